// The backward walk of one layer: the gradients of every pre-activation and of the initial state.
// (The sums over all rows that follow, (eq. 9), are plain matrix products and not done here.)
//
// The mirror image of forward.h: steps are undone in the opposite order, and the gradient of the
// pre-activations, da_t, is what is exchanged through two blocked buffers. An item is one
// direction and one panel of columns. Each step multiplies da of the step undone before by an
// item's panel of W_hh, which carries the gradient to h of this step, and finishes the cells of
// those units while the tile is in the L1 cache: one barrier a step. With a projection, the
// gradient of h is exchanged too and multiplied by W_hr: two barriers a step.
#pragma once

#include "pack.h"
#include "split.h"

namespace fastlstm {
namespace {

template <class S>
class Backward {
  using T = typename StateOf<S>::type;
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
        tiles_(rows_),
        projected_(args.w_hr[0] != nullptr),
        groups_(blocks_of(n_.H, L)),
        output_blocks_(blocks_of(n_.P, L)),
        unit_panels_(blocks_of(n_.H, width)),
        output_panels_(blocks_of(n_.P, width)),
        da_size_(Blocked<T>::size(4 * groups_, rows_)),
        dh_size_(projected_ ? Blocked<T>::size(output_blocks_, rows_) : 0),
        recurrent_(n_.D * output_panels_ * 4 * n_.H * width),
        projection_(projected_ ? n_.D * unit_panels_ * n_.P * width : 0),
        da_(n_.D * 2 * da_size_),
        dh_(n_.D * dh_size_),
        dbias_(n_.D * 4 * n_.H),
        dc_(n_.D * unit_panels_ * panel_vectors * rows_ * L) {
    std::memset(dbias_, 0, size_t(n_.D * 4 * n_.H) * sizeof(T));
  }

  static Work work(const BackwardArgs& args) {
    const Shape& n = args.shape;
    const int64_t weights = 4 * n.H * n.P * n.D;
    const int64_t rows = n.T > 0 ? n.batch_sizes[0] : 0;
    return {n.D * blocks_of(n.P, width), rows * weights, weights * int64_t(sizeof(T))};
  }

  void walk(const Team& team) {
    const Range outputs = team.share(n_.D * output_panels_);
    const Range units = projected_ ? team.share(n_.D * unit_panels_) : Range{0, 0};
    for (int64_t item = outputs.begin; item < outputs.end; ++item)
      pack_panel(a_.w_hh, n_.P, 4 * n_.H, output_panels_, item, recurrent_);
    for (int64_t item = units.begin; item < units.end; ++item)
      pack_panel(a_.w_hr, n_.H, n_.P, unit_panels_, item, projection_);
    const bool in_advance =
        worth_prefetching<T>(rows_, (outputs.end - outputs.begin) * 4 * n_.H * width);
    if (a_.begin > 0) {
      for_carried(team, a_.begin,
                  [](T* place, T* value, int count) { store(place, load_some(value, count)); });
      team.barrier.wait();
    }
    const bool to_initial_state =
        a_.end == walk_.all_steps() && (a_.dh0 != nullptr || a_.dc0 != nullptr);
    for (int64_t s = a_.begin; s < a_.end + (to_initial_state ? 1 : 0); ++s) {
      // There and back again: what the cache still holds of the last step is used first.
      for (int64_t k = 0; k < outputs.end - outputs.begin; ++k)
        carry(s % 2 == 0 ? outputs.begin + k : outputs.end - 1 - k, s, in_advance);
      team.barrier.wait();
      if (!projected_) continue;
      for (int64_t item = units.begin; item < units.end; ++item) unproject(item, s);
      team.barrier.wait();
    }
    if (a_.end < walk_.all_steps())
      for_carried(team, a_.end,
                  [](T* place, T* value, int count) { store_some(value, load(place), count); });
  }

  // Sequences without steps: what comes in for their final state goes out for their initial one.
  // The bias gradients of the parts add up, in their order.
  static void finish(const BackwardArgs& args, Backward* const* parts, int count) {
    const Shape& n = args.shape;
    for (int64_t d = 0; d < n.D; ++d) {
      for (int64_t b = n.T > 0 ? n.batch_sizes[0] : 0; b < n.B; ++b) {
        copy_row(args.dh_n, args.dh0, (d * n.B + b) * n.P, n.P);
        copy_row(args.dc_n, args.dc0, (d * n.B + b) * n.H, n.H);
      }
    }
    if (args.dbias == nullptr) return;
    T* sum = static_cast<T*>(args.dbias);
    for (int64_t k = 0; k < n.D * 4 * n.H; ++k) {
      sum[k] = parts[0]->dbias_[k];
      for (int part = 1; part < count; ++part) sum[k] += parts[part]->dbias_[k];
    }
  }

 private:
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

