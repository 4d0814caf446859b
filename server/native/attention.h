// Paged attention on the CPU: writes a step's K and V into the cache, then attends over each sequence's
// context with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), one tile of queries at a time.
#pragma once
#include <cmath>
#include <vector>

#include "maths.h"
#include "simd.h"
#include "team.h"

struct ChorusPlan {  // one step, all layers
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    const int64_t* slot_mapping;
    int64_t num_seqs, table_stride, num_tokens, block_size;
};

struct ChorusAttention {  // one layer; strides in elements, the last dimension is contiguous
    const void *query, *key, *value;
    void *out, *k_cache, *v_cache;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int64_t heads, kv_heads, k_dim, v_dim;
    int64_t window;      // 0 = none
    float scale, softcap;  // softcap 0 = none
    const float* sinks;  // [heads] or null
};

namespace chorus {

constexpr int kRows = 32;  // (query token, query head of the KV head) pairs in one tile
constexpr int kKeys = 64;  // keys scored at once at most; whole blocks

constexpr int kAheadKeys = 32;  // keys and values asked for ahead of use: blocks lie scattered, which the processor can't foresee

template <typename T>
inline void prefetch(const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// Where a token's K (which = 0) or V of one KV head lies in the cache.
template <typename T>
T* cache_row(const ChorusPlan& p, const ChorusAttention& a, int64_t token, int64_t kv_head, int which) {
    const int64_t slot = p.slot_mapping[token], block = slot / p.block_size, offset = slot % p.block_size;
    const int64_t row = (block * a.kv_heads + kv_head) * p.block_size + offset;
    return which == 0 ? static_cast<T*>(a.k_cache) + row * a.k_dim : static_cast<T*>(a.v_cache) + row * a.v_dim;
}

// Scores of one tile row against `keys` keys, in place: cap, mask, online softmax. Returns the factor by
// which what was accumulated so far must shrink.
inline float softmax_row(float* score, int keys, int first_visible, int last_visible, const ChorusAttention& a,
                         float& row_max, float& row_sum) {
    for (int j = 0; j < keys; j++) score[j] *= a.scale;
    if (a.softcap > 0)
        for (int j = 0; j < keys; j++) score[j] = a.softcap * std::tanh(score[j] / a.softcap);
    for (int j = 0; j < first_visible && j < keys; j++) score[j] = -INFINITY;
    // A row may see none of these keys, when later rows of its tile do.
    for (int j = last_visible < 0 ? 0 : last_visible + 1; j < keys; j++) score[j] = -INFINITY;
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int j = 0; j < keys; j++) top = score[j] > top ? score[j] : top;
    const float new_max = top > row_max ? top : row_max;
    if (new_max == -INFINITY) {
        for (int j = 0; j < keys; j++) score[j] = 0;
        return 1;
    }
    const float shrink = exp_negative(row_max - new_max);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < keys; j++) {
        score[j] = exp_negative(score[j] - new_max);
        sum += score[j];
    }
    row_sum = row_sum * shrink + sum;
    row_max = new_max;
    return shrink;
}

template <typename T>
struct Scratch {  // one thread's
    std::vector<T> q;
    std::vector<float> acc;
    alignas(64) float score[kRows * kKeys];
    float row_max[kRows], row_sum[kRows];
};

