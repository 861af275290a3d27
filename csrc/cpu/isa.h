// One instruction set's kernels, as a table of functions; see dispatch.h.
#pragma once

#include "../layer.h"

namespace fastlstm {

// Values of gate_math.h's functions at n points, for the tests: (4, n) pre-activations a, and
// (n) c_prev, dm, dc in; (4, n) gates, (n) c, (n) m, (4, n) da, (n) dc_prev out.
struct GateProbe {
  int64_t n;
  const void *a, *c_prev, *dm, *dc;
  void *gates, *c, *m, *da, *dc_prev;
};

struct Kernels {
  const char* name;
  void (*forward)(const ForwardArgs&);
  // Whether the da and dh_all that it wrote are `bounded` (see ProductArgs).
  bool (*backward)(const BackwardArgs&);
  void (*probe)(const GateProbe&, Storage);  // f32 or f64
  void (*recompute)(const RecomputeArgs&);
  void (*tangent)(const TangentArgs&);      // f32 or f64
  void (*curvature)(const CurvatureArgs&);  // f32 or f64
  // False, and nothing done, where torch's BLAS is better.
  bool (*product)(const ProductArgs&);
};

}  // namespace fastlstm
