// The kernels for processors that multiply bfloat16 by vectors: passes in bfloat16 and their
// products (dot_tiles.h), everything else by the AVX-512 kernels. As in isa.cpp, all but the table
// is internal to this object.
#include "backward.h"
#include "dispatch.h"
#include "dot_tiles.h"
#include "few_steps.h"
#include "forward.h"
#include "isa.h"
#include "product.h"

namespace fastlstm {

extern const Kernels kernels_avx512;

namespace {

using Dots = DotTiles<bf16>;

// Whether it takes fewer pairs of columns than there are columns: two are multiplied by an
// instruction, but in blocks of 32, and narrow layers fill only a part of them.
bool fills_blocks(int64_t first, int64_t second) {
  constexpr int64_t columns = Dots::block_columns;
  return (blocks_of(first, columns) + blocks_of(second, columns)) * columns / 2 < first + second;
}

// A few steps are multiplied without packing.
void forward(const ForwardArgs& args) {
  const Shape& n = args.shape;
  const bool worth = fills_blocks(n.I, n.P) && !are_few_steps(n, args.storage);
  if (args.storage == Storage::bf16 && (worth || !spares_matrix_unit()))
    run_pass<Forward<Dots>>(args);
  else
    kernels_avx512.forward(args);
}

bool backward(const BackwardArgs& args) {
  const bool worth = fills_blocks(args.shape.H, 0);
  if (args.storage != Storage::bf16 || (!worth && spares_matrix_unit()))
    return kernels_avx512.backward(args);
  run_pass<Backward<Dots>>(args);
  return false;
}

bool product(const ProductArgs& args) {
  const bool worth = args.M > 1 && args.columns() > 1 && args.K >= 32;
  if (args.storage != Storage::bf16 || !worth) return kernels_avx512.product(args);
  using Gradients = DotTiles<float>;
  if (args.transposed)
    run_product<Dots, Gradients, Dots, true>(args);
  else
    run_product<Gradients, Dots, Dots, false>(args);
  return true;
}

void probe(const GateProbe& args, Storage storage) {
  kernels_avx512.probe(args, storage);
}
void recompute(const RecomputeArgs& args) {
  kernels_avx512.recompute(args);
}
}  // namespace

extern const Kernels kernels_avx512_bf16;
const Kernels kernels_avx512_bf16 = {"avx512_bf16", forward, backward, probe, recompute, product};

}  // namespace fastlstm
