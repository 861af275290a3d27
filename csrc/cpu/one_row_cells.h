// The pointwise part of the backward walk of a single sequence (one_row.h), a row of units after
// the other. What does not depend on the gradients of a step is made while the step's products
// wait for weights: after them little is left to do before the next ones can begin.
#pragma once

#include "operand.h"
#include "walk.h"

namespace fastlstm {
namespace {

// A step of one direction that is carried the gradient of the step undone before it.
template <class Pass>
class OneRowCells {
  using T = typename Pass::T;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  using Step = typename Pass::Step;
  static constexpr int64_t L = lanes<T>;

 public:
  static constexpr int64_t factors = 6;  // of L units: CellFactors, in order

  OneRowCells(const Pass& pass, const Step& step) : H_(pass.n_.H) {
    if (step.rows == 0) return;
    const BackwardArgs& a = pass.a_;
    const int d = step.d;
    const int64_t D = pass.n_.D, row = step.start * D + d;
    const int64_t before = Walk::previous(d, step.t), state = pass.state_at(d, 0, H_);
    const T* const c_all = static_cast<const T*>(a.c_all);
    gates_ = static_cast<const T*>(a.gates) + row * 4 * H_;
    c_ = c_all + row * H_;
    if (!pass.walk_.cut_before(d, step.t, 0))
      c_prev_ = pass.walk_.rows(before) > 0 ? c_all + (pass.walk_.start(before) * D + d) * H_
                                            : static_cast<const T*>(a.c0) + state;
    cut_ = pass.walk_.cut_before(d, step.after, 0);
    dy_ = a.dy ? static_cast<const T*>(a.dy) + row * H_ : nullptr;
    dc_all_ = a.dc_all ? static_cast<const T*>(a.dc_all) + row * H_ : nullptr;
    da_ = static_cast<T*>(a.da) + (row - a.first_row[d] * D) * 4 * H_;
    dc_ = pass.carried_cell(d, 0, 0);
    dbias_ = pass.dbias_ + d * 4 * H_;
    factors_ = pass.factors_ + d * blocks_of(H_, L) * factors * L;
    exchanged_ = pass.da(d, step.index).data;
    gate_distance_ = pass.gate_blocks_ * L;
  }

  // Units [unit, unit + L), before anything is known of their gradients,
  void prepare(int64_t unit) const {
    if (H_ - unit < L) return prepare(unit, int(H_ - unit));
    prepare(unit, int(L));
  }
  // and with what is carried of the gradient of h.
  void undo(int64_t unit, V dh) const {
    if (H_ - unit < L) return undo(unit, int(H_ - unit), dh);
    undo(unit, int(L), dh);
  }

 private:
  [[gnu::always_inline]] void prepare(int64_t unit, int count) const {
    const T* const gates = gates_ + unit;
    const CellFactors<V> by = Math::cell_factors(
        {load_some(gates, count), load_some(gates + H_, count), load_some(gates + 2 * H_, count),
         load_some(gates + 3 * H_, count)},
        c_prev_ ? load_some(c_prev_ + unit, count) : V{}, load_some(c_ + unit, count));
    T* const place = factors_ + unit * factors;
    store(place, by.da.i);
    store(place + L, by.da.f);
    store(place + 2 * L, by.da.g);
    store(place + 3 * L, by.da.o);
    store(place + 4 * L, by.dc);
    store(place + 5 * L, by.dc_prev);
  }

  [[gnu::always_inline]] void undo(int64_t unit, int count, V dh) const {
    const T* const place = factors_ + unit * factors;
    const CellFactors<V> by{
        {load(place), load(place + L), load(place + 2 * L), load(place + 3 * L)},
        load(place + 4 * L),
        load(place + 5 * L)};
    V dc = load(dc_ + unit);
    if (cut_) dh = dc = V{};
    if (dy_) dh += load_some(dy_ + unit, count);
    if (dc_all_) dc += load_some(dc_all_ + unit, count);
    const CellGradient<V> gradient = Math::cell_backward(by, dh, dc);
    store(dc_ + unit, gradient.dc_prev);
    give(0, unit, count, gradient.da.i);
    give(1, unit, count, gradient.da.f);
    give(2, unit, count, gradient.da.g);
    give(3, unit, count, gradient.da.o);
  }

  // Where it is multiplied, out, and to the bias.
  [[gnu::always_inline]] void give(int gate, int64_t unit, int count, V da) const {
    store(exchanged_ + gate * gate_distance_ + unit, da);
    store_some(da_ + gate * H_ + unit, da, count);
    T* const sum = dbias_ + gate * H_ + unit;
    store_some(sum, load_some(sum, count) + da, count);
  }

  const int64_t H_;
  const T *gates_, *c_, *c_prev_ = nullptr, *dy_, *dc_all_;
  T *da_, *dc_, *dbias_, *factors_, *exchanged_;
  int64_t gate_distance_;
  bool cut_;
};

}  // namespace
}  // namespace fastlstm
