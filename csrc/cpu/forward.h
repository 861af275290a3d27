// The forward pass of one layer.
//
// Work is cut into items (forward_items.h): one direction and one group of `lanes` hidden units
// with their four gates. A thread has its items for the whole sequence: their weights (packed once)
// stay in its cache. (Of a step that takes long it may leave some to others that are done with
// theirs; nobody else touches an item's cell states in that step.) Each step multiplies [x_t |
// h_{t-1}] by an item's panels, a tile of rows at a time, and finishes its cells while the sums of
// some tiles are in the L1 cache, or, of few rows, those of all items. The hidden state is
// exchanged through two blocked buffers, read and written in turn, with one barrier a step (two
// with a projection).
//
// With few rows a step, or many weights, streaming W_ih through the caches at every step costs too
// much: then the input part of a chunk of steps is multiplied at once ("ahead"). A chunk has
// many rows, so that part may have Tiles of its own, Tiles::Inputs.
#pragma once

#include <algorithm>
#include <utility>

#include "forward_cells.h"
#include "forward_items.h"
#include "operand.h"
#include "split.h"

namespace fastlstm {
namespace {

// CellsOf is ForwardCells, or TangentCells (tangent_cells.h), whose layer has no input part.
template <class Tiles, template <class> class CellsOf>
class ForwardWalk : public FindsBeyond {
  using TilesOf = Tiles;
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<Tiles>;
  using Inputs = typename Tiles::Inputs;
  using InputElement = typename Inputs::Element;
  using InputOperand = Blocked<Inputs>;
  using Items = ForwardItems<Tiles>;
  using Item = fastlstm::Item<T>;
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>;
  static constexpr int64_t width = panel_width<T>;

 public:
  // One part of the pass: the given sequences.
  ForwardWalk(const ForwardArgs& args, Range sequences)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset, sequences),
        rows_(walk_.max_rows()),
        ahead_(is_ahead(args, rows_)),
        items_(args, ahead_),
        out_panels_(a_.w_hr[0] ? blocks_of(n_.P, width) : 0),
        few_rows_(rows_ <= Tiles::few_rows),
        helps_(!few_rows_ && !(ahead_ && Inputs::has_pauses) &&
               worth_helping<Tiles>(work(a_), a_.threads)),
        chunk_(ahead_ && rows_ > 0
                   ? std::clamp<int64_t>(Inputs::ahead_rows(n_.I, rows_) / rows_, 1, walk_.steps())
                   : 1),
        chunk_tiles_(chunk_ * rows_, Inputs::max_rows),
        hidden_block_(ahead_ ? 0 : Operand::count(n_.I)),
        state_blocks_(hidden_block_ + Operand::count(n_.P)),
        tiles_(rows_, Tiles::walk_rows(rows_, items_.panel_size())),
        state_size_(Operand::size(state_blocks_, rows_, tiles_)),
        inputs_size_(
            ahead_ ? InputOperand::size(InputOperand::count(n_.I), chunk_ * rows_, chunk_tiles_)
                   : 0),
        unprojected_size_(out_panels_ > 0 ? Operand::size(Operand::count(n_.H), rows_, tiles_) : 0),
        out_weights_(n_.D * out_panels_ * Tiles::panel_size(n_.H)),
        state_(n_.D * 2 * state_size_),
        cells_(items_.count() * rows_ * L),
        inputs_(n_.D * inputs_size_),
        ahead_gates_(ahead_ ? items_.count() * chunk_ * rows_ * 4 * L : 0),
        unprojected_(n_.D * unprojected_size_),
        pre_(few_rows_ ? items_.count() * rows_ * 4 * L : 0) {
    // What no group of units fills of a block may be multiplied all the same.
    if (Operand::columns > L) {
      state_.clear();
      unprojected_.clear();
    }
    if (InputOperand::columns > L) inputs_.clear();
  }

