// The threads of one parallel region: they share out tiles of work and meet at barriers.
//
// All threads walk the same sequence of `share` and `barrier` calls. Tiles are numbered through the whole walk
// and drawn as threads get to them, so a thread that the machine delays takes fewer; each knows one tile ahead,
// so that it can ask memory for it.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Team {  // what the threads share
    friend class Member;
    alignas(64) std::atomic<int64_t> next_tile_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

class Member {
  public:
    Member(Team& team, int threads) : team_(team), threads_(threads), tile_(draw()), upcoming_(draw()) {}

    // Runs run(0) .. run(tiles - 1), each on some thread. Returns when no tile is left to draw, not when all are
    // done: a `barrier` says that.
    template <typename Run>
    void share(int64_t tiles, Run run) {
        for (shared_ = tiles; tile_ < seen_ + tiles; tile_ = upcoming_, upcoming_ = draw()) run(tile_ - seen_);
        seen_ += tiles;
    }

    // Within run: the tile that this thread will run next, or -1 where that is not one of this `share`.
    int64_t upcoming() const { return upcoming_ < seen_ + shared_ ? upcoming_ - seen_ : -1; }

    // As `share`, for work on each of `rows` rows: run(first, last), in pieces of a few rows.
    template <typename Run>
    void share_rows(int64_t rows, Run run) {
        const int64_t pieces = rows < 8 * threads_ ? rows : 8 * threads_;
        share(pieces, [&](int64_t piece) { run(rows * piece / pieces, rows * (piece + 1) / pieces); });
    }

    void barrier() {
        if (threads_ == 1) return;
        const int round = team_.round_.load(std::memory_order_relaxed);
        if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            team_.arrived_.store(0, std::memory_order_relaxed);
            team_.round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; team_.round_.load(std::memory_order_acquire) == round; spins++) {
            if (spins < kSpins)
                pause();
            else
                sched_yield();  // the machine has other work: the thread waited for may need this core
        }
    }

  private:
    int64_t draw() { return team_.next_tile_.fetch_add(1, std::memory_order_relaxed); }

    static constexpr int kSpins = 2000;
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Team& team_;
    const int threads_;
    int64_t tile_, upcoming_, seen_ = 0, shared_ = 0;
};

// Tiles of several groups, `count(group)` each, in one numbering. To be asked for in ascending order.
template <typename Count>
class Groups {
  public:
    Groups(int64_t groups, Count count) : count_(count) {
        for (int64_t g = 0; g < groups; g++) total_ += count(g);
    }

    int64_t total() const { return total_; }

    struct Place {
        int64_t group, tile;  // the latter within its group
    };
    Place find(int64_t tile) {
        while (tile >= start_ + count_(group_)) start_ += count_(group_++);
        return {group_, tile - start_};
    }

  private:
    Count count_;
    int64_t total_ = 0, group_ = 0, start_ = 0;  // where the last one was found
};

// Runs body(Member&) on `threads` threads, or on as many as the OpenMP runtime gives.
template <typename Body>
void run_team(int64_t threads, Body body) {
    Team team;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Member me(team, omp_get_num_threads());
        body(me);
    }
}