  // What step s is given by the step undone before it, when that belonged to another call: for
  // each vector of it, its place here and its place in da_carry or dc_carry.
  template <class Move>
  void for_carried(const Team& team, int64_t s, const Move& move) {
    for (int d = 0; d < n_.D; ++d) {
      const Blocked<T> blocked = da(d, s - 1);
      const Range share = team.share(walk_.rows(time(d, s - 1)));
      for (int64_t r = share.begin; r < share.end; ++r) {
        for (int64_t unit = 0; unit < n_.H; unit += L) {
          const int count = int(n_.H - unit < L ? n_.H - unit : L);
          for (int gate = 0; gate < 4; ++gate)
            move(blocked.at(r, gate * groups_ + unit / L),
                 static_cast<T*>(a_.da_carry) + state_at(d, r, 4 * n_.H) + gate * n_.H + unit,
                 count);
          move(carried_cell(d, r, unit), static_cast<T*>(a_.dc_carry) + state_at(d, r, n_.H) + unit,
               count);
        }
      }
    }
  }

  // The place of sequence r's state in a (D, B, size) tensor.
  int64_t state_at(int64_t d, int64_t r, int64_t size) const {
    return (d * n_.B + walk_.first() + r) * size;
  }

  static void copy_row(const void* from, void* to, int64_t offset, int64_t size) {
    if (to == nullptr) return;
    S* out = static_cast<S*>(to) + offset;
    if (from == nullptr) {
      std::memset(static_cast<void*>(out), 0, size_t(size) * sizeof(S));
    } else {
      std::memcpy(out, static_cast<const S*>(from) + offset, size_t(size) * sizeof(S));
    }
  }

  // Columns of a row-major (k_size, columns) weight matrix into the panel of an item.
  void pack_panel(const void* const* weights, int64_t columns, int64_t k_size, int64_t panels,
                  int64_t item, T* packed) {
    const int64_t column = item % panels * width;
    pack_rows(static_cast<const S*>(weights[item / panels]) + column, columns, k_size,
              columns - column, packed + item * k_size * width);
  }

  // Blocked (rows, 4 * groups) da, gate by gate, of the s-th step undone in direction d.
  Blocked<T> da(int d, int64_t s) const {
    return {da_ + (d * 2 + (s & 1)) * da_size_, 4 * groups_, tiles_.height};
  }
  Blocked<T> dh(int d) const { return {dh_ + d * dh_size_, output_blocks_, tiles_.height}; }

  // (eq. 8) The gradient of h for one panel of columns: carried from the step undone before,
  // tile by tile, and then for the sequences that end at this step.
  void carry(int64_t item, int64_t s, bool in_advance) {
    alignas(64) T sums[max_tile_rows * width];  // (rows of the tile, width)
    const Step step = this->step(int(item / output_panels_), s);
    const int64_t column = item % output_panels_ * width;
    const Segments segments{4, {n_.H, n_.H, n_.H, n_.H}};
    for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.carried);
      tile_function<T>(last - first, in_advance)(da(step.d, s - 1).tile(tile), tiles_.height,
                                                 recurrent_ + item * 4 * n_.H * width, segments,
                                                 sums, width);
      finish_tile(step, first, last, column, sums);
    }
    for (int64_t first = step.carried; first < step.rows; first += max_tile_rows) {
      std::memset(sums, 0, sizeof sums);
      const int64_t left = step.rows - first;
      finish_tile(step, first, first + (left < max_tile_rows ? left : max_tile_rows), column, sums);
    }
  }

