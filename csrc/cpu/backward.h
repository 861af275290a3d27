// The backward walk of one layer: the gradients of every pre-activation and of the initial state.
// (The sums over all rows that follow, (eq. 9), are plain matrix products and not done here.)
//
// The mirror image of forward.h: steps are undone in the opposite order, and the gradient of the
// pre-activations, da_t, is what is exchanged through two blocked buffers. An item is one
// direction and one panel of columns. Each step multiplies da of the step undone before by an
// item's panel of W_hh, which carries the gradient to h of this step, and finishes the cells of
// those units while the tile is in the L1 cache: one barrier a step. With a projection, the
// gradient of h is exchanged too and multiplied by W_hr: two barriers a step. (A single sequence's
// weights are not packed, and what is exchanged are sums: see one_row.h. So may be what threads
// exchange that multiply by the matrix unit: see exchanged_sums.h.)
#pragma once

#include <algorithm>

#include "backward_cells.h"
#include "backward_edges.h"
#include "exchanged_sums.h"
#include "one_row.h"
#include "one_row_step.h"
#include "operand.h"
#include "processor.h"
#include "split.h"

namespace fastlstm {
namespace {

template <class Tiles>
class Backward : public FindsBeyond {
  using TilesOf = Tiles;
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<Tiles>;
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>;
  static constexpr int64_t width = panel_width<T>;

 public:
  // One part of the pass: the given sequences.
  Backward(const BackwardArgs& args, Range sequences)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset, sequences),
        rows_(walk_.max_rows()),
        tiles_(rows_, Tiles::walk_rows(rows_, 4 * Tiles::panel_size(n_.H))),
        projected_(args.w_hr[0] != nullptr),
        last_(a_.end == walk_.all_steps()),
        carried_end_(a_.end + (last_ && a_.dh0 != nullptr)),
        carries_(carried_end_ > std::max<int64_t>(a_.begin, 1)),
        gate_blocks_(Operand::count(n_.H)),
        output_blocks_(Operand::count(n_.P)),
        unit_panels_(blocks_of(n_.H, width)),
        output_panels_(blocks_of(n_.P, width)),
        in_place_(Tiles::in_place && rows_ == 1 && !projected_),
        exchanges_sums_(worth_exchanging_sums<Tiles>(n_, a_.threads) && !projected_ && n_.T > 0 &&
                        rows_ == n_.batch_sizes[0] &&
                        da_bytes() <= l2_cache_bytes() / 2 * a_.threads),
        gate_by_gate_(Tiles::gate_by_gate && !in_place_ && !exchanges_sums_ &&
                      da_bytes() > l2_cache_bytes() / 2),
        helps_(rows_ > Tiles::few_rows && !gate_by_gate_ &&
               worth_helping<Tiles>(work(a_), a_.threads)),
        paired_(!in_place_ && !gate_by_gate_ && tiles_.height <= Tiles::pair_rows),
        da_size_(Operand::size(4 * gate_blocks_, rows_, tiles_)),
        dh_size_(projected_ ? Operand::size(output_blocks_, rows_, tiles_) : 0),
        recurrent_(carries_ && !in_place_ ? n_.D * output_panels_ * 4 * Tiles::panel_size(n_.H)
                                          : 0),
        projection_(projected_ ? n_.D * unit_panels_ * Tiles::panel_size(n_.P) : 0),
        da_(n_.D * 2 * da_size_),
        dh_(n_.D * dh_size_),
        dbias_(n_.D * 4 * n_.H),
        sums_(gate_by_gate_ ? n_.D * output_panels_ * tiles_.count(rows_) * tiles_.height * width
                            : 0),
        dc_(n_.D * unit_panels_ * panel_vectors * rows_ * L),
        factors_(in_place_ ? n_.D * blocks_of(n_.H, L) * OneRowCells<Backward>::factors * L : 0),
        exchange_(n_.H, n_.P, n_.D, in_place_ ? std::min<int64_t>(a_.threads, max_parts) : 0),
        given_(exchanges_sums_ ? std::min<int64_t>(a_.threads, max_parts) : 0,
               n_.D * output_panels_, rows_) {
    dbias_.clear();
    // What no group of columns fills of a block may be multiplied all the same.
    if (Operand::columns > L) {
      da_.clear();
      dh_.clear();
    }
  }

