// The equations of one LSTM cell, once for every C++ kernel.
//
// `Math` supplies the value type `V` (a float, a SIMD vector, a CUDA thread's value) and its
// primitives; this file supplies what an LSTM does with them. docs/design.md derives the
// equations that "(eq. n)" names; fastlstm/reference.py and kernels/gate_math.py state the same
// ones, and tests/test_gate_math.py holds the three together.
//
// Math provides: Scalar, V, and for V
//   exp_nonpositive(x)   exp(x) for x <= 0, NaN for NaN
//   quotient(n, d)       n / d for d in [1, 2], NaN for NaN
//   magnitude(x)         |x|
//   with_sign_of(m, x)   m with the sign of x, for m >= 0
//   where_less(a, b, yes, no), where_negative(x, yes, no)
//   broadcast(scalar), fma(a, b, c), and the operators + - * between V and V, and between Scalar and V
#pragma once

#if defined(__CUDACC__)
#define FASTLSTM_INLINE static __host__ __device__ __forceinline__
#else
#define FASTLSTM_INLINE static inline __attribute__((always_inline))
#endif

namespace fastlstm {

// tanh(x) = x + x^3 P(x^2) for |x| < 0.625; Chebyshev fits of P, highest power first.
template <class Scalar>
struct TanhPolynomial;

template <>
struct TanhPolynomial<float> {
  static constexpr int terms = 5;
  static constexpr float coefficients[terms] = {
      -0.0060967141659081976f, 0.020997178999074751f, -0.053850909578513581f,
      0.13332769736976328f, -0.33333328944134255f};
};

template <>
struct TanhPolynomial<double> {
  static constexpr int terms = 12;
  static constexpr double coefficients[terms] = {
      6.48516348279311315e-6,  -0.000031201101425797400033, 0.000092571161295567682707,
      -0.00023759064960555620, 0.0005896606577757043347,    -0.0014557754120478055104,
      0.0035921217511549622695, -0.008863235103240877925,   0.021869488519008305756,
      -0.05396825396789699169, 0.13333333333333041602,      -0.33333333333333332938};
};

template <class V>
struct Gates {  // one unit's (or one vector of units') four gates, in torch's order
  V i, f, g, o;
};

template <class V>
struct CellGradient {
  Gates<V> da;  // of the pre-activations
  V dc_prev;    // of c_{t-1}
};

template <class Math>
struct GateMath {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // Exponentials of -|x| alone: nothing overflows, and the small tail keeps its digits.
  FASTLSTM_INLINE V sigmoid(V x) {
    V e = Math::exp_nonpositive(-Math::magnitude(x));
    return Math::quotient(Math::where_negative(x, e, Math::broadcast(1)), Scalar(1) + e);
  }

  FASTLSTM_INLINE V tanh(V x) {
    V z = Math::magnitude(x);
    V e = Math::exp_nonpositive(Scalar(-2) * z);
    V large = Math::quotient(Scalar(1) - e, Scalar(1) + e);
    V square = x * x;
    V p = Math::broadcast(TanhPolynomial<Scalar>::coefficients[0]);
    for (int k = 1; k < TanhPolynomial<Scalar>::terms; ++k)
      p = Math::fma(p, square, Math::broadcast(TanhPolynomial<Scalar>::coefficients[k]));
    V small = Math::fma(p * square, z, z);
    return Math::with_sign_of(Math::where_less(z, Math::broadcast(0.625), small, large), x);
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
    const Scalar one = 1;
    V tanh_c = tanh(c);
    dc = Math::fma(dm * s.o, one - tanh_c * tanh_c, dc);
    CellGradient<V> d;
    d.da.i = dc * s.g * s.i * (one - s.i);
    d.da.f = dc * c_prev * s.f * (one - s.f);
    d.da.g = dc * s.i * (one - s.g * s.g);
    d.da.o = dm * tanh_c * s.o * (one - s.o);
    d.dc_prev = dc * s.f;
    return d;
  }
};

}  // namespace fastlstm
