// Products with panels: the matrix order that lets one instruction take many outputs at once.
//
// A panel is 32 outputs: for each pair of inputs (each input, in float32), the 32 weights of the pair side by
// side, as the dot-product instruction wants them. Ragged edges are padded.
#pragma once
#include "simd.h"

namespace chorus {

constexpr int kPanel = 32;
constexpr int kPanelRows = 12;  // rows of x that a panel is read for at once: 24 of the 32 vector registers

template <typename T>
struct Pair {
    static constexpr int value = sizeof(T) == 2 ? 2 : 1;  // inputs that one instruction takes together
};

template <typename T>
int64_t pairs(int64_t in) {
    return (in + Pair<T>::value - 1) / Pair<T>::value;
}

template <typename T>  // elements
int64_t panel_size(int64_t in) {
    return pairs<T>(in) * kPanel * Pair<T>::value;
}

#ifdef CHORUS_AVX512

static inline __m512 broadcast_dot(__m512 acc, __m512 x, __m512 w, const float*) { return _mm512_fmadd_ps(x, w, acc); }
static inline __m512 broadcast_dot(__m512 acc, __m512 x, __m512 w, const bf16*) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(w));
}
static inline __m512 broadcast(const float* x) { return _mm512_set1_ps(*x); }
static inline __m512 broadcast(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
static inline __m512 broadcast_last(const float* x) { return broadcast(x); }
static inline __m512 broadcast_last(const bf16* x) {  // half a pair
    return _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(x->bits)));
}

// y[R, columns <= 32] = x[R, in] . panel + start, where row i starts from start + i * ldstart (null = zero).
// Meanwhile memory is asked for: `lines` (0 to 2) cache lines of `ahead` for each pair of inputs.
template <int R, typename T, typename Y>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const float* start, int64_t ldstart, Y* y,
                       int64_t ldy, int columns, const char* ahead, int lines) {
    constexpr int P = Pair<T>::value;
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    __m512 acc[R][2];
    UNROLL
    for (int i = 0; i < R; i++) {
        acc[i][0] = start ? _mm512_maskz_loadu_ps(m0, start + i * ldstart) : _mm512_setzero_ps();
        acc[i][1] = start ? _mm512_maskz_loadu_ps(m1, start + i * ldstart + 16) : _mm512_setzero_ps();
    }
    const int64_t whole = in / P;
    const float* w = reinterpret_cast<const float*>(panel);  // 32 pairs or floats are 128 bytes
    for (int64_t k = 0; k < whole; k++, w += 32) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        for (int i = 0; i < lines; i++) _mm_prefetch(ahead + (k * lines + i) * 64, _MM_HINT_T1);
        UNROLL
        for (int i = 0; i < R; i++) {
            const __m512 xs = broadcast(x + i * ldx + k * P);
            acc[i][0] = broadcast_dot(acc[i][0], xs, w0, x);
            acc[i][1] = broadcast_dot(acc[i][1], xs, w1, x);
        }
    }
    if (whole * P < in) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        UNROLL
        for (int i = 0; i < R; i++) {
            const __m512 xs = broadcast_last(x + i * ldx + whole * P);
            acc[i][0] = broadcast_dot(acc[i][0], xs, w0, x);
            acc[i][1] = broadcast_dot(acc[i][1], xs, w1, x);
        }
    }
    UNROLL
    for (int i = 0; i < R; i++) {
        store16(y + i * ldy, acc[i][0], m0);
        store16(y + i * ldy + 16, acc[i][1], m1);
    }
}

#else

template <int R, typename T, typename Y>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const float* start, int64_t ldstart, Y* y,
                       int64_t ldy, int columns, const char*, int) {
    constexpr int P = Pair<T>::value;
    for (int i = 0; i < R; i++) {
        float acc[kPanel] = {};
        for (int j = 0; start && j < columns; j++) acc[j] = start[i * ldstart + j];
        for (int64_t column = 0; column < in; column++) {
            const float xi = to_float(x[i * ldx + column]);
            const T* w = panel + (column / P * kPanel) * P + column % P;
#pragma omp simd
            for (int j = 0; j < kPanel; j++) acc[j] += xi * to_float(w[j * P]);
        }
        for (int j = 0; j < columns; j++) from_float(acc[j], y + i * ldy + j);
    }
}

#endif

// As panel_rows, for `rows` <= R rows.
template <int R = kPanelRows, typename T, typename Y>
static void panel_rows_of(int rows, const T* x, int64_t ldx, const T* panel, int64_t in, const float* start,
                          int64_t ldstart, Y* y, int64_t ldy, int columns, const char* ahead = nullptr, int lines = 0) {
    if (rows == R) return panel_rows<R>(x, ldx, panel, in, start, ldstart, y, ldy, columns, ahead, lines);
    if constexpr (R > 1)
        panel_rows_of<R - 1>(rows, x, ldx, panel, in, start, ldstart, y, ldy, columns, ahead, lines);
}

}  // namespace chorus