  static Work work(const BackwardArgs& args) {
    const Shape& n = args.shape;
    const int64_t weights = 4 * n.H * n.P * n.D, bytes = Tiles::weight_bytes(weights);
    const int64_t rows = n.T > 0 ? n.batch_sizes[0] : 0;
    // A copy of the weights for each thread is worth it if it takes little of the cache, or meets
    // many rows.
    return {n.D * blocks_of(n.P, width), rows * weights,
            sequences_worth_a_thread<Tiles>(
                bytes, args.threads, n.N, rows_worth_a_plain_copy,
                bytes > l2_cache_bytes() / 2 ? Tiles::own_sequences : sequences_per_thread)};
  }

  void walk(const Team& team) {
    [[maybe_unused]] const typename Tiles::Session session;
    const Range outputs = team.share(n_.D * output_panels_);
    const Range units = projected_ ? team.share(n_.D * unit_panels_) : Range{0, 0};
    Thread thread;
    for (int d = 0; d < n_.D; ++d)
      thread.units[d] = exchanges_sums_ ? units_of(outputs, d) : Range{0, n_.H};
    if (carries_ && !in_place_) pack_recurrent(outputs, thread);
    for (int64_t item = units.begin; item < units.end; ++item) pack_projection(item);
    const Advance advance =
        Tiles::advance(rows_, (outputs.end - outputs.begin) * 4 * Tiles::panel_size(n_.H));
    if (a_.begin > 0) {
      Edges::receive(*this, team, thread);
      team.barrier.wait();
    }
    for (int64_t s = a_.begin; s < carried_end_; ++s) {
      if (in_place_) {
        if constexpr (Tiles::in_place) OneRowStep<Backward>::carry(*this, team, outputs, s, thread);
        continue;
      }
      if (exchanges_sums_) {
        if constexpr (Tiles::has_pauses)
          ExchangingStep<Backward>::carry(*this, team, outputs, s, thread);
        continue;
      }
      if (gate_by_gate_)
        for (int gate = 0; gate < 3; ++gate)
          for (int64_t item = outputs.begin; item < outputs.end; ++item) {
            const Step step = this->step(int(item / output_panels_), s, thread);
            Idle idle;
            for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile)
              add_gate(item, step, gate, tile, nullptr, idle);
          }
      // There and back again: what the cache still holds of the last step is used first. (The first
      // step of all carries nothing, so that nobody meets panels that are still being packed.)
      team.each_piece(n_.D * output_panels_, paired_ ? 2 : 1, s % 2 != 0, helps_ ? s : Team::alone,
                      [&](const Range& items) { carry(items, s, advance, thread); });
      thread.cells.rest();
      team.barrier.wait();
      if (!projected_) continue;
      for (int64_t item = units.begin; item < units.end; ++item) unproject(item, s, thread);
      thread.cells.rest();
      team.barrier.wait();
    }
    const bool leaves = a_.begin < a_.end && !last_;
    const bool finishes = last_ && a_.dh0 == nullptr && a_.dc0 != nullptr;
    if ((leaves || finishes) && (in_place_ || exchanges_sums_)) team.barrier.wait();
    if (leaves) Edges::leave(*this, team);
    if (finishes) Edges::finish_cells(*this, team, thread);
  }

  static void finish(const BackwardArgs& args, Backward* const* parts, int count) {
    BackwardEdges<Backward>::finish(args, parts, count);
  }

 private:
  friend class BackwardCells<Backward>;
  friend class BackwardEdges<Backward>;
  friend class OneRowCells<Backward>;
  friend class OneRowStep<Backward>;
  friend class ExchangingStep<Backward>;
  using Cells = BackwardCells<Backward>;
  using Edges = BackwardEdges<Backward>;

  // A step to undo, and the step undone before it, of one direction. There is one more than
  // there are steps, walked where the gradient of h_0 is wanted: it has no rows of its own and only
  // carries gradients to the initial state. Steps are counted over all sequences: a part of shorter
  // ones has no rows in some of them.
  struct Step {
    int d;
    int64_t index;    // how many steps were undone before
    int64_t t;        // time of this step; of no meaning in the extra one
    int64_t rows;     // of this step
    int64_t start;    // its first packed row
    int64_t after;    // time of the step undone before
    int64_t carried;  // rows of the step undone before, whose gradients are carried here
    Range units;      // the thread's: see below
  };

