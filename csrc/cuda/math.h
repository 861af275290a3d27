// float's primitives for gate_math.h, on a CUDA thread or, for tests, on the host.
#pragma once

#include <cmath>

#include "../gate_math.h"

namespace fastlstm {
namespace cuda {

struct FloatMath {
  using Scalar = float;
  using V = float;

  FASTLSTM_INLINE float broadcast(float x) { return x; }
  FASTLSTM_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  FASTLSTM_INLINE float minus_magnitude(float x) { return -::fabsf(x); }
  FASTLSTM_INLINE float with_sign_of(float m, float x) { return ::copysignf(m, x); }
  FASTLSTM_INLINE float where_negative(float x, float yes, float no) { return x < 0 ? yes : no; }

  // Two units in the last place near zero. Far from it up to 2 + 1.2 |x| of them, where the result
  // is small.
  FASTLSTM_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return ::expf(x);
#endif
  }

  // Near zero the series of eight terms, whose rest is below 1e-9 of it.
  FASTLSTM_INLINE float expm1_nonpositive(float x) {
    float s = 1.0f / 40320;
    s = fma(s, x, 1.0f / 5040);
    s = fma(s, x, 1.0f / 720);
    s = fma(s, x, 1.0f / 120);
    s = fma(s, x, 1.0f / 24);
    s = fma(s, x, 1.0f / 6);
    s = fma(s, x, 0.5f);
    s = fma(s * x, x, x);
    return x > -0.35f ? s : exp_nonpositive(x) - 1;
  }

  FASTLSTM_INLINE float quotient(float n, float d) {
#if defined(__CUDA_ARCH__)
    return __fdividef(n, d);
#else
    return n / d;
#endif
  }
};

using Cell = GateMath<FloatMath>;

}  // namespace cuda
}  // namespace fastlstm
