// Tokens from rows of logits: the likeliest, or one that is drawn. The Python side is devices/cpu/sampling.py.
#include <algorithm>
#include <vector>

#include "layout.h"
#include "maths.h"
#include "simd.h"
#include "team.h"

extern "C" {

struct ChorusDraws {  // one array for each parameter: [count]
    const int64_t* rows;
    const float* temperature;
    const int32_t* top_k;  // 0 = off
    const float* top_p;
    const float* min_p;
    const double* uniform;  // [0, 1)
    int64_t count;
};
}

namespace {

using namespace chorus;

constexpr int64_t kBlock = 512;  // values among which the place of the maximum, or of the token, is looked for

// The index of x's first maximum, and whether that is finite: false too where x holds a NaN.
template <typename T>
bool argmax_row(const T* x, int64_t n, int64_t* index) {
    float best = -INFINITY;
    int64_t best_block = 0;
    bool odd = false;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t last = first + kBlock < n ? first + kBlock : n;
        float top = -INFINITY;
        int not_below = 0;
#pragma omp simd reduction(max : top) reduction(+ : not_below)
        for (int64_t j = first; j < last; j++) {
            const float v = to_float(x[j]);
            top = v > top ? v : top;
            not_below += v < INFINITY ? 0 : 1;
        }
        odd |= not_below > 0;
        if (top > best) best = top, best_block = first;
    }
    *index = best_block;
    while (*index < n - 1 && !(to_float(x[*index]) == best)) ++*index;
    return !odd && best > -INFINITY;
}

template <typename T>
void argmax(const T* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite, int64_t threads) {
    run_team(threads < rows ? threads : rows, [&](Member& me) {
        me.share(rows, [&](int64_t row) { finite[row] = argmax_row(x + row * ldx, n, indices + row); });
    });
}

// One thread's work on one row after the other.
class Drawer {
  public:
    // The row's token: the first up to which there is more than `uniform` of the weights that are left.
    template <typename T>
    int64_t draw(const T* scores, int64_t n, const ChorusDraws& draws, int64_t at) {
        weigh(scores, n, draws.temperature[at]);
        const int32_t top_k = draws.top_k[at];
        const float top_p = draws.top_p[at];
        uint32_t largest = kAll;
        if (top_k > 0 && top_k < n)
            largest = last_below(largest, double(top_k), [](float) { return 1.0; });
        if (top_p < 1) {
            double mass = 0;
            for (int64_t j = 0; j < n; j++) mass += distance_[j] <= largest ? weight_[j] : 0.0f;
            largest = last_below(largest, double(top_p) * mass, [](float weight) { return double(weight); });
        }
        return first_beyond(draws.uniform[at], largest, draws.min_p[at]);
    }

  private:
    static constexpr uint32_t kAll = 0x7f800000;  // the bits of infinity: no score is farther from the largest

    // For each score its distance from the largest over the temperature, as bits, which order as it does, and the
    // weight e^-distance.
    template <typename T>
    void weigh(const T* scores, int64_t n, float temperature) {
        distance_.resize(size_t(n));
        weight_.resize(size_t(n));
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) {
            const float v = to_float(scores[j]);
            top = v > top ? v : top;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            const float below = (top - to_float(scores[j])) / temperature;
            weight_[j] = exp_negative(-below);
            std::memcpy(&distance_[j], &below, 4);
        }
    }

    // The largest of the distances up to `most` for which what is nearer counts for less than `limit` in all: found
    // by its bits, eleven, ten and ten at a time.
    template <typename Count>
    uint32_t last_below(uint32_t most, double limit, Count count) {
        uint32_t prefix = 0;
        double nearer = 0;  // what all with smaller bits before the prefix count for
        int shift = 31;
        for (const int bits : {11, 10, 10}) {
            const int next = shift - bits;
            std::fill(buckets_, buckets_ + (1 << bits), 0.0);
            std::fill(seen_, seen_ + (1 << bits), false);
            for (size_t j = 0; j < distance_.size(); j++) {
                const uint32_t d = distance_[j];
                if (d > most || d >> shift != prefix >> shift) continue;
                const uint32_t bucket = (d >> next) & ((1u << bits) - 1);
                buckets_[bucket] += count(weight_[j]);
                seen_[bucket] = true;
            }
            uint32_t chosen = 0;
            double before = nearer;
            for (uint32_t b = 0; b < (1u << bits) && before < limit; b++) {
                if (!seen_[b]) continue;
                chosen = b;
                nearer = before;
                before += buckets_[b];
            }
            prefix |= chosen << next;
            shift = next;
        }
        return prefix;
    }

    int64_t first_beyond(double uniform, uint32_t largest, float min_weight) {
        const int64_t n = int64_t(weight_.size());
        double mass = 0;
        blocks_.clear();
        for (int64_t first = 0; first < n; first += kBlock) {
            const int64_t last = first + kBlock < n ? first + kBlock : n;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = first; j < last; j++) {
                const bool left = distance_[j] <= largest && weight_[j] >= min_weight;
                sum += weight_[j] = left ? weight_[j] : 0.0f;
            }
            blocks_.push_back(mass += sum);
        }
        const double target = uniform * mass;
        const size_t block = size_t(std::upper_bound(blocks_.begin(), blocks_.end(), target) - blocks_.begin());
        double sum = block ? blocks_[block - 1] : 0;
        int64_t token = 0;  // the last of positive weight so far: rounding could reach past all of them
        for (int64_t j = int64_t(block) * kBlock; j < n; j++) {
            if (!(weight_[j] > 0)) continue;
            token = j;
            if ((sum += weight_[j]) > target) return j;
        }
        for (int64_t j = n - 1; token == 0 && j > 0; j--)
            if (weight_[j] > 0) token = j;
        return token;
    }

    std::vector<uint32_t> distance_;
    std::vector<float> weight_;
    std::vector<double> blocks_;  // sums up to the end of each block
    double buckets_[1 << 11];
    bool seen_[1 << 11];
};

template <typename T>
void draw(const T* scores, int64_t ld, int64_t n, const ChorusDraws& draws, int64_t* token_ids, int64_t threads) {
    run_team(threads < draws.count ? threads : draws.count, [&](Member& me) {
        Drawer drawer;
        me.share(draws.count, [&](int64_t at) {
            token_ids[at] = drawer.draw(scores + draws.rows[at] * ld, n, draws, at);
        });
    });
}

}  // namespace

extern "C" {
void chorus_argmax_f32(const float* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite,
                       int64_t threads) {
    argmax(x, ldx, rows, n, indices, finite, threads);
}
void chorus_argmax_bf16(const bf16* x, int64_t ldx, int64_t rows, int64_t n, int64_t* indices, uint8_t* finite,
                        int64_t threads) {
    argmax(x, ldx, rows, n, indices, finite, threads);
}
void chorus_draw_f32(const float* scores, int64_t ld, int64_t n, const ChorusDraws* draws, int64_t* token_ids,
                     int64_t threads) {
    draw(scores, ld, n, *draws, token_ids, threads);
}
void chorus_draw_bf16(const bf16* scores, int64_t ld, int64_t n, const ChorusDraws* draws, int64_t* token_ids,
                      int64_t threads) {
    draw(scores, ld, n, *draws, token_ids, threads);
}
}

CHORUS_LAYOUT(ChorusDraws, &S::rows, &S::temperature, &S::top_k, &S::top_p, &S::min_p, &S::uniform, &S::count)
