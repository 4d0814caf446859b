// Vectors of float and bfloat16 data, and the products that LoRA is made of where there are few tokens:
//
//   dots:  H[n, r]  = X[n, k] . A[r, k]^T     both operands contiguous along k
//   axpys: Y[n, c] += H[n, r] . B[r, c]       H float32, Y float32 or as B
//
// Compiled once with AVX-512 BF16 intrinsics (where the compiler is told the machine has them) and once as
// plain loops that any compiler vectorises. All sums are kept in float32.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define CHORUS_AVX512 1
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, bf16* out) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
    out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Memory that is read front to back up to `end`, then on from `next`, and asked for a fixed distance ahead of use.
struct Walk {
    static constexpr int64_t kAhead = 8192;  // bytes
    const void *end, *next;

    // Inlined always: GCC takes a function that only prefetches for one without effect, and drops calls to it.
    [[gnu::always_inline]] void ask(const void* at) const {
        const char* ahead = static_cast<const char*>(at) + kAhead;
        const int64_t beyond = ahead - static_cast<const char*>(end);
        __builtin_prefetch(beyond < 0 ? ahead : static_cast<const char*>(next) + beyond);
    }
};

// Tiles of accumulators only stay in registers when the loops over them are unrolled, which -O3 alone does not
// do: without this, kernels run at a third of their speed.
#define UNROLL _Pragma("GCC unroll 16")

#ifdef CHORUS_AVX512

// 32 bfloat16 or 16 float values along k, multiplied pairwise and added into 16 float lanes.
template <typename T>
struct Along;

template <>
struct Along<bf16> {
    static constexpr int width = 32;
    using mask_t = __mmask32;
    using reg_t = __m512bh;
    static mask_t tail(int n) { return mask_t((uint64_t(1) << n) - 1); }
    static reg_t load(const bf16* p) { return (reg_t)_mm512_loadu_si512(p); }
    static reg_t load(const bf16* p, mask_t m) { return (reg_t)_mm512_maskz_loadu_epi16(m, p); }
    static __m512 dot(__m512 acc, reg_t a, reg_t b) { return _mm512_dpbf16_ps(acc, a, b); }
};

template <>
struct Along<float> {
    static constexpr int width = 16;
    using mask_t = __mmask16;
    using reg_t = __m512;
    static mask_t tail(int n) { return mask_t((uint32_t(1) << n) - 1); }
    static reg_t load(const float* p) { return _mm512_loadu_ps(p); }
    static reg_t load(const float* p, mask_t m) { return _mm512_maskz_loadu_ps(m, p); }
    static __m512 dot(__m512 acc, reg_t a, reg_t b) { return _mm512_fmadd_ps(a, b, acc); }
};

