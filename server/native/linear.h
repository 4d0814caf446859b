// y = x W^T + bias with W packed once into panels that are read front to back. A decode step reads every
// weight for a handful of tokens, so it runs at the speed of memory; the packed order is what lets it.
#pragma once
#include <type_traits>

#include "amx.h"
#include "panel.h"
#include "team.h"

struct ChorusLinear {
    const void* packed;
    const float* bias;  // [out] or null
    int64_t in, out;
    int64_t module;  // column of the arena's tables
};

namespace chorus {

constexpr int kRowBlock = 96;             // tokens of one task: x stays in the L2 cache while panels pass
constexpr int64_t kLargePanel = 1 << 18;  // bytes; two smaller ones fit the L2 cache beside what else is there
constexpr int64_t kAhead = 12288;         // bytes that a large panel is asked for ahead of use

#ifdef CHORUS_AMX

constexpr int kFewRows = 4;  // up to here memory is the limit, and the vector unit keeps up with it

// y[rows <= 32, columns <= 32] = x[rows, in] . panel + bias
inline void tile_rows(const bf16* x, int64_t ldx, int rows, const bf16* panel, int64_t in, const float* bias, bf16* y,
                      int64_t ldy, int columns, const char* ahead, int lines) {
    alignas(64) float sums[2 * kTileRows * kPanel];
    tile_panel(x, ldx, rows, panel, in, sums, ahead, lines);
    const __mmask16 m0 = first16(columns), m1 = columns > 16 ? first16(columns - 16) : __mmask16(0);
    const __m512 b0 = bias ? _mm512_maskz_loadu_ps(m0, bias) : _mm512_setzero_ps();
    const __m512 b1 = bias ? _mm512_maskz_loadu_ps(m1, bias + 16) : _mm512_setzero_ps();
    for (int i = 0; i < rows; i++) {
        store16(y + i * ldy, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel), b0), m0);
        store16(y + i * ldy + 16, _mm512_add_ps(_mm512_load_ps(sums + i * kPanel + 16), b1), m1);
    }
}

#endif

// One team's share of y[tokens, out] = x[tokens, in] W^T + bias.
template <typename T>
void linear(Member& me, const ChorusLinear& l, const T* x, int64_t ldx, int64_t tokens, T* y, int64_t ldy) {
    const int64_t panels = (l.out + kPanel - 1) / kPanel, blocks = (tokens + kRowBlock - 1) / kRowBlock;
    const int64_t size = panel_size<T>(l.in);
    const bool large = size * int64_t(sizeof(T)) > kLargePanel;  // what is next is then in the panel itself
    const T* packed = static_cast<const T*>(l.packed);
    int most = kPanelRows;  // rows that a panel is read for at once
#ifdef CHORUS_AMX
    const bool tiles = std::is_same<T, bf16>::value && l.in % kTileDepth == 0 && tokens > kFewRows;
    if (tiles) most = 2 * kTileRows;
    int shaped = 0;  // rows that the tiles are shaped for
#endif
    me.share(panels * blocks, [&](int64_t task) {
        const int64_t p = task % panels, first = task / panels * kRowBlock, column = p * kPanel;
        const int rows = int(tokens - first < kRowBlock ? tokens - first : kRowBlock);
        const int columns = int(l.out - column < kPanel ? l.out - column : kPanel);
        const T* panel = packed + p * size;
        const T* next = me.upcoming() < 0 ? nullptr : packed + me.upcoming() % panels * size;
        if (large) next = panel + kAhead / sizeof(T);
        const float* bias = l.bias ? l.bias + column : nullptr;
        const int parts = (rows + most - 1) / most;    // of nearly equal size
        const int asking = parts > 1 && !large ? 2 : 1;  // over so many of them, memory is asked for what is `next`
        for (int part = 0; part < parts; part++) {
            const int64_t from = first + rows * part / parts, to = first + rows * (part + 1) / parts;
            const char* ahead = reinterpret_cast<const char*>(next) + part * pairs<T>(l.in) * 64;
            const int lines = next && part < asking ? 2 / asking : 0;
#ifdef CHORUS_AMX
            if constexpr (std::is_same<T, bf16>::value)
                if (tiles) {
                    if (shaped != to - from) shape_tiles(shaped = int(to - from));
                    tile_rows(x + from * ldx, ldx, shaped, panel, l.in, bias, y + from * ldy + column, ldy, columns, ahead,
                              lines);
                    continue;
                }
#endif
            panel_rows_of(int(to - from), x + from * ldx, ldx, panel, l.in, bias, 0, y + from * ldy + column, ldy, columns,
                          ahead, lines);
        }
    });
#ifdef CHORUS_AMX
    if (shaped) release_tiles();
#endif
}

}  // namespace chorus
