// How a block walks: the rows of a step, where segments are cut, and its cells.
#pragma once

#include "product.h"

namespace fastlstm {
namespace cuda {

// The packed rows of one step; none outside of [0, T).
struct StepRows {
  int64_t start;
  int32_t count;
};

template <class Machine>
FASTLSTM_DEVICE StepRows step_rows(const Walk& walk, Machine& machine, int t) {
  if (t < 0 || t >= walk.steps) return {0, 0};
  if (walk.starts == nullptr) return {int64_t(walk.rows_per_step) * t, walk.rows_per_step};
  const int64_t start = machine.load(walk.starts + t);
  return {start, int32_t(machine.load(walk.starts + t + 1) - start)};
}

// Which block this is.
struct Place {
  int tile, tiles, team, d, first;  // d: direction; first: the first of its sequences

  template <class Machine>
  FASTLSTM_DEVICE Place(const Walk& walk, Machine& machine, int units, int sequences)
      : tile(machine.tile()),
        tiles(tiles_of(walk.hidden, units)),
        team(walk.first_team + machine.team()),
        d(direction_of(team, slices_of(walk.rows_per_step, sequences))),
        first(first_sequence(team, slices_of(walk.rows_per_step, sequences), sequences)) {}
};

// One step of one direction. `in` is the step that the forward pass took before it, whose state
// enters it, `out` the step that the forward pass took after it.
struct Step {
  StepRows here, in, out;
  const uint8_t* reset;
  int d;

  template <class Machine>
  FASTLSTM_DEVICE Step(const Walk& walk, Machine& machine, int direction, int t)
      : here(step_rows(walk, machine, t)),
        in(step_rows(walk, machine, direction == 0 ? t - 1 : t + 1)),
        out(step_rows(walk, machine, direction == 0 ? t + 1 : t - 1)),
        reset(walk.reset),
        d(direction) {}

  FASTLSTM_DEVICE bool live(int b) const { return b < here.count; }
  // Is sequence b entered by what a step left, not by h0 and c0?
  FASTLSTM_DEVICE bool from_step(int b) const { return live(b) && b < in.count; }
  // Is it the last step that the forward pass takes of sequence b?
  FASTLSTM_DEVICE bool last(int b) const { return live(b) && b >= out.count; }

  // Does any state enter this step? Not where a segment begins: forward at the step itself, in
  // reverse at the later step that the state came from.
  template <class Machine>
  FASTLSTM_DEVICE bool entered(Machine& machine, int b) const {
    if (!live(b)) return false;
    if (reset == nullptr) return true;
    if (d == 0) return machine.load(reset + here.start + b) == 0;
    return !from_step(b) || machine.load(reset + in.start + b) == 0;
  }
  // Does any gradient come back from the step after it?
  template <class Machine>
  FASTLSTM_DEVICE bool carried(Machine& machine, int b) const {
    if (b >= out.count) return false;
    if (reset == nullptr) return true;
    if (d == 0) return machine.load(reset + out.start + b) == 0;
    return !live(b) || machine.load(reset + here.start + b) == 0;
  }
};

// What a block says when it gives up waiting: see the fault word in fastlstm/cuda.py.
FASTLSTM_HOST_DEVICE constexpr int64_t fault_at(int position, int team, int kernel) {
  return int64_t(position) << 24 | int64_t(team & 0xFFFFF) << 4 | kernel;
}
// A stress test's way to shuffle schedules: looks more than needed, at one of its waits.
FASTLSTM_HOST_DEVICE constexpr int64_t more_looks(int jitter, int position, int tile) {
  return jitter > 0 ? (position * int64_t(30011) + tile * 40503) % (jitter + 1) : 0;
}

// What both walks have: the block's place, its exchange with others, and the cells of a thread.
//
// Exchange is Rows (rows.h), or ClusterForward or ClusterBackward (cluster.h).
template <class C, class Machine, class Exchange>
class Block {
 protected:
  using Element = typename Machine::template Element<C::storage>;

  FASTLSTM_DEVICE Block(const Walk& walk, Machine& machine)
      : walk_(walk),
        machine_(machine),
        H_(walk.hidden),
        D_(walk.directions),
        place_(walk, machine, C::units, C::sequences),
        exchange_(walk, place_, machine) {}

  FASTLSTM_DEVICE int unit(int k) const { return place_.tile * C::units + own_unit(k); }
  FASTLSTM_DEVICE int sequence(int k) const { return place_.first + own_sequence(k); }
  // The same within the block.
  FASTLSTM_DEVICE int own_unit(int k) const { return cell_unit(machine_.thread(), k, C::units); }
  FASTLSTM_DEVICE int own_sequence(int k) const {
    return cell_sequence(machine_.thread(), k, C::units);
  }
  // Is cell k of this thread one of the layer's?
  FASTLSTM_DEVICE bool owned(int k) const {
    return own_sequence(k) < C::sequences && unit(k) < H_ && sequence(k) < walk_.batch;
  }
  FASTLSTM_DEVICE int64_t state(int k) const {  // in (D, B, H)
    return (int64_t(place_.d) * walk_.batch + sequence(k)) * H_ + unit(k);
  }
  // The sequence whose products this lane's operands are of, in the n-th eight.
  FASTLSTM_DEVICE int operand_sequence(int n) const {
    return place_.first + n * mma_columns + b_column(machine_.thread() % lanes);
  }
  static FASTLSTM_DEVICE float widen(Element value) {
    return Machine::template widen<C::storage>(value);
  }
  FASTLSTM_DEVICE void put(Element* to, float value) {
    machine_.store(to, Machine::template narrow<C::storage>(value));
  }

  const Walk& walk_;
  Machine& machine_;
  const int H_, D_;
  const Place place_;
  Exchange exchange_;
};

}  // namespace cuda
}  // namespace fastlstm
