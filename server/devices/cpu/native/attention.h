// Paged attention on the CPU: writes a step's K and V into the cache, then attends over each sequence's
// context with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), one tile of queries at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "maths.h"
#include "scores.h"
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

constexpr int kRows = 32;       // (query token, query head of the KV head) pairs in one tile
constexpr int kAheadKeys = 64;  // how many keys ahead of use memory is asked for them and their values
constexpr int kLanes = 16;      // partial sums of a row's weights: added up once, at its end

// Where a token's K (which = 0) or V of one KV head lies in the cache.
template <typename T>
T* cache_row(const ChorusPlan& p, const ChorusAttention& a, int64_t token, int64_t kv_head, int which) {
    const int64_t slot = p.slot_mapping[token], block = slot / p.block_size, offset = slot % p.block_size;
    const int64_t row = (block * a.kv_heads + kv_head) * p.block_size + offset;
    return which == 0 ? static_cast<T*>(a.k_cache) + row * a.k_dim : static_cast<T*>(a.v_cache) + row * a.v_dim;
}

// Scores [rows, kKeys] of which the first `keys` are there -> the weights of their values: cap, mask, online
// softmax. Loops are over all kKeys places, so that they stay in vector registers. `seen(row)` gives the first
// and last key that a row sees, `ask(row)` is called for each. Leaves in `shrink` the factor by which a row's sums so
// far must shrink.
template <typename T, typename Seen, typename Ask>
void softmax_rows(float* scores, int rows, int keys, const ChorusAttention& a, Seen seen, Ask ask, float* row_max,
                  float (*row_sum)[kLanes], float* shrink, T* weights) {
    const float softcap = a.softcap, scale = softcap > 0 ? 1.0f : a.scale;
    for (int row = 0; row < rows; row++) {
        float* score = scores + row * kKeys;
        const std::pair<int, int> see = seen(row);
        const int from = see.first, to = see.second < keys - 1 ? see.second : keys - 1;
        if (softcap > 0)
            for (int j = 0; j < kKeys; j++) score[j] = softcap * tanh_of(score[j] * a.scale / softcap);
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int j = 0; j < kKeys; j++) {
            const float x = score[j] * scale, y = j >= from && j <= to ? x : -INFINITY;
            score[j] = y;
            top = y > top ? y : top;
        }
        shrink[row] = row_max[row];
        row_max[row] = top > row_max[row] ? top : row_max[row];
    }
#pragma omp simd
    for (int row = 0; row < rows; row++) {
        // A row may see none of these keys, when later rows of its tile do; then its maximum may still be -inf.
        const float top = row_max[row];
        shrink[row] = top == -INFINITY ? 1.0f : exp_negative(shrink[row] - top);
    }
    for (int row = 0; row < rows; row++) {
        ask(row);
        float *score = scores + row * kKeys, *sum = row_sum[row];
        const float top = row_max[row] == -INFINITY ? 0.0f : row_max[row], less = shrink[row];
        float lanes[kLanes];
#pragma omp simd
        for (int i = 0; i < kLanes; i++) lanes[i] = sum[i] * less;
        for (int j = 0; j < kKeys; j += kLanes)
#pragma omp simd
            for (int i = 0; i < kLanes; i++) {
                const float e = exp_negative(score[j + i] - top);
                score[j + i] = e;
                lanes[i] += e;
            }
#pragma omp simd
        for (int i = 0; i < kLanes; i++) sum[i] = lanes[i];
        convert(score, kKeys, weights + row * kKeys);
    }
}

template <typename T>
struct Scratch {  // one thread's
    Lines<T> q, panel;
    Lines<float> sum;
    const T *key[kKeys], *key_ahead[kKeys], *value[kKeys], *value_ahead[kKeys];  // rows of the round
    alignas(64) float score[kRows * kKeys];
    alignas(64) T weight[kRows * kKeys];
    float row_max[kRows], shrink[kRows], row_sum[kRows][kLanes];
};

// What one call of `attend` computes: rows of one sequence and KV head, and the keys that they see.
struct AttentionTile {
    int64_t seq, kv_head, first_row;
    int rows;
    int64_t first_position;       // of query token 0 of the sequence's run
    int64_t first_key, last_key;  // the first one starts a block
};

inline int64_t attention_rows(const ChorusPlan& p, const ChorusAttention& a, int64_t s) {
    return (p.query_starts[s + 1] - p.query_starts[s]) * (a.heads / a.kv_heads);
}

// Tile `tile` of a sequence: all KV heads of its first rows, then of the next.
inline AttentionTile attention_tile(const ChorusPlan& p, const ChorusAttention& a, int64_t s, int64_t tile) {
    const int64_t group = a.heads / a.kv_heads, rows = attention_rows(p, a, s);
    AttentionTile t;
    t.seq = s;
    t.kv_head = tile % a.kv_heads;
    t.first_row = tile / a.kv_heads * kRows;
    t.rows = int(rows - t.first_row < kRows ? rows - t.first_row : kRows);
    t.first_position = p.context_lens[s] - rows / group;
    const int64_t seen = a.window > 0 ? t.first_position + t.first_row / group - a.window + 1 : 0;
    t.first_key = seen < 0 ? 0 : seen / p.block_size * p.block_size;
    t.last_key = t.first_position + (t.first_row + t.rows - 1) / group;
    return t;
}

