// How a block walks: the rows of a step, where segments are cut, and the wait for others.
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
  FASTLSTM_DEVICE Place(const Walk& walk, Machine& machine, int sequences)
      : tile(machine.tile()),
        tiles(tiles_of(walk.hidden)),
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

// Each lane waits for the blocks that publish the pieces that its warp will read.
//
// A wait is bounded. A lane that gives up says where in the fault word, and never waits again: the
// launch runs to its end, its results are worthless, and the host raises when it next looks.
template <class C, class Machine>
class Waiter {
 public:
  FASTLSTM_DEVICE Waiter(const Walk& walk, const Place& place, Machine& machine)
      : machine_(machine),
        flags_(walk.flags + int64_t(place.team) * place.tiles),
        fault_(walk.fault),
        team_(place.team),
        tile_(place.tile),
        hidden_(walk.hidden),
        polls_(walk.polls),
        jitter_(walk.jitter) {}

  FASTLSTM_DEVICE void wait(const Product<C, Machine>& product, int position) {
    if (position == 0) return;
    const int warp = machine_.thread() / lanes;
    for (int k = machine_.thread() % lanes; k < C::pairs * quads; k += lanes) {
      const int piece = piece_of(warp, k / quads, k % quads);
      if (piece < product.pieces())
        wait_for(producer_of(piece, piece_elements(C::storage), hidden_), position);
    }
    // What a lane has acquired, its warp has.
    machine_.sync_warp();
  }

  // Called by one thread, when all of the block have stored their share of `position`.
  FASTLSTM_DEVICE void publish(int position) { machine_.publish(flags_ + tile_, position + 1); }

 private:
  FASTLSTM_DEVICE void wait_for(int tile, int position) {
    const int32_t* flag = flags_ + tile;
    int polls = polls_;
    bool arrived = machine_.arrived(flag, position);
    while (!arrived && polls-- > 0) arrived = machine_.arrived(flag, position);
    if (!arrived && polls_ >= 0) {
      polls_ = -1;
      machine_.report(fault_, int64_t(position) << 24 | int64_t(team_ & 0xFFFFF) << 4 |
                                  (C::kind == Kind::forward ? 1 : 2));
    }
    if (jitter_ > 0)
      for (int64_t k = (position * int64_t(30011) + tile_ * 40503) % (jitter_ + 1); k > 0; --k)
        machine_.arrived(flag, position);
  }

  Machine& machine_;
  int32_t* const flags_;
  int64_t* const fault_;
  const int team_, tile_, hidden_;
  int polls_;
  const int jitter_;
};

// What both walks have: the block's place, its product, its wait, and the cells of a thread.
template <class C, class Machine>
class Block {
 protected:
  using Element = typename Machine::template Element<C::storage>;

  FASTLSTM_DEVICE Block(const Walk& walk, Machine& machine)
      : walk_(walk),
        machine_(machine),
        H_(walk.hidden),
        D_(walk.directions),
        place_(walk, machine, C::sequences),
        product_(machine, walk.hidden),
        waiter_(walk, place_, machine) {}

  FASTLSTM_DEVICE int unit(int k) const {
    return place_.tile * tile_units + cell_unit(machine_.thread(), k);
  }
  FASTLSTM_DEVICE int sequence(int k) const {
    return place_.first + cell_sequence(machine_.thread(), k);
  }
  // Is cell k of this thread one of the layer's?
  FASTLSTM_DEVICE bool owned(int k) const {
    return cell_sequence(machine_.thread(), k) < C::sequences && unit(k) < H_ &&
           sequence(k) < walk_.batch;
  }
  FASTLSTM_DEVICE int64_t state(int k) const {  // in (D, B, H)
    return (int64_t(place_.d) * walk_.batch + sequence(k)) * H_ + unit(k);
  }
  // The sequence whose products this lane's operands are of, in the n-th eight.
  FASTLSTM_DEVICE int operand_sequence(int n) const {
    return place_.first + n * mma_columns + b_column(machine_.thread() % lanes);
  }
  FASTLSTM_DEVICE float wide(const Element* from) const {
    return Machine::template widen<C::storage>(machine_.load(from));
  }
  FASTLSTM_DEVICE void put(Element* to, float value) {
    machine_.store(to, Machine::template narrow<C::storage>(value));
  }

  const Walk& walk_;
  Machine& machine_;
  const int H_, D_;
  const Place place_;
  Product<C, Machine> product_;
  Waiter<C, Machine> waiter_;
};

}  // namespace cuda
}  // namespace fastlstm