  static Work work(const ForwardArgs& args) {
    const Shape& n = args.shape;
    const int64_t rows = n.T > 0 ? n.batch_sizes[0] : 0;
    const int64_t inputs = 4 * n.D * n.H * n.I, recurrent = 4 * n.D * n.H * n.P;
    const bool ahead = is_ahead(args, rows);
    const int64_t each_step = ahead ? recurrent : inputs + recurrent;
    // (A matrix unit is quick with what it multiplies ahead.)
    return {n.D * blocks_of(n.H, L), rows * each_step,
            sequences_worth_a_thread<Tiles>(Tiles::weight_bytes(each_step), args.threads, n.N,
                                            rows_worth_a_copy),
            ahead && !Inputs::has_pauses ? rows * inputs : 0};
  }

  void walk(const Team& team) {
    [[maybe_unused]] const typename Inputs::Session session;
    const Range mine = team.share(items_.count()), my_panels = team.share(n_.D * out_panels_);
    const Advance advance =
        Tiles::advance(rows_, (mine.end - mine.begin) * 2 * items_.panel_size());
    for (int64_t k = mine.begin; k < mine.end; ++k) begin_item(items_[k]);
    for (int64_t k = my_panels.begin; k < my_panels.end; ++k) pack_projection(k);
    prepare_step(team, 0);
    team.barrier.wait();
    Unfinished unfinished;
    int64_t turn = 0;
    for (int64_t s = 0; s < steps(); ++s) {
      if (ahead_ && s % chunk_ == 0) compute_ahead(team, s, helps_ ? turn++ : Team::alone);
      // There and back again: what the cache still holds of the last step is used first.
      const bool back = s % 2 != 0;
      if (few_rows_)
        step_few_rows(mine, s, back, advance);
      else
        team.each_piece(items_.count(), 1, back, helps_ ? turn++ : Team::alone,
                        [&](const Range& one) {
                          const Item item = items_[one.begin];
                          if constexpr (Tiles::has_pauses)
                            step_item(item, s, advance, unfinished);
                          else
                            step_item(item, s, advance);
                        });
      unfinished.cells.rest();
      prepare_step(team, s + 1);
      team.barrier.wait();
      if (out_panels_ > 0) {
        for (int64_t k = my_panels.begin; k < my_panels.end; ++k) project(k, s);
        team.barrier.wait();
      }
    }
  }

  // Sequences without steps keep their initial state.
  static void finish(const ForwardArgs& args, ForwardWalk* const*, int) {
    const Shape& n = args.shape;
    for (int64_t d = 0; d < n.D; ++d) {
      for (int64_t b = n.T > 0 ? n.batch_sizes[0] : 0; b < n.B; ++b) {
        const int64_t row = d * n.B + b;
        std::memcpy(static_cast<S*>(args.h_n) + row * n.P,
                    static_cast<const S*>(args.h0) + row * n.P, size_t(n.P) * sizeof(S));
        std::memcpy(static_cast<S*>(args.c_n) + row * n.H,
                    static_cast<const S*>(args.c0) + row * n.H, size_t(n.H) * sizeof(S));
      }
    }
  }

 private:
  using Cells = CellsOf<ForwardWalk>;
  friend Cells;

  // What one direction does at its s-th step.
  struct Step {
    int64_t t, rows, start;   // time, sequences, first packed row
    int64_t next, next_rows;  // the step after it, which is given the state of so many
    Operand reads, hidden;    // what it multiplies; where it leaves h for the step after it
  };

  // The tile that was multiplied last, whose cells wait for the multiplication of the next one.
  struct Unfinished {
    Cells cells;
    int buffer = 0;                                 // which one is its own
    alignas(64) T pre[2][Tiles::max_rows * 4 * L];  // (rows of the tile, 4L)
    T* next() { return pre[buffer = 1 - buffer]; }
  };

  static bool is_ahead(const ForwardArgs& args, int64_t rows) {
    return args.shape.I > 0 && Tiles::ahead(args.shape, rows, args.threads);
  }

  int64_t steps() const { return walk_.steps(); }

  // Blocked [x_t | h_{t-1}], or h_{t-1} alone, that step s of direction d reads.
  Operand state(int d, int64_t s) const {
    return {state_ + (d * 2 + (s & 1)) * state_size_, state_blocks_, tiles_.height};
  }
  InputOperand inputs(int d) const {
    return {inputs_ + d * inputs_size_, InputOperand::count(n_.I), chunk_tiles_.height};
  }
  Operand unprojected(int d) const {
    return {unprojected_ + d * unprojected_size_, Operand::count(n_.H), tiles_.height};
  }

