// What this machine can do at best: multiply-adds in registers, reads from each cache, and a word
// from one thread to another.
// limits.py compiles it for the instruction set that is timed, and calls it by ctypes.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#ifdef __AMX_BF16__
#  include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, accumulators = 16;  // of 32 registers; 2 units by 4 cycles need 8
#elif defined(__AVX__)
constexpr int vector_bytes = 32, accumulators = 12;  // of 16
#else
constexpr int vector_bytes = 16, accumulators = 12;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};

// What is computed counts as used. Their total, and not the sums, since what is in memory here
// would be there all the time.
template <class V, int n>
void use(V (&sums)[n]) {
  V total = sums[0];
  for (int k = 1; k < n; ++k) total += sums[k];
  asm volatile("" : : "m"(total) : "memory");
}

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// All threads go on together.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    const int round = round_.load();
    if (waiting_.fetch_add(1) + 1 == threads_) {
      waiting_.store(0);
      round_.fetch_add(1);
    } else {
      while (round_.load() == round) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> waiting_{0}, round_{0};
};

// The fewest seconds that `threads` calls of work(), side by side, took in all of the rounds that
// there is time for: a limit is what a noisy machine managed once. make(), which each thread calls
// first, gives its work.
template <class Make>
double best_seconds(int threads, double seconds, Make make) {
  Barrier barrier(threads);
  double best = 1e30;
  std::atomic<bool> done{false};
  auto run = [&](bool leads) {
    auto work = make();
    work();
    const double deadline = now() + seconds;
    while (!done.load()) {
      barrier.wait();
      const double start = now();
      work();
      barrier.wait();
      if (leads) {
        const double end = now();
        best = end - start < best ? end - start : best;
        done.store(end > deadline);
      }
      barrier.wait();
    }
  };
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back(run, false);
  run(true);
  for (std::thread& other : others) other.join();
  return best;
}

template <class T>
double fma_flops(int threads, double seconds) {
  typedef typename VectorOf<T>::type V;
  constexpr int64_t loops = 20000;
  const double best = best_seconds(threads, seconds, [] {
    return [] {
      V sums[accumulators] = {}, a = V{} + T(0.5), b = V{} + T(1);
      // Values that the compiler doesn't know: of sums alike it would compute one.
      asm volatile("" : "+m"(sums), "+m"(a), "+m"(b));
      for (int64_t k = 0; k < loops; ++k) {
#pragma GCC unroll 16
        for (V& sum : sums) sum = sum * a + b;
      }
      use(sums);
    };
  });
  return 2.0 * accumulators * (vector_bytes / sizeof(T)) * loops * threads / best;
}

}  // namespace

extern "C" {

double fma_flops_float(int threads, double seconds) {
  return fma_flops<float>(threads, seconds);
}

double fma_flops_double(int threads, double seconds) {
  return fma_flops<double>(threads, seconds);
}

// bfloat16 products of the matrix unit; 0 without one. The process has leave to use it, because the
// library asked for it.
double matrix_unit_flops([[maybe_unused]] int threads, [[maybe_unused]] double seconds) {
#ifdef __AMX_BF16__
  constexpr int64_t loops = 20000;
  const double best = best_seconds(threads, seconds, [] {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "r"(&config) : "memory");  // gcc takes the next line to read 8 bytes
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    return [] {
      for (int64_t k = 0; k < loops; ++k) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    };
  });
  return 4.0 * 2 * 16 * 16 * 32 * loops * threads / best;
#else
  return 0;
#endif
}

// Bytes a second that the threads read, each `bytes` of its own again and again.
double read_bytes(int threads, int64_t bytes, double seconds) {
  typedef VectorOf<float>::type V;
  constexpr int64_t stride = 8 * sizeof(V);
  const int64_t count = bytes / stride > 0 ? bytes / stride : 1;
  const int64_t passes = 1 + (int64_t(1) << 24) / (count * stride);  // a round is 16 MiB or more
  const double best = best_seconds(threads, seconds, [=] {
    std::shared_ptr<char> memory(new char[count * stride + 64], std::default_delete<char[]>());
    std::memset(memory.get(), 0, count * stride + 64);
    char* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    return [=, keep = memory] {
      for (int64_t pass = 0; pass < passes; ++pass) {
        V sums[8] = {};
        const V* from = reinterpret_cast<const V*>(aligned);
        for (int64_t k = 0; k < count; ++k, from += 8) {
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) sums[j] += from[j];
        }
        use(sums);
      }
    };
  });
  return double(count * stride) * passes * threads / best;
}

// Keeps a thread on the processor that it is on, or the others on all but that one, while it lasts.
class Pinned {
 public:
  Pinned() : here_(sched_getcpu()), known_(sched_getaffinity(0, sizeof before_, &before_) == 0) {
    if (!known_) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(here_, &one);
    sched_setaffinity(0, sizeof one, &one);
  }
  ~Pinned() {
    if (known_) sched_setaffinity(0, sizeof before_, &before_);
  }
  Pinned(const Pinned&) = delete;
  void send_away() const {
    if (!known_) return;
    cpu_set_t others = before_;
    CPU_CLR(here_, &others);
    if (CPU_COUNT(&others) > 0) sched_setaffinity(0, sizeof others, &others);
  }

 private:
  cpu_set_t before_;
  const int here_;
  const bool known_;
};

// Seconds until another thread sees what one writes. It is a tenth where the two processors share
// an L3 cache, and a virtual machine may move its own at any time.
double hop_seconds(double seconds) {
  constexpr int64_t trips = 1000;
  alignas(64) std::atomic<int64_t> there{0};
  alignas(64) std::atomic<int64_t> back{0};
  std::atomic<bool> done{false};
  const auto wait_for = [](const std::atomic<int64_t>& word, int64_t value, auto given_up) {
    for (int64_t spins = 1; word.load() < value && !given_up(); ++spins)
      if (spins % 10000 == 0) std::this_thread::yield();
  };
  const Pinned pinned;
  std::thread other([&] {
    pinned.send_away();
    for (int64_t trip = 1; !done.load(); ++trip) {
      wait_for(there, trip, [&] { return done.load(); });
      back.store(trip);
    }
  });
  double best = 1e30;
  const double deadline = now() + seconds;
  for (int64_t trip = 0; now() < deadline || best == 1e30;) {
    const double start = now();
    for (const int64_t last = trip + trips; trip < last;) {
      there.store(++trip);
      wait_for(back, trip, [] { return false; });
    }
    best = std::min(best, now() - start);
  }
  done.store(true);
  other.join();
  return best / (2 * trips);
}
}
