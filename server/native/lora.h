// Segmented LoRA on the CPU: for every segment, y += sum over entries of weight * (x A^T) B.
// Chen et al. 2023 (Punica, SGMV) without padding: ranks are exact.
#pragma once
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
    int64_t scratch_stride;  // at least sum over entries of tokens * rank
};

namespace chorus {

constexpr int kLoraTokens = 32;    // tokens of one task
constexpr int kLoraRanks = 16;     // rows of A in one shrink task
constexpr int kLoraColumns = 256;  // columns of B in one expand task; more where it has fewer tokens

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

// h = weight * x A^T, entry after entry as [tokens of its segment, rank].
template <typename T>
void lora_shrink(Member& me, const ChorusSegments& s, int64_t module, const T* x, int64_t ldx, int64_t in, float* h) {
    for (int64_t g = 0; g < s.num_segments; g++) {
        const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
            const int r = rank_of(s, e, module);
            if (r == 0) continue;
            const T* a = weight_of<T>(s, e, module, 0);
            const int rank_tiles = (r + kLoraRanks - 1) / kLoraRanks, token_tiles = (n + kLoraTokens - 1) / kLoraTokens;
            me.share(rank_tiles * token_tiles, [&](int64_t tile) {
                const int j = int(tile % rank_tiles) * kLoraRanks, i = int(tile / rank_tiles) * kLoraTokens;
                const int rows = r - j < kLoraRanks ? r - j : kLoraRanks, tokens = n - i < kLoraTokens ? n - i : kLoraTokens;
                float* to = h + int64_t(i) * r + j;
                dots(x + (first + i) * ldx, ldx, tokens, a + j * in, in, rows, int(in), to, r);
                const float w = s.weights[e];
                if (w != 1.0f)
                    for (int t = 0; t < tokens; t++)
                        for (int q = 0; q < rows; q++) to[int64_t(t) * r + q] *= w;
            });
            h += int64_t(n) * r;
        }
    }
}

// y += h B, with h as `lora_shrink` leaves it (a barrier lies between them).
template <typename T>
void lora_expand(Member& me, const ChorusSegments& s, int64_t module, const float* h, T* y, int64_t ldy, int64_t out) {
    for (int64_t g = 0; g < s.num_segments; g++) {
        const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
        const int token_tiles = (n + kLoraTokens - 1) / kLoraTokens;
        // Whole rows of B are read best; but a lone short segment must leave work for every thread.
        const int most = kLoraTokens * kLoraColumns / (n < kLoraTokens ? n : kLoraTokens);
        const int width = s.num_segments > 4 && n < kLoraTokens ? most : kLoraColumns;
        const int column_tiles = int((out + width - 1) / width);
        int64_t segment_h = 0;
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) segment_h += int64_t(n) * rank_of(s, e, module);
        if (segment_h == 0) continue;
        me.share(column_tiles * token_tiles, [&](int64_t tile) {
            alignas(64) float delta[kLoraTokens * kLoraColumns];
            const int c = int(tile % column_tiles) * width, i = int(tile / column_tiles) * kLoraTokens;
            const int columns = out - c < width ? int(out - c) : width;
            const int tokens = n - i < kLoraTokens ? n - i : kLoraTokens;
            std::memset(delta, 0, sizeof(float) * size_t(tokens) * size_t(columns));
            const float* from = h;
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                const int r = rank_of(s, e, module);
                if (r == 0) continue;
                axpys(from + int64_t(i) * r, r, tokens, weight_of<T>(s, e, module, 1) + c, out, r, columns, delta,
                      columns);
                from += int64_t(n) * r;
            }
            for (int t = 0; t < tokens; t++) add_into(delta + t * columns, columns, y + (first + i + t) * ldy + c);
        });
        h += segment_h;
    }
}

}  // namespace chorus
