// Segmented LoRA on the CPU: for every segment, y = y + sum over entries of weight * (y * gain + (x A^T) B + bias).
// Chen et al. 2023 (Punica, SGMV) without padding: ranks are exact.
//
// In two parts, with a barrier between them. The first, `lora_begin`, is for all linears of the same x: it multiplies
// by A, and for segments of few tokens by B too. The second, `LoraDelta::add`, is asked for by whoever computes a tile
// of y; where there are gains, after `LoraDelta::gain` of the base's whole output.
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
    const int64_t* offsets;  // [slots, modules, kParts]
    const int32_t* ranks;    // [slots, modules]
    float* products;         // weight * x A^T for each linear of an x, `product_stride` floats each
    int64_t product_stride;
    const int64_t* product_starts;  // [segments]: where in it the segment's [tokens, sum of its ranks] lie
    float* deltas;  // [segments, kFewTokens, delta_stride]: what segments of `few` tokens add to the linears of an x
    int64_t delta_stride;
    int64_t more;  // whether any adapter of the step has a gain or a bias on any module
};

namespace chorus {

enum Part { kA, kB, kGain, kBias, kParts };  // what an adapter has of a module, see lora/kernels/interface.py

constexpr int kLoraTokens = 96;   // tokens of one task at most
constexpr int kLoraRanks = 16;    // rows of A in one task
constexpr int kLoraColumns = 256; // of y in one task at most
constexpr int kFewTokens = 4;     // of a segment that one thread takes whole
constexpr int kPanelTokens = 24;  // from here on, turning B into panels saves more than it costs

// A few tokens, among many segments, as when sequences with different adapters decode: one thread takes them whole,
// so that it reads whole matrices from memory, in the order they lie there.
inline bool few(const ChorusSegments& s, int64_t g) {
    return s.token_starts[g + 1] - s.token_starts[g] <= kFewTokens && s.num_segments > 4;
}

// What LoRA adds to the outputs of one linear.
template <typename T>
class LoraDelta {
  public:
    // The linear is the `index`-th of those that share x; `column` outputs of them come before its own.
    LoraDelta(const ChorusSegments& s, int64_t module, int64_t in, int64_t out, int64_t index, int64_t column)
        : s_(s), module_(module), in_(in), out_(out), products_(s.products + index * s.product_stride),
          deltas_(s.deltas + column), gains_(s.more && has(kGain)), biases_(s.more && has(kBias)),
          any_(gains_ || biases_ || adapted()) {}

    // Whether any adapter of the step changes the module.
    bool any() const { return any_; }

    int64_t tokens() const { return s_.token_starts[s_.num_segments]; }

    // The first part, of one segment: tiles(g) tiles. `next` is what the thread will read after this one.
    int64_t tiles(int64_t g) const {
        if (few(s_, g)) return 1;
        int64_t count = 0;
        for (int e = first(g); e < end(g); e++) count += tiles_across(e) * tiles_down(g);
        return count;
    }
    void begin(int64_t g, int64_t tile, const T* x, int64_t ldx, const T* next) const {
        if (few(s_, g)) return whole(g, x + s_.token_starts[g] * ldx, ldx, next);
        int64_t before = 0;
        int e = first(g);
        for (; tile >= tiles_across(e) * tiles_down(g); e++) {
            tile -= tiles_across(e) * tiles_down(g);
            before += rank(e);
        }
        const int64_t j = tile % tiles_across(e) * kLoraRanks, row = tile / tiles_across(e);
        const int64_t i = tokens_of(g) * row / tiles_down(g), tokens = tokens_of(g) * (row + 1) / tiles_down(g) - i;
        const int ranks = int(std::min<int64_t>(rank(e) - j, kLoraRanks));
        float h[kLoraTokens * kLoraRanks];
        dots(x + (s_.token_starts[g] + i) * ldx, ldx, int(tokens), weight(e, kA) + j * in_, in_, ranks, int(in_), h,
             ranks);
        scale(h, tokens * ranks, s_.weights[e]);
        const int64_t stride = rank_sum(g);
        const bool panels = by_panels(g);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = (i + t) * stride + before + j;
            if (panels)
                convert(h + t * ranks, ranks, product<T>(g) + at);
            else
                std::copy_n(h + t * ranks, ranks, product<float>(g) + at);
        }
    }
    // What `begin` reads first; null where the segment has no adapter.
    const T* first_weight(int64_t g) const { return first(g) == end(g) ? nullptr : weight(first(g), kA); }

    // Whether `gain` does anything to y.
    bool gains() const { return gains_; }

