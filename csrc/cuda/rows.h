// How the blocks of a grid exchange: through rows in global memory, where every step has rows of
// its own, so that nothing is overwritten that somebody may still read.
#pragma once

#include "walk.h"

namespace fastlstm {
namespace cuda {

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
      machine_.report(fault_, fault_at(position, team_, C::kind == Kind::forward ? 1 : 2));
    }
    for (int64_t k = more_looks(jitter_, position, tile_); k > 0; --k)
      machine_.arrived(flag, position);
  }

  Machine& machine_;
  int32_t* const flags_;
  int64_t* const fault_;
  const int team_, tile_, hidden_;
  int polls_;
  const int jitter_;
};

// Rows of h (of da), multiplied with this block's slice of W_hh.
template <class C, class Machine>
class Rows {
  using Element = typename Machine::template Element<C::storage>;

 public:
  static constexpr bool in_cluster = false;

  FASTLSTM_DEVICE Rows(const Walk& walk, const Place& place, Machine& machine)
      : machine_(machine),
        tile_(place.tile),
        product_(machine, depth(C::kind, walk.hidden)),
        partials_(machine),
        waiter_(walk, place, machine) {}

  template <class Weights>
  FASTLSTM_DEVICE void load(const Weights& weights) {
    product_.load(weights);
  }
  // Backward: the column of W_hh (4H, H) that is row m of the block's slice, and the row of W_hh
  // that is its k-th column.
  FASTLSTM_DEVICE int column(int m) const { return tile_ * C::units + m; }
  FASTLSTM_DEVICE int row(int k) const { return k; }
  template <class WalkAll>
  FASTLSTM_DEVICE void attend(const WalkAll& walk) {
    walk();
  }

  // Waits for the rows of the position before, and multiplies: row_of(n) is the row of sequence
  // operand_sequence of the n-th eight, or null.
  template <class RowOf>
  FASTLSTM_DEVICE bool receive(int position, const RowOf& row_of) {
    const Element* rows[C::n_tiles];
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n) rows[n] = row_of(n);
    waiter_.wait(product_, position);
    product_.multiply(rows,
                      [&](int m, int n, const float (&sums)[4]) { partials_.put(m, n, sums); });
    machine_.sync(Before::sums);
    return true;
  }
  // What has come in for a unit of the block: of its four gates; of its h.
  FASTLSTM_DEVICE Gates<float> gates(int n, int unit) const {
    return partials_.sum_of_four(n, unit);
  }
  FASTLSTM_DEVICE float carry(int n, int unit) const { return partials_.sum(n, unit); }

  // When all cells of the block have stored their part of their rows.
  FASTLSTM_DEVICE bool share(int position, bool) {
    machine_.sync(Before::others);
    if (machine_.thread() == 0) waiter_.publish(position);
    return true;
  }

 private:
  Machine& machine_;
  const int tile_;
  Product<C, Machine> product_;
  Partials<C, Machine> partials_;
  Waiter<C, Machine> waiter_;
};

}  // namespace cuda
}  // namespace fastlstm
