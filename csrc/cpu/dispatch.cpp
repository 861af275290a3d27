#include "dispatch.h"

#include <cstring>

namespace fastlstm {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

int available_kernels(const Kernels** out, int capacity) {
  int count = 0;
  auto offer = [&](bool runs, const Kernels& table) {
    if (runs && count < capacity) out[count++] = &table;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  offer(avx2 && avx512, kernels_avx512);
  offer(avx2, kernels_avx2);  // every processor with AVX2 and FMA has F16C
#endif
  offer(true, kernels_baseline);
  return count;
}

static const Kernels* best() {
  const Kernels* table[1];
  available_kernels(table, 1);
  return table[0];
}

static const Kernels*& chosen() {
  static const Kernels* table = best();
  return table;
}

const Kernels& kernels() {
  return *chosen();
}

bool use_kernels(const char* name) {
  const Kernels* tables[3];
  const int count = available_kernels(tables, 3);
  for (int k = 0; k < count; ++k) {
    if (std::strcmp(tables[k]->name, name) == 0) {
      chosen() = tables[k];
      return true;
    }
  }
  return false;
}

}  // namespace fastlstm
