// The cells of a layer's forward direction, from pre-activations that are all known: what is left
// of a forward pass to do again once every h is there (eq. 2 to 4). Only c goes from step to step,
// and unit by unit, so there is nothing to exchange.
#pragma once

#include "split.h"
#include "storage.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

template <class Tiles>
class Recompute {
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  static constexpr int64_t L = lanes<T>;

 public:
  Recompute(const RecomputeArgs& args, Range)
      : a_(args), n_(args.shape), cells_(n_.T > 0 ? n_.batch_sizes[0] * n_.H : 0) {}

  // About sixteen operations a unit: worth a thread as many multiply-adds are.
  static Work work(const RecomputeArgs& args) {
    const Shape& n = args.shape;
    return {blocks_of(n.H, L), n.N * n.H, never};
  }

  void walk(const Team& team) {
    const Range groups = team.share(blocks_of(n_.H, L));
    const int64_t begin = groups.begin * L, end = groups.end * L < n_.H ? groups.end * L : n_.H;
    int64_t row = 0;
    for (int64_t t = 0; t < n_.T; ++t)
      for (int64_t r = 0; r < n_.batch_sizes[t]; ++r, ++row) finish_row(row, t == 0, r, begin, end);
  }

  bool beyond() const { return false; }
  static void finish(const RecomputeArgs&, Recompute* const*, int) {}

 private:
  void finish_row(int64_t row, bool first, int64_t r, int64_t begin, int64_t end) {
    const int64_t H = n_.H;
    const bool cut = a_.reset != nullptr && a_.reset[row] != 0;
    const T* pre = static_cast<const T*>(a_.pre) + row * 4 * H;
    S* gates = static_cast<S*>(a_.gates) + row * 4 * H;
    for (int64_t unit = begin; unit < end; unit += L) {
      const int count = int(end - unit < L ? end - unit : L);
      const Gates<V> s = Math::activate(
          {load_some(pre + unit, count), load_some(pre + H + unit, count),
           load_some(pre + 2 * H + unit, count), load_some(pre + 3 * H + unit, count)});
      T* cell = cells_ + r * H + unit;
      V c_prev{};
      if (!cut)
        c_prev = first ? load_some(static_cast<const S*>(a_.c0) + r * H + unit, count)
                       : load_some(cell, count);
      const V c = Math::cell_state(s, c_prev);
      store_some(gates + unit, s.i, count);
      store_some(gates + H + unit, s.f, count);
      store_some(gates + 2 * H + unit, s.g, count);
      store_some(gates + 3 * H + unit, s.o, count);
      store_some(cell, c, count);
      store_some(static_cast<T*>(a_.c_all) + row * H + unit, c, count);
      if (a_.m) store_some(static_cast<S*>(a_.m) + row * H + unit, Math::cell_output(s, c), count);
    }
  }

  const RecomputeArgs a_;
  const Shape n_;
  Scratch<T> cells_;  // (sequences, H)
};

}  // namespace
}  // namespace fastlstm
