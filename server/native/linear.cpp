// y = x W^T + bias with W packed once into panels that are read front to back. A decode step reads every
// weight for a handful of tokens, so it runs at the speed of memory; the packed order is what lets it.
// The Python side is model/packed_linear.py.
//
// A panel is 32 outputs: for each pair of inputs (each input, in float32), the 32 weights of the pair side by
// side, as the dot-product instruction wants them. Ragged edges are padded with zeros.
#include <atomic>

#include "simd.h"

namespace {

constexpr int kPanel = 32;
constexpr int kRowBlock = 96;  // tokens of one task: x stays in the L2 cache while panels pass

template <typename T>
struct Pair {
    static constexpr int value = sizeof(T) == 2 ? 2 : 1;  // inputs that one instruction takes together
};

template <typename T>
int64_t groups(int64_t in) {
    return (in + Pair<T>::value - 1) / Pair<T>::value;
}

template <typename T>
void pack(T* packed, const T* w, int64_t out, int64_t in, int64_t threads) {
    constexpr int P = Pair<T>::value;
    const int64_t panels = (out + kPanel - 1) / kPanel, g = groups<T>(in);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        T* to = packed + p * g * kPanel * P;
        for (int64_t k = 0; k < g; k++)
            for (int64_t j = 0; j < kPanel; j++)
                for (int64_t q = 0; q < P; q++) {
                    const int64_t row = p * kPanel + j, column = k * P + q;
                    T zero;
                    std::memset(&zero, 0, sizeof(T));
                    to[(k * kPanel + j) * P + q] = row < out && column < in ? w[row * in + column] : zero;
                }
    }
}

// acc[rows][32] = x[rows, in] . panel, rows <= 12. `tail` says that `in` is odd and a pair is half empty.
#ifdef CHORUS_AVX512

static inline __m512 broadcast_dot(__m512 acc, const float* x, __m512 w) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*x), w, acc);
}
static inline __m512 broadcast_dot(__m512 acc, const bf16* x, __m512 w) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_castps_si512(w));
}
static inline __m512 broadcast_dot_last(__m512 acc, const float* x, __m512 w) { return broadcast_dot(acc, x, w); }
static inline __m512 broadcast_dot_last(__m512 acc, const bf16* x, __m512 w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int32_t(x->bits)), (__m512bh)_mm512_castps_si512(w));
}

template <typename T, int R>
static inline void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, float* acc_out) {
    constexpr int P = Pair<T>::value;
    __m512 acc[R][2];
    for (int i = 0; i < R; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    const int64_t whole = in / P;
    const float* w = reinterpret_cast<const float*>(panel);  // 32 pairs or floats are 128 bytes
    for (int64_t k = 0; k < whole; k++, w += 32) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        if (R <= 4) _mm_prefetch(reinterpret_cast<const char*>(w + 32 * 24), _MM_HINT_T0);
        if (R <= 4) _mm_prefetch(reinterpret_cast<const char*>(w + 32 * 24 + 16), _MM_HINT_T0);
        for (int i = 0; i < R; i++) {
            acc[i][0] = broadcast_dot(acc[i][0], x + i * ldx + k * P, w0);
            acc[i][1] = broadcast_dot(acc[i][1], x + i * ldx + k * P, w1);
        }
    }
    if (whole * P < in) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        for (int i = 0; i < R; i++) {
            acc[i][0] = broadcast_dot_last(acc[i][0], x + i * ldx + whole * P, w0);
            acc[i][1] = broadcast_dot_last(acc[i][1], x + i * ldx + whole * P, w1);
        }
    }
    for (int i = 0; i < R; i++) {
        _mm512_storeu_ps(acc_out + i * kPanel, acc[i][0]);
        _mm512_storeu_ps(acc_out + i * kPanel + 16, acc[i][1]);
    }
}

#else

