// A step of the backward walk (backward.h) of a single sequence, whose weights are not packed
// (one_row.h), and its pointwise part. What does not depend on the gradients of a step is made
// while the step's products wait for weights: after them little is left to do before the next ones
// can begin.
#pragma once

#include <algorithm>

#include "operand.h"
#include "vector_math.h"
#include "walk.h"

namespace fastlstm {
namespace {

// The cells of a step of one direction that is carried the gradient of the step undone before it.
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
    const int64_t before = Walk::previous(d, step.t), state = pass.walk_.state_at(d, 0, H_);
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
    exchanged_ = pass.da(d, step.index, step.units).data;
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
  // Of a step without rows there are none.
  const T *gates_ = nullptr, *c_ = nullptr, *c_prev_ = nullptr, *dy_ = nullptr, *dc_all_ = nullptr;
  T *da_ = nullptr, *dc_ = nullptr, *dbias_ = nullptr, *factors_ = nullptr, *exchanged_ = nullptr;
  int64_t gate_distance_ = 0;
  bool cut_ = false;
};

template <class Pass>
class OneRowStep {
  using T = typename Pass::T;
  using Step = typename Pass::Step;
  using Cells = typename Pass::Cells;
  using Thread = typename Pass::Thread;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;

 public:
  // Every thread's part of the products, and then the cells of its own panels of units.
  static void carry(Pass& p, const Team& team, const Range& items, int64_t s, Thread& thread) {
    for (int d = 0; d < p.n_.D; ++d) multiply(p, team, p.units_of(items, d), s, d, thread);
    team.barrier.wait();
    for (int d = 0; d < p.n_.D; ++d) {
      const Step step = p.step(d, s, thread);
      const Range units = p.units_of(items, d);
      if (step.carried > 0 && step.rows > 0) {
        const OneRowCells<Pass> cells(p, step);
        for (int64_t unit = units.begin; unit < units.end; unit += L)
          cells.undo(unit, p.exchange_.sum(team, s, d, unit));
      } else {
        for (int64_t unit = units.begin; unit < units.end; unit += width)
          begin_or_end(p, team, step, unit, thread);
      }
    }
  }

 private:
  static void multiply(const Pass& p, const Team& team, const Range& units, int64_t s, int d,
                       const Thread& thread) {
    const Step step = p.step(d, s, thread);
    if (step.carried == 0) return;
    Wanted wanted;
    ask_for_next(p, wanted, d, s, units, thread);
    const OneRowCells<Pass> cells(p, step);
    int64_t unit = units.begin;
    auto prepare = [&] {
      cells.prepare(unit);
      unit += L;
    };
    const int64_t pieces = step.rows > 0 ? blocks_of(units.end - units.begin, L) : 0;
    Spread<decltype(prepare)> meanwhile(prepare, pieces, p.exchange_.pauses(units));
    p.exchange_.multiply(team, s, d, units, p.da(d, s - 1, step.units).data, p.gate_blocks_ * L,
                         static_cast<const T*>(p.a_.w_hh[d]), wanted, meanwhile);
  }

  // What is prepared while the next step's products are made.
  static void ask_for_next(const Pass& p, Wanted& wanted, int d, int64_t s, const Range& units,
                           const Thread& thread) {
    if (s + 1 >= p.a_.end) return;
    const Step next = p.step(d, s + 1, thread);
    for (int64_t unit = units.begin; unit < units.end && wanted.has_room(Cells::most_asked);
         unit += width)
      Cells::ask(p, wanted, next, {0, 1}, unit);
  }

  // A panel of units at the step that the sequence ends with, or before the one it begins with.
  static void begin_or_end(Pass& p, const Team& team, const Step& step, int64_t unit,
                           Thread& thread) {
    if (step.carried > 0) {
      T* const sums = thread.next();
      for (int64_t v = 0; v < width; v += L)
        store(sums + v, p.exchange_.sum(team, step.index, step.d, unit + v));
      p.finish_tile(step, 0, 1, unit, sums, thread);
    }
    p.begin_sequences(step.d * p.output_panels_ + unit / width, step.index, thread);
  }
};

}  // namespace
}  // namespace fastlstm
