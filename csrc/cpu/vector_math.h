// The primitives that gate_math.h asks for, of vectors.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

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
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 4)
      return bit_cast<V>(vmaxq_f32(bit_cast<float32x4_t>(low), bit_cast<float32x4_t>(x)));
    else
      return bit_cast<V>(vmaxq_f64(bit_cast<float64x2_t>(low), bit_cast<float64x2_t>(x)));
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
