#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#  include <sys/mman.h>
#  include <unistd.h>
#endif

namespace fastlstm {

static bool poison = false;

void poison_scratch(bool on) {
  poison = on;
}

static constexpr size_t huge_page = size_t(2) << 20;
static constexpr size_t most_held = size_t(128) << 20;  // of each store, without a way back

#if defined(__linux__)
// A hint about the whole pages of a block.
static void advise(void* memory, size_t bytes, size_t page, int advice) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}
#endif

void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  advise(memory, bytes, huge_page, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// The system may take the pages when it needs some, until they are written to again.
static void offer_pages(Block block) {
#if defined(__linux__) && defined(MADV_FREE)
  advise(block.memory, block.bytes, size_t(sysconf(_SC_PAGESIZE)), MADV_FREE);
#else
  (void)block;
#endif
}

// Large blocks that were freed and wait for the next call of the same shape: fresh pages cost a
// fault and a clearing each, and threads that meet at every step wait for each other's. The oldest
// make room for new ones. Whoever finds the store in use goes without it, so that nothing waits
// here, in a forked child least of all.
class Store {
 public:
  explicit Store(size_t most) : most_(most) {}

  // The smallest block of at least so many bytes and at most `spare` more, the newest of those; or
  // none.
  Block take(size_t bytes, size_t spare) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    int best = -1;
    for (int k = 0; lock && k < count_; ++k)
      if (blocks_[k].bytes >= bytes && blocks_[k].bytes - bytes <= spare)
        if (best < 0 || blocks_[k].bytes <= blocks_[best].bytes) best = k;
    return best < 0 ? Block{nullptr, 0} : remove(best);
  }

  // Bytes of all blocks; many where that cannot be told.
  size_t kept() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock ? kept_ : SIZE_MAX;
  }

  // Frees the oldest blocks, until so many bytes are or none is left.
  void release(size_t bytes) {
    Freed freed;
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    while (lock && count_ > 0 && freed.bytes < bytes) freed.add(remove(0));
  }

  bool keep(Block block) {
    if (block.bytes < least_kept || block.bytes > most_) return false;
    Freed freed;
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    while (count_ == capacity || kept_ + block.bytes > most_) freed.add(remove(0));
    blocks_[count_++] = block;
    kept_ += block.bytes;
    fresh_ += block.bytes;
    return true;
  }

  // Has the pages of all but so many bytes of the newest blocks offered to the system, once. A
  // block is not here meanwhile, so that nobody takes it and writes to what is being offered.
  void offer(size_t newest) {
    for (Block block; (block = take_older(newest)).memory != nullptr;) {
      offer_pages(block);
      if (!put_back(block)) std::free(block.memory);
    }
  }

 private:
  static constexpr int capacity = 256;

  // Freed when the store is not locked any more, since that takes long.
  struct Freed {
    Block blocks[capacity];
    int count = 0;
    size_t bytes = 0;
    void add(Block block) {
      blocks[count++] = block;
      bytes += block.bytes;
    }
    ~Freed() {
      for (int k = 0; k < count; ++k) std::free(blocks[k].memory);
    }
  };

  Block take_older(size_t newest) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock && fresh_ > newest ? remove(offered_) : Block{nullptr, 0};
  }
  bool put_back(Block block) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || count_ == capacity) return false;
    for (int k = count_++; k > offered_; --k) blocks_[k] = blocks_[k - 1];
    blocks_[offered_++] = block;
    kept_ += block.bytes;
    return true;
  }

  Block remove(int k) {
    const Block block = blocks_[k];
    kept_ -= block.bytes;
    if (k < offered_)
      --offered_;
    else
      fresh_ -= block.bytes;
    for (--count_; k < count_; ++k) blocks_[k] = blocks_[k + 1];
    return block;
  }

  const size_t most_;
  std::mutex mutex_;
  Block blocks_[capacity];       // oldest first
  int count_ = 0, offered_ = 0;  // how many of them, the oldest, were offered to the system
  size_t kept_ = 0, fresh_ = 0;  // bytes of all, and of those that were not
};

// Never destroyed: a call may outlive static destructors.
static Store& scratch_store() {
  static Store* forever = new Store(most_held);
  return *forever;
}
static Store& reserve_store() {
  static Store* forever = new Store(SIZE_MAX);
  return *forever;
}

static Block try_to_allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= 2 * huge_page ? huge_page : 64, bytes) != 0) return {};
  advise_huge_pages(memory, bytes);
  return {memory, bytes};
}

static Block allocate(size_t bytes) {
  Block block = try_to_allocate(bytes);
  if (block.memory == nullptr) {  // what is kept may be what is missing
    scratch_store().release(SIZE_MAX);
    reserve_store().release(SIZE_MAX);
    block = try_to_allocate(bytes);
  }
  if (block.memory == nullptr) throw std::bad_alloc();
  return block;
}

void* allocate_scratch(size_t bytes) {
  if (bytes == 0) return nullptr;
  Block block = scratch_store().take(bytes, 0);
  if (block.memory == nullptr) block = allocate(bytes);
  if (poison) std::memset(block.memory, 0xff, bytes);
  return block.memory;
}

void free_scratch(void* memory, size_t bytes) {
  if (!scratch_store().keep({memory, bytes})) std::free(memory);
}

// Bytes of the blocks that are in use, and the most that ever were.
static std::atomic<size_t> in_use{0}, most_in_use{0};

// A block that is not found takes the place of others, where else what is kept and what is in use
// came to a quarter more than was once in use. (Taking their place always would be too much: a step
// that has a block more in use than the one before, as where a program holds on to an output for as
// long, pushes out another block, which then pushes out the next, at every step.)
Block allocate_reserve(size_t bytes) {
  Block block = reserve_store().take(bytes, bytes / 4);
  if (block.memory == nullptr) {
    const size_t used = in_use + bytes, most = std::max<size_t>(most_in_use, used);
    const size_t allowed = most + most / 4 - used, kept = reserve_store().kept();
    if (kept > allowed) reserve_store().release(std::min(bytes, kept - allowed));
    block = allocate(bytes);
  }
  // Only now: what could not be allocated was never in use.
  const size_t used = in_use += block.bytes;
  size_t most = most_in_use;
  while (most < used && !most_in_use.compare_exchange_weak(most, used)) continue;
  return block;
}

// What was in use last stays as it is: offering pages takes some per cent of a small model's
// training step, of two threads up to a quarter, mostly afterwards, when they are written to. So a
// large model that is not run any more does not slow a small one down.
void free_reserve(Block block) {
  in_use -= block.bytes;
  if (reserve_store().keep(block))
    reserve_store().offer(most_held);
  else
    std::free(block.memory);
}

}  // namespace fastlstm
