// The instructions of AMX's matrix unit in C++, for processors without one: `make emulate` compiles
// csrc with this file included first, or second after avx512.h, and runs the kernels' tests.
// Misuse (an unset shape, sizes that do not fit) aborts, as it would fault on the unit. Order and
// rounding are the unit's, but for subnormal sums, which it takes for zeros: a product's even and
// odd pairs of K are summed apart, from zero, and then added to the accumulator. Slow.
#pragma once

#define FASTLSTM_EMULATED_AMX  // dispatch.cpp offers the kernels

#if defined(__AMX_TILE__)
#  include <immintrin.h>
#  include <stdint.h>
#  include <stdlib.h>
#  include <string.h>

namespace emulated {
namespace {

struct Register {
  uint8_t rows, row_bytes;
  alignas(64) char row[16][64];
};
thread_local Register registers[8];
thread_local bool configured = false;

inline void require(bool fine) {
  if (!fine) abort();
}

inline void load_config(const void* from) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  memcpy(&config, from, sizeof config);
  require(config.palette == 1 && config.start_row == 0);
  for (const uint8_t byte : config.reserved) require(byte == 0);
  for (int k = 8; k < 16; ++k) require(config.rows[k] == 0 && config.row_bytes[k] == 0);
  for (int k = 0; k < 8; ++k) {
    require(0 < config.rows[k] && config.rows[k] <= 16);
    require(0 < config.row_bytes[k] && config.row_bytes[k] <= 64);
    registers[k] = {config.rows[k], uint8_t(config.row_bytes[k]), {}};
  }
  configured = true;
}

inline void zero(int to) {
  require(configured);
  memset(registers[to].row, 0, sizeof registers[to].row);
}

inline void load(int to, const void* from, int64_t stride) {
  zero(to);
  for (int r = 0; r < registers[to].rows; ++r)
    memcpy(registers[to].row[r], static_cast<const char*>(from) + r * stride,
           registers[to].row_bytes);
}

inline void store(int from, void* to, int64_t stride) {
  require(configured);
  for (int r = 0; r < registers[from].rows; ++r)
    memcpy(static_cast<char*>(to) + r * stride, registers[from].row[r], registers[from].row_bytes);
}

// c += a b, of pairs of bfloat16.
inline void multiply(int to, int left, int right) {
  Register &c = registers[to], &a = registers[left], &b = registers[right];
  require(configured && c.rows == a.rows && a.row_bytes == 4 * b.rows &&
          c.row_bytes == b.row_bytes);
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int r = 0; r < c.rows; ++r) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < b.rows; ++k) {
      int32_t pair;
      memcpy(&pair, a.row[r] + 4 * k, sizeof pair);
      const __m512i value = _mm512_set1_epi32(pair), pairs = _mm512_load_si512(b.row[k]);
      even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_and_si512(value, low),
                              (__m512bh)_mm512_and_si512(pairs, low));
      odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_andnot_si512(low, value),
                             (__m512bh)_mm512_andnot_si512(low, pairs));
    }
    _mm512_store_ps(c.row[r], _mm512_add_ps(_mm512_load_ps(c.row[r]), _mm512_add_ps(even, odd)));
  }
}

}  // namespace
}  // namespace emulated

#  undef _tile_loadconfig
#  undef _tile_release
#  undef _tile_zero
#  undef _tile_loadd
#  undef _tile_stored
#  undef _tile_dpbf16ps
#  define _tile_loadconfig(from) emulated::load_config(from)
#  define _tile_release() (void)(emulated::configured = false)
#  define _tile_zero(to) emulated::zero(to)
#  define _tile_loadd(to, from, stride) emulated::load(to, from, stride)
#  define _tile_stored(from, to, stride) emulated::store(from, to, stride)
#  define _tile_dpbf16ps(to, left, right) emulated::multiply(to, left, right)
#endif
