// How the blocks of a cluster exchange: each stores into the others' shared memory.
//
// A block has two mailboxes, each with an mbarrier that counts the bytes that have come in. What is
// stored for one position arrives in one of them while what came for the position before is still
// in use in the other. Nobody stores into a mailbox that is still read: who sends what follows has
// received from every block what it had computed from what it read there.
#pragma once

#include "cluster_layout.h"
#include "walk.h"

namespace fastlstm {
namespace cuda {

// What is sent to a block is counted in turns, from 0 at the first that a launch exchanges. Each
// thread waits for itself, and what it has acquired is its own. A wait is bounded: a block of which
// a thread gives up says where in the fault word, sends nothing more and goes to the end of its
// walk, and so will all who wait for it.
template <class C, class Machine>
class Mailboxes {
 public:
  FASTLSTM_DEVICE Mailboxes(const Walk& walk, const Place& place, Machine& machine, int bytes)
      : machine_(machine),
        barriers_(reinterpret_cast<uint64_t*>(machine.shared() + C::barriers_at)),
        fault_(walk.fault),
        team_(place.team),
        tile_(place.tile),
        first_(walk.begin),
        bytes_(bytes),
        polls_(walk.polls),
        jitter_(walk.jitter) {}

  FASTLSTM_DEVICE bool given_up() const { return given_up_; }
  FASTLSTM_DEVICE int turn_of(int position) const { return position - first_; }
  FASTLSTM_DEVICE char* box(int turn) const {
    return machine_.shared() + C::mailboxes_at + turn % mailboxes * C::mailbox_bytes;
  }
  FASTLSTM_DEVICE uint64_t* barrier(int turn) const { return barriers_ + turn % mailboxes; }

  // By all threads of a cluster, before anything is sent.
  FASTLSTM_DEVICE void open() {
    if (machine_.thread() == 0) {
      for (int k = 0; k < mailboxes; ++k) machine_.init_barrier(barriers_ + k);
      machine_.fence_barriers();
    }
    machine_.sync_cluster();
  }
  // By all, in the end: who leaves takes its mailboxes with it. What a block has waited for has
  // arrived; where one has given up, something may still be on its way.
  FASTLSTM_DEVICE void close() {
    machine_.sync_cluster();
    if (given_up_) machine_.outlast_stores();
  }

  // The bytes of a turn are due: by one thread, when those of two turns before have arrived.
  FASTLSTM_DEVICE void expect(int turn) {
    if (machine_.thread() == 0) machine_.expect(barrier(turn), bytes_);
  }
  FASTLSTM_DEVICE void wait(int position) {
    const int turn = turn_of(position), parity = turn / mailboxes % 2;
    int polls = polls_;
    bool complete = machine_.complete(barrier(turn), parity);
    while (!complete && polls-- > 0) complete = machine_.complete(barrier(turn), parity);
    for (int64_t k = more_looks(jitter_, position, tile_); k > 0; --k)
      machine_.complete(barrier(turn), parity);
    if (!complete && !given_up_) {
      given_up_ = true;
      machine_.report(fault_, fault_at(position, team_, C::kind == Kind::forward ? 3 : 4));
    }
    // Lanes that have waited for different times multiply together.
    machine_.sync_warp();
  }

 private:
  Machine& machine_;
  uint64_t* const barriers_;
  int64_t* const fault_;
  const int team_, tile_, first_, bytes_, polls_, jitter_;
  bool given_up_ = false;
};

// What forward and backward have in common.
template <class C, class Machine>
class Cluster {
 public:
  static constexpr bool in_cluster = true;

  template <class WalkAll>
  FASTLSTM_DEVICE void attend(const WalkAll& walk) {
    boxes_.open();
    if (place_.tile < place_.tiles) walk();
    boxes_.close();
  }

 protected:
  using Element = typename Machine::template Element<C::storage>;

  // `depth`: elements of an exchanged row; `bytes`: what a block receives each time.
  FASTLSTM_DEVICE Cluster(const Walk& walk, const Place& place, Machine& machine, int depth,
                          int bytes)
      : machine_(machine),
        place_(place),
        product_(machine, depth),
        boxes_(walk, place, machine, bytes) {}

  FASTLSTM_DEVICE char* own() const { return machine_.shared() + C::own_at; }
  // The k-th of the blocks that a block sends to: each begins with itself.
  FASTLSTM_DEVICE int receiver(int k) const {
    const int rank = place_.tile + k;
    return rank < place_.tiles ? rank : rank - place_.tiles;
  }

  Machine& machine_;
  const Place place_;
  Product<C, Machine> product_;
  Mailboxes<C, Machine> boxes_;
};

// h: each block sends its units of the rows that enter the next step to all blocks.
template <class C, class Machine>
class ClusterForward : public Cluster<C, Machine> {
  using Base = Cluster<C, Machine>;
  using Base::boxes_, Base::machine_, Base::own, Base::place_, Base::product_, Base::receiver;
  using typename Base::Element;
  static constexpr int elements = piece_elements(C::storage);

 public:
  FASTLSTM_DEVICE ClusterForward(const Walk& walk, const Place& place, Machine& machine)
      : Base(walk, place, machine, walk.hidden, C::sequences * walk.hidden * item_size(C::storage)),
        partials_(machine),
        hidden_(walk.hidden) {}

