// y = x W^T + bias with W packed once into panels that are read front to back. A decode step reads every
// weight for a handful of tokens, so it runs at the speed of memory; the packed order is what lets it.
#pragma once
#include <type_traits>

#include "amx.h"
#include "lora.h"

struct ChorusLinear {
    const void* packed;
    const float* bias;  // [out] or null
    int64_t in, out;
    int64_t module;  // column of the arena's tables
};

namespace chorus {

constexpr int kRowBlock = 192;            // tokens of one task: x stays in the L2 cache while panels pass
constexpr int64_t kLargePanel = 1 << 18;  // bytes; two smaller ones fit the L2 cache beside what else is there
constexpr int64_t kAhead = 12288;         // bytes that a large panel is asked for ahead of use

#ifdef CHORUS_AMX

constexpr int kFewRows = 4;  // up to here memory is the limit, and the vector unit keeps up with it

// y[rows <= 32, columns <= 32] = x[rows, in] . panel + start, where row i starts from start + i * ldstart (null = zero)
template <typename Y>
void tile_rows(const bf16* x, int64_t ldx, int rows, const bf16* panel, int64_t in, const float* start,
               int64_t ldstart, Y* y, int64_t ldy, int columns, const char* ahead, int lines) {
    alignas(64) float sums[2 * kTileRows * kPanel];
    tile_panel(x, ldx, rows, panel, in, sums, ahead, lines);
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    for (int i = 0; i < rows; i++) {
        const float* from = start ? start + i * ldstart : nullptr;
        const __m512 s0 = from ? load16(from, m0) : _mm512_setzero_ps();
        const __m512 s1 = from ? load16(from + 16, m1) : _mm512_setzero_ps();
        store16(y + i * ldy, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel), s0), m0);
        store16(y + i * ldy + 16, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel + 16), s1), m1);
    }
}

#endif

// One thread's products of x[tokens, in] with panels of linears that read it, a block of tokens at a time.
template <typename T>
class PanelProducts {
  public:
    PanelProducts(const T* x, int64_t ldx, int64_t tokens, int64_t in)
        : x_(x), ldx_(ldx), tokens_(tokens), in_(in), blocks_((tokens + kRowBlock - 1) / kRowBlock) {
#ifdef CHORUS_AMX
        tiles_ = std::is_same<T, bf16>::value && in % kTileDepth == 0 && tokens > kFewRows;
        if (tiles_) most_ = 2 * kTileRows;
#endif
    }
#ifdef CHORUS_AMX
    ~PanelProducts() {
        if (shaped_) release_tiles();
    }
#endif
    PanelProducts(const PanelProducts&) = delete;
    PanelProducts& operator=(const PanelProducts&) = delete;

    int64_t blocks() const { return blocks_; }
    int64_t first(int64_t block) const { return tokens_ * block / blocks_; }
    int rows(int64_t block) const { return int(first(block + 1) - first(block)); }
    const T* panel(const ChorusLinear& l, int64_t p) const {
        return static_cast<const T*>(l.packed) + p * panel_size<T>(in_);
    }

    // to[rows, columns of the panel] = x of the block times the p-th panel + bias + delta (null = none, else begun
    // before a barrier). `next`: the panel that the thread will read after this one, or null.
    template <typename Y>
    void run(const ChorusLinear& l, int64_t p, int64_t block, const LoraDelta<T>* delta, const T* next, Y* to,
             int64_t ld) {
        const int64_t first_token = first(block), column = p * kPanel;
        const int rows = this->rows(block), columns = int(std::min<int64_t>(l.out - column, kPanel));
        const T* weights = panel(l, p);
        const bool large = panel_size<T>(in_) * int64_t(sizeof(T)) > kLargePanel;
        if (large) next = weights + kAhead / sizeof(T);  // what is next is then in the panel itself
        const float* start = l.bias ? l.bias + column : nullptr;
        int64_t ldstart = 0;
        alignas(64) float starts[kRowBlock * kPanel];
        const bool adapted = delta && first_token < delta->tokens();
        if (adapted && delta->gains()) {  // which is of the whole product: what is added comes after
            multiply(weights, first_token, rows, columns, start, 0, starts, kPanel, next, large);
            delta->gain(first_token, rows, column, columns, starts, kPanel);
            delta->add(first_token, rows, column, columns, starts, kPanel);
            for (int i = 0; i < rows; i++) convert(starts + i * kPanel, columns, to + i * ld);
            return;
        }
        if (adapted) {
            for (int i = 0; i < rows; i++)
                if (start)
                    std::copy_n(start, columns, starts + i * kPanel);
                else
                    std::fill_n(starts + i * kPanel, kPanel, 0.0f);
            delta->add(first_token, rows, column, columns, starts, kPanel);
            start = starts;
            ldstart = kPanel;
        }
        multiply(weights, first_token, rows, columns, start, ldstart, to, ld, next, large);
    }