  Step step(int d, int64_t s) const {
    const int64_t t = walk_.time(d, s), next = Walk::next(d, t);
    return {t, walk_.rows(t), walk_.start(t), next, walk_.rows(next), state(d, s), state(d, s + 1)};
  }

  // ---- before the first step ---------------------------------------------------------------

  void begin_item(const Item& item) {
    note(items_.pack(item));
    const S* c0 = static_cast<const S*>(a_.c0) + walk_.state_at(item.d, 0, n_.H) + item.unit;
    for (int64_t r = 0; r < rows_; ++r) {
      const bool cut = item.d == 0 && walk_.cut_before(0, 0, r);
      store(cells_ + (item.index * rows_ + r) * L,
            cut ? V{} : load_some(c0 + r * n_.H, item.count));
    }
  }

  void pack_projection(int64_t panel) {
    const int64_t column = panel % out_panels_ * width;
    const S* w_hr = static_cast<const S*>(a_.w_hr[panel / out_panels_]);
    for (int half = 0; half < panel_vectors; ++half) {
      const int64_t left = n_.P - column - half * L;
      const int64_t count = left < 0 ? 0 : left < L ? left : L;
      note(Tiles::pack_transposed(w_hr + (column + half * L) * n_.H, n_.H, n_.H, count, half,
                                  out_weights_ + panel * Tiles::panel_size(n_.H)));
    }
  }

  // ---- what a step reads -------------------------------------------------------------------

  // Puts x_t, and the initial state of the sequences that begin, where step s reads them.
  void prepare_step(const Team& team, int64_t s) {
    if (s >= steps()) return;
    for (int d = 0; d < n_.D; ++d) {
      const int64_t t = walk_.time(d, s), known = s == 0 ? 0 : walk_.rows(walk_.time(d, s - 1));
      const Operand reads = state(d, s);
      const Range share = team.share(walk_.rows(t));
      const int64_t after = s + 1 < steps() ? walk_.time(d, s + 1) : t;
      for (int64_t r = share.begin; r < share.end; ++r) {
        if (!ahead_) {
          note(reads.put_row(r, 0, x_row(walk_.start(t) + r), n_.I));
          const char* const x = reinterpret_cast<const char*>(x_row(walk_.start(after) + r));
          for (int64_t k = 0; r < walk_.rows(after) && k < n_.I * int64_t(sizeof(S)); k += 64)
            __builtin_prefetch(x + k, 0, 2);
        }
        if (r < known) continue;
        const S* h0 = static_cast<const S*>(a_.h0) + walk_.state_at(d, r, n_.P);
        const bool cut = d == 0 && walk_.cut_before(d, t, r);
        note(reads.put_row(r, hidden_block_, cut ? nullptr : h0, n_.P));
      }
    }
  }

  const S* x_row(int64_t row) const { return static_cast<const S*>(a_.x) + row * n_.I; }

  // The times of the chunk of steps that begins with step s.
  Range chunk_times(int d, int64_t s) const {
    const int64_t last = (s + chunk_ < steps() ? s + chunk_ : steps()) - 1;
    return d == 0 ? Range{s, last + 1} : Range{walk_.time(1, last), walk_.time(1, s) + 1};
  }