  // What a thread has to itself.
  struct Thread {
    // Of each direction, the units whose da it multiplies by packed weights: all, or its own where
    // sums are exchanged.
    Range units[max_directions];
    Cells cells;     // of the tile that was multiplied last, which wait for the next multiplication
    int buffer = 0;  // which one is its own
    alignas(64) T sums[2][Tiles::max_rows * width];  // (rows of the tile, width)
    T* next() { return sums[buffer = 1 - buffer]; }
  };

  // The time of the s-th step that is undone in direction d.
  int64_t time(int d, int64_t s) const { return d == 0 ? walk_.all_steps() - 1 - s : s; }

  Step step(int d, int64_t s, const Thread& thread) const {
    Step step{d, s, time(d, s), 0, 0, 0, 0, thread.units[d]};
    if (s < walk_.all_steps()) {
      step.rows = walk_.rows(step.t);
      step.start = walk_.start(step.t);
    }
    if (s > 0) step.after = time(d, s - 1), step.carried = walk_.rows(step.after);
    return step;
  }

  // Of one step and direction, as it is multiplied.
  int64_t da_bytes() const { return 4 * n_.H * rows_ * Tiles::terms * int64_t(sizeof(Element)); }

  // Those of some items of outputs that are of direction d, where outputs are units.
  Range units_of(const Range& items, int64_t d) const {
    const int64_t first = d * output_panels_, last = first + output_panels_;
    const int64_t begin = (std::clamp(items.begin, first, last) - first) * width;
    const int64_t end = (std::clamp(items.end, first, last) - first) * width;
    return {std::min(begin, n_.H), std::min(end, n_.H)};
  }

  // The panels that a thread multiplies by: of its own columns, or where sums are exchanged of all,
  // but only its own units' rows.
  void pack_recurrent(const Range& outputs, const Thread& thread) {
    for (int64_t item = 0; item < n_.D * output_panels_; ++item) {
      const int d = int(item / output_panels_);
      const Range& units = thread.units[d];
      const bool mine = outputs.begin <= item && item < outputs.end;
      if (units.begin == units.end || !(mine || exchanges_sums_)) continue;
      const int64_t panel = item % output_panels_, size = units.end - units.begin;
      const S* w_hh = static_cast<const S*>(a_.w_hh[d]) + units.begin * n_.P + panel * width;
      Element* packed = recurrent(d, units, panel);
      for (int gate = 0; gate < 4; ++gate)
        note(Tiles::pack_rows(w_hh + gate * n_.H * n_.P, n_.P, size, n_.P - panel * width,
                              packed + gate * Tiles::panel_size(size)));
    }
  }
  // The panel of W_hh for some columns and the rows of some units.
  Element* recurrent(int d, const Range& units, int64_t panel) const {
    const int64_t before = d * Tiles::panel_size(n_.H) + Tiles::panel_size(units.begin);
    const int64_t size = Tiles::panel_size(units.end - units.begin);
    return recurrent_ + 4 * (output_panels_ * before + panel * size);
  }

  void pack_projection(int64_t item) {
    const int64_t column = item % unit_panels_ * width;
    note(Tiles::pack_rows(static_cast<const S*>(a_.w_hr[item / unit_panels_]) + column, n_.H, n_.P,
                          n_.H - column, projection_ + item * Tiles::panel_size(n_.P)));
  }

  // Blocked da of some units, gate by gate, of the s-th step undone in direction d.
  Operand da(int d, int64_t s, const Range& units) const {
    return {da_ + (d * 2 + (s & 1)) * da_size_ +
                Operand::size(4 * Operand::count(units.begin), rows_, tiles_),
            4 * Operand::count(units.end - units.begin), tiles_.height};
  }
  static Segments segments(const Range& units) {
    const int64_t size = units.end - units.begin;
    return {4, {size, size, size, size}};
  }
  Operand dh(int d) const { return {dh_ + d * dh_size_, output_blocks_, tiles_.height}; }

  // (eq. 8) The gradient of h for one or two panels of columns: carried from the step undone
  // before, and then for the sequences that end at this step.
  void carry(const Range& items, int64_t s, Advance advance, Thread& thread) {
    const int d = int(items.begin / output_panels_);
    const bool pair = items.end - items.begin == 2 && (items.end - 1) / output_panels_ == d;
    if (pair) carry_pair(items.begin, s, advance, thread);
    for (int64_t item = items.begin; item < items.end; ++item) {
      if (!pair) carry_tiles(item, s, advance, thread);
      begin_sequences(item, s, thread);
    }
  }

