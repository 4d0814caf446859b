// The largest of each row of logits. The Python side is devices/cpu/argmax.py.
#include <cmath>

#include "simd.h"
#include "team.h"

namespace {

constexpr int64_t kBlock = 512;  // values among which the place of the maximum is looked for

// The index of x's first maximum, and whether that is finite: false too where x holds a NaN.
template <typename T>
bool argmax_row(const T* x, int64_t n, int64_t* index) {
    float best = -INFINITY;
    int64_t best_block = 0;
    bool odd = false;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t last = first + kBlock < n ? first + kBlock : n;
        float top = -INFINITY;
        int not_below = 0;
#pragma omp simd reduction(max : top) reduction(+ : not_below)
        for (int64_t j = first; j < last; j++) {
            const float v = to_float(x[j]);
            top = v > top ? v : top;
            not_below += v < INFINITY ? 0 : 1;
        }
        odd |= not_below > 0;
        if (top > best) best = top, best_block = first;
    }
    *index = best_block;
    while (*index < n - 1 && !(to_float(x[*index]) == best)) ++*index;
    return !odd && best > -INFINITY;
}

template <typename T>
void run(const T* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite, int64_t threads) {
    run_team(threads < rows ? threads : rows, [&](Member& me) {
        me.share(rows, [&](int64_t row) { finite[row] = argmax_row(x + row * ldx, n, indices + row); });
    });
}

}  // namespace

extern "C" {
void chorus_argmax_f32(const float* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite,
                       int64_t threads) {
    run(x, ldx, rows, n, indices, finite, threads);
}
void chorus_argmax_bf16(const bf16* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite,
                        int64_t threads) {
    run(x, ldx, rows, n, indices, finite, threads);
}
}
