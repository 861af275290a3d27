// The kernels for one instruction set: compiled once for each, with the compiler's flags for it
// and FASTLSTM_ISA naming it. Everything but the table is internal to the object: an inline
// function that the linker may share with other objects would run this instruction set on
// processors that lack it.
#include "isa.h"

#include "backward.h"
#include "curvature.h"
#include "few_steps.h"
#include "forward.h"
#include "recompute.h"
#include "run_product.h"
#include "tangent_cells.h"
#include "unpacked_product.h"
#include "vector_math.h"
#include "vector_tiles.h"

#define FASTLSTM_STRING(x) #x
#define FASTLSTM_NAME(x) FASTLSTM_STRING(x)
#define FASTLSTM_JOIN(a, b) a##b
#define FASTLSTM_TABLE(isa) FASTLSTM_JOIN(kernels_, isa)

namespace fastlstm {
namespace {

template <template <class> class Pass, class Args>
void run(const Args& args) {
  switch (args.storage) {
    case Storage::f32:
      return void(run_pass<Pass<VectorTiles<float>>>(args));
    case Storage::f64:
      return void(run_pass<Pass<VectorTiles<double>>>(args));
    case Storage::f16:
      return void(run_pass<Pass<VectorTiles<fp16>>>(args));
    case Storage::bf16:
      return void(run_pass<Pass<VectorTiles<bf16>>>(args));
  }
}

void forward(const ForwardArgs& args) {
  are_few_steps<RowVectors<float>>(args) ? run<FewSteps>(args) : run<Forward>(args);
}

bool backward(const BackwardArgs& args) {
  run<Backward>(args);
  return false;
}

template <class S>
void product_of(const ProductArgs& args) {
  if (is_unpacked_product(args))
    return args.transposed ? run_unpacked_product<S, true>(args)
                           : run_unpacked_product<S, false>(args);
  using State = VectorTiles<typename StateOf<S>::type>;
  using Stored = VectorTiles<S>;
  args.transposed ? run_product<Form::flipped, Stored, State, State>(args)
                  : run_product<Form::rows, State, Stored, State>(args);
}

// See docs/performance.md for where packing costs more than it gains.
bool product(const ProductArgs& args) {
#if defined(__AVX2__)
  const int64_t least_depth = is_unpacked_product(args) ? 2 : 16;
  if (args.M < 2 || args.columns() < 2 || args.K < least_depth) return false;
  switch (args.storage) {
    case Storage::f32:
      product_of<float>(args);
      break;
    case Storage::f64:
      product_of<double>(args);
      break;
    case Storage::f16:
      product_of<fp16>(args);
      break;
    case Storage::bf16:
      product_of<bf16>(args);
  }
  return true;
#else
  (void)args;
  return false;
#endif
}

void recompute(const RecomputeArgs& args) {
  run<Recompute>(args);
}

// Storage is the state type.
template <template <class> class Pass, class Args>
void run_in_state_type(const Args& args) {
  if (args.storage == Storage::f64)
    run_pass<Pass<VectorTiles<double>>>(args);
  else
    run_pass<Pass<VectorTiles<float>>>(args);
}

void tangent(const TangentArgs& args) {
  run_in_state_type<Tangent>(args);
}

void curvature(const CurvatureArgs& args) {
  run_in_state_type<Curvature>(args);
}

template <class T>
void probe_as(const GateProbe& p) {
  using Math = GateMath<VectorMath<T>>;
  using V = Vec<T>;
  auto in = [&](const void* from, int64_t k, int count) {
    return load_some(static_cast<const T*>(from) + k, count);
  };
  auto out = [&](void* to, int64_t k, V value, int count) {
    store_some(static_cast<T*>(to) + k, value, count);
  };
  for (int64_t k = 0; k < p.n; k += lanes<T>) {
    const int count = int(p.n - k < lanes<T> ? p.n - k : lanes<T>);
    const Gates<V> gates =
        Math::activate({in(p.a, k, count), in(p.a, p.n + k, count), in(p.a, 2 * p.n + k, count),
                        in(p.a, 3 * p.n + k, count)});
    const V c_prev = in(p.c_prev, k, count), c = Math::cell_state(gates, c_prev);
    const CellGradient<V> d =
        Math::cell_backward(gates, c_prev, c, in(p.dm, k, count), in(p.dc, k, count));
    const V gate[4] = {gates.i, gates.f, gates.g, gates.o},
            da[4] = {d.da.i, d.da.f, d.da.g, d.da.o};
    for (int j = 0; j < 4; ++j) {
      out(p.gates, j * p.n + k, gate[j], count);
      out(p.da, j * p.n + k, da[j], count);
    }
    out(p.c, k, c, count);
    out(p.m, k, Math::cell_output(gates, c), count);
    out(p.dc_prev, k, d.dc_prev, count);
  }
}

void probe(const GateProbe& p, Storage storage) {
  storage == Storage::f64 ? probe_as<double>(p) : probe_as<float>(p);
}

}  // namespace

extern const Kernels FASTLSTM_TABLE(FASTLSTM_ISA);
const Kernels FASTLSTM_TABLE(FASTLSTM_ISA) = {
    FASTLSTM_NAME(FASTLSTM_ISA), forward, backward, probe, recompute, tangent, curvature, product};

}  // namespace fastlstm
