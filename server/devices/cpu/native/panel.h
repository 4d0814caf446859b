// Products with panels: the matrix order that lets one instruction take many outputs at once.
//
// A panel is 32 outputs: for each pair of inputs (each input, in float32), the 32 weights of the pair side by
// side, as the dot-product instruction wants them. Ragged edges are padded.
#pragma once
#include <vector>

#include "simd.h"

namespace chorus {

constexpr int kPanel = 32;
constexpr const float* kNoStart = nullptr;  // sums start from zero
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

// Memory that starts a cache line: vectors that straddle two are read and written at half the rate.
template <typename T>
class Lines {
  public:
    void resize(int64_t n) { lines_.resize(size_t(n * int64_t(sizeof(T)) + 63) / 64); }
    T* data() { return reinterpret_cast<T*>(lines_.data()); }

  private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines_;
};

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
template <int R, typename T, typename S, typename Y>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const S* start, int64_t ldstart, Y* y,
                       int64_t ldy, int columns, const char* ahead, int lines) {
    constexpr int P = Pair<T>::value;
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    __m512 acc[R][2];
    UNROLL
    for (int i = 0; i < R; i++) {
        acc[i][0] = start ? load16(start + i * ldstart, m0) : _mm512_setzero_ps();
        acc[i][1] = start ? load16(start + i * ldstart + 16, m1) : _mm512_setzero_ps();
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

// 32 columns of a row, or of two rows in pairs (b = null: zero), as `panel_rows` finds them in a panel.
static inline void columns_of(const float* a, const float*, const __mmask16 m[2], __m512 w[2]) {
    w[0] = _mm512_maskz_loadu_ps(m[0], a);
    w[1] = _mm512_maskz_loadu_ps(m[1], a + 16);
}
static inline void columns_of(const bf16* a, const bf16* b, const __mmask16 m[2], __m512 w[2]) {
    static constexpr struct Order {  // a0 b0 a1 b1 ...
        alignas(64) uint16_t low[32];
        alignas(64) uint16_t high[32];
        constexpr Order() : low(), high() {
            for (int i = 0; i < 16; i++) {
                low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(32 + i);
                high[2 * i] = uint16_t(16 + i), high[2 * i + 1] = uint16_t(48 + i);
            }
        }
    } order;
    const __mmask32 mask = _mm512_kunpackw(m[1], m[0]);
    const __m512i va = _mm512_maskz_loadu_epi16(mask, a);
    const __m512i vb = b ? _mm512_maskz_loadu_epi16(mask, b) : _mm512_setzero_si512();
    w[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(va, _mm512_load_si512(order.low), vb));
    w[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(va, _mm512_load_si512(order.high), vb));
}

// The panels, one after the other, whose inputs are the n rows and whose outputs are their first `columns`.
template <typename T>
static void panels_of_columns(const T* const* rows, int n, int64_t columns, T* panels) {
    constexpr int P = Pair<T>::value, kRowsAhead = 4;
    for (int k = 0; k < n; k += P)
        for (int64_t c = 0; c < columns; c += kPanel) {
            for (int i = k + kRowsAhead; i < k + kRowsAhead + P && i < n; i++)
                _mm_prefetch(reinterpret_cast<const char*>(rows[i] + c), _MM_HINT_T0);
            const int here = int(columns - c);
            const __mmask16 m[2] = {first16(here), here > 16 ? first16(here - 16) : __mmask16(0)};
            __m512 w[2];
            columns_of(rows[k] + c, k + 1 < n ? rows[k + P - 1] + c : nullptr, m, w);
            T* to = panels + c / kPanel * panel_size<T>(n) + k * kPanel;
            _mm512_storeu_ps(to, w[0]);
            _mm512_storeu_ps(reinterpret_cast<float*>(to) + 16, w[1]);
        }
}

#else

template <int R, typename T, typename S, typename Y>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const S* start, int64_t ldstart, Y* y,
                       int64_t ldy, int columns, const char*, int) {
    constexpr int P = Pair<T>::value;
    for (int i = 0; i < R; i++) {
        float acc[kPanel] = {};
        for (int j = 0; start && j < columns; j++) acc[j] = to_float(start[i * ldstart + j]);
        for (int64_t column = 0; column < in; column++) {
            const float xi = to_float(x[i * ldx + column]);
            const T* w = panel + (column / P * kPanel) * P + column % P;
#pragma omp simd
            for (int j = 0; j < kPanel; j++) acc[j] += xi * to_float(w[j * P]);
        }
        for (int j = 0; j < columns; j++) from_float(acc[j], y + i * ldy + j);
    }
}

template <typename T>
static void panels_of_columns(const T* const* rows, int n, int64_t columns, T* panels) {
    constexpr int P = Pair<T>::value;
    for (int k = 0; k < n; k++)
        for (int64_t c = 0; c < columns; c++)
            panels[c / kPanel * panel_size<T>(n) + (k / P * kPanel + c % kPanel) * P + k % P] = rows[k][c];
}

#endif

// As panel_rows, for `rows` <= R rows.
template <int R = kPanelRows, typename T, typename S, typename Y>
static void panel_rows_of(int rows, const T* x, int64_t ldx, const T* panel, int64_t in, const S* start,
                          int64_t ldstart, Y* y, int64_t ldy, int columns, const char* ahead = nullptr, int lines = 0) {
    if (rows == R) return panel_rows<R>(x, ldx, panel, in, start, ldstart, y, ldy, columns, ahead, lines);
    if constexpr (R > 1)
        panel_rows_of<R - 1>(rows, x, ldx, panel, in, start, ldstart, y, ldy, columns, ahead, lines);
}

}  // namespace chorus
