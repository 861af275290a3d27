// The forward walk (eq. 1 to 4) of one thread of one block.
//
// h is exchanged through y, where every step has rows of its own: nothing is overwritten that
// somebody may still read. c stays in registers within a launch and in c_carry between launches.
#pragma once

#include "math.h"
#include "walk.h"

namespace fastlstm {
namespace cuda {

template <class C, class Machine>
class Forward : Block<C, Machine> {
  using Base = Block<C, Machine>;
  using Base::D_, Base::H_, Base::machine_, Base::place_, Base::product_, Base::waiter_;
  using Base::operand_sequence, Base::owned, Base::put, Base::sequence, Base::state, Base::unit;
  using Base::wide;
  using typename Base::Element;

 public:
  FASTLSTM_DEVICE Forward(const ForwardArgs& args, Machine& machine)
      : Base(args.walk, machine), a_(args) {}

  FASTLSTM_DEVICE void walk() {
    const Walk& w = a_.walk;
    load_weights();
    float c[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      c[k] = owned(k) ? machine_.load(a_.c_carry + state(k)) : 0.0f;
    for (int position = w.begin; position < w.end; ++position) {
      const int t = place_.d == 0 ? position : w.steps - 1 - position;
      take(Step(w, machine_, place_.d, t), position, c);
    }
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (owned(k)) machine_.store(a_.c_carry + state(k), c[k]);
  }

 private:
  FASTLSTM_DEVICE void load_weights() {
    const auto* w_hh = static_cast<const Element*>(a_.w_hh) + int64_t(place_.d) * 4 * H_ * H_;
    product_.load([&](int m, int piece) {
      const int unit = unit_of_row(place_.tile, m);
      if (unit >= H_) return Piece{};
      const int64_t row = int64_t(gate_of_row(m)) * H_ + unit;
      return machine_.load(
          reinterpret_cast<const Piece*>(w_hh + row * H_ + piece * piece_elements(C::storage)));
    });
  }

  FASTLSTM_DEVICE void take(const Step& step, int position, float (&c)[C::cells]) {
    // What does not depend on other blocks comes before the wait.
    Gates<float> a[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (live(step, k)) a[k] = inputs(gates(step, k));
    const Element* rows[C::n_tiles];
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n) rows[n] = entering(step, n);

    waiter_.wait(product_, position);
    product_.multiply(rows);
    machine_.sync();
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!live(step, k)) continue;
      const Gates<float> r = product_.sum_of_four(sequence(k) - place_.first, unit(k) % tile_units);
      // (eq. 1)
      a[k] = Cell::activate({a[k].i + r.i, a[k].f + r.f, a[k].g + r.g, a[k].o + r.o});
      c[k] = Cell::cell_state(a[k], step.entered(machine_, sequence(k)) ? c[k] : 0.0f);
      const Element h = Machine::template narrow<C::storage>(Cell::cell_output(a[k], c[k]));
      const int64_t row = (step.here.start + sequence(k)) * D_ + place_.d;
      machine_.store(static_cast<Element*>(a_.y) + row * H_ + unit(k), h);
      if (step.last(sequence(k))) machine_.store(static_cast<Element*>(a_.h_n) + state(k), h);
    }
    machine_.sync();
    if (machine_.thread() == 0) waiter_.publish(position);
    // What nobody waits for comes after it.
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (live(step, k)) keep(step, k, a[k], c[k]);
  }

  // The rows of h that enter a step, for the sequences whose products this lane's operands are of.
  FASTLSTM_DEVICE const Element* entering(const Step& step, int n) const {
    const int b = operand_sequence(n);
    if (!step.entered(machine_, b)) return nullptr;
    if (step.from_step(b))
      return static_cast<const Element*>(a_.y) + ((step.in.start + b) * D_ + place_.d) * H_;
    return static_cast<const Element*>(a_.h0) + (int64_t(place_.d) * a_.walk.batch + b) * H_;
  }

  FASTLSTM_DEVICE Gates<float> inputs(const Element* gates) const {
    return {wide(gates), wide(gates + H_), wide(gates + 2 * H_), wide(gates + 3 * H_)};
  }

  FASTLSTM_DEVICE void keep(const Step& step, int k, const Gates<float>& s, float c) {
    const int64_t row = (step.here.start + sequence(k)) * D_ + place_.d;
    if (a_.c_all != nullptr) machine_.store(a_.c_all + row * H_ + unit(k), c);
    if (!a_.reserve) return;
    Element* to = gates(step, k);
    put(to, s.i);
    put(to + H_, s.f);
    put(to + 2 * H_, s.g);
    put(to + 3 * H_, s.o);
  }

  FASTLSTM_DEVICE bool live(const Step& step, int k) const {
    return owned(k) && step.live(sequence(k));
  }
  FASTLSTM_DEVICE Element* gates(const Step& step, int k) const {
    const int64_t row = step.here.start + sequence(k) - a_.origin[place_.d];
    return static_cast<Element*>(a_.gates) + (row * D_ + place_.d) * 4 * H_ + unit(k);
  }

  const ForwardArgs& a_;
};

}  // namespace cuda
}  // namespace fastlstm
