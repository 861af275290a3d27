// The kernels for processors with AMX: float state on the matrix unit (amx_tiles.h), everything
// else by the AVX-512 kernels. As in isa.cpp, all but the table is internal to this object.
#include <algorithm>
#include <cstring>

#include "amx_tiles.h"
#include "backward.h"
#include "dispatch.h"
#include "dot_tiles.h"
#include "few_steps.h"
#include "forward.h"
#include "isa.h"
#include "run_product.h"

namespace fastlstm {

extern const Kernels kernels_avx512, kernels_avx512_bf16;

namespace {

// What a pass must have for the unit to be worth it (measured: docs/performance.md).
struct Least {
  int64_t rows;   // a step: with fewer it waits for weights, which take more bytes than as floats
  int64_t all;    // rows that are multiplied in all: for fewer, packing the terms takes too long
  int64_t depth;  // of what they are multiplied by: with less, cells take most of the time
  int64_t outputs = 0;  // fewer leave most of h's block empty
};

struct Rule {
  Least at_all;
  Least by_terms[3];  // that a value of storage has
};

constexpr Rule forward_rule = {{6, 0, 0}, {{6, 0, 0}, {6, 32, 48}, {9, 128, 128, 32}}};
constexpr Rule ahead_rule = {{0, 1, 1}, {{0, 64, 32}, {0, 64, 32}, {0, 64, 32}}};
constexpr Rule backward_rule = {{6, 0, 0}, {{6, 64, 64}, {12, 128, 96}, {16, 256, 112}}};

// The rows that are multiplied, and by how much.
struct Multiplied {
  int64_t rows, depth;
};

template <template <class> class Pass, class S, bool gradients, class Args>
bool run_as(const Args& args, const Rule& rule, const Multiplied& multiplied) {
  using Run = Pass<AmxTiles<S, gradients ? gradient_terms<S> : terms_of<S>>>;
  const Least& least = spares_matrix_unit() ? rule.by_terms[terms_of<S> - 1] : rule.at_all;
  const Split split = split_work(args.shape, args.threads, Run::work(args));
  const int64_t walks = args.shape.T * (split.by_sequence ? split.threads : 1);
  return args.shape.N >= least.rows * walks && multiplied.rows >= least.all &&
         multiplied.depth >= least.depth && args.shape.P >= least.outputs && run_pass<Run>(args);
}

// False if it is not worth it, or the results don't count. `gradients`: are they multiplied, or
// values of storage type?
template <template <class> class Pass, bool gradients, class Args>
bool run(const Args& args, const Rule& rule, const Multiplied& multiplied) {
  switch (args.storage) {
    case Storage::f32:
      return run_as<Pass, float, gradients>(args, rule, multiplied);
    case Storage::f16:
      return run_as<Pass, fp16, gradients>(args, rule, multiplied);
    case Storage::bf16:
      return run_as<Pass, bf16, gradients>(args, rule, multiplied);
    case Storage::f64:
      break;
  }
  return false;
}

template <class Unit>
using ForwardAhead = Forward<AheadTiles<Unit>>;

// Are there so few rows that vectors take them before the unit is asked, if they need not pack
// their weights? A single step always, and one row a step.
bool go_unpacked(const Shape& n) {
  return n.T == 1 || n.N == n.T || n.N <= 16;
}

void run_unpacked(const ForwardArgs& args) {
  using Ahead = FewSteps<AheadTiles<AmxTiles<float, 3>>>;
  const Shape& n = args.shape;
  if (args.storage == Storage::bf16) return kernels_avx512_bf16.forward(args);
  if (args.storage == Storage::f32 && n.I >= 32 && Ahead::packs(n) && run_pass<Ahead>(args)) return;
  kernels_avx512.forward(args);
}

void forward(const ForwardArgs& args) {
  const Shape& n = args.shape;
  const bool few = args.storage == Storage::bf16 ? are_few_steps<DotRows>(args)
                                                 : are_few_steps<RowVectors<float>>(args);
  if (few && go_unpacked(n) && spares_matrix_unit()) return run_unpacked(args);
  if (run<Forward, false>(args, forward_rule, {n.N, n.I + n.P}) ||
      run<ForwardAhead, false>(args, ahead_rule, {n.N, n.I}))
    return;
  const bool dots = few && args.storage == Storage::bf16;
  (dots ? kernels_avx512_bf16 : kernels_avx512).forward(args);
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
  const Shape& n = args.shape;
  // The step that is undone first carries nothing.
  const int64_t carried = n.T > 0 ? n.N - n.batch_sizes[0] : 0;
  if (run<Backward, true>(args, backward_rule, {carried, n.P})) return true;
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
void tangent(const TangentArgs& args) {
  kernels_avx512.tangent(args);
}
void curvature(const CurvatureArgs& args) {
  kernels_avx512.curvature(args);
}

// Whether no value of a (rows, columns) matrix is too large (see amx_tiles.h).
template <int terms, class S>
bool none_too_large(const S* values, int64_t rows, int64_t columns, int64_t ld, int threads) {
  if (terms == 1) return true;
  constexpr int64_t L = lanes<float>, worth_a_thread = 1 << 16;
  bool beyond = false;
  run_team(int(std::min<int64_t>(rows * columns / worth_a_thread + 1, threads)),
           [&](const Team& team) {
             const Range mine = team.share(rows);
             unsigned found = 0;
             for (int64_t r = mine.begin; r < mine.end; ++r) {
               const S* const row = values + r * ld;
               int64_t k = 0;
               for (; k + L <= columns; k += L) found |= too_large<terms>(load(row + k));
               if (k < columns) found |= too_large<terms>(load_some(row + k, int(columns - k)));
             }
             if (found) __atomic_store_n(&beyond, true, __ATOMIC_RELAXED);
           });
  return !beyond;
}

// False if there are any.
template <class S>
bool product_of(const ProductArgs& p) {
  const auto* a = static_cast<const float*>(p.a);
  const int64_t rows = p.transposed ? p.K : p.M, columns = p.transposed ? p.M : p.K;
  constexpr int left = gradient_terms<S>, right = terms_of<S>;
  if (!p.bounded && !none_too_large<left>(a, rows, columns, p.lda, p.threads)) return false;
  for (const ProductPart& part : p.parts)
    if (!none_too_large<right>(static_cast<const S*>(part.b), p.K, part.N, part.ldb, p.threads))
      return false;
  using Gradients = AmxTiles<float, left, left>;
  using Stored = AmxTiles<S, right>;
  const int64_t N = p.columns();
  if (!p.transposed && p.M <= N && N >= 128)
    run_product<Form::columns, Gradients, Stored, AmxTiles<S, left>>(p);
  else if (!p.transposed)
    run_product<Form::rows, Gradients, Stored, AmxTiles<S, left>>(p);
  else if (p.K <= 160)
    run_product<Form::upright, Gradients, Stored, AmxTiles<S, left>>(p);
  else
    run_product<Form::flipped, Stored, Gradients, AmxTiles<float, right, left>>(p);
  return true;
}

bool product(const ProductArgs& args) {
  // Packing takes longer than with vectors: what is packed is to meet many rows or columns, and all
  // of it is to be worth it.
  const int64_t M = args.M, N = args.columns(), K = args.K;
  const bool worth = (args.transposed ? M >= 96 && N >= 64 : M * N >= 48 * (M + N)) && K >= 32 &&
                     M * N * K >= 1 << 20;
  if (!worth) return kernels_avx512.product(args);
  switch (args.storage) {
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
const Kernels kernels_amx = {"amx",     forward, backward,  probe,
                             recompute, tangent, curvature, product};

}  // namespace fastlstm