    // Before the second part: y *= 1 + gain, of the same tokens and outputs. At most kLoraColumns columns.
    void gain(int64_t token, int64_t rows, int64_t column, int64_t columns, float* to, int64_t ld) const {
        float sum[kLoraColumns];
        each_segment(token, rows, [&](int64_t g, int64_t i, int64_t tokens) {
            if (!sum_of(kGain, g, column, columns, sum)) return;
            for (float* y = to + (s_.token_starts[g] + i - token) * ld; tokens-- > 0; y += ld)
                for (int64_t j = 0; j < columns; j++) y[j] += sum[j] * y[j];
        });
    }

    // The second part: to[rows, columns] += those of the tokens from `token` and the outputs from `column`.
    // At most kLoraColumns columns.
    template <typename Y>
    void add(int64_t token, int64_t rows, int64_t column, int64_t columns, Y* to, int64_t ld) const {
        float sum[kLoraColumns];
        each_segment(token, rows, [&](int64_t g, int64_t i, int64_t tokens) {
            Y* y = to + (s_.token_starts[g] + i - token) * ld;
            if (biases_ && sum_of(kBias, g, column, columns, sum))
                for (int64_t t = 0; t < tokens; t++) add_into(sum, int(columns), y + t * ld);
            if (few(s_, g)) {
                for (int64_t t = 0; t < tokens; t++) add_into(delta(g, i + t) + column, int(columns), y + t * ld);
                return;
            }
            if (by_panels(g)) return add_by_panels(g, i, tokens, column, columns, y, ld);
            const int64_t ranks = rank_sum(g);
            const float* h = product<float>(g) + i * ranks;
            for (int e = first(g); e < end(g); h += rank(e++))
                axpys(h, ranks, int(tokens), weight(e, kB) + column, out_, rank(e), int(columns), y, ld);
        });
    }
    // Asks memory for what `add` with the same arguments will read, where columns are as few as a panel's.
    [[gnu::always_inline]] void ask(int64_t token, int64_t rows, int64_t column) const {
        each_segment(token, rows, [&](int64_t g, int64_t, int64_t) __attribute__((always_inline)) {
            for (int e = few(s_, g) ? end(g) : first(g); e < end(g); e++)
                for (int64_t j = 0; j < rank(e); j++) __builtin_prefetch(weight(e, kB) + j * out_ + column);
        });
    }

  private:
    int first(int64_t g) const { return s_.entry_starts[g]; }
    int end(int64_t g) const { return s_.entry_starts[g + 1]; }
    int64_t tokens_of(int64_t g) const { return s_.token_starts[g + 1] - s_.token_starts[g]; }
    int rank(int entry) const { return s_.ranks[s_.slots[entry] * s_.modules + module_]; }
    int64_t rank_sum(int64_t g) const {
        int64_t sum = 0;
        for (int e = first(g); e < end(g); e++) sum += rank(e);
        return sum;
    }
    bool adapted() const {
        for (int e = 0; e < s_.entry_starts[s_.num_segments]; e++)
            if (rank(e) > 0) return true;
        return false;
    }
    int64_t offset(int entry, Part part) const {  // 0 = there is no such part
        return s_.offsets[(s_.slots[entry] * s_.modules + module_) * kParts + part];
    }
    const T* weight(int entry, Part part) const { return static_cast<const T*>(s_.arena) + offset(entry, part); }
    bool has(Part part) const {
        for (int e = 0; e < s_.entry_starts[s_.num_segments]; e++)
            if (offset(e, part)) return true;
        return false;
    }
    // sum[columns] = weight * part over a segment's entries; false = none of them has it.
    bool sum_of(Part part, int64_t g, int64_t column, int64_t columns, float* sum) const {
        float row[kLoraColumns];
        bool any = false;
        for (int e = first(g); e < end(g); e++) {
            if (!offset(e, part)) continue;
            convert(weight(e, part) + column, columns, row);
            for (int64_t j = 0; j < columns; j++) sum[j] = (any ? sum[j] : 0.0f) + s_.weights[e] * row[j];
            any = true;
        }
        return any;
    }
    bool by_panels(int64_t g) const { return tokens_of(g) >= kPanelTokens; }
    int64_t tiles_across(int e) const { return (rank(e) + kLoraRanks - 1) / kLoraRanks; }
    int64_t tiles_down(int64_t g) const { return (tokens_of(g) + kLoraTokens - 1) / kLoraTokens; }

    template <typename H>  // [tokens, rank_sum]: T where B meets it as panels
    H* product(int64_t g) const {
        return reinterpret_cast<H*>(products_ + s_.product_starts[g]);
    }

