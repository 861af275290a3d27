#include "processor.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#  include <cpuid.h>
#endif
#if defined(__linux__)
#  include <unistd.h>
#endif

namespace fastlstm {

static Maker maker_at_hand() {
#if defined(__x86_64__)
  unsigned highest, name[3];  // of ebx, edx and ecx: "Genu" "ineI" "ntel"
  if (!__get_cpuid(0, &highest, &name[0], &name[2], &name[1])) return Maker::other;
  if (std::memcmp(name, "GenuineIntel", sizeof name) == 0) return Maker::intel;
  if (std::memcmp(name, "AuthenticAMD", sizeof name) == 0) return Maker::amd;
#endif
  return Maker::other;
}

static Processor at_hand() {
  int64_t bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return {maker_at_hand(), bytes > 0 ? bytes : int64_t(1) << 20};
}

static Processor& assumed() {
  static Processor processor = at_hand();
  return processor;
}

bool is_intel() {
  return assumed().maker == Maker::intel;
}
bool is_amd() {
  return assumed().maker == Maker::amd;
}
int64_t l2_cache_bytes() {
  return assumed().l2_cache_bytes;
}

Processor assume_processor(const Processor& other) {
  return std::exchange(assumed(), other);
}

}  // namespace fastlstm
