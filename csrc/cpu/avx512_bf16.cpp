// The kernels for processors that multiply bfloat16 by vectors: the forward pass in bfloat16
// (dot_tiles.h), everything else by the AVX-512 kernels. As in isa.cpp, all but the table is
// internal to this object.
#include "dispatch.h"
#include "dot_tiles.h"
#include "few_steps.h"
#include "forward.h"
#include "isa.h"

namespace fastlstm {

extern const Kernels kernels_avx512;

namespace {

// Two columns an instruction, but in blocks of 32 of x and of h: narrow layers fill only a part of
// them. A few steps are multiplied without packing.
bool is_worth_it(const Shape& n, Storage storage) {
  constexpr int64_t columns = DotTiles::block_columns;
  const int64_t pairs = (blocks_of(n.I, columns) + blocks_of(n.P, columns)) * columns / 2;
  return pairs < n.I + n.P && !are_few_steps(n, storage);
}

// Values beyond what has terms are left to vectors of floats.
void forward(const ForwardArgs& args) {
  const bool dots = args.storage == Storage::bf16 &&
                    (!spares_matrix_unit() || is_worth_it(args.shape, args.storage));
  if (!dots || !run_pass<Forward<DotTiles>>(args)) kernels_avx512.forward(args);
}

bool backward(const BackwardArgs& args) {
  return kernels_avx512.backward(args);
}
void probe(const GateProbe& args, Storage storage) {
  kernels_avx512.probe(args, storage);
}
void recompute(const RecomputeArgs& args) {
  kernels_avx512.recompute(args);
}
bool product(const ProductArgs& args) {
  return kernels_avx512.product(args);
}

}  // namespace

extern const Kernels kernels_avx512_bf16;
const Kernels kernels_avx512_bf16 = {"avx512_bf16", forward, backward, probe, recompute, product};

}  // namespace fastlstm