  // Tile by tile, for one panel.
  void carry_tiles(int64_t item, int64_t s, Advance advance, Thread& thread) {
    carry_tiles(item, s, advance, thread, [](const Step&, int64_t, const Range&, T*) {});
  }
  // `receive` adds what is not carried by this thread's own multiplication.
  template <class Receive>
  void carry_tiles(int64_t item, int64_t s, Advance advance, Thread& thread,
                   const Receive& receive) {
    const Step step = this->step(int(item / output_panels_), s, thread);
    const int64_t column = column_of(item);
    const Segments segments = gate_by_gate_ ? Segments{1, {n_.H}} : this->segments(step.units);
    for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.carried);
      T* const sums = gate_by_gate_ ? sums_of(item, tile) : thread.next();
      Spread<Cells> meanwhile(thread.cells, thread.cells.pieces(), Tiles::pauses(segments));
      Wanted wanted;
      if (Tiles::asks && !projected_) Cells::ask(*this, wanted, step, {first, last}, column);
      if (gate_by_gate_)
        add_gate(item, step, 3, tile, &wanted, meanwhile);
      else
        Tiles::multiply(da(step.d, s - 1, step.units).tile(tile), tiles_.height, last - first,
                        {recurrent(step.d, step.units, item % output_panels_), n_.P - column},
                        segments, advance, sums, width, &wanted, false, meanwhile);
      receive(step, item, Range{first, last}, sums);
      finish_tile(step, first, last, column, sums, thread);
    }
  }

  // The same for two panels of one direction.
  void carry_pair(int64_t item, int64_t s, Advance advance, Thread& thread) {
    if constexpr (Tiles::pair_rows > 0) {
      const Step step = this->step(int(item / output_panels_), s, thread);
      const int64_t size = 4 * Tiles::panel_size(n_.H), rows = step.carried;
      for (int64_t tile = 0; tile < tiles_.count(rows); ++tile) {
        const int64_t first = tile * tiles_.height, last = tiles_.end(tile, rows);
        Wanted wanted;
        for (int panel = 0; panel < 2 && !projected_; ++panel)
          Cells::ask(*this, wanted, step, {first, last}, column_of(item + panel));
        Tiles::multiply_pair(da(step.d, s - 1, step.units).tile(tile), tiles_.height, last - first,
                             {recurrent_ + item * size, size}, segments(step.units), advance,
                             {thread.sums[0], width, Tiles::max_rows * width}, &wanted);
        for (int panel = 0; panel < 2; ++panel)
          finish_tile(step, first, last, column_of(item + panel), thread.sums[panel], thread);
      }
    }
  }

  // Those that have this step and not the one undone before are carried nothing.
  void begin_sequences(int64_t item, int64_t s, Thread& thread) {
    const Step step = this->step(int(item / output_panels_), s, thread);
    for (int64_t first = step.carried; first < step.rows; first += Tiles::max_rows) {
      T* const sums = thread.next();
      std::memset(sums, 0, sizeof thread.sums[0]);
      const int64_t left = step.rows - first;
      finish_tile(step, first, first + (left < Tiles::max_rows ? left : Tiles::max_rows),
                  column_of(item), sums, thread);
    }
  }

  int64_t column_of(int64_t item) const { return item % output_panels_ * width; }

  // Where da is too large for the L2 cache, a gate's part of it stays there while all panels pass
  // by.
  template <class Other>
  void add_gate(int64_t item, const Step& step, int gate, int64_t tile, const Wanted* wanted,
                Other& meanwhile) {
    if constexpr (Tiles::gate_by_gate) {
      const Operand operand = da(step.d, step.index - 1, step.units);
      Tiles::multiply(
          operand.tile(tile) + gate * gate_blocks_ * operand.block_size(), tiles_.height,
          tiles_.end(tile, step.carried) - tile * tiles_.height,
          {recurrent_ + (item * 4 + gate) * Tiles::panel_size(n_.H), n_.P - column_of(item)},
          {1, {n_.H}}, Advance::none, sums_of(item, tile), width, wanted, gate > 0, meanwhile);
    }
  }

  T* sums_of(int64_t item, int64_t tile) const {
    return sums_ + (item * tiles_.count(rows_) + tile) * tiles_.height * width;
  }

  // Rows [first, last) of one panel: all of them carried from the step undone before, or none.
  // Their cells may wait.
  void finish_tile(const Step& step, int64_t first, int64_t last, int64_t column, T* sums,
                   Thread& thread) {
    const int64_t going_on = step.rows < first ? first : step.rows < last ? step.rows : last;
    const int64_t received = projected_ ? first : going_on;  // by cells
    for (int64_t part = 0; part < width && column + part < n_.P; part += L) {
      Edges::join(*this, step, {received, last}, column + part,
                  sums + (received - first) * width + part);
      if (!projected_) Edges::finish_sequences(*this, step, {going_on, last}, column + part);
    }
    if (!projected_) undo(thread, Cells(*this, step, {first, going_on}, column, sums));
  }

  // Undoes cells; what may be put off is done at the latest when the next is.
  void undo(Thread& thread, Cells cells) {
    thread.cells.rest();
    if (Tiles::overlaps(cells.rows()))
      thread.cells = cells;
    else
      cells.all();
  }

  // (eq. 8) dm = dh W_hr for one panel of units, and their cells.
  void unproject(int64_t item, int64_t s, Thread& thread) {
    const Step step = this->step(int(item / unit_panels_), s, thread);
    const int64_t unit = item % unit_panels_ * width;
    const Segments segments{1, {n_.P}};
    for (int64_t tile = 0; tile < tiles_.count(step.rows); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.rows);
      T* const sums = thread.next();
      Spread<Cells> meanwhile(thread.cells, thread.cells.pieces(), Tiles::pauses(segments));
      Tiles::multiply(dh(step.d).tile(tile), tiles_.height, last - first,
                      {projection_ + item * Tiles::panel_size(n_.P), n_.H - unit}, segments,
                      Advance::none, sums, width, nullptr, false, meanwhile);
      // As everywhere: rows that are carried here and rows that are not are finished apart.
      const int64_t middle = step.carried < first  ? first
                             : step.carried < last ? step.carried
                                                   : last;
      if (first < middle) undo(thread, Cells(*this, step, {first, middle}, unit, sums));
      if (middle < last)
        undo(thread, Cells(*this, step, {middle, last}, unit, sums + (middle - first) * width));
    }
    for (int64_t part = 0; part < width && unit + part < n_.H; part += L)
      Edges::finish_sequences(*this, step, {step.rows, step.carried}, unit + part);
  }

  // The gradient of the cell state that the step undone before left for sequence r.
  T* carried_cell(int d, int64_t r, int64_t unit) const {
    return dc_ + ((d * unit_panels_ * panel_vectors + unit / L) * rows_ + r) * L;
  }

  const BackwardArgs& a_;
  const Shape& n_;
  const Walk walk_;
  const int64_t rows_;  // of the widest step
  const RowTiles tiles_;
  const bool projected_;
  const bool last_;              // of the calls that walk through these sequences?
  const int64_t carried_end_;    // of the steps that are carried a gradient of h
  const bool carries_;           // does it multiply W_hh? The step undone first is carried nothing.
  const int64_t gate_blocks_;    // of hidden units
  const int64_t output_blocks_;  // of outputs
  const int64_t unit_panels_;    // of panel_width hidden units
  const int64_t output_panels_;  // of panel_width outputs
  const bool in_place_;          // are the weights left where they lie?
  const bool exchanges_sums_;    // do threads hand each other sums, and not da?
  const bool gate_by_gate_;      // see add_gate
  const bool helps_;             // see worth_helping
  const bool paired_;            // are two panels multiplied at once?
  const int64_t da_size_, dh_size_;
  // Where sums are exchanged, what is said of H rows and all blocks is each thread's part of them.
  Scratch<Element> recurrent_;   // (D, output_panels) panels of 4 segments of H rows
  Scratch<Element> projection_;  // (D, unit_panels) panels of P rows
  Scratch<Element> da_;          // (D, 2) Blocked (rows, 4 * gate_blocks)
  Scratch<Element> dh_;          // (D) Blocked (rows, output_blocks)
  Scratch<T> dbias_;             // (D, 4H), of these sequences
  Scratch<T> sums_;              // (D, output_panels, rows, panel_width), gate by gate
  Scratch<T> dc_;                // (D, unit_panels * 2, rows, L)
  Scratch<T> factors_;           // (D, units / L, 6, L), where the weights are not packed
  const OneRow<T> exchange_;     // of sums, where the weights are not packed
  const GivenSums<T> given_;     // where they are
};

}  // namespace
}  // namespace fastlstm
