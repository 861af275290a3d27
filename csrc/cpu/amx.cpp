// The kernels for processors with AMX: float state on the matrix unit (amx_tiles.h), everything
// else by the AVX-512 kernels. As in isa.cpp, all but the table is internal to this object.
#include <cstring>

#include "amx_tiles.h"
#include "backward.h"
#include "dispatch.h"
#include "forward.h"
#include "isa.h"
#include "product.h"

namespace fastlstm {

extern const Kernels kernels_avx512;

namespace {

// What a pass must have for the unit to be worth it (measured: docs/performance.md).
struct Least {
  int64_t rows;   // a step: with fewer it waits for weights, which take more bytes than as floats
  int64_t all;    // rows that are multiplied in all: for fewer, packing the terms takes too long
  int64_t depth;  // of what they are multiplied by: with less, cells take most of the time
};

constexpr Least least_at_all{6, 0, 0};
// By the terms that a value of storage has.
constexpr Least least_forward[] = {least_at_all, {6, 32, 48}, {8, 128, 128}};
constexpr Least least_backward[] = {{6, 64, 64}, {12, 128, 96}, {16, 256, 112}};

template <class S>
Least least_for(const ForwardArgs&) {
  return least_forward[terms_of<S> - 1];
}
template <class S>
Least least_for(const BackwardArgs&) {
  return least_backward[terms_of<S> - 1];
}

int64_t multiplied(const ForwardArgs& args) {
  return args.shape.N;
}
// The step that is undone first carries nothing.
int64_t multiplied(const BackwardArgs& args) {
  const Shape& n = args.shape;
  return n.T > 0 ? n.N - n.batch_sizes[0] : 0;
}
int64_t depth(const ForwardArgs& args) {
  return args.shape.I + args.shape.P;
}
int64_t depth(const BackwardArgs& args) {
  return args.shape.P;
}

template <template <class> class Pass, class S, bool state, class Args>
bool run_as(const Args& args) {
  using Run = Pass<AmxTiles<S, state ? terms_of<float> : terms_of<S>>>;
  const Least least = spares_matrix_unit() ? least_for<S>(args) : least_at_all;
  const Split split = split_work(args.shape, args.threads, Run::work(args));
  const int64_t walks = args.shape.T * (split.by_sequence ? split.threads : 1);
  return args.shape.N >= least.rows * walks && multiplied(args) >= least.all &&
         depth(args) >= least.depth && run_pass<Run>(args);
}

// False if it is not worth it, or the results don't count. `state`: are states multiplied, or
// values of storage type?
template <template <class> class Pass, bool state, class Args>
bool run(const Args& args) {
  switch (args.storage) {
    case Storage::f32:
      return run_as<Pass, float, state>(args);
    case Storage::f16:
      return run_as<Pass, fp16, state>(args);
    case Storage::bf16:
      return run_as<Pass, bf16, state>(args);
    case Storage::f64:
      break;
  }
  return false;
}

void forward(const ForwardArgs& args) {
  if (!run<Forward, false>(args)) kernels_avx512.forward(args);
}

// A carry is read and written by the same call: another attempt needs it as it was.
class Kept {
 public:
  Kept(void* place, int64_t bytes) : place_(place), bytes_(place ? bytes : 0), copy_(bytes_) {
    if (bytes_ > 0) std::memcpy(copy_, place_, size_t(bytes_));
  }
  void restore() const {
    if (bytes_ > 0) std::memcpy(place_, copy_, size_t(bytes_));
  }

 private:
  void* const place_;
  const int64_t bytes_;
  const Scratch<char> copy_;
};

bool backward(const BackwardArgs& args) {
  const int64_t cells = args.shape.D * args.shape.B * args.shape.H * int64_t(sizeof(float));
  const Kept da(args.begin > 0 ? args.da_carry : nullptr, 4 * cells);
  const Kept dc(args.begin > 0 ? args.dc_carry : nullptr, cells);
  if (run<Backward, true>(args)) return true;
  da.restore();
  dc.restore();
  kernels_avx512.backward(args);
  return false;
}

void probe(const GateProbe& args, Storage storage) {
  kernels_avx512.probe(args, storage);
}

void recompute(const RecomputeArgs& args) {
  kernels_avx512.recompute(args);
}

// Whether no value of a (rows, columns) matrix is too large (see amx_tiles.h).
template <class S>
bool none_too_large(const S* values, int64_t rows, int64_t columns, int64_t ld) {
  unsigned beyond = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; k += lanes<float>) {
      const int some = int(columns - k < lanes<float> ? columns - k : lanes<float>);
      beyond |= too_large(load_some(values + r * ld + k, some));
    }
  return beyond == 0;
}

// False if there are any.
template <class S>
bool product_of(const ProductArgs& p) {
  const auto* a = static_cast<const float*>(p.a);
  const int64_t rows = p.transposed ? p.K : p.M, columns = p.transposed ? p.M : p.K;
  if (!p.bounded && !none_too_large(a, rows, columns, p.lda)) return false;
  for (const ProductPart& part : p.parts)
    if (!none_too_large(static_cast<const S*>(part.b), p.K, part.N, part.ldb)) return false;
  using State = AmxTiles<float, terms_of<float>>;
  using Stored = AmxTiles<S, terms_of<S>>;
  if (p.transposed)
    run_product<Stored, State, AmxTiles<float, terms_of<S>>, true>(p);
  else
    run_product<State, Stored, AmxTiles<S, terms_of<float>>, false>(p);
  return true;
}

bool product(const ProductArgs& args) {
  // Smaller ones cost the unit more to pack than it gains.
  const bool worth = args.M >= 48 && args.columns() >= 48 && args.K >= 192;
  switch (worth ? args.storage : Storage::f64) {
    case Storage::f32:
      if (product_of<float>(args)) return true;
      break;
    case Storage::f16:
      if (product_of<fp16>(args)) return true;
      break;
    case Storage::bf16:
      if (product_of<bf16>(args)) return true;
      break;
    case Storage::f64:
      break;
  }
  return kernels_avx512.product(args);
}

}  // namespace

extern const Kernels kernels_amx;
const Kernels kernels_amx = {"amx", forward, backward, probe, recompute, product};

}  // namespace fastlstm
