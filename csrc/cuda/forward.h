// The forward walk (eq. 1 to 4) of one thread of one block.
//
// The blocks of a grid exchange h through y; those of a cluster send each other the rows that enter
// the next step. c stays in registers within a launch and in c_carry between launches.
#pragma once

#include "math.h"
#include "walk.h"

namespace fastlstm {
namespace cuda {

template <class C, class Machine, class Exchange>
class Forward : Block<C, Machine, Exchange> {
  using Base = Block<C, Machine, Exchange>;
  using Base::D_, Base::H_, Base::exchange_, Base::machine_, Base::place_;
  using Base::operand_sequence, Base::own_sequence, Base::own_unit, Base::owned, Base::put;
  using Base::sequence, Base::state, Base::unit, Base::widen;
  using typename Base::Element;

  // Who widens what comes from memory waits for it. (A block of four eights has no registers to
  // keep it as it is stored.)
  static constexpr bool widens_late = C::n_tiles < 4 && sizeof(Element) < sizeof(float);

  // What enters a cell's next step: h of this one, or something else.
  struct Entering {
    bool h = false;
    Element other{};
  };

 public:
  FASTLSTM_DEVICE Forward(const ForwardArgs& args, Machine& machine)
      : Base(args.walk, machine), a_(args) {}

  FASTLSTM_DEVICE void walk() {
    exchange_.attend([this] { walk_positions(); });
  }

 private:
  FASTLSTM_DEVICE void walk_positions() {
    const Walk& w = a_.walk;
    load_weights();
    float c[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      c[k] = owned(k) ? machine_.load(a_.c_carry + state(k)) : 0.0f;
    if constexpr (Exchange::in_cluster) send_first(step_at(w.begin));
    for (int position = w.begin; position < w.end; ++position)
      if (!take(step_at(position), position, c)) break;
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (owned(k)) machine_.store(a_.c_carry + state(k), c[k]);
  }

  FASTLSTM_DEVICE Step step_at(int position) const {
    const int t = place_.d == 0 ? position : a_.walk.steps - 1 - position;
    return Step(a_.walk, machine_, place_.d, t);
  }

  FASTLSTM_DEVICE void load_weights() {
    const auto* w_hh = static_cast<const Element*>(a_.w_hh) + int64_t(place_.d) * 4 * H_ * H_;
    exchange_.load([&](int m, int piece) {
      const int unit = unit_of_row(place_.tile, m, C::units);
      if (unit >= H_) return Piece{};
      const int64_t row = int64_t(gate_of_row(m)) * H_ + unit;
      return machine_.load(
          reinterpret_cast<const Piece*>(w_hh + row * H_ + piece * piece_elements(C::storage)));
    });
  }

  // False: the block has given up.
  FASTLSTM_DEVICE bool take(const Step& step, int position, float (&c)[C::cells]) {
    // What does not depend on other blocks is asked for before the wait, and looked at after it.
    const bool more = position + 1 < a_.walk.end;
    Gates<float> a[C::cells];
    [[maybe_unused]] Gates<Element> x[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!live(step, k)) continue;
      if constexpr (widens_late)
        x[k] = stored(gates(step, k));
      else
        a[k] = widened(stored(gates(step, k)));
    }
    Entering next[C::cells];
    if constexpr (Exchange::in_cluster)
      if (more) find_entering(step_at(position + 1), next);

    if (!exchange_.receive(position, [&](int n) { return entering(step, n); })) return false;
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      Element h{};
      if (live(step, k)) {
        const Gates<float> r = exchange_.gates(own_sequence(k), own_unit(k));
        // (eq. 1)
        if constexpr (widens_late) a[k] = widened(x[k]);
        a[k] = Cell::activate({a[k].i + r.i, a[k].f + r.f, a[k].g + r.g, a[k].o + r.o});
        c[k] = Cell::cell_state(a[k], step.entered(machine_, sequence(k)) ? c[k] : 0.0f);
        h = Machine::template narrow<C::storage>(Cell::cell_output(a[k], c[k]));
        const int64_t row = (step.here.start + sequence(k)) * D_ + place_.d;
        machine_.store(static_cast<Element*>(a_.y) + row * H_ + unit(k), h);
        if (step.last(sequence(k))) machine_.store(static_cast<Element*>(a_.h_n) + state(k), h);
      }
      if constexpr (Exchange::in_cluster)
        if (owned(k)) exchange_.stage(own_sequence(k), own_unit(k), next[k].h ? h : next[k].other);
    }
    exchange_.share(position, more);
    // What nobody waits for comes after it.
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (live(step, k)) keep(step, k, a[k], c[k]);
    return true;
  }

  // Of a cluster: what enters the first step of a launch.
  FASTLSTM_DEVICE void send_first(const Step& step) {
    Entering first[C::cells];
    find_entering(step, first);
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!owned(k)) continue;
      if (first[k].h) {
        const int64_t row = (step.in.start + sequence(k)) * D_ + place_.d;
        first[k].other = machine_.load(static_cast<const Element*>(a_.y) + row * H_ + unit(k));
      }
      exchange_.stage(own_sequence(k), own_unit(k), first[k].other);
    }
    exchange_.share(a_.walk.begin - 1, true);
  }

  // What enters `next` in each cell of this thread.
  FASTLSTM_DEVICE void find_entering(const Step& next, Entering (&found)[C::cells]) {
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!owned(k) || !next.entered(machine_, sequence(k))) continue;
      found[k].h = next.from_step(sequence(k));
      if (!found[k].h)
        found[k].other = machine_.load(static_cast<const Element*>(a_.h0) + state(k));
    }
  }

  // The rows of h that enter a step, for the sequences whose products this lane's operands are of.
  FASTLSTM_DEVICE const Element* entering(const Step& step, int n) const {
    const int b = operand_sequence(n);
    if (!step.entered(machine_, b)) return nullptr;
    if (step.from_step(b))
      return static_cast<const Element*>(a_.y) + ((step.in.start + b) * D_ + place_.d) * H_;
    return static_cast<const Element*>(a_.h0) + (int64_t(place_.d) * a_.walk.batch + b) * H_;
  }

  FASTLSTM_DEVICE Gates<Element> stored(const Element* gates) const {
    return {machine_.load(gates), machine_.load(gates + H_), machine_.load(gates + 2 * H_),
            machine_.load(gates + 3 * H_)};
  }
  static FASTLSTM_DEVICE Gates<float> widened(const Gates<Element>& x) {
    return {widen(x.i), widen(x.f), widen(x.g), widen(x.o)};
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
