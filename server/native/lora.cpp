// Segmented LoRA on the CPU: for every segment, y += sum over entries of weight * (x A^T) B.
// Chen et al. 2023 (Punica, SGMV) without padding: ranks are exact. The Python side is lora/kernels/cpu.py.
#include <atomic>

#include "simd.h"

extern "C" {

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
    float* scratch;          // x A^T of one module: at least sum over entries of tokens * rank floats
    int64_t threads;
};
}

namespace {

constexpr int kTokens = 32;   // tokens of one task
constexpr int kRanks = 16;    // rows of A in one shrink task
constexpr int kColumns = 256;  // columns of B in one expand task

// Deals tiles out to threads: each thread walks the same list of groups of tiles and runs those it drew.
class Dealer {
  public:
    explicit Dealer(std::atomic<int64_t>& next) : next_(next), mine_(next.fetch_add(1)) {}

    template <typename Run>
    void deal(int64_t tiles, Run run) {
        for (; mine_ < seen_ + tiles; mine_ = next_.fetch_add(1)) run(int(mine_ - seen_));
        seen_ += tiles;
    }

  private:
    std::atomic<int64_t>& next_;
    int64_t mine_, seen_ = 0;
};

template <typename T>
void apply(const ChorusSegments& s, int64_t module, T* out, int64_t ldo, const T* x, int64_t ldx, int64_t in,
           int64_t out_features) {
    const T* arena = static_cast<const T*>(s.arena);
    auto rank_of = [&](int32_t slot) { return s.ranks[slot * s.modules + module]; };
    auto weight_of = [&](int32_t slot, int which) {
        return arena + s.offsets[(slot * s.modules + module) * 2 + which];
    };
    bool any = false;
    for (int e = 0; e < s.entry_starts[s.num_segments]; e++) any = any || rank_of(s.slots[e]) > 0;
    if (!any) return;

    std::atomic<int64_t> next_shrink{0}, next_expand{0};
#pragma omp parallel num_threads(s.threads)
    {
        Dealer shrink(next_shrink);
        int64_t h_start = 0;
        for (int64_t g = 0; g < s.num_segments; g++) {
            const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                const int r = rank_of(s.slots[e]);
                if (r == 0) continue;
                const T* a = weight_of(s.slots[e], 0);
                float* h = s.scratch + h_start;
                const int rank_tiles = (r + kRanks - 1) / kRanks, token_tiles = (n + kTokens - 1) / kTokens;
                shrink.deal(rank_tiles * token_tiles, [&](int tile) {
                    const int j = (tile % rank_tiles) * kRanks, i = (tile / rank_tiles) * kTokens;
                    const int rows = r - j < kRanks ? r - j : kRanks, tokens = n - i < kTokens ? n - i : kTokens;
                    dots(x + (first + i) * ldx, ldx, tokens, a + j * in, in, rows, int(in), h + int64_t(i) * r + j, r);
                    const float w = s.weights[e];
                    if (w != 1.0f)
                        for (int t = 0; t < tokens; t++)
                            for (int q = 0; q < rows; q++) h[int64_t(i + t) * r + j + q] *= w;
                });
                h_start += int64_t(n) * r;
            }
        }
#pragma omp barrier
        Dealer expand(next_expand);
        alignas(64) float y[kTokens * kColumns];
        h_start = 0;
        for (int64_t g = 0; g < s.num_segments; g++) {
            const int first = s.token_starts[g], n = s.token_starts[g + 1] - first;
            const int column_tiles = int((out_features + kColumns - 1) / kColumns);
            const int token_tiles = (n + kTokens - 1) / kTokens;
            int64_t segment_h = 0;
            for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++)
                segment_h += int64_t(n) * rank_of(s.slots[e]);
            if (segment_h == 0) continue;
            expand.deal(column_tiles * token_tiles, [&](int tile) {
                const int c = (tile % column_tiles) * kColumns, i = (tile / column_tiles) * kTokens;
                const int columns = out_features - c < kColumns ? int(out_features - c) : kColumns;
                const int tokens = n - i < kTokens ? n - i : kTokens;
                std::memset(y, 0, sizeof(float) * size_t(tokens) * kColumns);
                const float* h = s.scratch + h_start;
                for (int e = s.entry_starts[g]; e < s.entry_starts[g + 1]; e++) {
                    const int r = rank_of(s.slots[e]);
                    if (r == 0) continue;
                    axpys(h + int64_t(i) * r, r, tokens, weight_of(s.slots[e], 1) + c, out_features, r, columns, y,
                          kColumns);
                    h += int64_t(n) * r;
                }
                for (int t = 0; t < tokens; t++) add_into(y + t * kColumns, columns, out + (first + i + t) * ldo + c);
            });
            h_start += segment_h;
        }
    }
}

}  // namespace

extern "C" {
void chorus_lora_f32(const ChorusSegments* s, int64_t module, float* out, int64_t ldo, const float* x, int64_t ldx,
                     int64_t in, int64_t out_features) {
    apply(*s, module, out, ldo, x, ldx, in, out_features);
}
void chorus_lora_bf16(const ChorusSegments* s, int64_t module, bf16* out, int64_t ldo, const bf16* x, int64_t ldx,
                      int64_t in, int64_t out_features) {
    apply(*s, module, out, ldo, x, ldx, in, out_features);
}
}
