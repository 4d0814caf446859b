// Segmented LoRA for torch: see lora.h. The Python side is lora/kernels/cpu.py.
#include "lora.h"

namespace {

using namespace chorus;

template <typename T>
void apply(const ChorusSegments& s, int64_t module, T* y, int64_t ldy, const T* x, int64_t ldx, int64_t in, int64_t out,
           int64_t threads) {
    if (!adapted(s, module)) return;
    run_team(threads, [&](Member& me) {
        lora_shrink(me, s, module, x, ldx, in, s.scratch);
        me.barrier();
        lora_expand(me, s, module, s.scratch, y, ldy, out);
    });
}

}  // namespace

extern "C" {
void chorus_lora_f32(const ChorusSegments* s, int64_t module, float* y, int64_t ldy, const float* x, int64_t ldx,
                     int64_t in, int64_t out, int64_t threads) {
    apply(*s, module, y, ldy, x, ldx, in, out, threads);
}
void chorus_lora_bf16(const ChorusSegments* s, int64_t module, bf16* y, int64_t ldy, const bf16* x, int64_t ldx,
                      int64_t in, int64_t out, int64_t threads) {
    apply(*s, module, y, ldy, x, ldx, in, out, threads);
}
}
