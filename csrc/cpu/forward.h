// The forward pass of one layer.
//
// Work is cut into items: one direction and one group of `lanes` hidden units with their four
// gates. A thread owns its items for the whole sequence: their weights (packed once into two
// panels, [i f] and [g o]) stay in its cache and their cell states are touched by nobody else.
// Each step multiplies [x_t | h_{t-1}] by an item's panels, a tile of rows at a time, and
// finishes the cells while the tile is in the L1 cache. The hidden state is exchanged through two
// blocked buffers, read and written in turn, with one barrier a step (two with a projection).
//
// With few rows a step, streaming W_ih through the caches at every step costs more than the
// arithmetic: then the input part of a chunk of steps is multiplied at once ("ahead").
#pragma once

#include "pack.h"
#include "team.h"
#include "walk.h"

namespace fastlstm {
namespace {

// Below this many rows a step, the input part is computed ahead; see docs/performance.md.
constexpr int64_t ahead_below_rows = 6;
constexpr int64_t ahead_rows = 96;  // how many rows are computed ahead, about

template <class S>
class Forward {
  using T = typename StateOf<S>::type;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  static constexpr int64_t L = lanes<T>;

 public:
  explicit Forward(const ForwardArgs& args)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset),
        rows_(walk_.max_rows()),
        groups_(blocks_of(n_.H, L)),
        items_(n_.D * groups_),
        out_panels_(a_.w_hr[0] ? blocks_of(n_.P, panel_width<T>) : 0),
        ahead_(rows_ < ahead_below_rows),
        chunk_(ahead_ ? ahead_rows / (rows_ > 0 ? rows_ : 1) : 1),
        input_blocks_(blocks_of(n_.I, L)),
        state_blocks_((ahead_ ? 0 : input_blocks_) + blocks_of(n_.P, L)),
        panels_(items_ * panels_size()),
        bias_(items_ * 4 * L),
        out_weights_(n_.D * out_panels_ * n_.H * panel_width<T>),
        state_(n_.D * 2 * state_blocks_ * rows_ * L),
        cells_(items_ * rows_ * L),
        inputs_(ahead_ ? n_.D * input_blocks_ * chunk_ * rows_ * L : 0),
        ahead_gates_(ahead_ ? items_ * chunk_ * rows_ * 4 * L : 0),
        unprojected_(a_.w_hr[0] ? n_.D * groups_ * rows_ * L : 0) {}

  void run() {
    pass_on_initial_state();
    if (walk_.steps() == 0) return;
    const int64_t work = rows_ * 4 * n_.H * (n_.P + (ahead_ ? 0 : n_.I)) * n_.D;
    run_team(team_size(a_.threads, items_, work), [this](const Team& team) { walk(team); });
  }

 private:
  int64_t panels_size() const { return 2 * (n_.I + n_.P) * panel_width<T>; }
  int64_t steps() const { return walk_.steps(); }

  // Blocked [x_t | h_{t-1}] (or h_{t-1} alone) that step s of direction d reads.
  T* state(int d, int64_t s) const {
    return state_ + (d * 2 + (s & 1)) * state_blocks_ * rows_ * L;
  }
  T* hidden(int d, int64_t s) const {
    return state(d, s) + (ahead_ ? 0 : input_blocks_) * rows_ * L;
  }

  // Sequences without steps keep their initial state.
  void pass_on_initial_state() {
    for (int64_t d = 0; d < n_.D; ++d) {
      for (int64_t b = rows_; b < n_.B; ++b) {
        const int64_t row = d * n_.B + b;
        std::memcpy(static_cast<S*>(a_.h_n) + row * n_.P,
                    static_cast<const S*>(a_.h0) + row * n_.P, size_t(n_.P) * sizeof(S));
        std::memcpy(static_cast<S*>(a_.c_n) + row * n_.H,
                    static_cast<const S*>(a_.c0) + row * n_.H, size_t(n_.H) * sizeof(S));
      }
    }
  }

