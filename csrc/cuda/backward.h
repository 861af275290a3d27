// The backward walk (eq. 5 to 8) of one thread of one block: undoes one step after the other.
//
// The blocks of a grid exchange da through its own array, which the products after the walk (eq. 9)
// read too; those of a cluster send each other their shares of dh. One position after the last step
// the gradient of h0 is due. dc stays in registers within a launch and in dc_carry between
// launches.
#pragma once

#include "math.h"
#include "walk.h"

namespace fastlstm {
namespace cuda {

template <class C, class Machine, class Exchange>
class Backward : Block<C, Machine, Exchange> {
  using Base = Block<C, Machine, Exchange>;
  using Base::D_, Base::H_, Base::exchange_, Base::machine_, Base::place_;
  using Base::operand_sequence, Base::own_sequence, Base::own_unit, Base::owned;
  using Base::sequence, Base::state, Base::unit, Base::widen;
  using typename Base::Element;

  // What a cell has of its own step, before anything comes back to it. What is there at every step
  // stays as it is stored: who widens it waits for it to come from memory.
  struct Saved {
    Element i, f, g, o, dy;
    float c, c_in, dh_n, dc;
  };

 public:
  FASTLSTM_DEVICE Backward(const BackwardArgs& args, Machine& machine)
      : Base(args.walk, machine), a_(args) {}

  FASTLSTM_DEVICE void walk() {
    exchange_.attend([this] { walk_positions(); });
  }

 private:
  FASTLSTM_DEVICE void walk_positions() {
    const Walk& w = a_.walk;
    load_weights();
    float dc[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      dc[k] = owned(k) ? machine_.load(a_.dc_carry + state(k)) : 0.0f;
    if constexpr (Exchange::in_cluster) send_first(step_at(w.begin));
    for (int position = w.begin; position < w.end; ++position)
      if (!undo(step_at(position), position, dc)) break;
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (owned(k)) machine_.store(a_.dc_carry + state(k), dc[k]);
  }

  FASTLSTM_DEVICE Step step_at(int position) const {
    const int t = place_.d == 0 ? a_.walk.steps - 1 - position : position;
    return Step(a_.walk, machine_, place_.d, t);
  }

  // Row m of the slice is a column of W_hh (4H, H), as far as the block has it.
  FASTLSTM_DEVICE void load_weights() {
    const auto* w_hh = static_cast<const Element*>(a_.w_hh) + int64_t(place_.d) * 4 * H_ * H_;
    exchange_.load([&](int m, int piece) {
      constexpr int elements = piece_elements(C::storage), per_word = elements / piece_words;
      const int column = exchange_.column(m);
      Piece found{};
      if (column >= H_) return found;
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const int64_t row = exchange_.row(piece * elements + e);
        if (row < 0) continue;
        const uint32_t bits = Machine::bits(machine_.load(w_hh + row * H_ + column));
        found.word[e / per_word] |= bits << (e % per_word * 16);
      }
      return found;
    });
  }

  // False: the block has given up.
  FASTLSTM_DEVICE bool undo(const Step& step, int position, float (&dc)[C::cells]) {
    // What does not depend on other blocks is asked for before the wait, and looked at after it.
    Saved saved[C::cells];
    bool carried[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      carried[k] = owned(k) && step.carried(machine_, sequence(k));
      if (!owned(k)) continue;
      if (sequence(k) < step.out.count && !carried[k]) dc[k] = 0;
      if (step.live(sequence(k))) saved[k] = load_saved(step, k, dc[k]);
    }

    if (!exchange_.receive(position, [&](int n) { return coming_back(step, n); })) return false;
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!owned(k)) continue;
      // (eq. 8)
      const float carry = carried[k] ? exchange_.carry(own_sequence(k), own_unit(k)) : 0.0f;
      if (step.live(sequence(k)))
        undo_cell(step, position, k, saved[k], carry, dc[k]);
      else if (a_.dh0 != nullptr && sequence(k) < step.out.count)
        machine_.store(static_cast<Element*>(a_.dh0) + state(k),
                       Machine::template narrow<C::storage>(carry));
    }
    return exchange_.share(position, position + 1 < a_.walk.end);
  }

