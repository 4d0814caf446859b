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

#ifdef __AVX__
constexpr int kLane = 8, kRowsAtOnce = 4;  // floats of a register; rows whose sums the registers have room for
#else
constexpr int kLane = 4, kRowsAtOnce = 2;
#endif
typedef float Floats __attribute__((vector_size(4 * kLane)));
typedef uint32_t Words __attribute__((vector_size(4 * kLane)));

template <typename V>
static inline V load_vector(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

// sum + the inputs of a pair (the input) times their weights in some columns
static inline Floats add_columns(Floats sum, const float* x, const float* w) {
    return sum + x[0] * load_vector<Floats>(w);
}
static inline Floats add_columns(Floats sum, const bf16* x, const bf16* w) {
    const Words pairs = load_vector<Words>(w);
    sum += to_float(x[0]) * (Floats)(pairs << 16);
    return sum + to_float(x[1]) * (Floats)(pairs & 0xffff0000u);
}

// C registers of a panel's columns for R rows; `sums` are of whole rows of a panel.
template <int R, int C, typename T>
static void some_columns(const T* x, int64_t ldx, const T* w, int64_t in, float* sums) {
    constexpr int P = Pair<T>::value;
    Floats acc[R][C];
    UNROLL
    for (int i = 0; i < R; i++)
        UNROLL
        for (int c = 0; c < C; c++) acc[i][c] = load_vector<Floats>(sums + i * kPanel + c * kLane);
    const int64_t whole = in / P * P;
    for (int64_t k = 0; k < whole; k += P, w += kPanel * P)
        UNROLL
        for (int c = 0; c < C; c++)
            UNROLL
            for (int i = 0; i < R; i++) acc[i][c] = add_columns(acc[i][c], x + i * ldx + k, w + c * kLane * P);
    if (whole < in)
        UNROLL
        for (int i = 0; i < R; i++) {
            const T last[2] = {x[i * ldx + whole], T{}};
            UNROLL
            for (int c = 0; c < C; c++) acc[i][c] = add_columns(acc[i][c], last, w + c * kLane * P);
        }
    UNROLL
    for (int i = 0; i < R; i++)
        UNROLL
        for (int c = 0; c < C; c++) std::memcpy(sums + i * kPanel + c * kLane, &acc[i][c], sizeof(Floats));
}

template <int R, typename T, typename S, typename Y>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const S* start, int64_t ldstart, Y* y,
                       int64_t ldy, int columns, const char* ahead, int lines) {
    constexpr int kAtOnce = R < kRowsAtOnce ? R : kRowsAtOnce, P = Pair<T>::value;
    float sums[kAtOnce][kPanel] = {};
    for (int i = 0; start && i < kAtOnce; i++)
        for (int j = 0; j < columns; j++) sums[i][j] = to_float(start[i * ldstart + j]);
    constexpr int kColumns = 2 * kAtOnce <= kRowsAtOnce ? kPanel : kPanel / 2;
    for (int j = 0; j < kPanel; j += kColumns)
        some_columns<kAtOnce, kColumns / kLane>(x, ldx, panel + j * P, in, sums[0] + j);
    for (int i = 0; i < kAtOnce; i++)
        for (int j = 0; j < columns; j++) from_float(sums[i][j], y + i * ldy + j);
    if constexpr (R > kAtOnce)
        panel_rows<R - kAtOnce>(x + kAtOnce * ldx, ldx, panel, in, start ? start + kAtOnce * ldstart : start, ldstart,
                                y + kAtOnce * ldy, ldy, columns, ahead, lines);
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
