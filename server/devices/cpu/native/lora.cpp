// Segmented LoRA for torch: see lora.h. The Python side is devices/cpu/lora.py.
#include "lora.h"
#include "layout.h"

namespace {

using namespace chorus;

// y[rows, columns] with what `delta` makes of it, in float32 from its gain on.
template <typename T>
void finish(const LoraDelta<T>& delta, int64_t token, int64_t rows, int64_t column, int64_t columns, T* y,
            int64_t ldy) {
    static thread_local std::vector<float> sums(kLoraTokens * kLoraColumns);
    if (!delta.gains()) return delta.add(token, rows, column, columns, y, ldy);
    for (int64_t t = 0; t < rows; t++) convert(y + t * ldy, columns, sums.data() + t * kLoraColumns);
    delta.gain(token, rows, column, columns, sums.data(), kLoraColumns);
    delta.add(token, rows, column, columns, sums.data(), kLoraColumns);
    for (int64_t t = 0; t < rows; t++) convert(sums.data() + t * kLoraColumns, columns, y + t * ldy);
}

template <typename T>
void apply(const ChorusSegments& s, int64_t module, T* y, int64_t ldy, const T* x, int64_t ldx, int64_t in, int64_t out,
           int64_t threads) {
    const LoraDelta<T> delta(s, module, in, out, 0, 0);
    if (!delta.any()) return;
    const int64_t across = (out + kLoraColumns - 1) / kLoraColumns, down = (delta.tokens() + kLoraTokens - 1) / kLoraTokens;
    run_team(threads, [&](Member& me) {
        lora_begin(me, s, &delta, 1, x, ldx);
        me.barrier();
        me.share(across * down, [&](int64_t tile) {
            const int64_t i = tile / across * kLoraTokens, c = tile % across * kLoraColumns;
            finish(delta, i, std::min<int64_t>(delta.tokens() - i, kLoraTokens), c,
                   std::min<int64_t>(out - c, kLoraColumns), y + i * ldy + c, ldy);
        });
    });
}

}  // namespace

extern "C" {
extern const int64_t chorus_few_tokens;
const int64_t chorus_few_tokens = kFewTokens;
extern const int64_t chorus_lora_parts;
const int64_t chorus_lora_parts = kParts;
void chorus_lora_f32(const ChorusSegments* s, int64_t module, float* y, int64_t ldy, const float* x, int64_t ldx,
                     int64_t in, int64_t out, int64_t threads) {
    apply(*s, module, y, ldy, x, ldx, in, out, threads);
}
void chorus_lora_bf16(const ChorusSegments* s, int64_t module, bf16* y, int64_t ldy, const bf16* x, int64_t ldx,
                      int64_t in, int64_t out, int64_t threads) {
    apply(*s, module, y, ldy, x, ldx, in, out, threads);
}
}

CHORUS_LAYOUT(ChorusSegments, &S::token_starts, &S::entry_starts, &S::slots, &S::weights, &S::num_segments,
              &S::modules, &S::arena, &S::offsets, &S::ranks, &S::products, &S::product_stride, &S::product_starts,
              &S::deltas, &S::delta_stride, &S::more)
