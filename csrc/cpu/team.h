// The threads of one call: who does what, and the barrier between steps.
#pragma once

#include <omp.h>
#include <sched.h>

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

  void wait() {
    if (members_ == 1) return;
    const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
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
    asm volatile("yield");
#endif
  }

  const int members_;
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

struct Team {
  int size, rank;
  Barrier& barrier;

  // This thread's contiguous share of `count` items.
  Range share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// Runs body(Team) on at most `threads` threads, in one parallel region. Inside somebody else's
// region the team is smaller than asked for, so everything is sized by the team it gets.
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads > 1) {
    Barrier* barrier = nullptr;
    alignas(64) unsigned char place[sizeof(Barrier)];
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier = new (place) Barrier(omp_get_num_threads());
      body(Team{omp_get_num_threads(), omp_get_thread_num(), *barrier});
    }
  } else {
    Barrier barrier(1);
    body(Team{1, 0, barrier});
  }
}

}  // namespace
}  // namespace fastlstm
