// The two products of attention, over keys and values that lie in scattered rows:
//
//   score_keys:  score[n, keys]  = q[n, k_dim] . K^T
//   add_values:  sum[n, v_dim]  += weight[n, keys] . V     weights from `keys` on are there, and zero
//
// Where rows lie, the processor can't foresee: memory is asked for `asked` later rows, `ahead`, meanwhile, one for
// each row or pair of rows. Asked for all at once, they would wait for each other.
#pragma once
#include "panel.h"

namespace chorus {

constexpr int kKeys = 64;  // keys scored at once at most; the row length of scores and weights

#ifdef CHORUS_AVX512

// Inlined always: GCC takes a function that only prefetches for one without effect, and drops calls to it.
template <typename T>
[[gnu::always_inline]] static inline void prefetch(const T* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 64 / int64_t(sizeof(T)))
        _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
}

constexpr int kFewQueries = 4;  // up to here, turning K into panels costs more than it saves

// 16 rows of 16 four-byte values -> 16 columns of them.
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {  // r[4 g + i] holds column i of each 128-bit lane, of rows 4 g to 4 g + 3
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        const __m512i b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    UNROLL
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// The panel whose outputs are the n <= 32 rows, each of `in` values. What pads it is not zero but repeated.
template <typename T>
static void panel_of_rows(const T* const* rows, int n, int64_t in, T* panel) {
    constexpr int P = Pair<T>::value;
    for (int j = 0; j < n; j += 16)
        for (int64_t k = 0; k < in; k += 16 * P) {
            const auto mask = Along<T>::tail(int(in - k < 16 * P ? in - k : 16 * P));
            const int count = int(pairs<T>(in - k) < 16 ? pairs<T>(in - k) : 16);
            __m512i r[16];
            UNROLL
            for (int i = 0; i < 16; i++) r[i] = (__m512i)Along<T>::load(rows[j + i < n ? j + i : n - 1] + k, mask);
            transpose16(r);
            T* to = panel + k * kPanel + j * P;
            UNROLL
            for (int i = 0; i < 16; i++)
                if (i < count) _mm512_storeu_si512(to + i * kPanel * P, r[i]);
        }
}

// The sums of the 16 lanes of each of 16 vectors.
static inline __m512 sum_lanes16(__m512 v[16]) {
    UNROLL
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return fold(fold(v[0], v[1]), fold(v[2], v[3]));
}

// score[0 .. 16) = q . rows; places from n on are filled with anything.
template <typename T>
static void score_16(const T* q, const T* const* rows, int n, int64_t dim, float* score) {
    using V = Along<T>;
    __m512 acc[16];
    UNROLL
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + V::width <= dim; k += V::width) {
        const auto xs = V::load(q + k);
        UNROLL
        for (int i = 0; i < 16; i++) acc[i] = V::dot(acc[i], xs, V::load(rows[i < n ? i : 0] + k));
    }
    if (k < dim) {
        const auto mask = V::tail(int(dim - k));
        const auto xs = V::load(q + k, mask);
        UNROLL
        for (int i = 0; i < 16; i++) acc[i] = V::dot(acc[i], xs, V::load(rows[i < n ? i : 0] + k, mask));
    }
    _mm512_storeu_ps(score, sum_lanes16(acc));
}

template <typename T>
static void score_keys(const T* q, int n, int64_t dim, const T* const* rows, const T* const* ahead, int asked, int keys,
                       T* panel, float* score) {
    if (n <= kFewQueries) {
        for (int j = 0; j < keys; j += 16) {
            for (int i = j; i < j + 16 && i < asked; i++) prefetch(ahead[i], dim);
            for (int i = 0; i < n; i++) score_16(q + i * dim, rows + j, keys - j, dim, score + i * kKeys + j);
        }
        return;
    }
    for (int j = 0; j < keys; j += kPanel) {
        const int here = keys - j < kPanel ? keys - j : kPanel;
        for (int i = j; i < j + here && i < asked; i++) prefetch(ahead[i], dim);
        panel_of_rows(rows + j, here, dim, panel);
        for (int i = 0; i < n; i += kPanelRows)
            panel_rows_of(n - i < kPanelRows ? n - i : kPanelRows, q + i * dim, dim, panel, dim, kNoStart, 0,
                          score + i * kKeys + j, kKeys, here);
    }
}

