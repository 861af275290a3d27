// The threads of one call: who does what, and the barrier between steps.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace fastlstm {
namespace {

struct Range {
  int64_t begin, end;
};

// A barrier that spins: a step may take a microsecond, much less than it takes to sleep and wake.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}

  void wait() { wait(arrive()); }

  // The same in two parts, with work of one's own between them.
  int arrive() {
    const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (members_ > 1 && __atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
    }
    return phase;
  }
  void wait(int phase) {
    if (members_ == 1) return;
    for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase;)
      if (++spins > spins_before_yield)
        sched_yield();  // more threads than cores
      else
        pause();
  }

 private:
  static constexpr int spins_before_yield = 4096;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` does nothing on most processors
#endif
  }

  const int members_;
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// How many pieces of each thread's share have been begun, in this turn. (The other count is the
// next turn's: nobody looks at it before the barrier between them.)
class Begun {
 public:
  static constexpr int most_threads = 64;

  void prepare(int whose, int64_t turn) {
    __atomic_store_n(&threads_[whose].counts[turn & 1], 0, __ATOMIC_RELAXED);
  }
  // The next piece of somebody's share, or `pieces` where all were begun.
  int64_t next(int whose, int64_t turn, int64_t pieces) {
    int64_t& count = threads_[whose].counts[turn & 1];
    if (__atomic_load_n(&count, __ATOMIC_RELAXED) >= pieces) return pieces;
    return std::min(__atomic_fetch_add(&count, 1, __ATOMIC_RELAXED), pieces);
  }

 private:
  struct alignas(64) Thread {
    int64_t counts[2];
  };
  Thread threads_[most_threads] = {};
};

struct Team {
  int size, rank;
  Barrier& barrier;
  Begun* begun;  // null where a thread is alone from the start

  // This thread's contiguous share of `count` items, or another's.
  Range share(int64_t count) const { return share(count, rank); }
  Range share(int64_t count, int whose) const {
    return {count * whose / size, count * (whose + 1) / size};
  }

  // body(Range) for each piece of `size_of_piece` items, or what is left of them, of this thread's
  // share, there or back again. Unless it works `alone` it then goes on with pieces that others
  // have not begun of theirs: a core that other programs use too is slower than its neighbours, and
  // some processors have cores of two kinds. Turns are counted, one more from each barrier to the
  // next, and need not begin with 0.
  static constexpr int64_t alone = -1;
  template <class Body>
  void each_piece(int64_t count, int64_t size_of_piece, bool back, int64_t turn,
                  const Body& body) const {
    const bool helps = turn != alone && size > 1 && size <= Begun::most_threads;
    if (helps) begun->prepare(rank, turn + 1);
    for (int after = 0; after < (helps ? size : 1); ++after) {
      const int whose = (rank + after) % size;
      const Range items = share(count, whose);
      const int64_t pieces = (items.end - items.begin + size_of_piece - 1) / size_of_piece;
      int64_t own = 0;
      for (int64_t k; (k = helps ? begun->next(whose, turn, pieces) : own++) < pieces;) {
        const int64_t begin = items.begin + (back ? pieces - 1 - k : k) * size_of_piece;
        body(Range{begin, std::min(begin + size_of_piece, items.end)});
      }
    }
  }
};

// Runs body(Team) on at most `threads` threads, in one parallel region. Inside somebody else's
// region the team is smaller than asked for, so everything is sized by the team it gets.
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads > 1) {
    Barrier* barrier = nullptr;
    Begun begun;
    alignas(64) unsigned char place[sizeof(Barrier)];
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier = new (place) Barrier(omp_get_num_threads());
      body(Team{omp_get_num_threads(), omp_get_thread_num(), *barrier, &begun});
    }
  } else {
    Barrier barrier(1);
    body(Team{1, 0, barrier, nullptr});
  }
}

}  // namespace
}  // namespace fastlstm
