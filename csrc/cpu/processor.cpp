#include "processor.h"

#include <cstring>

#if defined(__x86_64__)
#  include <cpuid.h>
#endif
#if defined(__linux__)
#  include <unistd.h>
#endif

namespace fastlstm {

enum class Maker { other, intel, amd };

struct Processor {
  Maker maker;
  int64_t l2_cache_bytes;
};

static Maker maker_at_hand() {
#if defined(__x86_64__)
  unsigned highest, name[3];  // in the order of the registers: "Genu" "ntel" "ineI"
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

void assume_processor(const char* maker, int64_t l2_cache_bytes) {
  if (maker == nullptr) {
    assumed() = at_hand();
    return;
  }
  const bool intel = std::strcmp(maker, "intel") == 0, amd = std::strcmp(maker, "amd") == 0;
  assumed() = {intel ? Maker::intel : amd ? Maker::amd : Maker::other, l2_cache_bytes};
}

}  // namespace fastlstm