  template <class Weights>
  FASTLSTM_DEVICE void load(const Weights& weights) {
    product_.load(weights);
  }
  // Waits for the rows that enter a position, and multiplies. False: the block has given up.
  template <class RowOf>
  FASTLSTM_DEVICE bool receive(int position, const RowOf&) {
    boxes_.wait(position);
    const char* box = boxes_.box(boxes_.turn_of(position));
    const Element* rows[C::n_tiles];
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n)
      rows[n] = reinterpret_cast<const Element*>(
          box + (n * mma_columns + b_column(machine_.thread() % lanes)) * C::row);
    product_.multiply(rows,
                      [&](int m, int n, const float (&sums)[4]) { partials_.put(m, n, sums); });
    return !machine_.sync_any(Before::sums, boxes_.given_up());
  }
  FASTLSTM_DEVICE Gates<float> gates(int n, int unit) const {
    return partials_.sum_of_four(n, unit);
  }

  // h of a cell, as it enters the next position.
  FASTLSTM_DEVICE void stage(int n, int unit, Element h) {
    machine_.store_shared(reinterpret_cast<Element*>(own()) + n * C::units + unit, h);
  }
  // Sends what all cells have staged; it enters position + 1.
  FASTLSTM_DEVICE bool share(int position, bool more) {
    if (!more) return true;
    machine_.sync(Before::others);
    const int turn = boxes_.turn_of(position + 1);
    constexpr int pieces = C::units / elements, of_block = C::sequences * pieces;
    for (int k = machine_.thread(); k < of_block * place_.tiles; k += threads) {
      const int piece = k % pieces, n = k / pieces % C::sequences;
      const int unit = place_.tile * C::units + piece * elements;
      if (unit >= hidden_) continue;
      const Piece sent =
          machine_.load_shared(reinterpret_cast<const Piece*>(own()) + n * pieces + piece);
      machine_.send(receiver(k / of_block),
                    reinterpret_cast<Piece*>(boxes_.box(turn) + n * C::row) + unit / elements, sent,
                    boxes_.barrier(turn));
    }
    boxes_.expect(turn);
    return true;
  }

 private:
  Partials<C, Machine> partials_;
  const int hidden_;
};

// dh: each block multiplies its own da, and sends the shares of every unit to who owns it.
template <class C, class Machine>
class ClusterBackward : public Cluster<C, Machine> {
  using Base = Cluster<C, Machine>;
  using Base::boxes_, Base::machine_, Base::own, Base::place_, Base::product_;
  using typename Base::Element;

 public:
  FASTLSTM_DEVICE ClusterBackward(const Walk& walk, const Place& place, Machine& machine)
      : Base(walk, place, machine, 4 * C::units,
             place.tiles * C::units * C::sequences * int(sizeof(float))),
        hidden_(walk.hidden) {}

  // The column of W_hh that is row m of the block's slice, and the row of W_hh that is its k-th
  // column; < 0: none.
  FASTLSTM_DEVICE int column(int m) const { return m; }
  FASTLSTM_DEVICE int row(int k) const {
    const int unit = place_.tile * C::units + k % C::units;
    return unit < hidden_ ? k / C::units * hidden_ + unit : -1;
  }
  template <class Weights>
  FASTLSTM_DEVICE void load(const Weights& weights) {
    product_.load(weights);
    // Units beyond H have no da, and sums over units have zeros of them.
    for (int k = machine_.thread(); k < mailboxes * C::sequences * C::row / int(sizeof(float));
         k += threads)
      machine_.store_shared(reinterpret_cast<float*>(own()) + k, 0.0f);
    machine_.sync(Before::cells);
  }

  template <class RowOf>
  FASTLSTM_DEVICE bool receive(int position, const RowOf&) {
    boxes_.wait(position);
    received_ = reinterpret_cast<const float*>(boxes_.box(boxes_.turn_of(position)));
    return true;
  }
  FASTLSTM_DEVICE float carry(int n, int unit) const {
    float total = 0;
    for (int rank = 0; rank < place_.tiles; ++rank)
      total += machine_.load_shared(received_ + share_of(rank, n, unit, C::units, C::n_tiles));
    return total;
  }

  // da of a cell at `position`.
  FASTLSTM_DEVICE void stage(int position, int n, int unit, int gate, Element da) {
    machine_.store_shared(own_row(position, n) + gate * C::units + unit, da);
  }
  // Multiplies what all cells have staged and sends it; it comes back to position + 1. False: the
  // block has given up.
  FASTLSTM_DEVICE bool share(int position, bool more) {
    if (!more) return true;
    if (machine_.sync_any(Before::others, boxes_.given_up())) return false;
    const int turn = boxes_.turn_of(position + 1), lane = machine_.thread() % lanes;
    const Element* rows[C::n_tiles];
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n)
      rows[n] = own_row(position, n * mma_columns + b_column(lane));
    product_.multiply(rows, [&](int m, int n, const float (&sums)[4]) {
      const int first = product_.first_row(m);
      if (first / C::units >= place_.tiles) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // sums of two sequences that are neighbours
        const int share = share_of(place_.tile, n * mma_columns + c_column(lane, 2 * half),
                                   first % C::units + c_row(lane, 2 * half), C::units, C::n_tiles);
        machine_.send(first / C::units, reinterpret_cast<float*>(boxes_.box(turn)) + share,
                      sums[2 * half], sums[2 * half + 1], boxes_.barrier(turn));
      }
    });
    boxes_.expect(turn);
    return true;
  }

 private:
  // A warp may still multiply one position's da while others have come to the next.
  FASTLSTM_DEVICE Element* own_row(int position, int n) const {
    return reinterpret_cast<Element*>(
        own() + (boxes_.turn_of(position + 1) % mailboxes * C::sequences + n) * C::row);
  }

  const int hidden_;
  const float* received_ = nullptr;
};

}  // namespace cuda
}  // namespace fastlstm