  FASTLSTM_DEVICE void undo_cell(const Step& step, int position, int k, const Saved& s, float carry,
                                 float& dc) {
    const Gates<float> gates{widen(s.i), widen(s.f), widen(s.g), widen(s.o)};
    const float dh = widen(s.dy) + s.dh_n + carry;
    const CellGradient<float> d = Cell::cell_backward(gates, s.c_in, s.c, dh, s.dc);
    dc = d.dc_prev;
    Element* da = gradients(step.here, k);
    put(da, position, k, 0, d.da.i);
    put(da, position, k, 1, d.da.f);
    put(da, position, k, 2, d.da.g);
    put(da, position, k, 3, d.da.o);
  }
  FASTLSTM_DEVICE void put(Element* da, int position, int k, int gate, float value) {
    const Element narrow = Machine::template narrow<C::storage>(value);
    machine_.store(da + gate * H_, narrow);
    if constexpr (Exchange::in_cluster)
      exchange_.stage(position, own_sequence(k), own_unit(k), gate, narrow);
  }
  FASTLSTM_DEVICE Element* gradients(const StepRows& rows, int k) const {
    const int64_t row = (rows.start + sequence(k)) * D_ + place_.d;
    return static_cast<Element*>(a_.da) + row * 4 * H_ + unit(k);
  }

  // Of a cluster: what comes back to the first step of a launch.
  FASTLSTM_DEVICE void send_first(const Step& step) {
    const int before = a_.walk.begin - 1;
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!owned(k) || sequence(k) >= step.out.count) continue;
      for (int gate = 0; gate < 4; ++gate)
        exchange_.stage(before, own_sequence(k), own_unit(k), gate,
                        machine_.load(gradients(step.out, k) + gate * H_));
    }
    exchange_.share(before, true);
  }

  FASTLSTM_DEVICE Saved load_saved(const Step& step, int k, float dc) const {
    const int b = sequence(k);
    const int64_t row = (step.here.start + b) * D_ + place_.d, in_row = row * H_ + unit(k);
    const auto* gates = static_cast<const Element*>(a_.gates) + row * 4 * H_ + unit(k);
    Saved s{machine_.load(gates),
            machine_.load(gates + H_),
            machine_.load(gates + 2 * H_),
            machine_.load(gates + 3 * H_),
            Element{},
            machine_.load(a_.c_all + in_row),
            0,
            0,
            dc};
    if (a_.dy != nullptr) s.dy = machine_.load(static_cast<const Element*>(a_.dy) + in_row);
    if (step.entered(machine_, b)) {
      const int64_t row_in = (step.in.start + b) * D_ + place_.d;
      if (step.from_step(b))
        s.c_in = machine_.load(a_.c_all + row_in * H_ + unit(k));
      else
        s.c_in = widen(machine_.load(static_cast<const Element*>(a_.c0) + state(k)));
    }
    if (a_.dh_n != nullptr && step.last(b))
      s.dh_n = widen(machine_.load(static_cast<const Element*>(a_.dh_n) + state(k)));
    if (a_.dc_all != nullptr) s.dc += machine_.load(a_.dc_all + in_row);
    return s;
  }

  // The rows of da of the step that was undone before, for the sequences whose products this
  // lane's operands are of.
  FASTLSTM_DEVICE const Element* coming_back(const Step& step, int n) const {
    const int b = operand_sequence(n);
    if (!step.carried(machine_, b)) return nullptr;
    return static_cast<const Element*>(a_.da) + ((step.out.start + b) * D_ + place_.d) * 4 * H_;
  }

  const BackwardArgs& a_;
};

}  // namespace cuda
}  // namespace fastlstm
