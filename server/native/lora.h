// Segmented LoRA on the CPU: for every segment, y += sum over entries of weight * (x A^T) B.
// Chen et al. 2023 (Punica, SGMV) without padding: ranks are exact.
#pragma once
#include <vector>

#include "simd.h"
#include "team.h"

struct ChorusSegments {  // one step, all modules
    const int32_t* token_starts;
    const int32_t* entry_starts;
    const int32_t* slots;
    const float* weights;
    int64_t num_segments;
    int64_t modules;         // columns of the arena's tables
    const void* arena;       // elements of the call's type
    const int64_t* offsets;  // [slots, modules, 2]
    const int32_t* ranks;    // [slots, modules]
    float* scratch;          // x A^T of up to three modules, `scratch_stride` floats each
    int64_t scratch_stride;
    const int64_t* scratch_starts;  // [entries]: where in it an entry's [tokens, rank] lie
    int64_t max_tokens;             // of a segment
};

namespace chorus {

constexpr int kLoraTokens = 32;    // tokens of one task
constexpr int kLoraRanks = 16;     // rows of A in one shrink task
constexpr int kLoraColumns = 256;  // columns of B in one expand task

inline int rank_of(const ChorusSegments& s, int entry, int64_t module) {
    return s.ranks[s.slots[entry] * s.modules + module];
}

template <typename T>
const T* weight_of(const ChorusSegments& s, int entry, int64_t module, int which) {
    return static_cast<const T*>(s.arena) + s.offsets[(s.slots[entry] * s.modules + module) * 2 + which];
}

// Whether any adapter of the step changes the module.
inline bool adapted(const ChorusSegments& s, int64_t module) {
    for (int e = 0; e < s.entry_starts[s.num_segments]; e++)
        if (rank_of(s, e, module) > 0) return true;
    return false;
}

// Segments of one token each, as when sequences with different adapters decode: a thread takes whole segments,
// so that it reads whole matrices from memory.
inline bool single_tokens(const ChorusSegments& s) { return s.max_tokens == 1 && s.num_segments > 4; }

inline void scale(float* h, int64_t n, float weight) {
    if (weight == 1.0f) return;
    for (int64_t i = 0; i < n; i++) h[i] *= weight;
}

// What a thread reads first of the segment that it takes next, or what it reads now where there is none.
template <typename T>
const T* next_weight(const Member& me, const ChorusSegments& s, int64_t module, int which, const T* now) {
    const int64_t g = me.upcoming();
    return g < 0 || s.entry_starts[g] == s.entry_starts[g + 1] ? now : weight_of<T>(s, s.entry_starts[g], module, which);
}

// h = weight * x A^T: of each entry [tokens of its segment, rank].
template <typename T>
void lora_shrink(Member& me, const ChorusSegments& s, int64_t module, const T* x, int64_t ldx, int64_t in, float* h) {
    if (single_tokens(s))
        return me.share(s.num_segments, [&](int64_t g) {
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                const int r = rank_of(s, e, module);
                const T* a = weight_of<T>(s, e, module, 0);
                dots_row(x + s.token_starts[g] * ldx, a, r, int(in), h + s.scratch_starts[e], next_weight(me, s, module, 0, a));
                scale(h + s.scratch_starts[e], r, s.weights[e]);
            }
        });
    for (int64_t g = 0; g < s.num_segments; g++) {
        const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
            const int r = rank_of(s, e, module);
            const T* a = weight_of<T>(s, e, module, 0);
            const int rank_tiles = (r + kLoraRanks - 1) / kLoraRanks, token_tiles = (n + kLoraTokens - 1) / kLoraTokens;
            me.share(rank_tiles * token_tiles, [&](int64_t tile) {
                const int j = int(tile % rank_tiles) * kLoraRanks, i = int(tile / rank_tiles) * kLoraTokens;
                const int rows = r - j < kLoraRanks ? r - j : kLoraRanks, tokens = n - i < kLoraTokens ? n - i : kLoraTokens;
                float* to = h + s.scratch_starts[e] + int64_t(i) * r + j;
                dots(x + (first + i) * ldx, ldx, tokens, a + j * in, in, rows, int(in), to, r);
                for (int t = 0; t < tokens; t++) scale(to + int64_t(t) * r, rows, s.weights[e]);
            });
        }
    }
}

// y += h B, with h as `lora_shrink` leaves it (a barrier lies between them).
template <typename T>
void lora_expand(Member& me, const ChorusSegments& s, int64_t module, const float* h, T* y, int64_t ldy, int64_t out) {
    if (single_tokens(s))
        return me.share(s.num_segments, [&](int64_t g) {
            static thread_local std::vector<float> delta;
            delta.assign(size_t(out), 0.0f);
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                const T* b = weight_of<T>(s, e, module, 1);
                axpys_row(h + s.scratch_starts[e], b, rank_of(s, e, module), int(out), delta.data(),
                          next_weight(me, s, module, 1, b));
            }
            add_into(delta.data(), int(out), y + s.token_starts[g] * ldy);
        });
    for (int64_t g = 0; g < s.num_segments; g++) {
        const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
        const int column_tiles = int((out + kLoraColumns - 1) / kLoraColumns);
        const int token_tiles = (n + kLoraTokens - 1) / kLoraTokens;
        int ranks = 0;
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) ranks += rank_of(s, e, module);
        if (ranks == 0) continue;
        me.share(column_tiles * token_tiles, [&](int64_t tile) {
            const int c = int(tile % column_tiles) * kLoraColumns, i = int(tile / column_tiles) * kLoraTokens;
            const int columns = out - c < kLoraColumns ? int(out - c) : kLoraColumns;
            const int tokens = n - i < kLoraTokens ? n - i : kLoraTokens;
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                const int r = rank_of(s, e, module);
                axpys(h + s.scratch_starts[e] + int64_t(i) * r, r, tokens, weight_of<T>(s, e, module, 1) + c, out, r, columns,
                      y + (first + i) * ldy + c, ldy);
            }
        });
    }
}

}  // namespace chorus
