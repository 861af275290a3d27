#include "dispatch.h"

#include <cstring>
#if defined(__x86_64__)
#  include <cpuid.h>
#endif
#if defined(FASTLSTM_AMX) && defined(__linux__)
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace fastlstm {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

#if defined(FASTLSTM_AVX512_BF16)
extern const Kernels kernels_avx512_bf16;

// Vectors' dot products of bfloat16. (Not every compiler has a name for them to ask for.)
static bool has_bf16_vectors() {
#  if defined(FASTLSTM_EMULATED_AVX512)  // tests/emulator/avx512.h
  return true;
#  else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#  endif
}
#endif

#if defined(FASTLSTM_AMX) && defined(__linux__)
extern const Kernels kernels_amx;

// The processor has the matrix unit, and the system lets this process use its registers: they are
// so large that Linux saves them only for those who ask.
static bool amx_permitted() {
#  if defined(FASTLSTM_EMULATED_AMX)  // tests/emulator/amx.h
  return has_bf16_vectors();
#  endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16_tiles = d >> 22 & 1;
  constexpr int request_permission = 0x1023, tile_data = 18;
  return tiles && bf16_tiles && has_bf16_vectors() &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

int available_kernels(const Kernels** out, int capacity) {
  int count = 0;
  auto offer = [&](bool runs, const Kernels& table) {
    if (runs && count < capacity) out[count++] = &table;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#  if defined(FASTLSTM_EMULATED_AVX512)
  const bool avx512 = avx2;
#  else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#  endif
#  if defined(FASTLSTM_AMX) && defined(__linux__)
  offer(avx2 && avx512 && amx_permitted(), kernels_amx);
#  endif
#  if defined(FASTLSTM_AVX512_BF16)
  offer(avx2 && avx512 && has_bf16_vectors(), kernels_avx512_bf16);
#  endif
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
  const Kernels* tables[most_kernels];
  const int count = available_kernels(tables, most_kernels);
  for (int k = 0; k < count; ++k) {
    if (std::strcmp(tables[k]->name, name) == 0) {
      chosen() = tables[k];
      return true;
    }
  }
  return false;
}

static bool spares = true;

bool spares_matrix_unit() {
  return spares;
}
void spare_matrix_unit(bool on) {
  spares = on;
}

}  // namespace fastlstm