template <typename T, int R>
static inline void panel_rows(const T* x, int64_t ldx, const T* panel, int64_t in, float* acc_out) {
    constexpr int P = Pair<T>::value;
    for (int i = 0; i < R; i++) {
        float acc[kPanel] = {};
        for (int64_t column = 0; column < in; column++) {
            const float xi = to_float(x[i * ldx + column]);
            const T* w = panel + (column / P * kPanel) * P + column % P;
#pragma omp simd
            for (int j = 0; j < kPanel; j++) acc[j] += xi * to_float(w[j * P]);
        }
        std::memcpy(acc_out + i * kPanel, acc, sizeof(acc));
    }
}

#endif

template <typename T>
static inline void panel_block(const T* x, int64_t ldx, int rows, const T* panel, int64_t in, float* acc) {
    int i = 0;
    for (; rows - i >= 12 && rows - i != 16; i += 12) panel_rows<T, 12>(x + i * ldx, ldx, panel, in, acc + i * kPanel);
    for (; rows - i >= 8; i += 8) panel_rows<T, 8>(x + i * ldx, ldx, panel, in, acc + i * kPanel);
    for (; rows - i >= 4; i += 4) panel_rows<T, 4>(x + i * ldx, ldx, panel, in, acc + i * kPanel);
    for (; rows - i >= 2; i += 2) panel_rows<T, 2>(x + i * ldx, ldx, panel, in, acc + i * kPanel);
    for (; rows - i >= 1; i += 1) panel_rows<T, 1>(x + i * ldx, ldx, panel, in, acc + i * kPanel);
}

template <typename T>
void linear(T* y, int64_t ldy, const T* x, int64_t ldx, const T* packed, const float* bias, int64_t tokens, int64_t in,
            int64_t out, int64_t threads) {
    const int64_t panels = (out + kPanel - 1) / kPanel, blocks = (tokens + kRowBlock - 1) / kRowBlock;
    const int64_t panel_size = groups<T>(in) * kPanel * Pair<T>::value;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float acc[kRowBlock * kPanel];
        for (int64_t task = next.fetch_add(1); task < panels * blocks; task = next.fetch_add(1)) {
            const int64_t p = task % panels, first = task / panels * kRowBlock;
            const int rows = int(tokens - first < kRowBlock ? tokens - first : kRowBlock);
            panel_block(x + first * ldx, ldx, rows, packed + p * panel_size, in, acc);
            const int columns = int(out - p * kPanel < kPanel ? out - p * kPanel : kPanel);
            for (int i = 0; i < rows; i++) {
                T* to = y + (first + i) * ldy + p * kPanel;
                const float* a = acc + i * kPanel;
                if (bias)
                    for (int j = 0; j < columns; j++) from_float(a[j] + bias[p * kPanel + j], to + j);
                else
                    for (int j = 0; j < columns; j++) from_float(a[j], to + j);
            }
        }
    }
}

}  // namespace

extern "C" {
int64_t chorus_packed_elements_bf16(int64_t out, int64_t in) {
    return (out + kPanel - 1) / kPanel * kPanel * groups<bf16>(in) * 2;
}
int64_t chorus_packed_elements_f32(int64_t out, int64_t in) { return (out + kPanel - 1) / kPanel * kPanel * in; }
void chorus_pack_bf16(bf16* packed, const bf16* w, int64_t out, int64_t in, int64_t threads) {
    pack(packed, w, out, in, threads);
}
void chorus_pack_f32(float* packed, const float* w, int64_t out, int64_t in, int64_t threads) {
    pack(packed, w, out, in, threads);
}
void chorus_linear_bf16(bf16* y, int64_t ldy, const bf16* x, int64_t ldx, const bf16* packed, const float* bias,
                        int64_t tokens, int64_t in, int64_t out, int64_t threads) {
    linear(y, ldy, x, ldx, packed, bias, tokens, in, out, threads);
}
void chorus_linear_f32(float* y, int64_t ldy, const float* x, int64_t ldx, const float* packed, const float* bias,
                       int64_t tokens, int64_t in, int64_t out, int64_t threads) {
    linear(y, ldy, x, ldx, packed, bias, tokens, in, out, threads);
}
}
