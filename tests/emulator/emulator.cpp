// Fibers and their order.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>

#include "host.h"

namespace fastlstm {
namespace cuda {

Settings settings;

namespace {

// Ranges by their first byte.
std::map<uintptr_t, size_t> allowed;

constexpr size_t stack_bytes = 128 << 10;

// Stacks are kept for the next launch.
std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    void* fresh = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    return static_cast<char*>(fresh);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

Grid* running = nullptr;

}  // namespace

void allow(const void* data, size_t bytes) {
  size_t& known = allowed[reinterpret_cast<uintptr_t>(data)];
  known = std::max(known, bytes);
}

void forget_allowed() {
  allowed.clear();
}

void emulator_set(std::string name, int64_t value) {
  if (name == "seed")
    settings.seed = value;
  else if (name == "detect")
    settings.detect = value != 0;
  else if (name == "blocks")
    settings.blocks = value;
  else if (name == "clusters")
    settings.clusters = value;
  else if (name == "slow")
    settings.slow = value;
  else if (name == "omit")
    settings.omit = Ordering(value);
  else
    throw std::runtime_error("emulator: no setting " + name);
}

// --- fibers --------------------------------------------------------------------------------

Grid::Grid(int tiles_, int teams_, int shared_bytes)
    : tiles(tiles_),
      teams(teams_),
      shared(size_t(tiles_ * teams_)),
      block_barrier(shared.size()),
      warp_barrier(shared.size() * warps),
      product_barrier(shared.size() * warps),
      cluster_barrier(size_t(teams_)),
      product(shared.size() * warps),
      random_(uint64_t(settings.seed)),
      fibers_(shared.size() * threads),
      running_(shared.size(), threads) {
  for (auto& bytes : shared) {
    bytes.resize(size_t(shared_bytes));
    std::fill(bytes.begin(), bytes.end(), char(0xFF));  // NaNs
  }
  for (size_t k = 0; k < fibers_.size(); ++k) {
    Fiber& f = fibers_[k];
    f.block = int(k) / threads;
    f.thread = int(k) % threads;
    f.stack = take_stack();
    if (settings.detect) {
      f.clock.assign(size_t(tiles * threads + tiles * most_barriers), 0);
      f.clock[size_t(index(f))] = 1;
      f.seen = f.clock;
    }
    ready(&f);
  }
}

Grid::~Grid() {
  for (Fiber& f : fibers_) free_stacks.push_back(f.stack);
}

// A fiber's first turn begins here, on a stack of its own; later turns are long jumps.
void Grid::trampoline() {
  Grid& grid = *running;
  grid.entry_();
  grid.end();
  _longjmp(grid.scheduler_, 1);
}

void Grid::end() {
  current->ended = true;
  if (--running_[size_t(current->block)] > 0) return;
  for (const Message& message : messages_)
    if (message.block == current->block) fail("a block ends while it is still sent to");
}

void Grid::loop() {
  running = this;
  while (!(runnable_.empty() && messages_.empty()) && error.empty()) {
    size_t chosen = random_() % (runnable_.size() + messages_.size());
    if (chosen >= runnable_.size() && !runnable_.empty() && int64_t(random_() >> 1) % settings.slow)
      chosen %= runnable_.size();
    if (chosen >= runnable_.size()) {
      deliver(chosen - runnable_.size());
      continue;
    }
    current = runnable_[chosen];
    runnable_[chosen] = runnable_.back();
    runnable_.pop_back();
    if (_setjmp(scheduler_) != 0) continue;
    if (current->started) _longjmp(current->context, 1);
    current->started = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = current->stack;
    first.uc_stack.ss_size = stack_bytes;
    first.uc_link = nullptr;
    makecontext(&first, &Grid::trampoline, 0);
    setcontext(&first);
  }
  running = nullptr;
}

void Grid::ready(Fiber* fiber) {
  runnable_.push_back(fiber);
}

void Grid::park() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler_, 1);
}

void Grid::pause() {
  ready(current);
  park();
}

void Grid::meet(Rendezvous& place, int expected, bool ordered) {
  place.waiting.push_back(current);
  if (++place.arrived < expected) return park();
  std::vector<Fiber*> together;
  together.swap(place.waiting);
  place.arrived = 0;
  place.said = place.saying;
  place.saying = false;
  if (ordered && settings.detect) order(together);
  for (Fiber* fiber : together)
    if (fiber != current) ready(fiber);
}

void Grid::fail(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(current->block) + ", thread " +
            std::to_string(current->thread) + ")";
}

