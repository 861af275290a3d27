// The pointwise part of a forward pass of tangents (forward.h): (eq. 10) of one tile.
#pragma once

#include "forward.h"

namespace fastlstm {
namespace {

// The cells of one item and the sequences of some tiles, row by row: as ForwardCells, of which it
// has what a walk by vectors calls.
template <class Pass>
class TangentCells {
  using Tiles = typename Pass::TilesOf;
  using T = typename Tiles::T;
  using Operand = Blocked<Tiles>;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  using Step = typename Pass::Step;
  static constexpr int64_t L = lanes<T>;
  static_assert(Tiles::in_place && !Tiles::has_pauses, "vectors of the storage type");

 public:
  TangentCells() = default;
  TangentCells(const Pass& pass, const typename Pass::Item& item, const Step& step, Range rows,
               const T* pre, const T*)
      : p_(&pass),
        a_(static_cast<const TangentArgs*>(&pass.a_)),
        item_(item),
        step_(step),
        rows_(rows),
        pre_(pre) {}

  // Nothing is worth beginning early.
  void activate() {}
  void all_but_last() {
    for (; rows_.begin + 1 < rows_.end; ++rows_.begin) row(rows_.begin);
  }
  void complete() { row(rows_.begin); }
  void all() {
    for (; rows_.begin < rows_.end; ++rows_.begin) row(rows_.begin);
  }
  void rest() {}

 private:
  [[gnu::always_inline]] void row(int64_t r) {
    const Walk& walk = p_->walk_;
    const int64_t H = p_->n_.H, D = p_->n_.D, unit = item_.unit;
    const int d = item_.d, count = item_.count;
    const int64_t here = ((step_.start + r) * D + d) * H + unit;
    const int64_t gate_here = here + 3 * ((step_.start + r) * D + d) * H;
    const T* gates = static_cast<const T*>(a_->layer_gates) + gate_here;
    T* const pre = static_cast<T*>(a_->pre) + gate_here;
    const Gates<V> s{load_some(gates, count), load_some(gates + H, count),
                     load_some(gates + 2 * H, count), load_some(gates + 3 * H, count)};
    const Gates<V> a{load(pre_) + load_some(pre, count), load(pre_ + L) + load_some(pre + H, count),
                     load(pre_ + 2 * L) + load_some(pre + 2 * H, count),
                     load(pre_ + 3 * L) + load_some(pre + 3 * H, count)};
    pre_ += 4 * L;
    store_some(pre, a.i, count);
    store_some(pre + H, a.f, count);
    store_some(pre + 2 * H, a.g, count);
    store_some(pre + 3 * H, a.o, count);

    T* const state = p_->cells_ + (item_.index * p_->rows_ + r) * L;
    const V c = load_some(static_cast<const T*>(a_->layer_c_all) + here, count);
    const auto factors = Math::cell_factors(s, cell_before(r), c);
    const CellTangent<V> tangent = Math::cell_tangent(factors, a, load(state));
    const bool goes_on = r < step_.next_rows;
    const bool cut = goes_on && walk.cut_before(d, step_.next, r);
    store(state, cut ? V{} : tangent.c);
    store_some(static_cast<T*>(a_->c_all) + here, tangent.c, count);
    const bool projected = p_->out_panels_ > 0;
    store_some(static_cast<T*>(projected ? a_->m : a_->y) + here, tangent.m, count);
    const Operand hidden = projected ? p_->unprojected(d) : step_.hidden;
    hidden.put(hidden.at(r, projected ? 0 : p_->hidden_block_, unit),
               cut && !projected ? V{} : tangent.m, count);
    if (goes_on) return;
    const int64_t final = walk.state_at(d, r, H) + unit;
    store_some(static_cast<T*>(a_->c_n) + final, tangent.c, count);
    if (!projected) store_some(static_cast<T*>(a_->h_n) + final, tangent.m, count);
  }

  // c_{t-1} itself.
  [[gnu::always_inline]] V cell_before(int64_t r) const {
    const Walk& walk = p_->walk_;
    const int64_t before = Walk::previous(item_.d, step_.t), H = p_->n_.H;
    if (walk.cut_before(item_.d, step_.t, r)) return V{};
    const T* place = r < walk.rows(before)
                         ? static_cast<const T*>(a_->layer_c_all) +
                               ((walk.start(before) + r) * p_->n_.D + item_.d) * H
                         : static_cast<const T*>(a_->layer_c0) + walk.state_at(item_.d, r, H);
    return load_some(place + item_.unit, item_.count);
  }

  const Pass* p_ = nullptr;
  const TangentArgs* a_ = nullptr;
  typename Pass::Item item_{0, 0, 0, 0};
  Step step_;
  Range rows_{0, 0};
  const T* pre_ = nullptr;  // of the rows left: (rows, 4L), W_hh h'
};

template <class Tiles>
using Tangent = ForwardWalk<Tiles, TangentCells>;

}  // namespace
}  // namespace fastlstm
