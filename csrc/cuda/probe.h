// The equations alone, point by point, for tests.
#pragma once

#include "args.h"
#include "math.h"

namespace fastlstm {
namespace cuda {

struct Probe {
  int64_t n;
  const float *a, *c_prev, *dm, *dc;    // (4, n), then (n)
  float *gates, *c, *m, *da, *dc_prev;  // (4, n), (n), (n), (4, n), (n)
};

FASTLSTM_INLINE void probe_point(const Probe& p, int64_t k) {
  const int64_t n = p.n;
  const Gates<float> s = Cell::activate({p.a[k], p.a[n + k], p.a[2 * n + k], p.a[3 * n + k]});
  const float c = Cell::cell_state(s, p.c_prev[k]);
  const CellGradient<float> d = Cell::cell_backward(s, p.c_prev[k], c, p.dm[k], p.dc[k]);
  p.gates[k] = s.i, p.gates[n + k] = s.f, p.gates[2 * n + k] = s.g, p.gates[3 * n + k] = s.o;
  p.c[k] = c;
  p.m[k] = Cell::cell_output(s, c);
  p.da[k] = d.da.i, p.da[n + k] = d.da.f, p.da[2 * n + k] = d.da.g, p.da[3 * n + k] = d.da.o;
  p.dc_prev[k] = d.dc_prev;
}

// On `stream`; throws std::runtime_error.
void probe(const Probe& p, void* stream);

}  // namespace cuda
}  // namespace fastlstm
