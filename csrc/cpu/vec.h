// SIMD values for one instruction set: types, loads and stores by storage type, and the
// primitives that gate_math.h asks for. Compiled once for each instruction set; everything is
// internal to that object (see isa.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
// GCC 12's own header leaves "undefined" vectors uninitialised on purpose, and warns about it.
#  pragma GCC diagnostic push
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  include <immintrin.h>
#  pragma GCC diagnostic pop
#endif

#include "../gate_math.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#  define FASTLSTM_VECTOR_REGISTERS 32
#else
#  define FASTLSTM_VECTOR_REGISTERS 16
#endif

namespace fastlstm {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
  typedef uint32_t bits __attribute__((vector_size(vector_bytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
  typedef uint64_t bits __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

template <class To, class From>
inline __attribute__((always_inline)) To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- storage types -----------------------------------------------------------------------

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

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// (By intrinsics, here and where bfloat16 is stored: GCC makes several instructions of a
// __builtin_convertvector.)
inline Vec<float> load(const bf16* p) {
  typedef Vector<float>::bits Bits;
#if defined(__AVX512F__)
  const Bits bits = bit_cast<Bits>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  const Bits bits =
      bit_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  const Bits bits = __builtin_convertvector(half, Bits);
#endif
  return bit_cast<Vec<float>>(bits << 16);
}
inline Vec<float> load(const fp16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int k = 0; k < lanes<float>; ++k) v[k] = half_to_float(p[k].bits);
  return v;
#endif
}

#if defined(__AVX512F__)
// The lanes of v that `lane` names, each in its place.
FASTLSTM_INLINE Vec<float> lane_of(Vec<float> v, Vector<float>::mask lane) {
  return bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(lane), bit_cast<__m512>(v)));
}
FASTLSTM_INLINE Vec<double> lane_of(Vec<double> v, Vector<double>::mask lane) {
  return bit_cast<Vec<double>>(
      _mm512_permutexvar_pd(bit_cast<__m512i>(lane), bit_cast<__m512d>(v)));
}
#endif

// A value that so many rows are multiplied by is to stay in a register. GCC makes it an operand in
// memory of each row where there are two or three; more are left to it. (Only where there are
// registers to spare, and such operands.)
template <int rows, class V>
FASTLSTM_INLINE V in_register(V value) {
#if defined(__AVX512F__)
  if (rows == 2 || rows == 3) asm("" : "+v"(value));
#endif
  return value;
}

inline void store(float* p, Vec<float> v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(double* p, Vec<double> v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(bf16* p, Vec<float> v) {
  typedef Vector<float>::bits Bits;
  Bits bits = bit_cast<Bits>(v);
  Bits rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  Bits nan = bits | 0x400000;
  bits = (v == v ? rounded : nan) >> 16;
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtepi32_epi16(bit_cast<__m512i>(bits));
#elif defined(__AVX2__)
  const __m256i all = bit_cast<__m256i>(bits);
  const __m128i half =
      _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
  const HalfVec half = __builtin_convertvector(bits, HalfVec);
#endif
  std::memcpy(p, &half, sizeof half);
}
inline void store(fp16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int k = 0; k < lanes<float>; ++k) p[k].bits = float_to_half(v[k]);
#endif
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
// In two's powers: masked stores are microcode on AMD's processors.
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

// What v becomes when it is stored as S and read again.
template <class S, class V>
inline V rounded_to_storage(V v) {
  if (sizeof(S) * lanes<typename StateOf<S>::type> == sizeof(V)) return v;
  S stored[lanes<typename StateOf<S>::type>];
  store(stored, v);
  return load(stored);
}

// ---- primitives for gate_math.h ----------------------------------------------------------

// exp(r) - 1 = r + r^2 P(r) for |r| <= ln(2)/2, P's highest power first; ln2 in two parts, the
// first with zeros at the end so that n * ln2_high is exact; below `lowest` exp is less than half
// the least subnormal, above `lowest_normal` 2^n is normal, and 2^(n + lift) wherever exp is not 0.
template <class Scalar>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int terms = 5, exponent_bias = 127, mantissa_bits = 23;
  static constexpr float coefficients[terms] = {0.0013926250831497612f, 0.0083632328836826182f,
                                                0.041666554212984150f, 0.16666576666119928f, 0.5f};
  static constexpr float lowest = -104.0f, lowest_normal = -87.0f, log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float rounder = 0x1.8p23f, lift = 64, lowered = 0x1p-64f;
};
template <>
struct ExpConstants<double> {
  static constexpr int terms = 11, exponent_bias = 1023, mantissa_bits = 52;
  static constexpr double coefficients[terms] = {2.09147553258932022e-9,
                                                 2.5105312729622101787e-8,
                                                 2.7557273478718580474e-7,
                                                 2.7557255170000887438e-6,
                                                 0.0000248015873256774619,
                                                 0.00019841269875002278793,
                                                 0.0013888888888883711167,
                                                 0.0083333333333260831202,
                                                 0.041666666666666669783,
                                                 0.1666666666666667103,
                                                 0.5};
  static constexpr double lowest = -746.0, lowest_normal = -708.0, log2e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double rounder = 0x1.8p52, lift = 512, lowered = 0x1p-512;
};

template <class T>
struct VectorMath {
  using Scalar = T;
  using V = Vec<T>;
  using Mask = typename Vector<T>::mask;
  using Bits = typename Vector<T>::bits;
  static constexpr T sign_bit = T(-0.0);

  FASTLSTM_INLINE V broadcast(T value) { return value - V{}; }  // exact, -0 included
  FASTLSTM_INLINE V fma(V a, V b, V c) { return a * b + c; }
  FASTLSTM_INLINE V minus_magnitude(V x) {
    return bit_cast<V>(bit_cast<Bits>(x) | bit_cast<Bits>(broadcast(sign_bit)));
  }
  FASTLSTM_INLINE V with_sign_of(V m, V x) {
    Bits sign = bit_cast<Bits>(broadcast(sign_bit));
    return bit_cast<V>((bit_cast<Bits>(m) & ~sign) | (bit_cast<Bits>(x) & sign));
  }
  // By the sign alone, which is as good for -0 and NaN: both are what they are of either.
  FASTLSTM_INLINE V where_negative(V x, V yes, V no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return bit_cast<V>(
          _mm256_blendv_ps(bit_cast<__m256>(no), bit_cast<__m256>(yes), bit_cast<__m256>(x)));
    else
      return bit_cast<V>(
          _mm256_blendv_pd(bit_cast<__m256d>(no), bit_cast<__m256d>(yes), bit_cast<__m256d>(x)));
#endif
    return x < V{} ? yes : no;
  }

  FASTLSTM_INLINE V exp_nonpositive(V x) {
    using K = ExpConstants<T>;
    const Reduced e = reduce(x, K::lowest, K::lift);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return scaled(e.fraction + T(1), e.n);
#endif
    const V power = e.power * K::lowered;  // beside the fraction; 0 where exp is next to nothing
    return fma(e.fraction, power, power);
  }
  FASTLSTM_INLINE V expm1_nonpositive(V x) {
    using K = ExpConstants<T>;
    const Reduced e = reduce(x, K::lowest_normal, 0);
    V power = e.power;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) power = scaled(broadcast(1), e.n);
#endif
    return fma(e.fraction, power, power - T(1));
  }

  FASTLSTM_INLINE V quotient(V n, V d) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      // vdivps takes 16 cycles; d is in [1, 2], so one Newton step refines the estimate enough.
      V y = bit_cast<V>(_mm512_rcp14_ps(bit_cast<__m512>(d)));
      return n * fma(y, fma(-d, y, broadcast(1)), y);
    }
#endif
    return n / d;
  }

 private:
  struct Reduced {         // exp(x) = (1 + fraction) 2^n
    V fraction, n, power;  // 2^(n + lift)
  };

  FASTLSTM_INLINE Reduced reduce(V x, T lowest, T lift) {
    using K = ExpConstants<T>;
    x = at_least(broadcast(lowest), x);
    // Its last bits are the integer nearest x / ln2, and what makes that an exponent.
    const T rounder = K::rounder + (K::exponent_bias + lift);
    const V shifted = x * K::log2e + rounder;
    const V n = shifted - rounder;
    const V r = fma(n, broadcast(-K::ln2_low), fma(n, broadcast(-K::ln2_high), x));
    // Two powers at a time: a chain of half the length.
    static_assert(K::terms % 2 == 1, "pairs of powers, and the last one");
    const auto pair = [&](int k) {
      return fma(broadcast(K::coefficients[k]), r, broadcast(K::coefficients[k + 1]));
    };
    const V r2 = r * r;
    V p = pair(0);
    for (int k = 2; k + 1 < K::terms; k += 2) p = fma(p, r2, pair(k));
    p = fma(p, r, broadcast(K::coefficients[K::terms - 1]));
    return {fma(p, r2, r), n, bit_cast<V>(bit_cast<Bits>(shifted) << K::mantissa_bits)};
  }

  // max(low, x), and NaN for a NaN.
  FASTLSTM_INLINE V at_least(V low, V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return bit_cast<V>(_mm512_max_ps(bit_cast<__m512>(low), bit_cast<__m512>(x)));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      return bit_cast<V>(_mm256_max_ps(bit_cast<__m256>(low), bit_cast<__m256>(x)));
    else
      return bit_cast<V>(_mm256_max_pd(bit_cast<__m256d>(low), bit_cast<__m256d>(x)));
#endif
    return x < low ? low : x;
  }

#if defined(__AVX512F__)
  // p * 2^n
  FASTLSTM_INLINE V scaled(V p, V n) {
    return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
  }
#endif
};

}  // namespace
}  // namespace fastlstm