  // W_ih x for the steps of a chunk, into ahead_gates_ (item, row of the chunk, 4L).
  void compute_ahead(const Team& team, int64_t s, int64_t turn) {
    for (int d = 0; d < n_.D; ++d) {
      const InputOperand blocked = inputs(d);
      const Range times = chunk_times(d, s), share = team.share(times.end - times.begin);
      for (int64_t t = times.begin + share.begin; t < times.begin + share.end; ++t) {
        const int64_t row = walk_.rows_before(t) - walk_.rows_before(times.begin);
        for (int64_t r = 0; r < walk_.rows(t); ++r)
          note(blocked.put_row(row + r, 0, x_row(walk_.start(t) + r), n_.I));
      }
    }
    team.barrier.wait();
    const Segments segments{1, {n_.I}};
    Idle idle;
    team.each_piece(items_.count(), 1, false, turn, [&](const Range& one) {
      const Item item = items_[one.begin];
      const Range times = chunk_times(item.d, s);
      const int64_t rows = walk_.rows_before(times.end) - walk_.rows_before(times.begin);
      for (int64_t tile = 0; tile < chunk_tiles_.count(rows); ++tile) {
        const int64_t first = tile * chunk_tiles_.height;
        Items::template multiply<Inputs>(
            item, items_.input_panels(item), segments, inputs(item.d), tile,
            chunk_tiles_.end(tile, rows) - first, Advance::none,
            ahead_gates_ + (item.index * chunk_ * rows_ + first) * 4 * L, idle);
      }
    });
    if (helps_) team.barrier.wait();  // others may take this thread's items
  }

  // ---- one step ----------------------------------------------------------------------------

  Segments segments() const { return ahead_ ? Segments{1, {n_.P}} : Segments{2, {n_.I, n_.P}}; }
  // What was computed ahead for an item and a step.
  const T* ahead_of(const Item& item, const Step& step, int64_t s) const {
    if (!ahead_) return nullptr;
    const int64_t begin = chunk_times(item.d, s - s % chunk_).begin;
    const int64_t row = walk_.rows_before(step.t) - walk_.rows_before(begin);
    return ahead_gates_ + (item.index * chunk_ * rows_ + row) * 4 * L;
  }

  // Of a few rows all items are multiplied first. A cell's state takes longer to come than to
  // compute, so it is computed after the next cell's gates, from one item to the next too.
  void step_few_rows(const Range& mine, int64_t s, bool back, Advance advance) {
    static_assert(Tiles::few_rows <= Tiles::max_rows, "they are one tile");
    Idle idle;
    for (int d = 0; d < n_.D; ++d) {
      const int64_t groups = items_.groups(), zero = d * groups;
      const Range items{std::max(mine.begin, zero), std::min(mine.end, zero + groups)};
      if (items.begin >= items.end) continue;
      const Step step = this->step(d, s);
      for (int64_t k = 0; k < items.end - items.begin; ++k) {
        const Item item = items_[back ? items.end - 1 - k : items.begin + k];
        Items::template multiply<Tiles>(item, items_.panels(item), segments(), step.reads, 0,
                                        step.rows, advance, pre_ + item.index * rows_ * 4 * L,
                                        idle);
      }
      const T* const ahead = ahead_of(items_[zero], step, s);
      const auto cells_of = [&](int64_t index) {
        return Cells(*this, items_[index], step, {0, step.rows}, pre_ + index * rows_ * 4 * L,
                     ahead ? ahead + (index - zero) * chunk_ * rows_ * 4 * L : nullptr);
      };
      Cells cells = cells_of(items.begin);
      cells.activate();
      for (int64_t index = items.begin + 1; index < items.end; ++index) {
        cells.all_but_last();
        Cells next = cells_of(index);
        next.activate();
        cells.complete();
        cells = next;
      }
      cells.all_but_last();
      cells.complete();
    }
  }

  // Where multiplication leaves pauses, a tile's cells wait for them.
  void step_item(const Item& item, int64_t s, Advance advance, Unfinished& unfinished) {
    const Step step = this->step(item.d, s);
    const Segments segments = this->segments();
    const T* const ahead = ahead_of(item, step, s);
    for (int64_t tile = 0; tile < tiles_.count(step.rows); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.rows);
      T* const pre = unfinished.next();
      Spread<Cells> meanwhile(unfinished.cells, unfinished.cells.pieces(),
                              item.panel_count() * Tiles::pauses(segments));
      Items::template multiply<Tiles>(item, items_.panels(item), segments, step.reads, tile,
                                      last - first, advance, pre, meanwhile);
      unfinished.cells.rest();
      Cells cells(*this, item, step, {first, last}, pre, ahead ? ahead + first * 4 * L : nullptr);
      if (Tiles::overlaps(last - first))
        unfinished.cells = cells;
      else
        cells.all();
    }
  }

