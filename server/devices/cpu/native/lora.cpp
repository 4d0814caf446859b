// Segmented LoRA for torch: see lora.h. The Python side is devices/cpu/lora.py.
#include "lora.h"
#include "layout.h"

namespace {

using namespace chorus;

constexpr int64_t kColumns = 256;  // of y in one task

template <typename T>
void apply(const ChorusSegments& s, int64_t module, T* y, int64_t ldy, const T* x, int64_t ldx, int64_t in, int64_t out,
           int64_t threads) {
    const LoraDelta<T> delta(s, module, in, out, 0, 0);
    if (!delta.any()) return;
    const int64_t across = (out + kColumns - 1) / kColumns, down = (delta.tokens() + kLoraTokens - 1) / kLoraTokens;
    run_team(threads, [&](Member& me) {
        lora_begin(me, s, &delta, 1, x, ldx);
        me.barrier();
        me.share(across * down, [&](int64_t tile) {
            const int64_t i = tile / across * kLoraTokens, c = tile % across * kColumns;
            delta.add(i, std::min<int64_t>(delta.tokens() - i, kLoraTokens), c, std::min(out - c, kColumns),
                      y + i * ldy + c, ldy);
        });
    });
}

}  // namespace

extern "C" {
extern const int64_t chorus_few_tokens;
const int64_t chorus_few_tokens = kFewTokens;
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
              &S::deltas, &S::delta_stride)
