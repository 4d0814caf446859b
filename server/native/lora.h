// Segmented LoRA on the CPU: for every segment, y += sum over entries of weight * (x A^T) B.
// Chen et al. 2023 (Punica, SGMV) without padding: ranks are exact.
#pragma once
#include <algorithm>
#include <vector>

#include "panel.h"
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

constexpr int kLoraTokens = 96;    // tokens of one task at most
constexpr int kLoraRanks = 16;     // rows of A in one shrink task
constexpr int kLoraColumns = 256;  // columns of B in one expand task
constexpr int kPanelTokens = 24;   // from here on, turning B into panels saves more than it costs

inline int64_t tokens_of(const ChorusSegments& s, int64_t g) { return s.token_starts[g + 1] - s.token_starts[g]; }

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

// A token alone, among many segments, as when sequences with different adapters decode: one thread takes it whole,
// so that it reads whole matrices from memory, in the order they lie there.
inline bool alone(const ChorusSegments& s, int64_t g) { return tokens_of(s, g) == 1 && s.num_segments > 4; }

// Of a segment, for a product of some outputs: tiles of outputs, and of tokens.
struct LoraGrid {
    LoraGrid(int64_t tokens, int64_t outputs, int at_once)
        : tokens(tokens), outputs(outputs), at_once(at_once), across((outputs + at_once - 1) / at_once),
          down((tokens + kLoraTokens - 1) / kLoraTokens) {}

    int64_t tiles() const { return across * down; }
    int64_t output(int64_t tile) const { return tile % across * at_once; }
    int64_t output_end(int64_t tile) const { return std::min(output(tile) + at_once, outputs); }
    int64_t token(int64_t tile) const { return tokens * (tile / across) / down; }
    int64_t token_end(int64_t tile) const { return tokens * (tile / across + 1) / down; }

    const int64_t tokens, outputs, at_once, across, down;
};

// What a thread reads first of the segment that it takes next, or `now` where it takes none or that has no adapter.
template <typename T, typename Segments>
const T* weight_after(const Member& me, const ChorusSegments& s, Segments& segments, int64_t module, int which,
                      const T* now) {
    if (me.upcoming() < 0) return now;
    const int64_t g = segments.find(me.upcoming()).group;
    const int e = s.entry_starts[g];
    return e == s.entry_starts[g + 1] ? now : weight_of<T>(s, e, module, which);
}

inline void scale(float* h, int64_t n, float weight) {
    if (weight == 1.0f) return;
    for (int64_t i = 0; i < n; i++) h[i] *= weight;
}

// h = weight * x A^T: of each entry [tokens of its segment, rank].
template <typename T>
void lora_shrink(Member& me, const ChorusSegments& s, int64_t module, const T* x, int64_t ldx, int64_t in, float* h) {
    auto grid = [&](int64_t g, int e) {
        const int r = rank_of(s, e, module);
        return LoraGrid(tokens_of(s, g), r, alone(s, g) ? std::max(r, 1) : kLoraRanks);
    };
    Groups segments(s.num_segments, [&](int64_t g) {
        int64_t tiles = 0;
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) tiles += grid(g, e).tiles();
        return tiles;
    });
    me.share(segments.total(), [&](int64_t number) {
        auto [g, tile] = segments.find(number);
        int e = s.entry_starts[g];
        for (; tile >= grid(g, e).tiles(); e++) tile -= grid(g, e).tiles();
        const LoraGrid tiles = grid(g, e);
        const int64_t r = rank_of(s, e, module), j = tiles.output(tile), i = tiles.token(tile);
        const int rows = int(tiles.output_end(tile) - j), tokens = int(tiles.token_end(tile) - i);
        const T *a = weight_of<T>(s, e, module, 0) + j * in, *of = x + (s.token_starts[g] + i) * ldx;
        float* to = h + s.scratch_starts[e] + i * r + j;
        if (alone(s, g))
            dots_row(of, a, rows, int(in), to, weight_after(me, s, segments, module, 0, a));
        else
            dots(of, ldx, tokens, a, in, rows, int(in), to, r);
        for (int t = 0; t < tokens; t++) scale(to + t * r, rows, s.weights[e]);
    });
}

// y[tokens, columns] += h B for tokens of one segment from the i-th on, as product with panels. The entries of a mix
// are taken side by side, as one adapter of the sum of their ranks.
template <typename T>
void expand_with_panels(const ChorusSegments& s, int64_t g, int64_t module, const float* h, int64_t i, int64_t tokens,
                        int64_t first, int64_t columns, int64_t out, T* y, int64_t ldy) {
    static thread_local std::vector<const T*> rows;
    static thread_local Lines<T> weights, panels;
    int64_t ranks = 0;
    for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) ranks += rank_of(s, e, module);
    if (ranks == 0) return;
    rows.clear();
    weights.resize(tokens * ranks);
    for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
        const int64_t r = rank_of(s, e, module), before = int64_t(rows.size());
        const float* from = h + s.scratch_starts[e] + i * r;
        for (int64_t t = 0; t < tokens; t++) convert(from + t * r, r, weights.data() + t * ranks + before);
        const T* b = weight_of<T>(s, e, module, 1) + first;
        for (int64_t j = 0; j < r; j++) rows.push_back(b + j * out);
    }
    panels.resize((columns + kPanel - 1) / kPanel * panel_size<T>(ranks));
    panels_of_columns(rows.data(), int(ranks), columns, panels.data());
    for (int64_t c = 0; c < columns; c += kPanel)
        for (int64_t t = 0; t < tokens; t += kPanelRows) {
            T* to = y + t * ldy + c;
            panel_rows_of(int(tokens - t < kPanelRows ? tokens - t : kPanelRows), weights.data() + t * ranks, ranks,
                          panels.data() + c / kPanel * panel_size<T>(ranks), ranks, to, ldy, to, ldy,
                          int(columns - c < kPanel ? columns - c : kPanel));
        }
}

// y += h B, with h as `lora_shrink` leaves it (a barrier lies between them).
template <typename T>
void lora_expand(Member& me, const ChorusSegments& s, int64_t module, const float* h, T* y, int64_t ldy, int64_t out) {
    auto grid = [&](int64_t g) { return LoraGrid(tokens_of(s, g), out, alone(s, g) ? out : kLoraColumns); };
    Groups segments(s.num_segments, [&](int64_t g) { return grid(g).tiles(); });
    me.share(segments.total(), [&](int64_t number) {
        static thread_local std::vector<float> delta;
        const auto [g, tile] = segments.find(number);
        const LoraGrid tiles = grid(g);
        const int64_t c = tiles.output(tile), columns = tiles.output_end(tile) - c;
        const int64_t i = tiles.token(tile), tokens = tiles.token_end(tile) - i;
        T* to = y + (s.token_starts[g] + i) * ldy + c;
        if (tokens >= kPanelTokens) return expand_with_panels(s, g, module, h, i, tokens, c, columns, out, to, ldy);
        if (alone(s, g)) delta.assign(size_t(out), 0.0f);
        for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
            const int r = rank_of(s, e, module);
            const float* from = h + s.scratch_starts[e] + i * r;
            const T* b = weight_of<T>(s, e, module, 1) + c;
            if (alone(s, g))
                axpys_row(from, b, r, int(out), delta.data(), weight_after(me, s, segments, module, 1, b));
            else
                axpys(from, r, int(tokens), b, out, r, int(columns), to, ldy);
        }
        if (alone(s, g)) add_into(delta.data(), int(out), to);
    });
}

}  // namespace chorus