  // Elsewhere several tiles are multiplied first: with many cells in a row, one begins while the
  // processor waits for the one before.
  void step_item(const Item& item, int64_t s, Advance advance) {
    constexpr int64_t most_rows = 32;
    static_assert(Tiles::max_rows <= most_rows, "they are one tile at least");
    alignas(64) T pre[most_rows * 4 * L];
    const Step step = this->step(item.d, s);
    const Segments segments = this->segments();
    const T* const ahead = ahead_of(item, step, s);
    Idle idle;
    for (int64_t tile = 0, begin = 0, end; begin < step.rows; begin = end) {
      end = begin;
      do {
        const int64_t first = std::exchange(end, tiles_.end(tile, step.rows));
        Items::template multiply<Tiles>(item, items_.panels(item), segments, step.reads, tile++,
                                        end - first, advance, pre + (first - begin) * 4 * L, idle);
      } while (end < step.rows && end - begin + tiles_.height <= most_rows);
      Cells(*this, item, step, {begin, end}, pre, ahead ? ahead + begin * 4 * L : nullptr).all();
    }
  }

  // (eq. 4) h_t = W_hr m_t for one panel of columns.
  void project(int64_t panel, int64_t s) {
    alignas(64) T sums[Tiles::max_rows * width];
    const int d = int(panel / out_panels_);
    const Step step = this->step(d, s);
    const Segments segments{1, {n_.H}};
    const int64_t column = panel % out_panels_ * width;
    for (int64_t tile = 0; tile < tiles_.count(step.rows); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.rows);
      Tiles::multiply(unprojected(d).tile(tile), tiles_.height, last - first,
                      {out_weights_ + panel * Tiles::panel_size(n_.H), n_.P - column}, segments,
                      Advance::none, sums, width, nullptr);
      for (int64_t r = first; r < last; ++r) {
        const bool final = r >= step.next_rows;
        const bool cut = !final && walk_.cut_before(d, step.next, r);
        for (int64_t part = 0; part < width; part += L) {
          const int64_t unit = column + part;
          if (unit >= n_.P) break;
          const int count = int(n_.P - unit < L ? n_.P - unit : L);
          const auto h = to_storage<S>(load(sums + (r - first) * width + part));
          store_some(static_cast<S*>(a_.y) + ((step.start + r) * n_.D + d) * n_.P + unit, h, count);
          if (final)
            store_some(static_cast<S*>(a_.h_n) + walk_.state_at(d, r, n_.P) + unit, h, count);
          else
            note(step.hidden.put(step.hidden.at(r, hidden_block_, unit),
                                 cut ? V{} : from_storage<S>(h), count));
        }
      }
    }
  }

  const ForwardArgs& a_;
  const Shape& n_;
  const Walk walk_;
  const int64_t rows_;          // of the widest step
  const bool ahead_;            // is the input part computed ahead?
  Items items_;                 // with their weights
  const int64_t out_panels_;    // of a projection, per direction; 0 without one
  const bool few_rows_;         // see step_few_rows
  const bool helps_;            // see worth_helping
  const int64_t chunk_;         // how many steps ahead
  const RowTiles chunk_tiles_;  // of the rows of a chunk
  const int64_t hidden_block_;  // of what a step reads, where h_{t-1} begins
  const int64_t state_blocks_;  // of what a step reads
  const RowTiles tiles_;
  const int64_t state_size_, inputs_size_, unprojected_size_;
  Scratch<Element> out_weights_;  // (D, out_panels) panels of H rows
  Scratch<Element> state_;        // (D, 2) Blocked (rows, state_blocks)
  Scratch<T> cells_;              // (items, rows, L)
  Scratch<InputElement> inputs_;  // (D) Blocked (chunk * rows, I)
  Scratch<T> ahead_gates_;        // (items, chunk * rows, 4L)
  Scratch<Element> unprojected_;  // (D) Blocked (rows, H)
  Scratch<T> pre_;                // (items, rows, 4L), of a step of few rows
};

template <class Tiles>
using Forward = ForwardWalk<Tiles, ForwardCells>;

}  // namespace
}  // namespace fastlstm