template <typename T>
void attend(const ChorusPlan& p, const ChorusAttention& a, const AttentionTile& tile, const AttentionTile* next,
            Scratch<T>& scratch) {
    const int64_t group = a.heads / a.kv_heads, q0 = p.query_starts[tile.seq], last = tile.last_key;
    const int rows = tile.rows;
    const T* query = static_cast<const T*>(a.query);
    auto position = [&](int row) { return tile.first_position + (tile.first_row + row) / group; };
    for (int row = 0; row < rows; row++) {
        const int64_t at = tile.first_row + row, token = q0 + at / group, head = tile.kv_head * group + at % group;
        std::memcpy(scratch.q.data() + row * a.k_dim, query + token * a.q_token + head * a.q_head,
                    size_t(a.k_dim) * sizeof(T));
        scratch.row_max[row] = a.sinks ? a.sinks[head] : -INFINITY;
        std::fill_n(scratch.row_sum[row], kLanes, 0.0f);
        if (a.sinks) scratch.row_sum[row][0] = 1.0f;
    }
    std::memset(scratch.sum.data(), 0, size_t(rows * a.v_dim) * sizeof(float));

    auto block_of = [&](const AttentionTile& of, const void* cache, int64_t block, int64_t dim) {
        const int64_t at = p.block_tables[of.seq * p.table_stride + block];
        return static_cast<const T*>(cache) + (at * a.kv_heads + of.kv_head) * p.block_size * dim;
    };
    // What comes some blocks after this one: of this tile, or the beginning of the next. Null = nothing.
    const int64_t blocks_ahead = (kAheadKeys + p.block_size - 1) / p.block_size, last_block = last / p.block_size;
    auto block_after = [&](const void* cache, int64_t block, int64_t dim) -> const T* {
        block += blocks_ahead;
        if (block <= last_block) return block_of(tile, cache, block, dim);
        if (!next) return nullptr;
        block += next->first_key / p.block_size - last_block - 1;
        return block <= next->last_key / p.block_size ? block_of(*next, cache, block, dim) : nullptr;
    };
    for (int64_t key0 = tile.first_key; key0 <= last; key0 += kKeys) {
        const int keys = int(last + 1 - key0 < kKeys ? last + 1 - key0 : kKeys);
        auto rows_in = [&](const void* cache, int64_t dim, const T** rows, const T** ahead) {
            for (int j = 0; j < keys;) {
                const int64_t block = (key0 + j) / p.block_size, offset = (key0 + j) % p.block_size;
                const int n = int(p.block_size - offset < keys - j ? p.block_size - offset : keys - j);
                const T *here = block_of(tile, cache, block, dim), *after = block_after(cache, block, dim);
                if (!after) after = here;
                for (int i = 0; i < n; i++) {
                    rows[j + i] = here + (offset + i) * dim;
                    ahead[j + i] = after + (offset + i) * dim;
                }
                j += n;
            }
        };
        rows_in(a.k_cache, a.k_dim, scratch.key, scratch.key_ahead);
        rows_in(a.v_cache, a.v_dim, scratch.value, scratch.value_ahead);
        // Memory is kept busy through all three parts: asked for half of the later keys, the values, the other half.
        const int half = keys / 2;
        score_keys(scratch.q.data(), rows, a.k_dim, scratch.key, scratch.key_ahead, half, keys, scratch.panel.data(),
                   scratch.score);
        auto seen = [&](int row) {
            const int64_t at = position(row) - key0, from = a.window > 0 ? at - a.window + 1 : 0;
            return std::pair<int, int>(int(from > 0 ? from : 0), int(at < keys ? at : keys));
        };
        auto ask = [&](int row) __attribute__((always_inline)) {
            for (int i = keys * row / rows; i < keys * (row + 1) / rows; i++) prefetch(scratch.value_ahead[i], a.v_dim);
        };
        softmax_rows(scratch.score, rows, keys, a, seen, ask, scratch.row_max, scratch.row_sum, scratch.shrink,
                     scratch.weight);
        for (int row = 0; row < rows && key0 > tile.first_key; row++) {
            if (scratch.shrink[row] == 1.0f) continue;
            float* sum = scratch.sum.data() + row * a.v_dim;
            for (int64_t c = 0; c < a.v_dim; c++) sum[c] *= scratch.shrink[row];
        }
        // Keys are asked for as wide as values, which they are nearly always.
        add_values(scratch.weight, rows, scratch.value, scratch.key_ahead + half, keys - half, keys, a.v_dim,
                   scratch.sum.data());
    }
    T* out = static_cast<T*>(a.out);
    for (int row = 0; row < rows; row++) {
        const int64_t at = tile.first_row + row, token = q0 + at / group, head = tile.kv_head * group + at % group;
        float total = 0;
        for (float part : scratch.row_sum[row]) total += part;
        const float scale = total > 0 ? 1.0f / total : 0.0f;
        const float* sum = scratch.sum.data() + row * a.v_dim;
        T* to = out + (token * a.heads + head) * a.v_dim;
        for (int64_t c = 0; c < a.v_dim; c++) from_float(sum[c] * scale, to + c);
    }
}

// One team's share of a layer's attention, over what the cache holds.
template <typename T>
void attention(Member& me, const ChorusPlan& p, const ChorusAttention& a, Scratch<T>& scratch) {
    scratch.q.resize(kRows * a.k_dim);
    scratch.sum.resize(kRows * a.v_dim);
    scratch.panel.resize(panel_size<T>(a.k_dim));
    Groups sequences(p.num_seqs, [&](int64_t s) { return (attention_rows(p, a, s) + kRows - 1) / kRows * a.kv_heads; });
    auto tile_at = [&](int64_t tile) {
        const auto [s, local] = sequences.find(tile);
        return attention_tile(p, a, s, local);
    };
    me.share(sequences.total(), [&](int64_t tile) {
        const AttentionTile now = tile_at(tile);
        if (me.upcoming() < 0) return attend<T>(p, a, now, nullptr, scratch);
        const AttentionTile next = tile_at(me.upcoming());
        attend(p, a, now, &next, scratch);
    });
}

}  // namespace chorus