    // Asks memory for what `delta` adds to a panel.
    [[gnu::always_inline]] void ask(const LoraDelta<T>* delta, int64_t p, int64_t block) const {
        if (delta) delta->ask(first(block), rows(block), p * kPanel);
    }

  private:
    // to[rows, columns] = x from `first_token` on times a panel + start
    template <typename Y>
    void multiply(const T* weights, int64_t first_token, int rows, int columns, const float* start, int64_t ldstart,
                  Y* to, int64_t ld, const T* next, bool large) {
        const int parts = (rows + most_ - 1) / most_;    // of nearly equal size
        const int asking = parts > 1 && !large ? 2 : 1;  // over so many of them, memory is asked for what is `next`
        for (int part = 0; part < parts; part++) {
            const int from = rows * part / parts, count = rows * (part + 1) / parts - from;
            const T* x = x_ + (first_token + from) * ldx_;
            const float* from_start = start ? start + from * ldstart : nullptr;
            const char* ahead = reinterpret_cast<const char*>(next) + part * pairs<T>(in_) * 64;
            const int lines = next && part < asking ? 2 / asking : 0;
#ifdef CHORUS_AMX
            if constexpr (std::is_same<T, bf16>::value)
                if (tiles_) {
                    if (shaped_ != count) shape_tiles(shaped_ = count);
                    tile_rows(x, ldx_, count, weights, in_, from_start, ldstart, to + from * ld, ld, columns, ahead,
                              lines);
                    continue;
                }
#endif
            panel_rows_of(count, x, ldx_, weights, in_, from_start, ldstart, to + from * ld, ld, columns, ahead, lines);
        }
    }

    const T* const x_;
    const int64_t ldx_, tokens_, in_, blocks_;
    int most_ = kPanelRows;  // rows that a panel is read for at once
#ifdef CHORUS_AMX
    bool tiles_ = false;
    int shaped_ = 0;  // rows that the tiles are shaped for
#endif
};

// One team's share of y[tokens, out] = x[tokens, in] W^T + bias + delta, as above.
template <typename T>
void linear(Member& me, const ChorusLinear& l, const T* x, int64_t ldx, int64_t tokens, T* y, int64_t ldy,
            const LoraDelta<T>* delta = nullptr) {
    PanelProducts<T> products(x, ldx, tokens, l.in);
    const int64_t panels = (l.out + kPanel - 1) / kPanel;
    me.share(panels * products.blocks(), [&](int64_t task) {
        const int64_t p = task % panels, block = task / panels, after = me.upcoming();
        if (after >= 0) products.ask(delta, after % panels, after / panels);
        products.run(l, p, block, delta, after < 0 ? nullptr : products.panel(l, after % panels),
                     y + products.first(block) * ldy + p * kPanel, ldy);
    });
}

struct Half {  // of a gated MLP's first part
    const ChorusLinear& linear;
    int64_t first_panel;
};

// One team's share of y[tokens, out] = activate(x G^T) * (x U^T), of two linears or the two halves of one.
template <typename T, typename Activate>
void gated(Member& me, Half gate, Half up, int64_t out, const T* x, int64_t ldx, int64_t tokens, T* y, int64_t ldy,
           const LoraDelta<T>* gate_delta, const LoraDelta<T>* up_delta, Activate activate) {
    PanelProducts<T> products(x, ldx, tokens, gate.linear.in);
    const int64_t panels = (out + kPanel - 1) / kPanel;
    me.share(panels * products.blocks(), [&](int64_t task) {
        alignas(64) float gates[kRowBlock * kPanel], ups[kRowBlock * kPanel];
        const int64_t p = task % panels, block = task / panels, after = me.upcoming();
        const T* next = after < 0 ? nullptr : products.panel(gate.linear, gate.first_panel + after % panels);
        products.ask(up_delta, up.first_panel + p, block);
        products.run(gate.linear, gate.first_panel + p, block, gate_delta,
                     products.panel(up.linear, up.first_panel + p), gates, kPanel);
        if (after >= 0) products.ask(gate_delta, gate.first_panel + after % panels, after / panels);
        products.run(up.linear, up.first_panel + p, block, up_delta, next, ups, kPanel);
        const int columns = int(std::min<int64_t>(out - p * kPanel, kPanel));
        for (int i = 0; i < products.rows(block); i++) {
            float *g = gates + i * kPanel, *u = ups + i * kPanel;
#pragma omp simd
            for (int j = 0; j < columns; j++) g[j] = activate(g[j]) * u[j];
            convert(g, columns, y + (products.first(block) + i) * ldy + p * kPanel);
        }
    });
}

}  // namespace chorus
