#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "cuda/backward.h"
#include "cuda/dispatch.h"
#include "cuda/forward.h"
#include "cuda/probe.h"

namespace fastlstm {
namespace cuda {
namespace {

struct Settings {
  int64_t seed = 0, blocks = 1 << 20;
  bool detect = false;
  Ordering omit = nothing;
} settings;

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
      product(shared.size() * warps),
      random_(uint64_t(settings.seed)),
      fibers_(shared.size() * threads) {
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
      f.clock.assign(size_t(tiles * threads), 0);
      f.clock[size_t(index(f))] = 1;
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
  grid.current->ended = true;
  _longjmp(grid.scheduler_, 1);
}

template <class Body>
const char* Grid::run(const Body& body) {
  entry_ = [&] {
    Host host(*this);
    body(host);
  };
  running = this;
  loop();
  running = nullptr;
  for (const Fiber& f : fibers_)
    if (!f.ended && error.empty()) error = "some threads wait for ever";
  static std::string said;
  said = error;
  return said.empty() ? nullptr : said.c_str();
}

void Grid::loop() {
  // volatile: these live across the jumps.
  while (!runnable_.empty() && error.empty()) {
    const size_t chosen = random_() % runnable_.size();
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
}

void Grid::ready(Fiber* fiber) {
  fiber->parked = false;
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

// Threads of a team have a place each in the clocks of that team.
int Grid::index(const Fiber& f) const {
  return f.block % tiles * threads + f.thread;
}

void Grid::order(const std::vector<Fiber*>& together) {
  Clock all = together[0]->clock;
  for (const Fiber* fiber : together)
    for (size_t k = 0; k < all.size(); ++k) all[k] = std::max(all[k], fiber->clock[k]);
  for (Fiber* fiber : together) {
    fiber->clock = all;
    ++fiber->clock[size_t(index(*fiber))];
  }
}

bool Grid::before(const Access& access) const {
  return access.thread < 0 || access.thread == index(*current) ||
         current->clock[size_t(access.thread)] >= access.time;
}

void Grid::wrote(const void* address, size_t bytes) {
  if (!settings.detect) return;
  const Access mine{index(*current), current->clock[size_t(index(*current))]};
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / 2; at < (begin + bytes + 1) / 2; ++at) {
    Shadow& shadow = shadows_[at];
    if (!before(shadow.write)) fail("a race of two writes");
    for (const Access& access : shadow.reads)
      if (!before(access)) fail("a race of a read and a write after it");
    shadow.write = mine;
    shadow.reads.clear();
  }
}

void Grid::read(const void* address, size_t bytes) {
  if (!settings.detect) return;
  const Access mine{index(*current), current->clock[size_t(index(*current))]};
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / 2; at < (begin + bytes + 1) / 2; ++at) {
    Shadow& shadow = shadows_[at];
    if (!before(shadow.write)) fail("a race of a write and a read after it");
    shadow.reads.push_back(mine);
  }
}

void Grid::publish(const int32_t* flag) {
  if (!settings.detect) return;
  published_[flag] = current->clock;
  ++current->clock[size_t(index(*current))];
}

void Grid::acquire(const int32_t* flag) {
  const auto found = published_.find(flag);
  if (!settings.detect || found == published_.end()) return;
  for (size_t k = 0; k < found->second.size(); ++k)
    current->clock[k] = std::max(current->clock[k], found->second[k]);
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

void Host::sync() {
  // A step has two: of the sums, then of the stores.
  const Ordering which = fiber_.barriers++ % 2 == 0 ? the_barrier_of_sums : the_barrier_of_stores;
  if (settings.omit != which) grid_.meet(grid_.block_barrier[size_t(fiber_.block)], threads, true);
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

// --- values --------------------------------------------------------------------------------

uint32_t bits_of(float x) {
  return Host::bits(x);
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint16_t narrow_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float widen_bf16(uint16_t x) {
  return float_of(uint32_t(x) << 16);
}

uint16_t narrow_f16(float x) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  if (std::isnan(x)) return 0x7FFF;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // In units of the last place; nearbyint rounds to even.
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const auto units = uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | uint16_t((uint32_t(exponent + 14) << 10) + units);
}

float widen_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  float magnitude = std::ldexp(float(mantissa), -24);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  if (exponent > 0 && exponent < 31) magnitude = std::ldexp(float(mantissa + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties away from zero.
uint32_t round_tf32(uint32_t bits) {
  if (std::isnan(float_of(bits))) return 0x7FFFE000;
  return (bits + 0x1000) & ~0x1FFFu;
}

// Element e of a word.
template <Storage storage>
float element_of(uint32_t word, int e) {
  if constexpr (storage == Storage::f32) return float_of(word & ~0x1FFFu);
  return Host::widen<storage == Storage::f32 ? Storage::f16 : storage>(uint16_t(word >> (16 * e)));
}

// "Matrix fragments for mma.m16n8k16 with floating point type" and ".. m16n8k8 .tf32" of the PTX
// manual. In words of 4 bytes both are: a0 (g, q), a1 (g+8, q), a2 (g, q+4), a3 (g+8, q+4);
// b0 (q, g), b1 (q+4, g); c0 (g, 2q), c1 (g, 2q+1), c2 (g+8, 2q), c3 (g+8, 2q+1). Written out here
// once more, by element, and not with the functions of layout.h.
template <Storage storage>
void Host::multiply_add(float (&sum)[4], const Piece& a, uint32_t b0, uint32_t b1) {
  constexpr bool tf32 = storage == Storage::f32;
  constexpr int depth = tf32 ? 8 : 16;
  const int lane = fiber_.thread % lanes;
  auto& brought = grid_.product[size_t(warp())].lanes_[fiber_.products++ % 2];
  brought[lane] = {a, {b0, b1}};
  grid_.meet(grid_.product_barrier[size_t(warp())], lanes, false);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
    float total = sum[i];
    for (int k = 0; k < depth; ++k) {
      float left, right;
      if constexpr (tf32) {
        // a(row, k): row = g or g + 8; k = q or q + 4. b(k, column): k = q or q + 4.
        const int q = k % 4, far = k / 4;
        left = element_of<storage>(brought[row % 8 * 4 + q].a.word[row / 8 + 2 * far], 0);
        right = element_of<storage>(brought[column * 4 + q].b[far], 0);
      } else {
        // a_i(row, k): k = 2q + (i & 1), 8 further for i >= 4. b_i(k, column) alike.
        const int q = k % 8 / 2, far = k / 8;
        left = element_of<storage>(brought[row % 8 * 4 + q].a.word[row / 8 + 2 * far], k % 2);
        right = element_of<storage>(brought[column * 4 + q].b[far], k % 2);
      }
      total += left * right;
    }
    sum[i] = total;
  }
}

// --- instances -----------------------------------------------------------------------------

namespace {

int together(const char**) {
  return int(settings.blocks);
}

template <class C>
const char* launch(const void* args, int tiles, int teams, void*) {
  Grid grid(tiles, teams, C::shared_bytes);
  const char* error = grid.run([&](Host& host) {
    if constexpr (C::kind == Kind::forward)
      Forward<C, Host>(*static_cast<const ForwardArgs*>(args), host).walk();
    else
      Backward<C, Host>(*static_cast<const BackwardArgs*>(args), host).walk();
  });
  return error;
}

template <Kind kind, Storage storage, int pairs, int n_tiles>
constexpr Instance instance() {
  if constexpr (is_compiled(kind, pairs, n_tiles)) {
    using C = Config<kind, storage, pairs, n_tiles>;
    return {kind, storage, pairs, n_tiles, C::shared_bytes, &together, &launch<C>};
  }
  return {};
}

template <Storage storage, int pairs>
constexpr Instance table[instances_in_table] = {
    instance<Kind::forward, storage, pairs, 1>(),  instance<Kind::forward, storage, pairs, 2>(),
    instance<Kind::forward, storage, pairs, 4>(),  instance<Kind::backward, storage, pairs, 1>(),
    instance<Kind::backward, storage, pairs, 2>(), instance<Kind::backward, storage, pairs, 4>(),
};

}  // namespace

const Instance* const instance_tables[] = {
    table<Storage::f16, 1>,
    table<Storage::bf16, 1>,
    table<Storage::bf16, 2>,
    table<Storage::f32, 1>,
    table<Storage::f32, 2>,
    table<Storage::f32, 8>,
    nullptr,
};

void probe(const Probe& p, void*) {
  for (int64_t k = 0; k < p.n; ++k) probe_point(p, k);
}

}  // namespace cuda
}  // namespace fastlstm