  // Rows [first, last) of one panel: all of them carried from the step undone before, or none.
  void finish_tile(const Step& step, int64_t first, int64_t last, int64_t column, T* sums) {
    const int64_t going_on = step.rows < first ? first : step.rows < last ? step.rows : last;
    for (int64_t part = 0; part < width && column + part < n_.P; part += L) {
      receive(step, first, last, column + part, sums + part);
      if (projected_) continue;
      undo_cells(step, first, going_on, column + part, sums + part);
      finish_sequences(step, going_on, last, column + part);
    }
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
      store(this->dh(step.d).at(r, column / L), dh);
    }
  }

  // (eq. 8) dm = dh W_hr for one panel of units, and their cells.
  void unproject(int64_t item, int64_t s) {
    alignas(64) T sums[max_tile_rows * width];
    const Step step = this->step(int(item / unit_panels_), s);
    const int64_t unit = item % unit_panels_ * width;
    const Segments segments{1, {n_.P}};
    for (int64_t tile = 0; tile < tiles_.count(step.rows); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.rows);
      tile_function<T>(last - first, false)(dh(step.d).tile(tile), tiles_.height,
                                            projection_ + item * n_.P * width, segments, sums,
                                            width);
      // As everywhere: rows that are carried here and rows that are not are finished apart.
      const int64_t middle = step.carried < first  ? first
                             : step.carried < last ? step.carried
                                                   : last;
      for (int64_t part = 0; part < width && unit + part < n_.H; part += L) {
        undo_cells(step, first, middle, unit + part, sums + part);
        undo_cells(step, middle, last, unit + part, sums + (middle - first) * width + part);
      }
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

  // The cells of L units and sequences [first, last), from the gradients of m (rows, width). What
  // does not change from row to row is held in locals: stores may alias everything that is not.
  void undo_cells(const Step step, int64_t first, int64_t last, int64_t unit, const T* dm) {
    if (first >= last) return;
    const int d = step.d, count = int(n_.H - unit < L ? n_.H - unit : L);
    const bool ends_here = first >= step.carried, resets = a_.reset != nullptr;
    const int64_t H = n_.H, D = n_.D, row = (step.start + first) * D + d;
    const int64_t gate_stride = groups_ * tiles_.height * L;
    const int64_t state = state_at(d, first, H) + unit;
    const int64_t before = Walk::previous(d, step.t), rows_before = walk_.rows(before);
    const T* c_all = static_cast<const T*>(a_.c_all);
    const T* c = c_all + row * H + unit;
    const T* c_before =
        rows_before == 0 ? nullptr : c_all + ((walk_.start(before) + first) * D + d) * H + unit;
    const S* c0 = static_cast<const S*>(a_.c0) + state;
    const S* dc_n = a_.dc_n ? static_cast<const S*>(a_.dc_n) + state : nullptr;
    const T* dc_all = a_.dc_all ? static_cast<const T*>(a_.dc_all) + row * H + unit : nullptr;
    const S* gates = static_cast<const S*>(a_.gates) + row * 4 * H + unit;
    const Blocked<T> blocked = da(d, step.index);
    T* exchanged = nullptr;
    T* out = static_cast<T*>(a_.da) + (row - a_.first_row[d] * D) * 4 * H + unit;
    T* carried = carried_cell(d, first, unit);
    Gates<V> sum{};

    for (int64_t r = first; r < last; ++r, dm += width, carried += L) {
      const int64_t k = r - first;
      V dc{};
      if (!ends_here) {
        if (!resets || !walk_.cut_before(d, step.after, r)) dc = load(carried);
      } else if (dc_n) {
        dc = load_some(dc_n + k * H, count);
      }
      if (dc_all) dc += load_some(dc_all + k * D * H, count);
      V c_prev{};
      if (!resets || !walk_.cut_before(d, step.t, r))
        c_prev =
            r < rows_before ? load_some(c_before + k * D * H, count) : load_some(c0 + k * H, count);
      const S* saved = gates + k * D * 4 * H;
      const CellGradient<V> gradient =
          Math::cell_backward({load_some(saved, count), load_some(saved + H, count),
                               load_some(saved + 2 * H, count), load_some(saved + 3 * H, count)},
                              c_prev, load_some(c + k * D * H, count), load(dm), dc);
      store(carried, gradient.dc_prev);
      const Gates<V>& da = gradient.da;
      if (exchanged == nullptr || r % tiles_.height == 0) exchanged = blocked.at(r, unit / L);
      store(exchanged, da.i);
      store(exchanged + gate_stride, da.f);
      store(exchanged + 2 * gate_stride, da.g);
      store(exchanged + 3 * gate_stride, da.o);
      exchanged += L;
      T* da_out = out + k * D * 4 * H;
      store_some(da_out, da.i, count);
      store_some(da_out + H, da.f, count);
      store_some(da_out + 2 * H, da.g, count);
      store_some(da_out + 3 * H, da.o, count);
      sum.i += da.i, sum.f += da.f, sum.g += da.g, sum.o += da.o;
    }
    T* dbias = dbias_ + d * 4 * H + unit;  // this thread's own units
    store_some(dbias, load_some(dbias, count) + sum.i, count);
    store_some(dbias + H, load_some(dbias + H, count) + sum.f, count);
    store_some(dbias + 2 * H, load_some(dbias + 2 * H, count) + sum.g, count);
    store_some(dbias + 3 * H, load_some(dbias + 3 * H, count) + sum.o, count);
  }

  const BackwardArgs& a_;
  const Shape& n_;
  const Walk walk_;
  const int64_t rows_;  // of the widest step
  const RowTiles tiles_;
  const bool projected_;
  const int64_t groups_;         // of L hidden units, the last one padded
  const int64_t output_blocks_;  // of L outputs
  const int64_t unit_panels_;    // of panel_width hidden units
  const int64_t output_panels_;  // of panel_width outputs
  const int64_t da_size_, dh_size_;
  Scratch<T> recurrent_;   // (D, output_panels, 4H, panel_width)
  Scratch<T> projection_;  // (D, unit_panels, P, panel_width)
  Scratch<T> da_;          // (D, 2) Blocked (rows, 4 * groups)
  Scratch<T> dh_;          // (D) Blocked (rows, output_blocks)
  Scratch<T> dbias_;       // (D, 4H), of these sequences
  Scratch<T> dc_;          // (D, unit_panels * 2, rows, L)
};

}  // namespace
}  // namespace fastlstm