    static void scale(float* h, int64_t n, float weight) {
        if (weight == 1.0f) return;
        for (int64_t i = 0; i < n; i++) h[i] *= weight;
    }

    // Calls run(segment, first token within it, tokens) for the segments that lie in `rows` tokens from `token` on.
    template <typename Run>
    void each_segment(int64_t token, int64_t rows, Run run) const {
        const int32_t* starts = s_.token_starts;
        int64_t g = std::upper_bound(starts, starts + s_.num_segments + 1, token) - starts - 1;
        for (; g < s_.num_segments && starts[g] < token + rows; g++) {
            const int64_t from = std::max<int64_t>(token, starts[g]);
            const int64_t to = std::min<int64_t>(token + rows, starts[g + 1]);
            run(g, from - starts[g], to - from);
        }
    }

    float* delta(int64_t g, int64_t token) const { return deltas_ + (g * kFewTokens + token) * s_.delta_stride; }

    // Both products of a few tokens. A and B are walked through once: row after row, for all tokens.
    void whole(int64_t g, const T* x, int64_t ldx, const T* next) const {
        static thread_local std::vector<float> h;
        const int64_t tokens = tokens_of(g);
        for (int64_t t = 0; t < tokens; t++) std::fill_n(delta(g, t), out_, 0.0f);
        for (int e = first(g); e < end(g); e++) {
            const int r = rank(e);
            const T *a = weight(e, kA), *b = weight(e, kB), *after = e + 1 < end(g) ? weight(e + 1, kA) : next;
            if (int64_t(h.size()) < tokens * r) h.resize(size_t(tokens * r));
            for (int j = 0; j < r; j += 4)
                for (int64_t t = 0; t < tokens; t++)
                    dots_row(x + t * ldx, a + j * in_, std::min(r - j, 4), int(in_), h.data() + t * r + j,
                             Walk{a + r * in_, b});
            scale(h.data(), tokens * r, s_.weights[e]);
            for (int j = 0; j < r; j++)
                for (int64_t t = 0; t < tokens; t++)
                    axpys_row(h.data() + t * r + j, b + j * out_, 1, int(out_), delta(g, t),
                              Walk{b + r * out_, after ? after : a});
        }
    }

    // y[tokens, columns] += h B for tokens of one segment from the i-th on, as product with panels. The entries of
    // a mix are taken side by side, as one adapter of the sum of their ranks.
    template <typename Y>
    void add_by_panels(int64_t g, int64_t i, int64_t tokens, int64_t column, int64_t columns, Y* y, int64_t ldy) const {
        static thread_local std::vector<const T*> rows;
        static thread_local Lines<T> panels;
        const int64_t ranks = rank_sum(g);
        if (ranks == 0) return;
        rows.clear();
        for (int e = first(g); e < end(g); e++)
            for (int64_t j = 0; j < rank(e); j++) rows.push_back(weight(e, kB) + j * out_ + column);
        panels.resize((columns + kPanel - 1) / kPanel * panel_size<T>(ranks));
        panels_of_columns(rows.data(), int(ranks), columns, panels.data());
        const T* h = product<T>(g) + i * ranks;
        for (int64_t c = 0; c < columns; c += kPanel)
            for (int64_t t = 0; t < tokens; t += kPanelRows) {
                Y* to = y + t * ldy + c;
                panel_rows_of(int(tokens - t < kPanelRows ? tokens - t : kPanelRows), h + t * ranks, ranks,
                              panels.data() + c / kPanel * panel_size<T>(ranks), ranks, to, ldy, to, ldy,
                              int(columns - c < kPanel ? columns - c : kPanel));
            }
    }

    const ChorusSegments& s_;
    const int64_t module_, in_, out_;
    float *const products_, *const deltas_;
    const bool gains_, biases_, any_;
};

// The first part of `count` linears that share x.
template <typename T>
void lora_begin(Member& me, const ChorusSegments& s, const LoraDelta<T>* deltas, int64_t count, const T* x,
                int64_t ldx) {
    Groups groups(count * s.num_segments, [&](int64_t group) {
        return deltas[group / s.num_segments].tiles(group % s.num_segments);
    });
    me.share(groups.total(), [&](int64_t number) {
        const auto [group, tile] = groups.find(number);
        const int64_t after = me.upcoming() < 0 ? -1 : groups.find(me.upcoming()).group;
        const T* next = after < 0 ? nullptr : deltas[after / s.num_segments].first_weight(after % s.num_segments);
        deltas[group / s.num_segments].begin(group % s.num_segments, tile, x, ldx, next);
    });
}

}  // namespace chorus
