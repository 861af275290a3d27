// The equations of one LSTM cell, once for every C++ kernel.
//
// `Math` supplies the value type `V` (a float, a SIMD vector, a CUDA thread's value) and its
// primitives; this file supplies what an LSTM does with them. docs/design.md derives the
// equations that "(eq. n)" names; fastlstm/reference.py states the same ones, and
// tests/test_gate_math.py holds the statements together.
//
// Math provides: Scalar, V, and for V
//   broadcast(scalar), fma(a, b, c), and the operators + - * between V and V or Scalar and V
//   exp_nonpositive(x), expm1_nonpositive(x)   for x <= 0; NaN for NaN
//   quotient(n, d)                             n / d for d in [1, 2]; NaN for NaN
//   minus_magnitude(x)                         -|x|
//   with_sign_of(m, x)                         m with the sign of x, for m >= 0 (or +-0)
//   where_negative(x, yes, no)                 yes where x < 0
#pragma once

#if defined(__CUDACC__)
#  define FASTLSTM_INLINE static __host__ __device__ __forceinline__
#else
#  define FASTLSTM_INLINE static inline __attribute__((always_inline))
#endif

namespace fastlstm {

template <class V>
struct Gates {  // one unit's (or one vector of units') four gates, in torch's order
  V i, f, g, o;
};

template <class V>
struct CellGradient {
  Gates<V> da;  // of the pre-activations
  V dc_prev;    // of c_{t-1}
};

// What the gradients of m_t and c_t have to be multiplied by.
template <class V>
struct CellFactors {
  Gates<V> da;  // of i, f and g that of c_t, of o that of m_t
  V dc;         // what m_t contributes to the gradient of c_t
  V dc_prev;
};

// Tangents of c_t and m_t.
template <class V>
struct CellTangent {
  V c, m;
};

// What a cell's second derivatives add to the gradients of its pre-activations, of c_t and of
// c_{t-1}; and what dc leaves for c'_{t-1}.
template <class V>
struct CellCurvature {
  Gates<V> a;
  V c, c_prev, dc_prev;
};

template <class Math>
struct GateMath {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // Exponentials of -|x| alone: nothing overflows, and the small tail keeps its digits.
  FASTLSTM_INLINE V sigmoid(V x) {
    V e = Math::exp_nonpositive(Math::minus_magnitude(x));
    return Math::quotient(Math::where_negative(x, e, Math::broadcast(1)), Scalar(1) + e);
  }

  // tanh(z) = (1 - e) / (1 + e) with e = exp(-2z), from e - 1 so that small z keep their digits.
  FASTLSTM_INLINE V tanh(V x) {
    V e1 = Math::expm1_nonpositive(Scalar(2) * Math::minus_magnitude(x));
    return Math::with_sign_of(Math::quotient(-e1, Scalar(2) + e1), x);
  }

  // (eq. 2)
  FASTLSTM_INLINE Gates<V> activate(Gates<V> a) {
    return {sigmoid(a.i), sigmoid(a.f), tanh(a.g), sigmoid(a.o)};
  }

  // (eq. 3): remember what the forget gate lets through, learn what the input gate lets in.
  FASTLSTM_INLINE V cell_state(Gates<V> s, V c_prev) { return Math::fma(s.f, c_prev, s.i * s.g); }

  // (eq. 4): m_t, which is h_t where there is no projection.
  FASTLSTM_INLINE V cell_output(Gates<V> s, V c) { return s.o * tanh(c); }

  // (eq. 5, 6, 7): dm and dc are the gradients of m_t and of c_t from outside the cell.
  FASTLSTM_INLINE CellGradient<V> cell_backward(Gates<V> s, V c_prev, V c, V dm, V dc) {
    return cell_backward(cell_factors(s, c_prev, c), dm, dc);
  }

  // The same in two parts: what is known before the gradients are, and what is not.
  FASTLSTM_INLINE CellFactors<V> cell_factors(Gates<V> s, V c_prev, V c) {
    const Scalar one = 1;
    V tanh_c = tanh(c);
    CellFactors<V> by;
    by.da.i = s.g * s.i * (one - s.i);
    by.da.f = c_prev * s.f * (one - s.f);
    by.da.g = s.i * (one - s.g * s.g);
    by.da.o = tanh_c * s.o * (one - s.o);
    by.dc = s.o * (one - tanh_c * tanh_c);
    by.dc_prev = s.f;
    return by;
  }
  FASTLSTM_INLINE CellGradient<V> cell_backward(CellFactors<V> by, V dm, V dc) {
    dc = Math::fma(dm, by.dc, dc);
    return {{dc * by.da.i, dc * by.da.f, dc * by.da.g, dm * by.da.o}, dc * by.dc_prev};
  }

  // (eq. 10): from the tangents of the pre-activations and of c_{t-1}.
  FASTLSTM_INLINE CellTangent<V> cell_tangent(CellFactors<V> by, Gates<V> a, V c_prev) {
    V c = Math::fma(by.da.i, a.i, by.dc_prev * c_prev);
    c = Math::fma(by.da.f, a.f, Math::fma(by.da.g, a.g, c));
    return {c, Math::fma(by.da.o, a.o, by.dc * c)};
  }

  // (eq. 11): the gradients of dc * c' + dm * m' (eq. 10), from tangents a, c_prev_tangent and c';
  // dc is all that reaches c' but for what does so through m', and m what reaches m_t besides.
  FASTLSTM_INLINE CellCurvature<V> cell_curvature(Gates<V> s, V c_prev, V c, Gates<V> a,
                                                  V c_prev_tangent, V c_tangent, V dm, V dc, V m) {
    const Scalar one = 1, two = 2;
    const V tanh_c = tanh(c), di = s.i * (one - s.i), df = s.f * (one - s.f), dg = one - s.g * s.g,
            d_o = s.o * (one - s.o), dtanh = one - tanh_c * tanh_c;
    dc = Math::fma(dm * s.o, dtanh, dc);  // (eq. 5)
    CellCurvature<V> out;
    out.a.i = dc * di * Math::fma((one - two * s.i) * s.g, a.i, dg * a.g);
    out.a.f = dc * df * Math::fma((one - two * s.f) * c_prev, a.f, c_prev_tangent);
    out.a.g = dc * dg * (di * a.i - two * s.i * s.g * a.g);
    out.a.o = dm * d_o * Math::fma((one - two * s.o) * tanh_c, a.o, dtanh * c_tangent);
    out.a.o = Math::fma(m * tanh_c, d_o, out.a.o);
    out.c = dm * dtanh * (d_o * a.o - two * s.o * tanh_c * c_tangent);
    out.c = Math::fma(m * s.o, dtanh, out.c);
    out.c_prev = dc * df * a.f;
    out.dc_prev = dc * s.f;  // (eq. 7)
    return out;
  }
};

}  // namespace fastlstm
