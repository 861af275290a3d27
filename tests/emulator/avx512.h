// AVX-512 and its BF16 in C++, for processors that have AVX2 alone: `make emulate` compiles csrc
// with this file included first, before amx.h, and runs the kernels' tests. The compiler makes two
// instructions of AVX2 of each operation on a vector of 64 bytes; what csrc calls by an intrinsic's
// name is here. Values are the instructions' own, but for rcp14, an estimate that differs between
// processors too, and scalef by more than 400 powers of two. Slow.
#pragma once

#define FASTLSTM_EMULATED_AVX512  // dispatch.cpp offers the kernels, and no instruction is named

#if defined(__AVX512F__)
#  if defined(__clang__)
#    error "GCC alone: clang has no pragma that takes instructions away"
#  endif
#  pragma GCC diagnostic ignored "-Wpsabi"
#  pragma GCC optimize("O1")  // at O3 the tiles take ten minutes to compile
#  pragma GCC target("no-avx512f")
#  pragma GCC target("avx2,fma,f16c")
#  include <immintrin.h>
#  include <math.h>
#  include <stdint.h>
#  include <string.h>
// What the pragma took away, for csrc alone to ask.
#  define __AVX512F__ 1

namespace emulated {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint16_t HalfRow __attribute__((vector_size(32)));

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

// Lanes that the mask names, zeros for the others, which are not read.
template <class Vector, class Lane>
inline Vector load_some(uint32_t mask, const void* from) {
  Lane lanes[sizeof(Vector) / sizeof(Lane)] = {};
  for (size_t k = 0; k < sizeof(Vector) / sizeof(Lane); ++k)
    if (mask >> k & 1) memcpy(&lanes[k], static_cast<const Lane*>(from) + k, sizeof(Lane));
  return as<Vector>(lanes);
}
template <class Lane, class Vector>
inline void store_some(void* to, uint32_t mask, Vector vector) {
  Lane lanes[sizeof(Vector) / sizeof(Lane)];
  memcpy(lanes, &vector, sizeof vector);
  for (size_t k = 0; k < sizeof(Vector) / sizeof(Lane); ++k)
    if (mask >> k & 1) memcpy(static_cast<Lane*>(to) + k, &lanes[k], sizeof(Lane));
}

template <class Vector, class Lane>
inline Vector permuted(__m512i index, Vector from) {
  constexpr size_t count = sizeof(Vector) / sizeof(Lane);
  Lane lanes[count], out[count], indices[count];
  memcpy(lanes, &from, sizeof from);
  memcpy(indices, &index, sizeof index);
  for (size_t k = 0; k < count; ++k) out[k] = lanes[size_t(indices[k]) % count];
  return as<Vector>(out);
}

// The second where either is a NaN.
inline __m512 greater(__m512 a, __m512 b) {
  return as<__m512>(as<Floats>(a) > as<Floats>(b) ? as<Floats>(a) : as<Floats>(b));
}
template <int how>
inline uint16_t compared(__m512 a, __m512 b) {
  static_assert(how == _CMP_GE_OQ, "no other comparison is here");
  uint16_t mask = 0;
  for (int k = 0; k < 16; ++k) mask |= uint16_t((as<Floats>(a)[k] >= as<Floats>(b)[k]) << k);
  return mask;
}
inline __m512 kept(uint32_t mask, __m512 v) {
  Floats out = as<Floats>(v);
  for (int k = 0; k < 16; ++k)
    if (!(mask >> k & 1)) out[k] = 0;
  return as<__m512>(out);
}
inline __m512 scaled(__m512 a, __m512 n) {  // a 2^floor(n)
  Floats out{};
  for (int k = 0; k < 16; ++k)
    out[k] = as<Floats>(n)[k] != as<Floats>(n)[k]
                 ? as<Floats>(n)[k]
                 : ldexpf(as<Floats>(a)[k], int(fminf(fmaxf(floorf(as<Floats>(n)[k]), -400), 400)));
  return as<__m512>(out);
}

inline float flushed(float x) {
  return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x;
}
// To the nearest, ties to even; subnormals are taken for zeros.
inline uint16_t rounded(float x) {
  const uint32_t bits = as<uint32_t>(flushed(x));
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline HalfRow narrowed(__m512 v) {
  HalfRow out{};
  for (int k = 0; k < 16; ++k) out[k] = rounded(as<Floats>(v)[k]);
  return out;
}
inline __m512bh narrowed(__m512 high, __m512 low) {
  const HalfRow rows[2] = {narrowed(low), narrowed(high)};
  return as<__m512bh>(rows);
}
// sum += the products of pairs: those of the odd places first, each product and sum rounded once.
inline __m512 add_products(__m512 sum, __m512bh a, __m512bh b) {
  const Words left = as<Words>(a), right = as<Words>(b);
  Floats out = as<Floats>(sum);
  for (int k = 0; k < 16; ++k) {
    const float odd = fmaf(flushed(as<float>(left[k] & 0xffff0000)),
                           flushed(as<float>(right[k] & 0xffff0000)), flushed(out[k]));
    out[k] = flushed(
        fmaf(flushed(as<float>(left[k] << 16)), flushed(as<float>(right[k] << 16)), flushed(odd)));
  }
  return as<__m512>(out);
}

inline __m512i widened(__m256i halves) {
  return as<__m512i>(__builtin_convertvector(as<HalfRow>(halves), Words));
}
inline __m256i lower_halves(__m512i words) {
  return as<__m256i>(__builtin_convertvector(as<Words>(words), HalfRow));
}
inline __m256i part(__m512i v, int which) {
  __m256i parts[2];
  memcpy(parts, &v, sizeof v);
  return parts[which];
}
inline __m512 from_halves(__m256i halves) {
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                           _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  return as<__m512>(parts);
}
template <int how>
inline __m256i to_halves(__m512 v) {
  static_assert(how == _MM_FROUND_TO_NEAREST_INT, "no other rounding is here");
  __m256 parts[2];
  memcpy(parts, &v, sizeof v);
  const __m128i halves[2] = {_mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT)};
  return as<__m256i>(halves);
}
inline __m512 every(float x) {
  return as<__m512>(x - Floats{});
}
inline __m512i every(int32_t x) {
  return as<__m512i>(x + Ints{});
}

}  // namespace
}  // namespace emulated

