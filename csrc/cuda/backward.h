// The backward walk (eq. 5 to 8) of one thread of one block: undoes one step after the other.
//
// da is exchanged through its own array, which the products after the walk (eq. 9) read too. One
// position after the last step the gradient of h0 is due. dc stays in registers within a launch
// and in dc_carry between launches.
#pragma once

#include "math.h"
#include "walk.h"

namespace fastlstm {
namespace cuda {

template <class C, class Machine>
class Backward : Block<C, Machine> {
  using Base = Block<C, Machine>;
  using Base::D_, Base::H_, Base::machine_, Base::place_, Base::product_, Base::waiter_;
  using Base::operand_sequence, Base::owned, Base::put, Base::sequence, Base::state, Base::unit;
  using Base::wide;
  using typename Base::Element;

  // What a cell has of its own step, before anything comes back to it.
  struct Saved {
    Gates<float> gates;
    float c, c_in, dh, dc;
  };

 public:
  FASTLSTM_DEVICE Backward(const BackwardArgs& args, Machine& machine)
      : Base(args.walk, machine), a_(args) {}

  FASTLSTM_DEVICE void walk() {
    const Walk& w = a_.walk;
    load_weights();
    float dc[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      dc[k] = owned(k) ? machine_.load(a_.dc_carry + state(k)) : 0.0f;
    for (int position = w.begin; position < w.end; ++position) {
      const int t = place_.d == 0 ? w.steps - 1 - position : position;
      undo(Step(w, machine_, place_.d, t), position, dc);
    }
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (owned(k)) machine_.store(a_.dc_carry + state(k), dc[k]);
  }

 private:
  // Row m of the slice is the column of W_hh that belongs to unit m of the tile.
  FASTLSTM_DEVICE void load_weights() {
    const auto* w_hh = static_cast<const Element*>(a_.w_hh) + int64_t(place_.d) * 4 * H_ * H_;
    product_.load([&](int m, int piece) {
      constexpr int elements = piece_elements(C::storage), per_word = elements / piece_words;
      const int column = place_.tile * tile_units + m;
      Piece found{};
      if (column >= H_) return found;
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const int64_t row = int64_t(piece) * elements + e;
        const uint32_t bits = Machine::bits(machine_.load(w_hh + row * H_ + column));
        found.word[e / per_word] |= bits << (e % per_word * 16);
      }
      return found;
    });
  }

  FASTLSTM_DEVICE void undo(const Step& step, int position, float (&dc)[C::cells]) {
    // What does not depend on other blocks comes before the wait.
    Saved saved[C::cells];
#pragma unroll
    for (int k = 0; k < C::cells; ++k)
      if (owned(k)) {
        if (sequence(k) < step.out.count && !step.carried(machine_, sequence(k))) dc[k] = 0;
        if (step.live(sequence(k))) saved[k] = load_saved(step, k, dc[k]);
      }
    const Element* rows[C::n_tiles];
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n) rows[n] = coming_back(step, n);

    waiter_.wait(product_, position);
    product_.multiply(rows);
    machine_.sync();
#pragma unroll
    for (int k = 0; k < C::cells; ++k) {
      if (!owned(k)) continue;
      // (eq. 8)
      const float carry = product_.sum(sequence(k) - place_.first, unit(k) % tile_units);
      if (step.live(sequence(k)))
        undo_cell(step, k, saved[k], saved[k].dh + carry, dc[k]);
      else if (a_.dh0 != nullptr && sequence(k) < step.out.count)
        put(static_cast<Element*>(a_.dh0) + state(k), carry);
    }
    machine_.sync();
    if (machine_.thread() == 0) waiter_.publish(position);
  }

  FASTLSTM_DEVICE void undo_cell(const Step& step, int k, const Saved& s, float dh, float& dc) {
    const CellGradient<float> d = Cell::cell_backward(s.gates, s.c_in, s.c, dh, s.dc);
    dc = d.dc_prev;
    const int64_t row = (step.here.start + sequence(k)) * D_ + place_.d;
    Element* da = static_cast<Element*>(a_.da) + row * 4 * H_ + unit(k);
    put(da, d.da.i);
    put(da + H_, d.da.f);
    put(da + 2 * H_, d.da.g);
    put(da + 3 * H_, d.da.o);
  }

  FASTLSTM_DEVICE Saved load_saved(const Step& step, int k, float dc) const {
    const int b = sequence(k);
    const int64_t row = (step.here.start + b) * D_ + place_.d, in_row = row * H_ + unit(k);
    const auto* gates = static_cast<const Element*>(a_.gates) + row * 4 * H_ + unit(k);
    Saved s{{wide(gates), wide(gates + H_), wide(gates + 2 * H_), wide(gates + 3 * H_)},
            machine_.load(a_.c_all + in_row),
            0,
            0,
            dc};
    if (step.entered(machine_, b)) {
      const int64_t row_in = (step.in.start + b) * D_ + place_.d;
      s.c_in = step.from_step(b) ? machine_.load(a_.c_all + row_in * H_ + unit(k))
                                 : wide(static_cast<const Element*>(a_.c0) + state(k));
    }
    if (a_.dc_all != nullptr) s.dc += machine_.load(a_.dc_all + in_row);
    if (a_.dy != nullptr) s.dh = wide(static_cast<const Element*>(a_.dy) + in_row);
    if (a_.dh_n != nullptr && step.last(b))
      s.dh += wide(static_cast<const Element*>(a_.dh_n) + state(k));
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