static inline __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 load16(const bf16* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
static inline void store16(float* p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
static inline void store16(bf16* p, __m512 v, __mmask16 m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}
static inline __mmask16 first16(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// The sums of the 16 lanes of four vectors.
static inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    auto halves = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    const __m256 ab = _mm256_hadd_ps(halves(a), halves(b)), cd = _mm256_hadd_ps(halves(c), halves(d));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

template <typename T, int N, int R>
static inline void dots_tile(const T* x, int64_t ldx, const T* a, int64_t lda, int k, float* h, int64_t ldh) {
    using V = Along<T>;
    __m512 acc[N][R];
    UNROLL
    for (int i = 0; i < N; i++)
        UNROLL
        for (int j = 0; j < R; j++) acc[i][j] = _mm512_setzero_ps();
    int p = 0;
    for (; p + V::width <= k; p += V::width) {
        typename V::reg_t xs[N];
        UNROLL
        for (int i = 0; i < N; i++) xs[i] = V::load(x + i * ldx + p);
        UNROLL
        for (int j = 0; j < R; j++) {
            auto as = V::load(a + j * lda + p);
            UNROLL
            for (int i = 0; i < N; i++) acc[i][j] = V::dot(acc[i][j], xs[i], as);
        }
    }
    if (p < k) {
        auto m = V::tail(k - p);
        typename V::reg_t xs[N];
        UNROLL
        for (int i = 0; i < N; i++) xs[i] = V::load(x + i * ldx + p, m);
        UNROLL
        for (int j = 0; j < R; j++) {
            auto as = V::load(a + j * lda + p, m);
            UNROLL
            for (int i = 0; i < N; i++) acc[i][j] = V::dot(acc[i][j], xs[i], as);
        }
    }
    UNROLL
    for (int i = 0; i < N; i++) {
        int j = 0;
        UNROLL
        for (; j + 4 <= R; j += 4)
            _mm_storeu_ps(h + i * ldh + j, sum_lanes(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]));
        UNROLL
        for (; j < R; j++) h[i * ldh + j] = _mm512_reduce_add_ps(acc[i][j]);
    }
}

template <typename T, int N>
static inline void dots_rows(const T* x, int64_t ldx, const T* a, int64_t lda, int r, int k, float* h, int64_t ldh) {
    constexpr int R = N == 1 ? 8 : 4;
    int j = 0;
    for (; j + R <= r; j += R) dots_tile<T, N, R>(x, ldx, a + j * lda, lda, k, h + j, ldh);
    for (; j < r; j++) dots_tile<T, N, 1>(x, ldx, a + j * lda, lda, k, h + j, ldh);
}

template <typename T>
static inline void dots(const T* x, int64_t ldx, int n, const T* a, int64_t lda, int r, int k, float* h, int64_t ldh) {
    int i = 0;
    for (; i + 4 <= n; i += 4) dots_rows<T, 4>(x + i * ldx, ldx, a, lda, r, k, h + i * ldh, ldh);
    if (n - i == 3) return dots_rows<T, 3>(x + i * ldx, ldx, a, lda, r, k, h + i * ldh, ldh);
    if (n - i == 2) return dots_rows<T, 2>(x + i * ldx, ldx, a, lda, r, k, h + i * ldh, ldh);
    if (n - i == 1) dots_rows<T, 1>(x + i * ldx, ldx, a, lda, r, k, h + i * ldh, ldh);
}

template <typename T, typename Y, int N, int C>  // N rows, C vectors of 16 columns, the last one masked
static inline void axpys_tile(const float* h, int64_t ldh, const T* b, int64_t ldb, int r, int c, Y* y, int64_t ldy) {
    __m512 acc[N][C];
    __mmask16 m[C];
    UNROLL
    for (int v = 0; v < C; v++) m[v] = c - 16 * v > 0 ? first16(c - 16 * v) : __mmask16(0);
    UNROLL
    for (int i = 0; i < N; i++)
        UNROLL
        for (int v = 0; v < C; v++) acc[i][v] = load16(y + i * ldy + 16 * v, m[v]);
    for (int j = 0; j < r; j++) {
        __m512 hs[N];
        UNROLL
        for (int i = 0; i < N; i++) hs[i] = _mm512_set1_ps(h[i * ldh + j]);
        UNROLL
        for (int v = 0; v < C; v++) {
            __m512 bs = load16(b + j * ldb + 16 * v, m[v]);
            UNROLL
            for (int i = 0; i < N; i++) acc[i][v] = _mm512_fmadd_ps(hs[i], bs, acc[i][v]);
        }
    }
    UNROLL
    for (int i = 0; i < N; i++)
        UNROLL
        for (int v = 0; v < C; v++) store16(y + i * ldy + 16 * v, acc[i][v], m[v]);
}

template <typename T, typename Y, int N, int C>
static inline void axpys_rows(const float* h, int64_t ldh, const T* b, int64_t ldb, int r, int c, Y* y, int64_t ldy) {
    int j = 0;
    for (; j + 16 * C <= c; j += 16 * C) axpys_tile<T, Y, N, C>(h, ldh, b + j, ldb, r, 16 * C, y + j, ldy);
    for (; C > 4 && j + 64 <= c; j += 64) axpys_tile<T, Y, N, 4>(h, ldh, b + j, ldb, r, 64, y + j, ldy);
    for (; j < c; j += 32) axpys_tile<T, Y, N, 2>(h, ldh, b + j, ldb, r, c - j < 32 ? c - j : 32, y + j, ldy);
}

template <typename T, typename Y>
static inline void axpys(const float* h, int64_t ldh, int n, const T* b, int64_t ldb, int r, int c, Y* y, int64_t ldy) {
    int i = 0;
    for (; i + 4 <= n; i += 4) axpys_rows<T, Y, 4, 4>(h + i * ldh, ldh, b, ldb, r, c, y + i * ldy, ldy);
    if (n - i == 3) return axpys_rows<T, Y, 3, 4>(h + i * ldh, ldh, b, ldb, r, c, y + i * ldy, ldy);
    if (n - i == 2) return axpys_rows<T, Y, 2, 8>(h + i * ldh, ldh, b, ldb, r, c, y + i * ldy, ldy);
    if (n - i == 1) axpys_rows<T, Y, 1, 8>(h + i * ldh, ldh, b, ldb, r, c, y + i * ldy, ldy);
}

// With one row of X or H there is nothing to compute while memory is waited for, so A and B are read but once, in the
// very order they lie there.

template <typename T>
static inline __m512 dot_row(const T* x, const T* row, int k, const Walk& walk) {
    using V = Along<T>;
    constexpr int W = V::width;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int p = 0;
    for (; p + 2 * W <= k; p += 2 * W)
        UNROLL
        for (int i = 0; i < 2; i++) {
            walk.ask(row + p + i * W);
            sums[i] = V::dot(sums[i], V::load(x + p + i * W), V::load(row + p + i * W));
        }
    for (; p < k; p += W) {
        const auto m = V::tail(k - p < W ? k - p : W);
        walk.ask(row + p);
        sums[0] = V::dot(sums[0], V::load(x + p, m), V::load(row + p, m));
    }
    return _mm512_add_ps(sums[0], sums[1]);
}

template <typename T>
static inline void dots_row(const T* x, const T* a, int r, int k, float* h, const Walk& walk) {
    for (int j = 0; j < r; j += 4) {
        __m512 sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = j + i < r ? dot_row(x, a + int64_t(j + i) * k, k, walk) : _mm512_setzero_ps();
        float four[4];
        _mm_storeu_ps(four, sum_lanes(sums[0], sums[1], sums[2], sums[3]));
        std::memcpy(h + j, four, size_t(r - j < 4 ? r - j : 4) * sizeof(float));
    }
}

template <typename T>
static inline void axpys_row(const float* h, const T* b, int r, int c, float* y, const Walk& walk) {
    for (int j = 0; j < r; j++) {
        const __m512 hs = _mm512_set1_ps(h[j]);
        const T* row = b + int64_t(j) * c;
        for (int p = 0; p < c; p += 16) {
            if (p * int(sizeof(T)) % 64 == 0) walk.ask(row + p);
            const __mmask16 m = first16(c - p);
            store16(y + p, _mm512_fmadd_ps(hs, load16(row + p, m), load16(y + p, m)), m);
        }
    }
}

template <typename T>  // out += y
static inline void add_into(const float* y, int c, T* out) {
    for (int j = 0; j < c; j += 16) {
        __mmask16 m = first16(c - j);
        store16(out + j, _mm512_add_ps(load16(out + j, m), load16(y + j, m)), m);
    }
}

template <typename From, typename To>  // to = from, one of the two float
static inline void convert(const From* from, int64_t n, To* to) {
    for (int64_t j = 0; j < n; j += 16) {
        const __mmask16 m = first16(n - j > 16 ? 16 : int(n - j));
        store16(to + j, load16(from + j, m), m);
    }
}

#else

template <typename T>
static inline void dots(const T* x, int64_t ldx, int n, const T* a, int64_t lda, int r, int k, float* h, int64_t ldh) {
    for (int i = 0; i < n; i++)
        for (int j = 0; j < r; j++) {
            const T *xi = x + i * ldx, *aj = a + j * lda;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int p = 0; p < k; p++) sum += to_float(xi[p]) * to_float(aj[p]);
            h[i * ldh + j] = sum;
        }
}

template <typename T, typename Y>
static inline void axpys(const float* h, int64_t ldh, int n, const T* b, int64_t ldb, int r, int c, Y* y, int64_t ldy) {
    constexpr int kWidth = 64;
    for (int i = 0; i < n; i++)
        for (int first = 0; first < c; first += kWidth) {
            const int columns = c - first < kWidth ? c - first : kWidth;
            Y* to = y + i * ldy + first;
            float acc[kWidth];
            for (int p = 0; p < columns; p++) acc[p] = to_float(to[p]);
            for (int j = 0; j < r; j++) {
                const float hij = h[i * ldh + j];
                const T* bj = b + j * ldb + first;
#pragma omp simd
                for (int p = 0; p < columns; p++) acc[p] += hij * to_float(bj[p]);
            }
            for (int p = 0; p < columns; p++) from_float(acc[p], to + p);
        }
}

template <typename T>
static inline void dots_row(const T* x, const T* a, int r, int k, float* h, const Walk&) {
    dots(x, k, 1, a, k, r, k, h, r);
}

template <typename T>
static inline void axpys_row(const float* h, const T* b, int r, int c, float* y, const Walk&) {
    axpys(h, r, 1, b, c, r, c, y, c);
}

template <typename T>
static inline void add_into(const float* y, int c, T* out) {
#pragma omp simd
    for (int j = 0; j < c; j++) from_float(to_float(out[j]) + y[j], out + j);
}

template <typename From, typename To>
static inline void convert(const From* from, int64_t n, To* to) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) from_float(to_float(from[j]), to + j);
}

#endif
