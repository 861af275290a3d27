#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastlstm {

static bool poison = false;

void poison_scratch(bool on) { poison = on; }

void* allocate_scratch(size_t bytes) {
  constexpr size_t huge_page = size_t(2) << 20;
  const bool large = bytes >= 2 * huge_page;
  void* memory = nullptr;
  if (posix_memalign(&memory, large ? huge_page : 64, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (large) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: page faults and TLB misses cost
#endif
  if (poison) std::memset(memory, 0xff, bytes);
  return memory;
}

void free_scratch(void* memory) { std::free(memory); }

}  // namespace fastlstm
