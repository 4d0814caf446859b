// bfloat16 products on the tile unit of Intel processors (AMX, Sapphire Rapids and later): some eight times the
// rate of the vector unit. Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
//
// A tile is 16 rows of 64 bytes. One instruction adds to a tile of 16 x 16 floats the product of 16 x 32 values
// of x with 32 x 16 weights, which must lie in pairs: just as a panel of linear.h has them.
//
// CHORUS_AMX_EMULATED stands in for the instructions, so that the kernel is tested on every processor.
#pragma once
#include "simd.h"

#if defined(CHORUS_AVX512) && (defined(__AMX_BF16__) || defined(CHORUS_AMX_EMULATED))
#define CHORUS_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

namespace chorus {

struct TileConfig {  // the operand of LDTILECFG
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#ifdef CHORUS_AMX_EMULATED

struct Tiles {
    TileConfig config;
    alignas(64) uint8_t data[8][16][64];

    void zero(int n) { std::memset(data[n], 0, sizeof(data[n])); }
    void load(int n, const void* from, int64_t stride) {
        for (int i = 0; i < config.rows[n]; i++)
            std::memcpy(data[n][i], static_cast<const char*>(from) + i * stride, config.row_bytes[n]);
    }
    void store(int n, void* to, int64_t stride) const {
        for (int i = 0; i < config.rows[n]; i++)
            std::memcpy(static_cast<char*>(to) + i * stride, data[n][i], config.row_bytes[n]);
    }
    void dot(int c, int a, int b) {
        for (int m = 0; m < config.rows[c]; m++)
            for (int k = 0; k < config.row_bytes[a] / 4; k++)
                for (int n = 0; n < config.row_bytes[c] / 4; n++)
                    for (int half = 0; half < 2; half++) {
                        bf16 left, right;
                        float sum;
                        std::memcpy(&left, &data[a][m][4 * k + 2 * half], 2);
                        std::memcpy(&right, &data[b][k][4 * n + 2 * half], 2);
                        std::memcpy(&sum, &data[c][m][4 * n], 4);
                        sum += to_float(left) * to_float(right);
                        std::memcpy(&data[c][m][4 * n], &sum, 4);
                    }
    }
};
inline thread_local Tiles tiles;

inline bool permit_tiles() { return true; }
inline void load_tile_config(const TileConfig& config) { tiles.config = config; }
inline void release_tiles() { tiles.config = TileConfig(); }
#define TILE_ZERO(n) tiles.zero(n)
#define TILE_LOAD(n, from, stride) tiles.load(n, from, stride)
#define TILE_STORE(n, to, stride) tiles.store(n, to, stride)
#define TILE_DOT(c, a, b) tiles.dot(c, a, b)

#else

// Linux gives a process the tile registers when it asks (Documentation/arch/x86/xstate.rst).
inline bool permit_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
inline void load_tile_config(const TileConfig& config) {
    asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic says that it reads 8 of the 64 bytes
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }
// Macros, because the tile's number is pasted into the instruction's name.
#define TILE_ZERO(n) _tile_zero(n)
#define TILE_LOAD(n, from, stride) _tile_loadd(n, from, stride)
#define TILE_STORE(n, to, stride) _tile_stored(n, to, stride)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // values of a row of x in a tile

// Tiles 0, 1: sums of the first 16 rows, 2, 3: of the next. 4, 5: x of the same. 6, 7: weights of 2 x 16 outputs.
inline void shape_tiles(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
        const bool second = tile == 2 || tile == 3 || tile == 5, weights = tile >= 6;
        const int here = second ? rows - kTileRows : rows;
        config.rows[tile] = uint8_t(weights || here > kTileRows ? kTileRows : here < 1 ? 1 : here);
        config.row_bytes[tile] = 64;
    }
    load_tile_config(config);
}

// sums[rows, 32] = x[rows, in] . panel for 1 <= rows <= 32 and whole tiles of `in`, in the shape set for `rows`.
// Meanwhile memory is asked for: `lines` (0 to 2) cache lines of `ahead` for each pair of inputs.
inline void tile_panel(const bf16* x, int64_t ldx, int rows, const bf16* panel, int64_t in, float* sums,
                       const char* ahead, int lines) {
    const bool second = rows > kTileRows;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    const int64_t x_stride = ldx * int64_t(sizeof(bf16)), step_lines = lines * kTileDepth / 2;
    for (int64_t k = 0; k < in; k += kTileDepth) {
        for (int64_t line = 0; line < step_lines; line++)
            _mm_prefetch(ahead + (k / kTileDepth * step_lines + line) * 64, _MM_HINT_T1);
        const bf16* w = panel + k * 32;
        TILE_LOAD(6, w, 128);
        TILE_LOAD(7, w + 32, 128);
        TILE_LOAD(4, x + k, x_stride);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        if (second) {
            TILE_LOAD(5, x + kTileRows * ldx + k, x_stride);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    }
    TILE_STORE(0, sums, 128);
    TILE_STORE(1, sums + 16, 128);
    if (second) {
        TILE_STORE(2, sums + kTileRows * 32, 128);
        TILE_STORE(3, sums + kTileRows * 32 + 16, 128);
    }
}

}  // namespace chorus
#endif
