// Packed linear layers for torch: see linear.h. The Python side is devices/cpu/linear.py.
#include "linear.h"
#include "layout.h"

namespace {

using namespace chorus;

template <typename T>
void pack(T* packed, const T* w, int64_t out, int64_t in, int64_t threads) {
    constexpr int P = Pair<T>::value;
    const int64_t panels = (out + kPanel - 1) / kPanel, g = pairs<T>(in);
    run_team(threads, [&](Member& me) {
        me.share(panels, [&](int64_t p) {
            T* to = packed + p * g * kPanel * P;
            for (int64_t k = 0; k < g; k++)
                for (int64_t j = 0; j < kPanel; j++)
                    for (int64_t q = 0; q < P; q++) {
                        const int64_t row = p * kPanel + j, column = k * P + q;
                        T zero;
                        std::memset(&zero, 0, sizeof(T));
                        to[(k * kPanel + j) * P + q] = row < out && column < in ? w[row * in + column] : zero;
                    }
        });
    });
}

template <typename T>
void run(const ChorusLinear& l, const T* x, int64_t ldx, int64_t tokens, T* y, int64_t ldy, int64_t threads) {
    run_team(threads, [&](Member& me) { linear(me, l, x, ldx, tokens, y, ldy); });
}

}  // namespace

extern "C" {
extern const int64_t chorus_panel;
const int64_t chorus_panel = kPanel;
// Asks the system for what the kernels need beside the instructions; 0 = refused. Before any other call.
int chorus_permitted() {
#ifdef CHORUS_AMX
    return permit_tiles();
#else
    return 1;
#endif
}
int64_t chorus_packed_elements_bf16(int64_t out, int64_t in) {
    return (out + kPanel - 1) / kPanel * kPanel * pairs<bf16>(in) * 2;
}
int64_t chorus_packed_elements_f32(int64_t out, int64_t in) { return (out + kPanel - 1) / kPanel * kPanel * in; }
void chorus_pack_bf16(bf16* packed, const bf16* w, int64_t out, int64_t in, int64_t threads) {
    pack(packed, w, out, in, threads);
}
void chorus_pack_f32(float* packed, const float* w, int64_t out, int64_t in, int64_t threads) {
    pack(packed, w, out, in, threads);
}
void chorus_linear_bf16(const ChorusLinear* l, const bf16* x, int64_t ldx, int64_t tokens, bf16* y, int64_t ldy,
                        int64_t threads) {
    run(*l, x, ldx, tokens, y, ldy, threads);
}
void chorus_linear_f32(const ChorusLinear* l, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy,
                       int64_t threads) {
    run(*l, x, ldx, tokens, y, ldy, threads);
}
}

CHORUS_LAYOUT(ChorusLinear, &S::packed, &S::bias, &S::in, &S::out, &S::module)
