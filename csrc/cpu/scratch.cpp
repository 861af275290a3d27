#include "scratch.h"

#include <cstdlib>
#include <cstring>
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

void* allocate_scratch(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= 2 * huge_page ? huge_page : 64, bytes) != 0)
    throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  if (poison) std::memset(memory, 0xff, bytes);
  return memory;
}

void free_scratch(void* memory) {
  std::free(memory);
}

}  // namespace fastlstm
