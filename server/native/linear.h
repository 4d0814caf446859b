// y = x W^T + bias with W packed once into panels that are read front to back. A decode step reads every
// weight for a handful of tokens, so it runs at the speed of memory; the packed order is what lets it.
//
// A panel is 32 outputs: for each pair of inputs (each input, in float32), the 32 weights of the pair side by
// side, as the dot-product instruction wants them. Ragged edges are padded with zeros.
#pragma once
#include <type_traits>

#include "amx.h"
#include "simd.h"
#include "team.h"

struct ChorusLinear {
    const void* packed;
    const float* bias;  // [out] or null
    int64_t in, out;
    int64_t module;  // column of the arena's tables
};

namespace chorus {

constexpr int kPanel = 32;
constexpr int kRowBlock = 96;   // tokens of one task: x stays in the L2 cache while panels pass
constexpr int kPanelRows = 12;  // tokens that a panel is read for at once: 24 of the 32 vector registers
constexpr int64_t kLargePanel = 1 << 18;  // bytes; two smaller ones fit the L2 cache beside what else is there
constexpr int64_t kAhead = 12288;         // bytes that a large panel is asked for ahead of use

template <typename T>
struct Pair {
    static constexpr int value = sizeof(T) == 2 ? 2 : 1;  // inputs that one instruction takes together
};

template <typename T>
int64_t groups(int64_t in) {
    return (in + Pair<T>::value - 1) / Pair<T>::value;
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

// y[R, columns <= 32] = x[R, in] . panel + bias; meanwhile memory is asked for `ahead`, of the panel's size.
template <typename T, int R>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const float* bias, T* y, int64_t ldy,
                       int columns, const char* ahead, int lines) {
    constexpr int P = Pair<T>::value;
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    __m512 acc[R][2];
    UNROLL
    for (int i = 0; i < R; i++) {
        acc[i][0] = bias ? _mm512_maskz_loadu_ps(m0, bias) : _mm512_setzero_ps();
        acc[i][1] = bias ? _mm512_maskz_loadu_ps(m1, bias + 16) : _mm512_setzero_ps();
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

template <typename T, int R>
static void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, const float* bias, T* y, int64_t ldy,
                       int columns, const char*, int) {
    constexpr int P = Pair<T>::value;
    for (int i = 0; i < R; i++) {
        float acc[kPanel] = {};
        for (int j = 0; bias && j < columns; j++) acc[j] = bias[j];
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

template <typename T, int R = kPanelRows>
static void panel_rows_of(int rows, const T* x, int64_t ldx, const T* panel, int64_t in, const float* bias, T* y,
                          int64_t ldy, int columns, const char* ahead, int lines) {
    if (rows == R) return panel_rows<T, R>(x, ldx, panel, in, bias, y, ldy, columns, ahead, lines);
    if constexpr (R > 1) panel_rows_of<T, R - 1>(rows, x, ldx, panel, in, bias, y, ldy, columns, ahead, lines);
}

#ifdef CHORUS_AMX

constexpr int kFewRows = 4;  // up to here memory is the limit, and the vector unit keeps up with it

// y[rows <= 32, columns <= 32] = x[rows, in] . panel + bias
inline void tile_rows(const bf16* x, int64_t ldx, int rows, const bf16* panel, int64_t in, const float* bias, bf16* y,
                      int64_t ldy, int columns, const char* ahead, int lines) {
    alignas(64) float sums[2 * kTileRows * kPanel];
    tile_panel(x, ldx, rows, panel, in, sums, ahead, lines);
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    const __m512 b0 = bias ? _mm512_maskz_loadu_ps(m0, bias) : _mm512_setzero_ps();
    const __m512 b1 = bias ? _mm512_maskz_loadu_ps(m1, bias + 16) : _mm512_setzero_ps();
    for (int i = 0; i < rows; i++) {
        store16(y + i * ldy, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel), b0), m0);
        store16(y + i * ldy + 16, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel + 16), b1), m1);
    }
}

#endif

// One team's share of y[tokens, out] = x[tokens, in] W^T + bias.
template <typename T>
void linear(Member& me, const ChorusLinear& l, const T* x, int64_t ldx, int64_t tokens, T* y, int64_t ldy) {
    const int64_t panels = (l.out + kPanel - 1) / kPanel, blocks = (tokens + kRowBlock - 1) / kRowBlock;
    const int64_t panel_size = groups<T>(l.in) * kPanel * Pair<T>::value;
    const T* packed = static_cast<const T*>(l.packed);
    int most = kPanelRows;  // rows that a panel is read for at once
#ifdef CHORUS_AMX
    const bool tiles = std::is_same<T, bf16>::value && l.in % kTileDepth == 0 && tokens > kFewRows;
    if (tiles) most = 2 * kTileRows;
    int shaped = 0;  // rows that the tiles are shaped for
#endif
    me.share(panels * blocks, [&](int64_t task) {
        const int64_t p = task % panels, first = task / panels * kRowBlock, column = p * kPanel;
        const int rows = int(tokens - first < kRowBlock ? tokens - first : kRowBlock);
        const int columns = int(l.out - column < kPanel ? l.out - column : kPanel);
        const T* panel = packed + p * panel_size;
        const T* next = me.upcoming() < 0 ? nullptr : packed + me.upcoming() % panels * panel_size;
        if (panel_size * int64_t(sizeof(T)) > kLargePanel) next = panel + kAhead / sizeof(T);
        const float* bias = l.bias ? l.bias + column : nullptr;
        const int parts = (rows + most - 1) / most;  // of nearly equal size
        for (int part = 0; part < parts; part++) {
            const int64_t from = first + rows * part / parts, to = first + rows * (part + 1) / parts;
            // The next panel is asked for in the first one or two passes over this one.
            const char* ahead = reinterpret_cast<const char*>(next) + (part == 1 ? groups<T>(l.in) * 64 : 0);
            const int lines = !next || part > 1 ? 0 : parts == 1 ? 2 : 1;
#ifdef CHORUS_AMX
            if constexpr (std::is_same<T, bf16>::value)
                if (tiles) {
                    if (shaped != to - from) shape_tiles(shaped = int(to - from));
                    tile_rows(x + from * ldx, ldx, shaped, panel, l.in, bias, y + from * ldy + column, ldy, columns, ahead,
                              lines);
                    continue;
                }
#endif
            panel_rows_of<T>(int(to - from), x + from * ldx, ldx, panel, l.in, bias, y + from * ldy + column, ldy, columns,
                             ahead, lines);
        }
    });
#ifdef CHORUS_AMX
    if (shaped) release_tiles();
#endif
}

}  // namespace chorus
