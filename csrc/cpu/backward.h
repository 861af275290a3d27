// The backward walk of one layer: the gradients of every pre-activation and of the initial state.
// (The sums over all rows that follow, eq. 8 and 9, are plain matrix products and not done here.)
//
// The mirror image of forward.h: steps are undone in the opposite order, and the gradient of the
// pre-activations, da_t, is what is exchanged through two blocked buffers. An item is one
// direction and one panel of columns. Each step multiplies da of the step undone before by an
// item's panel of W_hh, which carries the gradient to h of this step, and finishes the cells of
// those units while the tile is in the L1 cache: one barrier a step. With a projection, the
// gradient of h is exchanged too and multiplied by W_hr: two barriers a step.
#pragma once

#include "pack.h"
#include "team.h"
#include "walk.h"

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
  explicit Backward(const BackwardArgs& args)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset),
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
        dc_(n_.D * unit_panels_ * panel_vectors * rows_ * L) {}

  void run() {
    pass_on_final_gradients();
    if (walk_.steps() == 0) return;
    const int64_t work = rows_ * 4 * n_.H * n_.P * n_.D;
    run_team(team_size(a_.threads, n_.D * output_panels_, work),
             [this](const Team& team) { walk(team); });
  }

 private:
  // A step to undo, and the step undone before it, of one direction. There is one more than
  // there are steps: it has no rows of its own and only carries gradients to the initial state.
  struct Step {
    int d;
    int64_t index;   // how many steps were undone before
    int64_t t;       // time of this step; of no meaning in the extra one
    int64_t rows;    // of this step
    int64_t after;   // time of the step undone before
    int64_t carried; // rows of the step undone before, whose gradients are carried here
  };

  Step step(int d, int64_t s) const {
    const int64_t steps = walk_.steps(), forward = steps - 1 - s;
    Step step{d, s, 0, 0, 0, 0};
    if (s < steps) step.t = walk_.time(d, forward), step.rows = walk_.rows(step.t);
    if (s > 0) step.after = walk_.time(d, forward + 1), step.carried = walk_.rows(step.after);
    return step;
  }

  // Sequences without steps: what comes in for their final state goes out for their initial one.
  void pass_on_final_gradients() {
    for (int64_t d = 0; d < n_.D; ++d) {
      for (int64_t b = rows_; b < n_.B; ++b) {
        copy_row(a_.dh_n, a_.dh0, (d * n_.B + b) * n_.P, n_.P);
        copy_row(a_.dc_n, a_.dc0, (d * n_.B + b) * n_.H, n_.H);
      }
    }
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

  void walk(const Team& team) {
    const Range outputs = team.share(n_.D * output_panels_);
    const Range units = projected_ ? team.share(n_.D * unit_panels_) : Range{0, 0};
    for (int64_t item = outputs.begin; item < outputs.end; ++item)
      pack_panel(a_.w_hh, n_.P, 4 * n_.H, output_panels_, item, recurrent_);
    for (int64_t item = units.begin; item < units.end; ++item)
      pack_panel(a_.w_hr, n_.H, n_.P, unit_panels_, item, projection_);
    const bool in_advance =
        (outputs.end - outputs.begin) * 4 * n_.H * width > cached_weights<T>;
    const bool to_initial_state = a_.dh0 != nullptr || a_.dc0 != nullptr;
    for (int64_t s = 0; s < walk_.steps() + (to_initial_state ? 1 : 0); ++s) {
      // There and back again: what the cache still holds of the last step is used first.
      for (int64_t k = 0; k < outputs.end - outputs.begin; ++k)
        carry(s % 2 == 0 ? outputs.begin + k : outputs.end - 1 - k, s, in_advance);
      team.barrier.wait();
      if (!projected_) continue;
      for (int64_t item = units.begin; item < units.end; ++item) unproject(item, s);
      team.barrier.wait();
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
    alignas(64) T sums[max_tile_rows * width];
    const Step step = this->step(int(item / output_panels_), s);
    const int64_t column = item % output_panels_ * width;
    const Segments segments{4, {n_.H, n_.H, n_.H, n_.H}};
    for (int64_t tile = 0; tile < tiles_.count(step.carried); ++tile) {
      const int64_t first = tile * tiles_.height, last = tiles_.end(tile, step.carried);
      tile_function<T>(last - first, in_advance)(da(step.d, s - 1).tile(tile), tiles_.height,
                                                 recurrent_ + item * 4 * n_.H * width, segments,
                                                 sums, width);
      for (int64_t r = first; r < last; ++r)
        for (int64_t part = 0; part < width && column + part < n_.P; part += L)
          arrive(step, r, column + part, load(sums + (r - first) * width + part));
    }
    for (int64_t r = step.carried; r < step.rows; ++r)
      for (int64_t part = 0; part < width && column + part < n_.P; part += L)
        arrive(step, r, column + part, V{});
  }

  // The carried gradient of h, L columns of sequence r, joins what comes in from outside.
  inline __attribute__((always_inline)) void arrive(const Step& step, int64_t r, int64_t column,
                                                    V dh) {
    const int count = int(n_.P - column < L ? n_.P - column : L);
    const int64_t d = step.d, row = walk_.start(step.t) + r, state = (d * n_.B + r) * n_.P + column;
    if (r >= step.carried) {
      if (a_.dh_n) dh = load_some(static_cast<const S*>(a_.dh_n) + state, count);
    } else if (walk_.cut_before(step.d, step.after, r)) {
      dh = V{};
    }
    if (r >= step.rows) {  // nothing is left of this sequence but its initial state
      if (a_.dh0) store_some(static_cast<S*>(a_.dh0) + state, dh, count);
      if (!projected_) finish_sequence(step, r, column);
      return;
    }
    const int64_t here = (row * n_.D + d) * n_.P + column;
    if (a_.dy) dh += load_some(static_cast<const S*>(a_.dy) + here, count);
    if (!projected_) return undo_cell(step, r, column, dh);
    if (a_.dh_all) store_some(static_cast<T*>(a_.dh_all) + here, dh, count);
    store(this->dh(step.d).at(r, column / L), dh);
  }

  // dm = dh W_hr for one panel of units, and their cells.
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
      for (int64_t r = first; r < last; ++r)
        for (int64_t part = 0; part < width && unit + part < n_.H; part += L)
          undo_cell(step, r, unit + part, load(sums + (r - first) * width + part));
    }
    for (int64_t r = step.rows; r < step.carried; ++r)
      for (int64_t part = 0; part < width && unit + part < n_.H; part += L)
        finish_sequence(step, r, unit + part);
  }

  // The gradient of the cell state that the step undone before left for sequence r.
  T* carried_cell(int d, int64_t r, int64_t unit) const {
    return dc_ + ((d * unit_panels_ * panel_vectors + unit / L) * rows_ + r) * L;
  }

  inline __attribute__((always_inline)) void finish_sequence(const Step& step, int64_t r,
                                                             int64_t unit) {
    if (a_.dc0 == nullptr) return;
    const V dc = walk_.cut_before(step.d, step.after, r) ? V{} : load(carried_cell(step.d, r, unit));
    store_some(static_cast<S*>(a_.dc0) + (step.d * n_.B + r) * n_.H + unit, dc,
               int(n_.H - unit < L ? n_.H - unit : L));
  }

  inline __attribute__((always_inline)) void undo_cell(const Step& step, int64_t r, int64_t unit,
                                                       V dm) {
    const int d = step.d;
    const int count = int(n_.H - unit < L ? n_.H - unit : L);
    const int64_t row = walk_.start(step.t) + r, here = (row * n_.D + d) * n_.H + unit;
    const int64_t state = (d * n_.B + r) * n_.H + unit;

    T* carried = carried_cell(d, r, unit);
    V dc{};
    if (r >= step.carried) {
      if (a_.dc_n) dc = load_some(static_cast<const S*>(a_.dc_n) + state, count);
    } else if (!walk_.cut_before(d, step.after, r)) {
      dc = load(carried);
    }
    const T* c_all = static_cast<const T*>(a_.c_all);
    if (a_.dc_all) dc += load_some(static_cast<const T*>(a_.dc_all) + here, count);
    const int64_t before = Walk::previous(d, step.t);
    V c_prev{};
    if (!walk_.cut_before(d, step.t, r)) {
      c_prev = r < walk_.rows(before)
                   ? load_some(c_all + ((walk_.start(before) + r) * n_.D + d) * n_.H + unit, count)
                   : load_some(static_cast<const S*>(a_.c0) + state, count);
    }
    const S* gates = static_cast<const S*>(a_.gates) + (row * n_.D + d) * 4 * n_.H + unit;
    const Gates<V> saved{load_some(gates, count), load_some(gates + n_.H, count),
                         load_some(gates + 2 * n_.H, count), load_some(gates + 3 * n_.H, count)};
    const CellGradient<V> gradient =
        Math::cell_backward(saved, c_prev, load_some(c_all + here, count), dm, dc);
    store(carried, gradient.dc_prev);

    const Blocked<T> blocked = da(d, step.index);
    T* exchanged = blocked.at(r, unit / L);
    T* out = static_cast<T*>(a_.da) + (row * n_.D + d) * 4 * n_.H + unit;
    const V parts[4] = {gradient.da.i, gradient.da.f, gradient.da.g, gradient.da.o};
    for (int gate = 0; gate < 4; ++gate) {
      store(exchanged + gate * groups_ * blocked.block_stride(), parts[gate]);
      store_some(out + gate * n_.H, parts[gate], count);
    }
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
  Scratch<T> recurrent_;         // (D, output_panels, 4H, panel_width)
  Scratch<T> projection_;        // (D, unit_panels, P, panel_width)
  Scratch<T> da_;                // (D, 2) Blocked (rows, 4 * groups)
  Scratch<T> dh_;                // (D) Blocked (rows, output_blocks)
  Scratch<T> dc_;                // (D, unit_panels * 2, rows, L)
};

}  // namespace
}  // namespace fastlstm
