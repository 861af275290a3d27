// The backward walk of one layer: the gradients of every pre-activation and of the initial state.
// (The sums over all rows that follow, (eq. 9), are plain matrix products and not done here.)
//
// The mirror image of forward.h: steps are undone in the opposite order, and the gradient of the
// pre-activations, da_t, is what is exchanged through two blocked buffers. An item is one
// direction and one panel of columns. Each step multiplies da of the step undone before by an
// item's panel of W_hh, which carries the gradient to h of this step, and finishes the cells of
// those units while the tile is in the L1 cache: one barrier a step. With a projection, the
// gradient of h is exchanged too and multiplied by W_hr: two barriers a step. (A single sequence's
// weights are not packed, and what is exchanged are sums: see one_row.h.)
#pragma once

#include <algorithm>

#include "backward_cells.h"
#include "backward_edges.h"
#include "one_row.h"
#include "one_row_step.h"
#include "operand.h"
#include "split.h"

namespace fastlstm {
namespace {

template <class Tiles>
class Backward {
  using TilesOf = Tiles;
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<Tiles>;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  static constexpr int64_t L = lanes<T>;
  static constexpr int64_t width = panel_width<T>;

 public:
  // One part of the pass: the given sequences.
  Backward(const BackwardArgs& args, Range sequences)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset, sequences),
        rows_(walk_.max_rows()),
        tiles_(rows_, Tiles::max_rows),
        projected_(args.w_hr[0] != nullptr),
        to_initial_state_(a_.end == walk_.all_steps() && (a_.dh0 != nullptr || a_.dc0 != nullptr)),
        carries_(a_.end + to_initial_state_ > std::max<int64_t>(a_.begin, 1)),
        gate_blocks_(Operand::count(n_.H)),
        output_blocks_(Operand::count(n_.P)),
        unit_panels_(blocks_of(n_.H, width)),
        output_panels_(blocks_of(n_.P, width)),
        in_place_(Tiles::in_place && rows_ == 1 && !projected_),
        gate_by_gate_(Tiles::gate_by_gate && !in_place_ &&
                      4 * n_.H * rows_ * Tiles::terms * int64_t(sizeof(Element)) >
                          l2_cache_bytes() / 2),
        helps_(rows_ > Tiles::few_rows && !gate_by_gate_ &&
               worth_helping<Tiles>(work(a_), a_.threads)),
        paired_(!in_place_ && !gate_by_gate_ && rows_ <= Tiles::pair_rows),
        da_size_(Operand::size(4 * gate_blocks_, rows_)),
        dh_size_(projected_ ? Operand::size(output_blocks_, rows_) : 0),
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
        exchange_(n_.H, n_.P, n_.D, in_place_ ? std::min<int64_t>(a_.threads, max_parts) : 0) {
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
                bytes, args.threads,
                bytes > l2_cache_bytes() / 2 ? Tiles::own_sequences : sequences_per_thread)};
  }

  void walk(const Team& team) {
    [[maybe_unused]] const typename Tiles::Session session;
    const Range outputs = team.share(n_.D * output_panels_);
    const Range units = projected_ ? team.share(n_.D * unit_panels_) : Range{0, 0};
    for (int64_t item = outputs.begin; carries_ && !in_place_ && item < outputs.end; ++item)
      pack_panel(a_.w_hh, n_.P, {4, {n_.H, n_.H, n_.H, n_.H}}, output_panels_, item, recurrent_);
    for (int64_t item = units.begin; item < units.end; ++item)
      pack_panel(a_.w_hr, n_.H, {1, {n_.P}}, unit_panels_, item, projection_);
    const Advance advance =
        Tiles::advance(rows_, (outputs.end - outputs.begin) * 4 * Tiles::panel_size(n_.H));
    if (a_.begin > 0) {
      Edges::receive(*this, team);
      team.barrier.wait();
    }
    Unfinished unfinished;
    for (int64_t s = a_.begin; s < a_.end + to_initial_state_; ++s) {
      if (in_place_) {
        if constexpr (Tiles::in_place)
          OneRowStep<Backward>::carry(*this, team, outputs, s, unfinished);
        continue;
      }
      if (gate_by_gate_)
        for (int gate = 0; gate < 3; ++gate)
          for (int64_t item = outputs.begin; item < outputs.end; ++item) {
            const Step step = this->step(int(item / output_panels_), s);
            Idle idle;
            for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile)
              add_gate(item, step, gate, tile, nullptr, idle);
          }
      // There and back again: what the cache still holds of the last step is used first. (The first
      // step of all carries nothing, so that nobody meets panels that are still being packed.)
      team.each_piece(n_.D * output_panels_, paired_ ? 2 : 1, s % 2 != 0, helps_ ? s : Team::alone,
                      [&](const Range& items) { carry(items, s, advance, unfinished); });
      unfinished.cells.rest();
      team.barrier.wait();
      if (!projected_) continue;
      for (int64_t item = units.begin; item < units.end; ++item) unproject(item, s, unfinished);
      unfinished.cells.rest();
      team.barrier.wait();
    }
    if (a_.begin < a_.end && a_.end < walk_.all_steps()) {
      if (in_place_) team.barrier.wait();
      Edges::leave(*this, team);
    }
  }

  // Did any value not fit the Elements? Then nothing that was written counts.
  bool beyond() const { return beyond_; }

  static void finish(const BackwardArgs& args, Backward* const* parts, int count) {
    BackwardEdges<Backward>::finish(args, parts, count);
  }

 private:
  friend class BackwardCells<Backward>;
  friend class BackwardEdges<Backward>;
  friend class OneRowCells<Backward>;
  friend class OneRowStep<Backward>;
  using Cells = BackwardCells<Backward>;
  using Edges = BackwardEdges<Backward>;

  // A step to undo, and the step undone before it, of one direction. There is one more than
  // there are steps: it has no rows of its own and only carries gradients to the initial state.
  // Steps are counted over all sequences: a part of shorter ones has no rows in some of them.
  struct Step {
    int d;
    int64_t index;    // how many steps were undone before
    int64_t t;        // time of this step; of no meaning in the extra one
    int64_t rows;     // of this step
    int64_t start;    // its first packed row
    int64_t after;    // time of the step undone before
    int64_t carried;  // rows of the step undone before, whose gradients are carried here
  };

  // The tile that was multiplied last, whose cells wait for the multiplication of the next one.
  struct Unfinished {
    Cells cells;
    int buffer = 0;                                  // which one is its own
    alignas(64) T sums[2][Tiles::max_rows * width];  // (rows of the tile, width)
    T* next() { return sums[buffer = 1 - buffer]; }
  };

  // The time of the s-th step that is undone in direction d.
  int64_t time(int d, int64_t s) const { return d == 0 ? walk_.all_steps() - 1 - s : s; }

  Step step(int d, int64_t s) const {
    Step step{d, s, time(d, s), 0, 0, 0, 0};
    if (s < walk_.all_steps()) {
      step.rows = walk_.rows(step.t);
      step.start = walk_.start(step.t);
    }
    if (s > 0) step.after = time(d, s - 1), step.carried = walk_.rows(step.after);
    return step;
  }

  void note(unsigned beyond) {
    if (beyond) __atomic_store_n(&beyond_, true, __ATOMIC_RELAXED);
  }

  // The place of sequence r's state in a (D, B, size) tensor.
  int64_t state_at(int64_t d, int64_t r, int64_t size) const {
    return (d * n_.B + walk_.first() + r) * size;
  }

  // Columns of a row-major (K, columns) weight matrix into the panel of an item.
  void pack_panel(const void* const* weights, int64_t columns, const Segments& k, int64_t panels,
                  int64_t item, Element* packed) {
    const int64_t column = item % panels * width, size = Tiles::panel_size(k.size[0]);
    const S* w = static_cast<const S*>(weights[item / panels]) + column;
    for (int64_t segment = 0; segment < k.count; ++segment)
      note(Tiles::pack_rows(w + segment * k.size[0] * columns, columns, k.size[0], columns - column,
                            packed + (item * k.count + segment) * size));
  }

  // Blocked da, gate by gate, of the s-th step undone in direction d.
  Operand da(int d, int64_t s) const {
    return {da_ + (d * 2 + (s & 1)) * da_size_, 4 * gate_blocks_, tiles_.height};
  }
  Operand dh(int d) const { return {dh_ + d * dh_size_, output_blocks_, tiles_.height}; }

  // (eq. 8) The gradient of h for one or two panels of columns: carried from the step undone
  // before, and then for the sequences that end at this step.
  void carry(const Range& items, int64_t s, Advance advance, Unfinished& unfinished) {
    const int d = int(items.begin / output_panels_);
    const bool pair = items.end - items.begin == 2 && (items.end - 1) / output_panels_ == d;
    if (pair) carry_pair(items.begin, s, advance, unfinished);
    for (int64_t item = items.begin; item < items.end; ++item) {
      if (!pair) carry_tiles(item, s, advance, unfinished);
      begin_sequences(item, s, unfinished);
    }
  }

  // Tile by tile, for one panel.
  void carry_tiles(int64_t item, int64_t s, Advance advance, Unfinished& unfinished) {
    const Step step = this->step(int(item / output_panels_), s);
    const int64_t column = column_of(item);
    const Segments segments =
        gate_by_gate_ ? Segments{1, {n_.H}} : Segments{4, {n_.H, n_.H, n_.H, n_.H}};
    for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.carried);
      T* const sums = gate_by_gate_ ? sums_of(item, tile) : unfinished.next();
      Spread<Cells> meanwhile(unfinished.cells, unfinished.cells.pieces(), Tiles::pauses(segments));
      Wanted wanted;
      if (Tiles::asks && !projected_) Cells::ask(*this, wanted, step, {first, last}, column);
      if (gate_by_gate_)
        add_gate(item, step, 3, tile, &wanted, meanwhile);
      else
        Tiles::multiply(da(step.d, s - 1).tile(tile), tiles_.height, last - first,
                        recurrent_ + item * 4 * Tiles::panel_size(n_.H), segments, advance, sums,
                        width, &wanted, false, meanwhile);
      finish_tile(step, first, last, column, sums, unfinished);
    }
  }

  // One tile, for two panels of one direction.
  void carry_pair(int64_t item, int64_t s, Advance advance, Unfinished& unfinished) {
    if constexpr (Tiles::pair_rows > 0) {
      const Step step = this->step(int(item / output_panels_), s);
      const int64_t size = 4 * Tiles::panel_size(n_.H), rows = step.carried;
      if (rows == 0) return;
      Wanted wanted;
      for (int panel = 0; panel < 2 && !projected_; ++panel)
        Cells::ask(*this, wanted, step, {0, rows}, column_of(item + panel));
      Tiles::multiply_pair(da(step.d, s - 1).tile(0), tiles_.height, rows,
                           {recurrent_ + item * size, size}, {4, {n_.H, n_.H, n_.H, n_.H}}, advance,
                           {unfinished.sums[0], width, Tiles::max_rows * width}, &wanted);
      for (int panel = 0; panel < 2; ++panel)
        finish_tile(step, 0, rows, column_of(item + panel), unfinished.sums[panel], unfinished);
    }
  }

  // Those that have this step and not the one undone before are carried nothing.
  void begin_sequences(int64_t item, int64_t s, Unfinished& unfinished) {
    const Step step = this->step(int(item / output_panels_), s);
    for (int64_t first = step.carried; first < step.rows; first += Tiles::max_rows) {
      T* const sums = unfinished.next();
      std::memset(sums, 0, sizeof unfinished.sums[0]);
      const int64_t left = step.rows - first;
      finish_tile(step, first, first + (left < Tiles::max_rows ? left : Tiles::max_rows),
                  column_of(item), sums, unfinished);
    }
  }

  int64_t column_of(int64_t item) const { return item % output_panels_ * width; }

  // Where da is too large for the L2 cache, a gate's part of it stays there while all panels pass
  // by.
  template <class Other>
  void add_gate(int64_t item, const Step& step, int gate, int64_t tile, const Wanted* wanted,
                Other& meanwhile) {
    if constexpr (Tiles::gate_by_gate) {
      const Operand operand = da(step.d, step.index - 1);
      Tiles::multiply(operand.tile(tile) + gate * gate_blocks_ * operand.block_size(),
                      tiles_.height, tiles_.end(tile, step.carried) - tile * tiles_.height,
                      recurrent_ + (item * 4 + gate) * Tiles::panel_size(n_.H), {1, {n_.H}},
                      Advance::none, sums_of(item, tile), width, wanted, gate > 0, meanwhile);
    }
  }

  T* sums_of(int64_t item, int64_t tile) const {
    return sums_ + (item * tiles_.count(rows_) + tile) * tiles_.height * width;
  }

  // Rows [first, last) of one panel: all of them carried from the step undone before, or none.
  // Their cells may wait.
  void finish_tile(const Step& step, int64_t first, int64_t last, int64_t column, T* sums,
                   Unfinished& unfinished) {
    const int64_t going_on = step.rows < first ? first : step.rows < last ? step.rows : last;
    const int64_t received = projected_ ? first : going_on;  // by cells
    for (int64_t part = 0; part < width && column + part < n_.P; part += L) {
      receive(step, received, last, column + part, sums + (received - first) * width + part);
      if (!projected_) finish_sequences(step, going_on, last, column + part);
    }
    if (!projected_) undo(unfinished, Cells(*this, step, {first, going_on}, column, sums));
  }

  // Undoes cells; what may be put off is done at the latest when the next is.
  void undo(Unfinished& unfinished, Cells cells) {
    unfinished.cells.rest();
    if (Tiles::overlaps(cells.rows()))
      unfinished.cells = cells;
    else
      cells.all();
  }

  // The carried gradient of h joins, in place, what comes in from outside.
  void receive(const Step step, int64_t first, int64_t last, int64_t column, T* sums) {
    const int count = int(n_.P - column < L ? n_.P - column : L);
    const bool ends_here = first >= step.carried, resets = a_.reset != nullptr;
    const int64_t P = n_.P, D = n_.D, d = step.d;
    for (int64_t r = first; r < last; ++r, sums += width) {
      const int64_t state = state_at(d, r, P) + column;
      V dh = load(sums);
      if (ends_here && a_.dh_n) dh = load_some(static_cast<const S*>(a_.dh_n) + state, count);
      if (!ends_here && resets && walk_.cut_before(step.d, step.after, r)) dh = V{};
      if (r >= step.rows) {  // nothing is left of this sequence but its initial state
        if (a_.dh0) store_some(static_cast<S*>(a_.dh0) + state, dh, count);
        continue;
      }
      const int64_t here = ((step.start + r) * D + d) * P + column;
      if (a_.dy) dh += load_some(static_cast<const S*>(a_.dy) + here, count);
      store(sums, dh);
      if (!projected_) continue;
      if (a_.dh_all)
        store_some(static_cast<T*>(a_.dh_all) + here - a_.first_row[d] * D * P, dh, count);
      note(this->dh(step.d).put(this->dh(step.d).at(r, 0, column), dh, count));
    }
  }

  // (eq. 8) dm = dh W_hr for one panel of units, and their cells.
  void unproject(int64_t item, int64_t s, Unfinished& unfinished) {
    const Step step = this->step(int(item / unit_panels_), s);
    const int64_t unit = item % unit_panels_ * width;
    const Segments segments{1, {n_.P}};
    for (int64_t tile = 0; tile < tiles_.count(step.rows); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.rows);
      T* const sums = unfinished.next();
      Spread<Cells> meanwhile(unfinished.cells, unfinished.cells.pieces(), Tiles::pauses(segments));
      Tiles::multiply(dh(step.d).tile(tile), tiles_.height, last - first,
                      projection_ + item * Tiles::panel_size(n_.P), segments, Advance::none, sums,
                      width, nullptr, false, meanwhile);
      // As everywhere: rows that are carried here and rows that are not are finished apart.
      const int64_t middle = step.carried < first  ? first
                             : step.carried < last ? step.carried
                                                   : last;
      if (first < middle) undo(unfinished, Cells(*this, step, {first, middle}, unit, sums));
      if (middle < last)
        undo(unfinished, Cells(*this, step, {middle, last}, unit, sums + (middle - first) * width));
    }
    for (int64_t part = 0; part < width && unit + part < n_.H; part += L)
      finish_sequences(step, step.rows, step.carried, unit + part);
  }

  // The gradient of the cell state that the step undone before left for sequence r.
  T* carried_cell(int d, int64_t r, int64_t unit) const {
    return dc_ + ((d * unit_panels_ * panel_vectors + unit / L) * rows_ + r) * L;
  }

  void finish_sequences(const Step& step, int64_t first, int64_t last, int64_t unit) {
    if (a_.dc0 == nullptr) return;
    const int count = int(n_.H - unit < L ? n_.H - unit : L);
    for (int64_t r = first; r < last; ++r) {
      const bool cut = walk_.cut_before(step.d, step.after, r);
      const V dc = cut ? V{} : load(carried_cell(step.d, r, unit));
      store_some(static_cast<S*>(a_.dc0) + state_at(step.d, r, n_.H) + unit, dc, count);
    }
  }

  const BackwardArgs& a_;
  const Shape& n_;
  const Walk walk_;
  const int64_t rows_;  // of the widest step
  const RowTiles tiles_;
  const bool projected_;
  const bool to_initial_state_;  // does it end with a gradient of h_0 or c_0?
  const bool carries_;           // does it multiply W_hh? The step undone first is carried nothing.
  const int64_t gate_blocks_;    // of hidden units
  const int64_t output_blocks_;  // of outputs
  const int64_t unit_panels_;    // of panel_width hidden units
  const int64_t output_panels_;  // of panel_width outputs
  const bool in_place_;          // are the weights left where they lie?
  const bool gate_by_gate_;      // see add_gate
  const bool helps_;             // see worth_helping
  const bool paired_;            // are two panels multiplied at once?
  const int64_t da_size_, dh_size_;
  Scratch<Element> recurrent_;   // (D, output_panels) panels of 4 segments of H rows
  Scratch<Element> projection_;  // (D, unit_panels) panels of P rows
  Scratch<Element> da_;          // (D, 2) Blocked (rows, 4 * gate_blocks)
  Scratch<Element> dh_;          // (D) Blocked (rows, output_blocks)
  Scratch<T> dbias_;             // (D, 4H), of these sequences
  Scratch<T> sums_;              // (D, output_panels, rows, panel_width), gate by gate
  Scratch<T> dc_;                // (D, unit_panels * 2, rows, L)
  Scratch<T> factors_;           // (D, units / L, 6, L), where the weights are not packed
  const OneRow<T> exchange_;     // of sums, where the weights are not packed
  bool beyond_ = false;          // Elements' range
};

}  // namespace
}  // namespace fastlstm
