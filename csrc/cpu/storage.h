// How values are stored: what each type in memory becomes in registers, loads and stores of
// vectors, whole or in part.
#pragma once

#include <cstring>
#include <type_traits>

#include "vec.h"

namespace fastlstm {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type of states and accumulators when S is stored.
template <class S>
struct StateOf {
  typedef float type;
};
template <>
struct StateOf<double> {
  typedef double type;
};

typedef uint16_t HalfVec __attribute__((vector_size(vector_bytes / 2)));

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  float tiny = float(mantissa) * 0x1p-24f;  // subnormal: exact in float
  return sign ? -tiny : tiny;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 rounds the value to a multiple of 2^-24 in the sum's last bits.
    float sum = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000));
  }
  uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);  // to nearest, ties to even
  return uint16_t(sign | ((rounded >> 13) - (112 << 10)));
}

inline float as_state(float value) {
  return value;
}
inline double as_state(double value) {
  return value;
}
inline float as_state(bf16 value) {
  return bit_cast<float>(uint32_t(value.bits) << 16);
}
inline float as_state(fp16 value) {
  return half_to_float(value.bits);
}

// What a vector is while it is stored as S: itself, or the halves of its values.
template <class S>
struct StoredAs {
  typedef Vec<S> type;
};
template <>
struct StoredAs<bf16> {
  typedef HalfVec type;
};
template <>
struct StoredAs<fp16> {
  typedef HalfVec type;
};

// A vector from what is stored of it. (By intrinsics: GCC makes several instructions of a
// __builtin_convertvector.)
template <class S>
FASTLSTM_INLINE auto from_storage(typename StoredAs<S>::type stored) {
  typedef Vector<float>::bits Bits;
  if constexpr (std::is_same<S, bf16>::value) {
#if defined(__AVX512F__)
    const Bits bits = bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(stored)));
#elif defined(__AVX2__)
    const Bits bits = bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(stored)));
#else
    const Bits bits = __builtin_convertvector(stored, Bits);
#endif
    return bit_cast<Vec<float>>(bits << 16);
  } else if constexpr (std::is_same<S, fp16>::value) {
#if defined(__AVX512F__)
    return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(stored)));
#elif defined(__F16C__)
    return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(stored)));
#elif defined(__aarch64__)
    return bit_cast<Vec<float>>(vcvt_f32_f16(bit_cast<float16x4_t>(stored)));
#else
    Vec<float> v;
    for (int k = 0; k < lanes<float>; ++k) v[k] = half_to_float(stored[k]);
    return v;
#endif
  } else {
    return stored;
  }
}

// To the nearest, ties to even.
template <class S>
FASTLSTM_INLINE typename StoredAs<S>::type to_storage(Vec<typename StateOf<S>::type> v) {
  typedef Vector<float>::bits Bits;
  if constexpr (std::is_same<S, bf16>::value) {
    Bits bits = bit_cast<Bits>(v);
    const Bits rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
    bits = (v == v ? rounded : nan) >> 16;
#if defined(__AVX512F__)
    return bit_cast<HalfVec>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
    const __m256i all = bit_cast<__m256i>(bits);
    return bit_cast<HalfVec>(
        _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return __builtin_convertvector(bits, HalfVec);
#endif
  } else if constexpr (std::is_same<S, fp16>::value) {
#if defined(__AVX512F__)
    return bit_cast<HalfVec>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bit_cast<HalfVec>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    return bit_cast<HalfVec>(vcvt_f16_f32(bit_cast<float32x4_t>(v)));
#else
    HalfVec half;
    for (int k = 0; k < lanes<float>; ++k) half[k] = float_to_half(v[k]);
    return half;
#endif
  } else {
    return v;
  }
}

template <class S>
inline auto load(const S* p) {
  typename StoredAs<S>::type stored;
  std::memcpy(&stored, p, sizeof stored);
  return from_storage<S>(stored);
}
// Of a vector, or of what is to be stored of one.
template <class S>
inline void store(S* p, typename StoredAs<S>::type stored) {
  std::memcpy(p, &stored, sizeof stored);
}
inline void store(bf16* p, Vec<float> v) {
  store(p, to_storage<bf16>(v));
}
inline void store(fp16* p, Vec<float> v) {
  store(p, to_storage<fp16>(v));
}

// The first n elements of a vector, of n less than all: read, with zeros for the others, and
// written. By masks where there are some; not under AddressSanitizer, which does not see what they
// touch.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
template <class S>
FASTLSTM_INLINE void read_some(S* to, const S* from, int n) {
  const auto mask = uint16_t((1u << n) - 1);
  if constexpr (sizeof(S) == 8)
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi64(uint8_t(mask), from));
  if constexpr (sizeof(S) == 4) _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(mask, from));
  if constexpr (sizeof(S) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(mask, from));
}
template <class S>
FASTLSTM_INLINE void write_some(S* to, const S* from, int n) {
  const auto mask = uint16_t((1u << n) - 1);
  if constexpr (sizeof(S) == 8)
    _mm512_mask_storeu_epi64(to, uint8_t(mask), _mm512_loadu_si512(from));
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_epi32(to, mask, _mm512_loadu_si512(from));
  if constexpr (sizeof(S) == 2)
    _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
#  if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
FASTLSTM_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
FASTLSTM_INLINE void read_some(float* to, const float* from, int n) {
  _mm256_storeu_ps(to, _mm256_maskload_ps(from, first_lanes(n)));
}
// By powers of two: masked stores are microcode on AMD's processors.
FASTLSTM_INLINE void write_some(float* to, const float* from, int n) {
  if (n & 4) _mm_storeu_ps(to, _mm_loadu_ps(from)), to += 4, from += 4;
  if (n & 2) _mm_storel_pi(reinterpret_cast<__m64*>(to), _mm_loadu_ps(from)), to += 2, from += 2;
  if (n & 1) *to = *from;
}
FASTLSTM_INLINE void read_some(double* to, const double* from, int n) {
  _mm256_storeu_pd(to, _mm256_maskload_pd(from, first_lanes(2 * n)));
}
FASTLSTM_INLINE void write_some(double* to, const double* from, int n) {
  _mm256_maskstore_pd(to, first_lanes(2 * n), _mm256_loadu_pd(from));
}
#  endif
template <class S>
FASTLSTM_INLINE void read_some(S* to, const S* from, int n) {
  for (int k = 0; k < lanes<typename StateOf<S>::type>; ++k) to[k] = k < n ? from[k] : S{};
}
template <class S>
FASTLSTM_INLINE void write_some(S* to, const S* from, int n) {
  for (int k = 0; k < n; ++k) to[k] = from[k];
}
#endif

template <class S>
inline auto load_some(const S* p, int n) {
  constexpr int all = lanes<typename StateOf<S>::type>;
  if (n >= all) return load(p);
  S some[all];
  read_some(some, p, n);
  return load(some);
}
template <class S, class V>
inline void store_some(S* p, V v, int n) {
  constexpr int all = lanes<typename StateOf<S>::type>;
  if (n >= all) return store(p, v);
  S some[all];
  store(some, v);
  write_some(p, some, n);
}

}  // namespace
}  // namespace fastlstm
