// A GPU for the kernels of csrc/cuda, on the host: every thread is a fiber, and chance says who
// goes on.
//
// Blocks of a launch are there at once, as in a cooperative launch or a cluster. The kernels' own
// code runs, compiled for `Host` instead of `Device`; tensor core products are computed lane by
// lane from the fragment layouts that the PTX manual documents. Stores into another block of a
// cluster arrive when chance says so, in any order.
//
// With `detect`, every access to exchanged rows and to shared memory is checked for races: threads
// have vector clocks, which barriers join, a release hands over and an acquire takes. So a missing
// ordering is found under any schedule, whether or not a wrong value was read.
//
// A store into another block hands over what it has stored and nothing else: who finds its mbarrier
// complete has an order with those stores, but not with what the sender did before. So threads have
// a second clock, of what must have happened since what arrived was computed from it: nobody can
// have sent a sum of values that were still to be read. Only stores into other blocks rely on it,
// when they overwrite what has been read.
#pragma once

#include <csetjmp>
#include <cstring>
#include <functional>
#include <memory>
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

// What a test can take out of the protocol, to see that it is missed.
enum Ordering {
  nothing,
  the_wait,                // a flag or an mbarrier is not looked at
  the_acquire,             // it is looked at, and what comes after may come before
  the_release,             // a flag is set, and what comes before may come after
  the_barrier_of_sums,     // before other warps' sums are read
  the_barrier_of_stores,   // before what all have stored is published or sent
  the_warps_barrier,       // after the lanes have waited, each for its own
  the_barrier_of_zeros,    // before cells write where zeros were written
  the_bytes,               // an mbarrier is not told how many bytes to expect
  the_arrival,             // nor that this is all to expect
  the_fence_of_mbarriers,  // before others use them
  the_first_meeting,       // of a cluster, before anything is sent
  the_last_meeting,        // before a block ends
  the_outlasting,          // of what is still sent to a block that gave up waiting
};

// For tests: "seed", "detect", how many "blocks" the device holds, and in "clusters", how many
// times as long as by chance a store into another block takes ("slow"), and what to leave out:
// "omit" (an Ordering).
struct Settings {
  int64_t seed = 0, blocks = 1 << 20, clusters = 1 << 20, slow = 1;
  bool detect = false;
  Ordering omit = nothing;
};
extern Settings settings;
void emulator_set(std::string name, int64_t value);

using Clock = std::vector<uint32_t>;
void join(Clock& clock, const Clock& other);

struct Fiber {
  int block, thread;
  bool started = false, ended = false;
  std::jmp_buf context;
  char* stack = nullptr;
  Clock clock;                        // what is ordered before
  Clock seen;                         // what must have happened, besides
  std::shared_ptr<const Clock> sent;  // `seen`, since which nothing else was done than send
  int products = 0;                   // of the tensor cores, so far
  int meetings = 0;                   // of its cluster, so far
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
  bool saying = false, said = false;  // by any who meet now; by any who met last
};

// Who accessed, and when by its own clock.
struct Access {
  int who = -1;
  uint32_t time = 0;
};

constexpr int most_barriers = 2;  // mbarriers of a block

// An mbarrier has a place in the clocks as a thread has: stores that complete its n-th phase are
// its own, at time n.
struct Mbarrier {
  int who;
  Access initialised;
  bool fenced = false;
  int pending = 1;
  int64_t due = 0;  // bytes
  uint32_t phase = 0;
  Clock gathering, seen;  // of this phase's and all earlier stores; of those of complete phases
};

// A store into a block's shared memory that is on its way.
struct Message {
  int block;
  char* to;
  Piece value;
  int bytes;
  const uint64_t* barrier;
  std::shared_ptr<const Clock> seen;  // by who sent it
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
  void check_shared(const void* address, size_t bytes);

  void init_barrier(const uint64_t* barrier);
  void fence_barriers();
  void expect(const uint64_t* barrier, int bytes);
  bool complete(const uint64_t* barrier, int parity);
  void send(int rank, const void* to, const void* value, int bytes, const uint64_t* barrier);
  void outlast_stores();

  const int tiles, teams;
  Fiber* current = nullptr;
  std::vector<std::vector<char>> shared;    // by block
  std::vector<Rendezvous> block_barrier;    // by block
  std::vector<Rendezvous> warp_barrier;     // by warp
  std::vector<Rendezvous> product_barrier;  // by warp
  std::vector<Rendezvous> cluster_barrier;  // by team
  std::vector<WarpProduct> product;         // by warp
  std::string error;

 private:
  struct Shadow {
    Access write;
    std::vector<Access> reads;
  };
  void loop();
  void ready(Fiber* fiber);
  void park();
  void end();
  void order(const std::vector<Fiber*>& together);
  int index(const Fiber& f) const;
  Access now();
  bool before(const Clock& clock, const Access& access) const;
  Mbarrier* barrier_of(const uint64_t* barrier);
  void settle(Mbarrier& barrier);
  void deliver(size_t place);

  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> runnable_;
  std::vector<Message> messages_;
  std::vector<int> running_;  // threads, by block
  std::jmp_buf scheduler_;
  std::function<void()> entry_;
  std::unordered_map<uintptr_t, Shadow> shadows_;  // by pairs of bytes
  std::unordered_map<const int32_t*, Clock> published_;
  std::unordered_map<const uint64_t*, Mbarrier> barriers_;
  static void trampoline();
};

template <class Body>
const char* Grid::run(const Body& body) {
  entry_ = [&] { body(); };
  loop();
  for (const Fiber& f : fibers_)
    if (!f.ended && error.empty()) error = "some threads wait for ever";
  static std::string said;
  said = error;
  return said.empty() ? nullptr : said.c_str();
}

}  // namespace cuda
}  // namespace fastlstm
