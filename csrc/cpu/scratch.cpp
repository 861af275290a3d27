#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace fastlstm {

static bool poison = false;

void poison_scratch(bool on) {
  poison = on;
}

static constexpr size_t huge_page = size_t(2) << 20;

void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge_page - 1) & ~(huge_page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(huge_page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint
#else
  (void)memory, (void)bytes;
#endif
}

int64_t l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t(1) << 20;
}

// Large blocks that were freed and wait for the next call of the same shape: fresh pages cost a
// fault and a clearing each, for a layer with one row a step up to a tenth of its time. The oldest
// make room for new ones. Whoever finds the store in use goes without it, so that nothing waits
// here, in a forked child least of all.
class Store {
 public:
  void* take(size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    for (int k = 0; lock && k < count_; ++k)
      if (blocks_[k].bytes == bytes) return remove(k);
    return nullptr;
  }

  bool keep(void* memory, size_t bytes) {
    if (bytes < smallest || bytes > most) return false;
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    while (count_ == capacity || kept_ + bytes > most) std::free(remove(0));
    blocks_[count_++] = {memory, bytes};
    kept_ += bytes;
    return true;
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  static constexpr size_t smallest = size_t(1) << 20, most = size_t(64) << 20;
  static constexpr int capacity = 8;

  void* remove(int k) {
    void* memory = blocks_[k].memory;
    kept_ -= blocks_[k].bytes;
    for (--count_; k < count_; ++k) blocks_[k] = blocks_[k + 1];
    return memory;
  }

  std::mutex mutex_;
  Block blocks_[capacity];  // oldest first
  int count_ = 0;
  size_t kept_ = 0;
};

static Store& store() {
  static Store* forever = new Store;  // never destroyed: a call may outlive static destructors
  return *forever;
}

void* allocate_scratch(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = store().take(bytes);
  if (memory == nullptr) {
    if (posix_memalign(&memory, bytes >= 2 * huge_page ? huge_page : 64, bytes) != 0)
      throw std::bad_alloc();
    advise_huge_pages(memory, bytes);
  }
  if (poison) std::memset(memory, 0xff, bytes);
  return memory;
}

void free_scratch(void* memory, size_t bytes) {
  if (!store().keep(memory, bytes)) std::free(memory);
}

}  // namespace fastlstm