template <int R, int C, typename T>  // C times 32 columns
static void add_values_tile(const T* weight, const T* const* rows, const T* const* ahead, int asked, int keys,
                            int64_t first, int columns, float* sum, int64_t dim) {
    __m512 acc[R][2 * C];
    __mmask16 m[2 * C];
    UNROLL
    for (int v = 0; v < 2 * C; v++) m[v] = columns > 16 * v ? first16(columns - 16 * v) : __mmask16(0);
    UNROLL
    for (int i = 0; i < R; i++)
        UNROLL
        for (int v = 0; v < 2 * C; v++) acc[i][v] = load16(sum + i * dim + 16 * v, m[v]);
    for (int k = 0; k < keys; k += Pair<T>::value) {
        if (k / Pair<T>::value < asked) prefetch(ahead[k / Pair<T>::value], dim);
        __m512 w[2 * C];
        UNROLL
        for (int v = 0; v < C; v++) {
            const int64_t c = first + 32 * v;
            columns_of(rows[k] + c, k + 1 < keys ? rows[k + 1] + c : nullptr, m + 2 * v, w + 2 * v);
        }
        UNROLL
        for (int i = 0; i < R; i++) {
            const __m512 xs = broadcast(weight + i * kKeys + k);
            UNROLL
            for (int v = 0; v < 2 * C; v++) acc[i][v] = broadcast_dot(acc[i][v], xs, w[v], weight);
        }
    }
    UNROLL
    for (int i = 0; i < R; i++)
        UNROLL
        for (int v = 0; v < 2 * C; v++) store16(sum + i * dim + 16 * v, acc[i][v], m[v]);
}

template <int R = kPanelRows, typename T>
static void add_values_of(int n, const T* weight, const T* const* rows, const T* const* ahead, int asked, int keys,
                          int64_t dim, float* sum) {
    if (n == R) {
        constexpr int C = R <= 5 ? 2 : 1;
        for (int64_t c = 0; c < dim; c += 32 * C) {
            const int columns = int(dim - c < 32 * C ? dim - c : 32 * C);
            add_values_tile<R, C>(weight, rows, ahead, c == 0 ? asked : 0, keys, c, columns, sum + c, dim);
        }
        return;
    }
    if constexpr (R > 1) add_values_of<R - 1>(n, weight, rows, ahead, asked, keys, dim, sum);
}

template <typename T>
static void add_values(const T* weight, int n, const T* const* rows, const T* const* ahead, int asked, int keys,
                       int64_t dim, float* sum) {
    for (int i = 0; i < n; i += kPanelRows)
        add_values_of(n - i < kPanelRows ? n - i : kPanelRows, weight + i * kKeys, rows, ahead, i == 0 ? asked : 0,
                      keys, dim, sum + i * dim);
}

#else

template <typename T>
static inline void prefetch(const T*, int64_t) {}

template <typename T>
static void score_keys(const T* q, int n, int64_t dim, const T* const* rows, const T* const*, int, int keys, T*,
                       float* score) {
    for (int j = 0; j < keys; j++) dots(q, dim, n, rows[j], dim, 1, int(dim), score + j, kKeys);
}

template <typename T>
static void add_values(const T* weight, int n, const T* const* rows, const T* const*, int, int keys, int64_t dim,
                       float* sum) {
    constexpr int kWidth = 64;
    for (int i = 0; i < n; i++)
        for (int64_t first = 0; first < dim; first += kWidth) {
            const int columns = int(dim - first < kWidth ? dim - first : kWidth);
            float* to = sum + i * dim + first;
            float acc[kWidth];
            for (int c = 0; c < columns; c++) acc[c] = to_float(to[c]);
            for (int j = 0; j < keys; j++) {
                const float w = to_float(weight[i * kKeys + j]);
                const T* row = rows[j] + first;
#pragma omp simd
                for (int c = 0; c < columns; c++) acc[c] += w * to_float(row[c]);
            }
            for (int c = 0; c < columns; c++) from_float(acc[c], to + c);
        }
}

#endif

}  // namespace chorus
