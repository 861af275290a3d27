// The kernels for processors that multiply bfloat16 by vectors: passes in bfloat16 and their
// products (dot_tiles.h), everything else by the AVX-512 kernels. As in isa.cpp, all but the table
// is internal to this object.
#include "backward.h"
#include "dispatch.h"
#include "dot_tiles.h"
#include "few_steps.h"
#include "forward.h"
#include "isa.h"
#include "run_product.h"

namespace fastlstm {

extern const Kernels kernels_avx512;

namespace {

using Dots = DotTiles<bf16>;

void forward(const ForwardArgs& args) {
  if (args.storage != Storage::bf16)
    kernels_avx512.forward(args);
  else if (spares_matrix_unit() && are_few_steps<DotRows>(args))
    run_pass<FewSteps<Dots>>(args);
  else
    run_pass<Forward<Dots>>(args);
}

bool backward(const BackwardArgs& args) {
  if (args.storage != Storage::bf16) return kernels_avx512.backward(args);
  run_pass<Backward<Dots>>(args);
  return false;
}

bool product(const ProductArgs& args) {
  const bool worth = args.M > 1 && args.columns() > 1 && args.K >= 32;
  if (args.storage != Storage::bf16 || !worth) return kernels_avx512.product(args);
  using Gradients = DotTiles<float>;
  if (args.transposed)
    run_product<Form::flipped, Dots, Gradients, Dots>(args);
  else
    run_product<Form::rows, Gradients, Dots, Dots>(args);
  return true;
}

void probe(const GateProbe& args, Storage storage) {
  kernels_avx512.probe(args, storage);
}
void recompute(const RecomputeArgs& args) {
  kernels_avx512.recompute(args);
}
void tangent(const TangentArgs& args) {
  kernels_avx512.tangent(args);
}
void curvature(const CurvatureArgs& args) {
  kernels_avx512.curvature(args);
}

}  // namespace

extern const Kernels kernels_avx512_bf16;
const Kernels kernels_avx512_bf16 = {"avx512_bf16", forward, backward,  probe,
                                     recompute,     tangent, curvature, product};

}  // namespace fastlstm