template <typename T>
void attend(const ChorusPlan& p, const ChorusAttention& a, int64_t s, int64_t kv_head, int64_t first_row, int rows,
            Scratch<T>& scratch) {
    const int64_t group = a.heads / a.kv_heads, q0 = p.query_starts[s];
    const int64_t query_len = p.query_starts[s + 1] - q0;
    const int64_t first_position = p.context_lens[s] - query_len;  // of query token 0 of this run
    const T* query = static_cast<const T*>(a.query);
    auto position = [&](int row) { return first_position + (first_row + row) / group; };
    for (int row = 0; row < rows; row++) {
        const int64_t token = q0 + (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
        std::memcpy(&scratch.q[size_t(row * a.k_dim)], query + token * a.q_token + head * a.q_head,
                    size_t(a.k_dim) * sizeof(T));
        scratch.row_max[row] = a.sinks ? a.sinks[head] : -INFINITY;
        scratch.row_sum[row] = a.sinks ? 1.0f : 0.0f;
    }
    std::memset(scratch.acc.data(), 0, size_t(rows * a.v_dim) * sizeof(float));

    auto block_of = [&](const void* cache, int64_t key, int64_t dim) {
        const int64_t block = p.block_tables[s * p.table_stride + key / p.block_size];
        return static_cast<const T*>(cache) + ((block * a.kv_heads + kv_head) * p.block_size + key % p.block_size) * dim;
    };
    const int64_t last = position(rows - 1);  // no row of the tile sees a key after this
    int64_t first = a.window > 0 ? position(0) - a.window + 1 : 0;
    first = first < 0 ? 0 : first / p.block_size * p.block_size;
    for (int64_t key = first; key < first + kAheadKeys && key <= last; key += p.block_size - key % p.block_size)
        prefetch(block_of(a.v_cache, key, a.v_dim), (p.block_size - key % p.block_size) * a.v_dim);
    const int64_t per_round = p.block_size >= kKeys ? kKeys : kKeys / p.block_size * p.block_size;
    for (int64_t key0 = first; key0 <= last;) {
        // A round never crosses a block when blocks are large, and is several whole blocks when small.
        int64_t keys = per_round;
        if (p.block_size >= kKeys && key0 % p.block_size + keys > p.block_size) keys = p.block_size - key0 % p.block_size;
        if (keys > last + 1 - key0) keys = last + 1 - key0;
        for (int64_t j = 0; j < keys;) {
            const int64_t offset = (key0 + j) % p.block_size;
            const int64_t n = p.block_size - offset < keys - j ? p.block_size - offset : keys - j;
            const T* k = block_of(a.k_cache, key0 + j, a.k_dim);
            if (key0 + j + kAheadKeys <= last) prefetch(block_of(a.k_cache, key0 + j + kAheadKeys, a.k_dim), n * a.k_dim);
            dots(scratch.q.data(), a.k_dim, rows, k, a.k_dim, int(n), int(a.k_dim), scratch.score + j, kKeys);
            j += n;
        }
        for (int row = 0; row < rows; row++) {
            const int64_t at = position(row);
            const int64_t from = a.window > 0 ? at - a.window + 1 - key0 : 0;
            const float shrink = softmax_row(scratch.score + row * kKeys, int(keys), int(from > 0 ? from : 0),
                                             int(at - key0 < keys ? at - key0 : keys), a, scratch.row_max[row],
                                             scratch.row_sum[row]);
            if (shrink != 1.0f) {
                float* acc = &scratch.acc[size_t(row * a.v_dim)];
                for (int64_t c = 0; c < a.v_dim; c++) acc[c] *= shrink;
            }
        }
        for (int64_t j = 0; j < keys;) {
            const int64_t offset = (key0 + j) % p.block_size;
            const int64_t n = p.block_size - offset < keys - j ? p.block_size - offset : keys - j;
            const T* v = block_of(a.v_cache, key0 + j, a.v_dim);
            if (key0 + j + kAheadKeys <= last) prefetch(block_of(a.v_cache, key0 + j + kAheadKeys, a.v_dim), n * a.v_dim);
            axpys(scratch.score + j, kKeys, rows, v, a.v_dim, int(n), int(a.v_dim), scratch.acc.data(), a.v_dim);
            j += n;
        }
        key0 += keys;
    }
    T* out = static_cast<T*>(a.out);
    for (int row = 0; row < rows; row++) {
        const int64_t token = q0 + (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
        const float scale = scratch.row_sum[row] > 0 ? 1.0f / scratch.row_sum[row] : 0.0f;
        T* to = out + (token * a.heads + head) * a.v_dim;
        for (int64_t c = 0; c < a.v_dim; c++) from_float(scratch.acc[size_t(row * a.v_dim + c)] * scale, to + c);
    }
}

// One team's share of a layer's attention, over what the cache holds.
template <typename T>
void attention(Member& me, const ChorusPlan& p, const ChorusAttention& a, Scratch<T>& scratch) {
    const int64_t group = a.heads / a.kv_heads;
    scratch.q.resize(size_t(kRows * a.k_dim));
    scratch.acc.resize(size_t(kRows * a.v_dim));
    for (int64_t s = 0; s < p.num_seqs; s++) {
        const int64_t rows = (p.query_starts[s + 1] - p.query_starts[s]) * group;
        me.share((rows + kRows - 1) / kRows * a.kv_heads, [&](int64_t tile) {
            const int64_t first = tile / a.kv_heads * kRows;
            attend(p, a, s, tile % a.kv_heads, first, int(rows - first < kRows ? rows - first : kRows), scratch);
        });
    }
}

}  // namespace chorus