  void walk(const Team& team) {
    const Range mine = team.share(items_);
    for (int64_t item = mine.begin; item < mine.end; ++item) pack_item(item);
    const Range my_panels = team.share(n_.D * out_panels_);
    for (int64_t panel = my_panels.begin; panel < my_panels.end; ++panel) pack_projection(panel);
    prepare_step(team, 0);
    team.barrier.wait();
    for (int64_t s = 0; s < steps(); ++s) {
      if (ahead_ && s % chunk_ == 0) compute_ahead(team, mine, s);
      // There and back again: what the cache still holds of the last step is used first.
      for (int64_t k = 0; k < mine.end - mine.begin; ++k)
        step_item(s % 2 == 0 ? mine.begin + k : mine.end - 1 - k, s);
      prepare_step(team, s + 1);
      team.barrier.wait();
      if (out_panels_ > 0) {
        for (int64_t panel = my_panels.begin; panel < my_panels.end; ++panel) project(panel, s);
        team.barrier.wait();
      }
    }
  }

  // ---- packing -----------------------------------------------------------------------------

  void pack_item(int64_t item) {
    const int d = int(item / groups_);
    const int64_t unit = item % groups_ * L, count = units_from(unit);
    const S* w_ih = static_cast<const S*>(a_.w_ih[d]);
    const S* w_hh = static_cast<const S*>(a_.w_hh[d]);
    const S* bias = static_cast<const S*>(a_.bias[d]);
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t row = gate * n_.H + unit;
      T* panel = panels_ + item * panels_size() + gate / 2 * (n_.I + n_.P) * panel_width<T> +
                 gate % 2 * L;
      pack_transposed(w_ih + row * n_.I, n_.I, n_.I, count, panel);
      pack_transposed(w_hh + row * n_.P, n_.P, n_.P, count, panel + n_.I * panel_width<T>);
      store(bias_ + (item * 4 + gate) * L, bias ? load_some(bias + row, int(count)) : V{});
    }
    const S* c0 = static_cast<const S*>(a_.c0) + d * n_.B * n_.H + unit;
    for (int64_t r = 0; r < rows_; ++r) {
      V c = load_some(c0 + r * n_.H, int(count));
      store(cells_ + (item * rows_ + r) * L, d == 0 && walk_.cut_before(d, 0, r) ? V{} : c);
    }
  }

  void pack_projection(int64_t panel) {
    const int d = int(panel / out_panels_);
    const int64_t column = panel % out_panels_ * panel_width<T>;
    const S* w_hr = static_cast<const S*>(a_.w_hr[d]);
    for (int64_t part = 0; part < panel_width<T>; part += L) {
      const int64_t left = n_.P - column - part;
      pack_transposed(w_hr + (column + part) * n_.H, n_.H, n_.H, left < 0 ? 0 : left < L ? left : L,
                      out_weights_ + panel * n_.H * panel_width<T> + part);
    }
  }

  int64_t units_from(int64_t unit) const { return n_.H - unit < L ? n_.H - unit : L; }

  // ---- what a step reads -------------------------------------------------------------------

  // Puts x_t, and the initial state of the sequences that begin, where step s reads them.
  void prepare_step(const Team& team, int64_t s) {
    if (s >= steps()) return;
    for (int d = 0; d < n_.D; ++d) {
      const int64_t t = walk_.time(d, s), known = s == 0 ? 0 : walk_.rows(walk_.time(d, s - 1));
      const Range share = team.share(walk_.rows(t));
      for (int64_t r = share.begin; r < share.end; ++r) {
        if (!ahead_) block_row(x_row(walk_.start(t) + r), n_.I, state(d, s), rows_, r);
        if (r < known) continue;
        const S* h0 = static_cast<const S*>(a_.h0) + (d * n_.B + r) * n_.P;
        if (d == 0 && walk_.cut_before(d, t, r)) {
          clear_block_row(n_.P, hidden(d, s), rows_, r);
        } else {
          block_row(h0, n_.P, hidden(d, s), rows_, r);
        }
      }
    }
  }

  const S* x_row(int64_t row) const { return static_cast<const S*>(a_.x) + row * n_.I; }

  // Rows of the chunk of steps that begins with step s: (first row, number of rows).
  Range chunk_rows(int d, int64_t s) const {
    const int64_t last = (s + chunk_ < steps() ? s + chunk_ : steps()) - 1;
    const int64_t from = walk_.time(d, d == 0 ? s : last), to = walk_.time(d, d == 0 ? last : s);
    return {walk_.start(from), walk_.start(to) + walk_.rows(to)};
  }

