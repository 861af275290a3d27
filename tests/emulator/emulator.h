// A GPU for the kernels of csrc/cuda, on the host: every thread is a fiber, and chance says who
// goes on.
//
// Blocks of a launch are there at once, as in a cooperative launch. The kernels' own code runs,
// compiled for `Host` instead of `Device`; tensor core products are computed lane by lane from the
// fragment layouts that the PTX manual documents.
//
// With `detect`, every access to exchanged rows and to shared memory is checked for races: threads
// have vector clocks, which barriers join, a release hands over and an acquire takes. So a missing
// ordering is found under any schedule, whether or not a wrong value was read.
#pragma once

#include <csetjmp>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/product.h"

namespace fastlstm {
namespace cuda {

// Memory that kernels may touch, until it is forgotten; what is outside is an error.
void allow(const void* data, size_t bytes);
void forget_allowed();

// Settings, for tests: "seed", "detect", "blocks" that the device holds, and what to leave out:
// "omit" (an Ordering).
void emulator_set(std::string name, int64_t value);

// What a test can take out of the protocol, to see that it is missed.
enum Ordering {
  nothing,
  the_wait,               // a flag is not looked at
  the_acquire,            // it is looked at, and what comes after may come before
  the_release,            // a flag is set, and what comes before may come after
  the_barrier_of_sums,    // before other warps' sums are read
  the_barrier_of_stores,  // before one thread publishes what all have stored
  the_warps_barrier,      // after the lanes have waited, each for its own
};

using Clock = std::vector<uint32_t>;

struct Fiber {
  int block, thread;
  bool started = false, parked = false, ended = false;
  std::jmp_buf context;
  char* stack = nullptr;
  Clock clock;
  int products = 0;  // of the tensor cores, so far
  int barriers = 0;
};

// What the lanes of a warp bring to a product, for two products: a lane may be one ahead.
struct WarpProduct {
  struct Lane {
    Piece a;
    uint32_t b[2];
  } lanes_[2][lanes];
};

struct Rendezvous {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

class Grid {
 public:
  Grid(int tiles, int teams, int shared_bytes);
  ~Grid();
  // Runs body(host) on every thread; null, or what went wrong.
  template <class Body>
  const char* run(const Body& body);

  // --- for Host ---
  void meet(Rendezvous& place, int expected, bool ordered);
  void pause();  // lets others go on
  void fail(const std::string& what);

  void wrote(const void* address, size_t bytes);
  void read(const void* address, size_t bytes);
  void publish(const int32_t* flag);
  void acquire(const int32_t* flag);
  void check(const void* address, size_t bytes);

  const int tiles, teams;
  Fiber* current = nullptr;
  std::vector<std::vector<char>> shared;    // by block
  std::vector<Rendezvous> block_barrier;    // by block
  std::vector<Rendezvous> warp_barrier;     // by warp
  std::vector<Rendezvous> product_barrier;  // by warp
  std::vector<WarpProduct> product;         // by warp
  std::string error;

 private:
  struct Access {
    int thread = -1;
    uint32_t time = 0;
  };
  struct Shadow {
    Access write;
    std::vector<Access> reads;
  };
  void loop();
  void ready(Fiber* fiber);
  void park();
  void order(const std::vector<Fiber*>& together);
  int index(const Fiber& f) const;
  bool before(const Access& access) const;

  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> runnable_;
  std::jmp_buf scheduler_;
  std::function<void()> entry_;
  std::unordered_map<uintptr_t, Shadow> shadows_;  // by pairs of bytes
  std::unordered_map<const int32_t*, Clock> published_;
  static void trampoline();
};

template <Storage storage>
struct HostElement {
  using type = uint16_t;
};
template <>
struct HostElement<Storage::f32> {
  using type = float;
};

uint16_t narrow_f16(float x);
float widen_f16(uint16_t x);
uint16_t narrow_bf16(float x);
float widen_bf16(uint16_t x);
uint32_t round_tf32(uint32_t bits);

// What a thread can do; device.h has the same for a GPU.
class Host {
 public:
  template <Storage storage>
  using Element = typename HostElement<storage>::type;

  explicit Host(Grid& grid) : grid_(grid), fiber_(*grid.current) {}

  int thread() const { return fiber_.thread; }
  int tile() const { return fiber_.block % grid_.tiles; }
  int team() const { return fiber_.block / grid_.tiles; }
  char* shared() const { return grid_.shared[fiber_.block].data(); }
  void sync();
  void sync_warp();
  static int zero_after(uint32_t) { return 0; }

  template <class T>
  T load(const T* from) const {
    grid_.check(from, sizeof(T));
    return *from;
  }
  template <class T>
  void store(T* to, T value) {
    grid_.check(to, sizeof(T));
    grid_.wrote(to, sizeof(T));
    *to = value;
  }
  Piece load_row(const void* from) const {
    grid_.check(from, sizeof(Piece));
    grid_.read(from, sizeof(Piece));
    Piece p;
    std::memcpy(&p, from, sizeof p);
    return p;
  }
  float load_shared(const float* from) const {
    grid_.read(from, sizeof(float));
    return *from;
  }
  Gates<float> load_shared_four(const float* from) const {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) grid_.fail("misaligned shared memory");
    return {load_shared(from), load_shared(from + 1), load_shared(from + 2), load_shared(from + 3)};
  }
  void store_shared(float* to, float value) {
    const char* begin = shared();
    const auto* at = reinterpret_cast<const char*>(to);
    if (at < begin || at + sizeof(float) > begin + grid_.shared[fiber_.block].size())
      grid_.fail("outside of shared memory");
    grid_.wrote(to, sizeof(float));
    *to = value;
  }

  bool arrived(const int32_t* flag, int position) const;
  void publish(int32_t* flag, int positions);
  void report(int64_t* word, int64_t place) { *word = place; }

  template <Storage storage>
  static float widen(Element<storage> x) {
    if constexpr (storage == Storage::f32)
      return x;
    else
      return storage == Storage::f16 ? widen_f16(x) : widen_bf16(x);
  }
  template <Storage storage>
  static Element<storage> narrow(float x) {
    if constexpr (storage == Storage::f32)
      return x;
    else
      return storage == Storage::f16 ? narrow_f16(x) : narrow_bf16(x);
  }
  static uint32_t bits(uint16_t x) { return x; }
  static uint32_t bits(float x) {
    uint32_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
  template <Storage storage>
  static uint32_t operand(uint32_t word) {
    return storage == Storage::f32 ? round_tf32(word) : word;
  }

  template <Storage storage>
  void multiply_add(float (&sum)[4], const Piece& a, uint32_t b0, uint32_t b1);

 private:
  int warp() const { return fiber_.block * warps + fiber_.thread / lanes; }

  Grid& grid_;
  Fiber& fiber_;
};

}  // namespace cuda
}  // namespace fastlstm
