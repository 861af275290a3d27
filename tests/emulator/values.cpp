// Numbers as a GPU stores them, and the product of its tensor cores.
#include <algorithm>
#include <cmath>

#include "host.h"

namespace fastlstm {
namespace cuda {

uint32_t bits_of(float x) {
  return Host::bits(x);
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint16_t narrow_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float widen_bf16(uint16_t x) {
  return float_of(uint32_t(x) << 16);
}

uint16_t narrow_f16(float x) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  if (std::isnan(x)) return 0x7FFF;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // In units of the last place; nearbyint rounds to even.
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const auto units = uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | uint16_t((uint32_t(exponent + 14) << 10) + units);
}

float widen_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  float magnitude = std::ldexp(float(mantissa), -24);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  if (exponent > 0 && exponent < 31) magnitude = std::ldexp(float(mantissa + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties away from zero.
uint32_t round_tf32(uint32_t bits) {
  if (std::isnan(float_of(bits))) return 0x7FFFE000;
  return (bits + 0x1000) & ~0x1FFFu;
}

// Element e of a word.
template <Storage storage>
float element_of(uint32_t word, int e) {
  if constexpr (storage == Storage::f32) return float_of(word & ~0x1FFFu);
  return Host::widen<storage == Storage::f32 ? Storage::f16 : storage>(uint16_t(word >> (16 * e)));
}

// "Matrix fragments for mma.m16n8k16 with floating point type" and ".. m16n8k8 .tf32" of the PTX
// manual. In words of 4 bytes both are: a0 (g, q), a1 (g+8, q), a2 (g, q+4), a3 (g+8, q+4);
// b0 (q, g), b1 (q+4, g); c0 (g, 2q), c1 (g, 2q+1), c2 (g+8, 2q), c3 (g+8, 2q+1). Written out here
// once more, by element, and not with the functions of layout.h.
template <Storage storage>
void Host::multiply_add(float (&sum)[4], const Piece& a, uint32_t b0, uint32_t b1) {
  constexpr bool tf32 = storage == Storage::f32;
  constexpr int depth = tf32 ? 8 : 16;
  const int lane = fiber_.thread % lanes;
  auto& brought = grid_.product[size_t(warp())].lanes_[fiber_.products++ % 2];
  brought[lane] = {a, {b0, b1}};
  grid_.meet(grid_.product_barrier[size_t(warp())], lanes, false);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
    float total = sum[i];
    for (int k = 0; k < depth; ++k) {
      float left, right;
      if constexpr (tf32) {
        // a(row, k): row = g or g + 8; k = q or q + 4. b(k, column): k = q or q + 4.
        const int q = k % 4, far = k / 4;
        left = element_of<storage>(brought[row % 8 * 4 + q].a.word[row / 8 + 2 * far], 0);
        right = element_of<storage>(brought[column * 4 + q].b[far], 0);
      } else {
        // a_i(row, k): k = 2q + (i & 1), 8 further for i >= 4. b_i(k, column) alike.
        const int q = k % 8 / 2, far = k / 8;
        left = element_of<storage>(brought[row % 8 * 4 + q].a.word[row / 8 + 2 * far], k % 2);
        right = element_of<storage>(brought[column * 4 + q].b[far], k % 2);
      }
      total += left * right;
    }
    sum[i] = total;
  }
}

template void Host::multiply_add<Storage::f32>(float (&)[4], const Piece&, uint32_t, uint32_t);
template void Host::multiply_add<Storage::f16>(float (&)[4], const Piece&, uint32_t, uint32_t);
template void Host::multiply_add<Storage::bf16>(float (&)[4], const Piece&, uint32_t, uint32_t);

}  // namespace cuda
}  // namespace fastlstm
