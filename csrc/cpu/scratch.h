// The machine's memory: scratch for one call, pages, the cache that weights should stay in, and
// whose caches they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastlstm {

constexpr size_t least_kept = size_t(1) << 20;  // bytes: smaller blocks are not worth keeping

// Throws std::bad_alloc; null for 0 bytes. A few large blocks are kept for the next call. Memory is
// aligned to 64 bytes, large blocks to huge pages; with `poison_scratch` on (tests) it comes filled
// with NaNs instead of whatever was there.
void* allocate_scratch(size_t bytes);
void free_scratch(void* memory, size_t bytes);
// Asks for huge pages where a block has room for some: a large block that is new to the process
// costs a page fault for every page, which for a training step is up to a tenth of its time.
void advise_huge_pages(void* memory, size_t bytes);
void poison_scratch(bool on);

// What a training step makes, kept for the next step; of what is kept beyond 128 MiB the system may
// have the pages. Throws std::bad_alloc; `bytes` of the block may be a quarter more than asked for.
struct Block {
  void* memory;
  size_t bytes;
};
Block allocate_reserve(size_t bytes);
void free_reserve(Block block);

namespace {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : count_(count > 0 ? count : 0),
        memory_(static_cast<T*>(allocate_scratch(size_t(count_) * sizeof(T)))) {}
  ~Scratch() { free_scratch(memory_, size_t(count_) * sizeof(T)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return memory_; }
  void clear() {
    if (count_ > 0) std::memset(static_cast<void*>(memory_), 0, size_t(count_) * sizeof(T));
  }

 private:
  const int64_t count_;
  T* const memory_;
};

}  // namespace

}  // namespace fastlstm