// --- order ---------------------------------------------------------------------------------

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t k = 0; k < other.size(); ++k) clock[k] = std::max(clock[k], other[k]);
}

// Threads of a team have a place each in the clocks of that team.
int Grid::index(const Fiber& f) const {
  return f.block % tiles * threads + f.thread;
}

void Grid::order(const std::vector<Fiber*>& together) {
  Clock clock = together[0]->clock, seen = together[0]->seen;
  for (const Fiber* fiber : together) {
    join(clock, fiber->clock);
    join(seen, fiber->seen);
  }
  for (Fiber* fiber : together) {
    const auto own = size_t(index(*fiber));
    fiber->clock = clock;
    fiber->seen = seen;
    ++fiber->clock[own];
    ++fiber->seen[own];
    fiber->sent.reset();
  }
}

bool Grid::before(const Clock& clock, const Access& access) const {
  return access.who < 0 || clock[size_t(access.who)] >= access.time;
}

// What the current thread does now comes after what it has sent.
Access Grid::now() {
  const int own = index(*current);
  if (current->sent) {
    ++current->clock[size_t(own)];
    ++current->seen[size_t(own)];
    current->sent.reset();
  }
  return {own, current->clock[size_t(own)]};
}

void Grid::wrote(const void* address, size_t bytes) {
  if (!settings.detect) return;
  const Access mine = now();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / 2; at < (begin + bytes + 1) / 2; ++at) {
    Shadow& shadow = shadows_[at];
    if (!before(current->clock, shadow.write)) fail("a race of two writes");
    for (const Access& access : shadow.reads)
      if (!before(current->clock, access)) fail("a race of a read and a write after it");
    shadow.write = mine;
    shadow.reads.clear();
  }
}

void Grid::read(const void* address, size_t bytes) {
  if (!settings.detect) return;
  const Access mine = now();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / 2; at < (begin + bytes + 1) / 2; ++at) {
    Shadow& shadow = shadows_[at];
    if (!before(current->clock, shadow.write)) fail("a race of a write and a read after it");
    shadow.reads.push_back(mine);
  }
}

void Grid::publish(const int32_t* flag) {
  if (!settings.detect) return;
  published_[flag] = current->clock;
  ++current->clock[size_t(index(*current))];
  ++current->seen[size_t(index(*current))];
}

void Grid::acquire(const int32_t* flag) {
  const auto found = published_.find(flag);
  if (!settings.detect || found == published_.end()) return;
  join(current->clock, found->second);
  join(current->seen, found->second);
}

void Grid::check(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto range = allowed.upper_bound(begin);
  if (range != allowed.begin()) --range;
  if (range == allowed.end() || begin < range->first ||
      begin + bytes > range->first + range->second)
    fail("an access outside of all tensors");
  if (begin % bytes != 0) fail("a misaligned access");
  if (!error.empty()) park();  // nothing more is touched
}

void Grid::check_shared(const void* address, size_t bytes) {
  const auto& own = shared[size_t(current->block)];
  const auto* at = static_cast<const char*>(address);
  if (at < own.data() || at + bytes > own.data() + own.size()) fail("outside of shared memory");
  if ((at - own.data()) % ptrdiff_t(bytes) != 0) fail("misaligned shared memory");
  if (!error.empty()) park();
}

// --- what a thread does --------------------------------------------------------------------

void Host::sync(Before what) {
  sync_any(what, false);
}

bool Host::sync_any(Before what, bool said) {
  const Ordering which = what == Before::sums     ? the_barrier_of_sums
                         : what == Before::others ? the_barrier_of_stores
                                                  : the_barrier_of_zeros;
  if (settings.omit == which) return said;
  Rendezvous& barrier = grid_.block_barrier[size_t(fiber_.block)];
  barrier.saying |= said;
  grid_.meet(barrier, threads, true);
  return barrier.said;
}

void Host::sync_warp() {
  if (settings.omit != the_warps_barrier)
    grid_.meet(grid_.warp_barrier[size_t(warp())], lanes, true);
}

bool Host::arrived(const int32_t* flag, int position) const {
  if (settings.omit == the_wait) return true;
  grid_.check(flag, sizeof *flag);
  if (*flag < position) {
    grid_.pause();
    return false;
  }
  if (settings.omit != the_acquire) grid_.acquire(flag);
  return true;
}

void Host::publish(int32_t* flag, int positions) {
  grid_.check(flag, sizeof *flag);
  if (settings.omit != the_release) grid_.publish(flag);
  *flag = positions;
}

}  // namespace cuda
}  // namespace fastlstm