  // W_ih x for the steps of a chunk, into ahead_gates_ (item, row of the chunk, 4L).
  void compute_ahead(const Team& team, const Range& mine, int64_t s) {
    const int64_t capacity = chunk_ * rows_;
    for (int d = 0; d < n_.D; ++d) {
      const Range rows = chunk_rows(d, s), share = team.share(rows.end - rows.begin);
      for (int64_t r = share.begin; r < share.end; ++r)
        block_row(x_row(rows.begin + r), n_.I, inputs_ + d * input_blocks_ * capacity * L, capacity,
                  r);
    }
    team.barrier.wait();
    const Segments segments{1, {n_.I}};
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int d = int(item / groups_);
      const Range rows = chunk_rows(d, s);
      const RowTiles tiles(rows.end - rows.begin);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t r = tiles.begin(tile);
        multiply(item, 0, segments, inputs_ + (d * input_blocks_ * capacity + r) * L, capacity,
                 int(tiles.begin(tile + 1) - r), ahead_gates_ + (item * capacity + r) * 4 * L);
      }
    }
  }

  // pre (rows, 4L) = A times an item's two panels, from row `k` of the panels on.
  void multiply(int64_t item, int64_t k, const Segments& segments, const T* blocked,
                int64_t blocked_rows, int rows, T* pre) {
    const TileFunction<T> function = tile_function<T>(rows);
    for (int half = 0; half < 2; ++half) {
      const T* panel = panels_ + item * panels_size() + (half * (n_.I + n_.P) + k) * panel_width<T>;
      function(blocked, blocked_rows * L, panel, segments, pre + half * 2 * L, 4 * L);
    }
  }

  // ---- one step ----------------------------------------------------------------------------

  void step_item(int64_t item, int64_t s) {
    alignas(64) T pre[max_tile_rows * 4 * L];  // (rows of the tile, 4L)
    const int d = int(item / groups_);
    const int64_t t = walk_.time(d, s);
    const Segments segments = ahead_ ? Segments{1, {n_.P}} : Segments{2, {n_.I, n_.P}};
    const RowTiles tiles(walk_.rows(t));
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t first = tiles.begin(tile), last = tiles.begin(tile + 1);
      multiply(item, ahead_ ? n_.I : 0, segments, state(d, s) + first * L, rows_, int(last - first),
               pre);
      const T* ahead = ahead_ ? ahead_gates_ + (item * chunk_ * rows_ + walk_.start(t) -
                                                chunk_rows(d, s - s % chunk_).begin) *
                                                   4 * L
                              : nullptr;
      for (int64_t r = first; r < last; ++r)
        finish_cell(item, s, t, r, pre + (r - first) * 4 * L, ahead ? ahead + r * 4 * L : nullptr);
    }
  }

  // The cells of sequence r and one group of units, from their pre-activations (4L).
  FASTLSTM_INLINE void add(Gates<V>& sum, const T* p) {
    sum.i += load(p), sum.f += load(p + L), sum.g += load(p + 2 * L), sum.o += load(p + 3 * L);
  }

  inline __attribute__((always_inline)) void finish_cell(int64_t item, int64_t s, int64_t t,
                                                         int64_t r, const T* pre, const T* ahead) {
    const int d = int(item / groups_);
    const int64_t group = item % groups_, unit = group * L;
    const int count = int(units_from(unit));
    const int64_t row = walk_.start(t) + r, next = Walk::next(d, t);
    Gates<V> sum{load(pre), load(pre + L), load(pre + 2 * L), load(pre + 3 * L)};
    add(sum, bias_ + item * 4 * L);
    if (ahead) add(sum, ahead);

    T* cell = cells_ + (item * rows_ + r) * L;
    const Gates<V> gates = Math::activate(sum);
    const V c = Math::cell_state(gates, load(cell));
    const V m = rounded_to_storage<S>(Math::cell_output(gates, c));

    const bool final = r >= walk_.rows(next);
    const bool cut = !final && walk_.cut_before(d, next, r);
    store(cell, cut ? V{} : c);
    if (final) store_some(static_cast<S*>(a_.c_n) + (d * n_.B + r) * n_.H + unit, c, count);
    if (a_.c_all)
      store_some(static_cast<T*>(a_.c_all) + (row * n_.D + d) * n_.H + unit, c, count);
    if (a_.gates) {
      S* out = static_cast<S*>(a_.gates) + (row * n_.D + d) * 4 * n_.H + unit;
      store_some(out, gates.i, count);
      store_some(out + n_.H, gates.f, count);
      store_some(out + 2 * n_.H, gates.g, count);
      store_some(out + 3 * n_.H, gates.o, count);
    }
    if (out_panels_ == 0) {
      store_hidden(d, s, r, row, unit, count, m, final, cut);
    } else {
      store(unprojected_ + ((d * groups_ + group) * rows_ + r) * L, m);
      if (a_.m) store_some(static_cast<S*>(a_.m) + (row * n_.D + d) * n_.H + unit, m, count);
    }
  }

  // h of `count` units from `unit` on: to y, to the next step, and to h_n where it is the last.
  inline __attribute__((always_inline)) void store_hidden(int d, int64_t s, int64_t r, int64_t row,
                                                          int64_t unit, int count, V h, bool final,
                                                          bool cut) {
    store_some(static_cast<S*>(a_.y) + (row * n_.D + d) * n_.P + unit, h, count);
    if (final) {
      store_some(static_cast<S*>(a_.h_n) + (d * n_.B + r) * n_.P + unit, h, count);
    } else {
      store(hidden(d, s + 1) + (unit / L * rows_ + r) * L, cut ? V{} : h);
    }
  }

  // h_t = W_hr m_t for one panel of columns.
  void project(int64_t panel, int64_t s) {
    alignas(64) T sums[max_tile_rows * panel_width<T>];
    const int d = int(panel / out_panels_);
    const int64_t t = walk_.time(d, s), next = Walk::next(d, t);
    const Segments segments{1, {n_.H}};
    const RowTiles tiles(walk_.rows(t));
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t first = tiles.begin(tile), last = tiles.begin(tile + 1);
      tile_function<T>(int(last - first))(unprojected_ + (d * groups_ * rows_ + first) * L,
                                          rows_ * L, out_weights_ + panel * n_.H * panel_width<T>,
                                          segments, sums, panel_width<T>);
      for (int64_t r = first; r < last; ++r) {
        const bool final = r >= walk_.rows(next);
        const bool cut = !final && walk_.cut_before(d, next, r);
        for (int64_t part = 0; part < panel_width<T>; part += L) {
          const int64_t unit = panel % out_panels_ * panel_width<T> + part;
          if (unit >= n_.P) break;
          const int count = int(n_.P - unit < L ? n_.P - unit : L);
          const V h = rounded_to_storage<S>(load(sums + (r - first) * panel_width<T> + part));
          store_hidden(d, s, r, walk_.start(t) + r, unit, count, h, final, cut);
        }
      }
    }
  }

  const ForwardArgs& a_;
  const Shape& n_;
  const Walk walk_;
  const int64_t rows_;          // of the widest step
  const int64_t groups_;        // of L hidden units, the last one padded
  const int64_t items_;         // D * groups
  const int64_t out_panels_;    // of a projection, per direction; 0 without one
  const bool ahead_;            // is the input part computed ahead?
  const int64_t chunk_;         // how many steps ahead
  const int64_t input_blocks_;  // of L inputs
  const int64_t state_blocks_;  // of what a step reads
  Scratch<T> panels_;           // (items, 2, I + P, panel_width)
  Scratch<T> bias_;             // (items, 4, L)
  Scratch<T> out_weights_;      // (D, out_panels, H, panel_width)
  Scratch<T> state_;            // (D, 2, state_blocks, rows, L)
  Scratch<T> cells_;            // (items, rows, L)
  Scratch<T> inputs_;           // (D, input_blocks, chunk * rows, L)
  Scratch<T> ahead_gates_;      // (items, chunk * rows, 4L)
  Scratch<T> unprojected_;      // (D, groups, rows, L)
};

}  // namespace
}  // namespace fastlstm