#  define _mm512_setzero_ps() emulated::every(0.0f)
#  define _mm512_set1_ps(x) emulated::every(float(x))
#  define _mm512_set1_epi32(x) emulated::every(int32_t(x))
#  define _mm512_load_ps(from) emulated::load<__m512>(from)
#  define _mm512_loadu_ps(from) emulated::load<__m512>(from)
#  define _mm512_load_si512(from) emulated::load<__m512i>(from)
#  define _mm512_loadu_si512(from) emulated::load<__m512i>(from)
#  define _mm512_store_ps(to, v) emulated::store_some<float>(to, 0xffff, v)
#  define _mm512_storeu_ps(to, v) emulated::store_some<float>(to, 0xffff, v)
#  define _mm512_storeu_si512(to, v) emulated::store_some<int32_t>(to, 0xffff, v)
#  define _mm512_maskz_loadu_epi64(mask, from) emulated::load_some<__m512i, int64_t>(mask, from)
#  define _mm512_maskz_loadu_epi32(mask, from) emulated::load_some<__m512i, int32_t>(mask, from)
#  define _mm512_maskz_loadu_epi16(mask, from) emulated::load_some<__m512i, int16_t>(mask, from)
#  define _mm256_maskz_loadu_epi16(mask, from) emulated::load_some<__m256i, int16_t>(mask, from)
#  define _mm512_mask_storeu_epi64(to, mask, v) emulated::store_some<int64_t>(to, mask, v)
#  define _mm512_mask_storeu_epi32(to, mask, v) emulated::store_some<int32_t>(to, mask, v)
#  define _mm256_mask_storeu_epi16(to, mask, v) emulated::store_some<int16_t>(to, mask, v)
#  define _mm512_permutexvar_ps(index, v) emulated::permuted<__m512, uint32_t>(index, v)
#  define _mm512_permutexvar_pd(index, v) emulated::permuted<__m512d, uint64_t>(index, v)
#  define _mm512_permutexvar_epi16(index, v) emulated::permuted<__m512i, uint16_t>(index, v)
#  define _mm512_add_ps(a, b) ((a) + (b))
#  define _mm512_and_si512(a, b) ((a) & (b))
#  define _mm512_andnot_si512(a, b) (~(a) & (b))
#  define _mm512_abs_ps(v) emulated::as<__m512>(emulated::as<emulated::Words>(v) & 0x7fffffffu)
#  define _mm512_max_ps(a, b) emulated::greater(a, b)
#  define _mm512_cmp_ps_mask(a, b, how) emulated::compared<how>(a, b)
#  define _mm512_maskz_mov_ps(mask, v) emulated::kept(mask, v)
#  define _mm512_rcp14_ps(v) \
    emulated::as<__m512>(emulated::as<emulated::Words>(1.0f / (v)) & 0xfffffe00u)
#  define _mm512_scalef_ps(a, n) emulated::scaled(a, n)
#  define _mm512_cvtneps_pbh(v) emulated::narrowed(v)
#  define _mm512_cvtne2ps_pbh(high, low) emulated::narrowed(high, low)
#  define _mm512_dpbf16_ps(sum, a, b) emulated::add_products(sum, a, b)
#  define _mm512_cvtepu16_epi32(v) emulated::widened(v)
#  define _mm512_cvtepi32_epi16(v) emulated::lower_halves(v)
#  define _mm512_castsi512_si256(v) emulated::part(v, 0)
#  define _mm512_extracti64x4_epi64(v, which) emulated::part(v, which)
#  define _mm512_cvtph_ps(v) emulated::from_halves(v)
#  define _mm512_cvtps_ph(v, how) emulated::to_halves<how>(v)
#endif
