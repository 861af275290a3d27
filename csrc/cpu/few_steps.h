// The forward pass of a call with few rows: a program that feeds one step at a time, or a short
// sequence through a large layer. Packing the weights, as forward.h does, would take longer than
// all of the steps, so each unit's rows of W_ih and W_hh are multiplied where they lie: those of
// W_ih by a chunk of steps, those of W_hh once a step. Where a chunk has many rows, W_ih is packed
// after all: of each group of units, when it is multiplied.
#pragma once

#include <algorithm>
#include <type_traits>

#include "forward.h"
#include "processor.h"
#include "row_products.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

// How many rows, of all steps together, at most: with more of them packing pays. It is the dearer
// the farther away packed weights have to be written; but several steps read W_hh several times. A
// single row a step waits for weights, packed or not; it was measured for itself on Intel's
// processors. (What training reads of a smaller W_hh, its backward pass finds in the cache.)
// Half precision has to be widened each time, which tiles of few rows do not hide, but where it is
// multiplied as it is. (Of all storage types RowVectors are alike in this.)
template <class Rows>
int64_t most_unpacked_rows(const ForwardArgs& args, int64_t steps) {
  constexpr bool wide = FASTLSTM_VECTOR_REGISTERS == 32;
  const Shape& n = args.shape;
  const Storage storage = args.storage;
  const bool half = storage == Storage::f16 || storage == Storage::bf16, single = steps == n.N;
  const int64_t size = half ? 2 : storage == Storage::f64 ? 8 : 4;
  const int64_t bytes = n.D * 4 * n.H * (n.P + n.I) * size;
  int64_t most = 128;
  if (steps > 1 && !single) {
    most = storage == Storage::f64 ? 32 : Rows::most_unpacked;
    if (half && !wide) most = 8;
  }
  const int64_t rows = std::clamp<int64_t>(
      (single ? 64 : Rows::unpacked_per_cache) * bytes / l2_cache_bytes(), half ? 8 : 16, most);
  if (!single || n.P < 128 || !is_intel()) return rows;
  const int64_t of_small = args.gates ? 112 : 64 + n.P / 4;
  return std::max({rows, n.P / 2, of_small});
}

// Steps in which all rows take part.
template <class Rows>
bool are_few_steps(const ForwardArgs& args) {
  const Shape& n = args.shape;
  const int64_t rows = n.T > 0 ? n.batch_sizes[0] : 0;
  if (rows == 0 || n.N % rows != 0) return false;
  const int64_t steps = n.N / rows;
  return n.N <= most_unpacked_rows<Rows>(args, steps) && n.batch_sizes[steps - 1] == rows;
}

template <int n>
using RowCount = std::integral_constant<int, n>;

template <class Tiles>
class FewSteps : public FindsBeyond {
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Inputs = typename Tiles::Inputs;  // of a chunk of steps, where W_ih is packed
  using Element = typename Inputs::Element;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  using Products = RowProducts<typename Tiles::Rows>;
  using Weights = typename Products::Weights;
  using Operand = Blocked<Inputs>;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;
  // Rows of a chunk from which on packing W_ih pays.
  static constexpr int64_t rows_worth_packing = Inputs::has_pauses ? 48 : 64;

 public:
  // One part of the pass: the given sequences.
  FewSteps(const ForwardArgs& args, Range sequences)
      : a_(args),
        n_(args.shape),
        rows_(n_.batch_sizes[0]),
        steps_(n_.N / rows_),
        mine_(sequences),
        groups_(blocks_of(n_.H, L)),
        chunk_(mine_.end - mine_.begin < rows_ ? 1 : chunk(n_, rows_, steps_)),
        panel_size_(packs(0) ? Inputs::panel_size(n_.I) : 0),
        chunk_tiles_(chunk_ * rows_, Inputs::max_rows),
        inputs_size_(packs(0) ? Operand::size(Operand::count(n_.I), chunk_ * rows_, chunk_tiles_)
                              : 0),
        inputs_(n_.D * inputs_size_),
        panels_(std::min<int64_t>(a_.threads, max_parts) * 2 * panel_size_),
        ahead_(chunk_ > 1 ? n_.D * groups_ * chunk_ * rows_ * 4 * L : 0),
        cells_(steps_ > 1 ? n_.D * groups_ * rows_ * L : 0),
        m_(args.w_hr[0] ? rows_ * n_.D * n_.H : 0) {
    // What no group of inputs fills of a block is multiplied all the same.
    if (blocks_of(n_.I, L) * L % Operand::columns != 0) inputs_.clear();
  }

  // Is W_ih packed, for those of so many steps that it pays?
  static bool packs(const Shape& n) {
    const int64_t rows = n.batch_sizes[0], steps = n.N / rows, together = chunk(n, rows, steps);
    return together > 1 && together * rows >= rows_worth_packing;
  }

  static Work work(const ForwardArgs& args) {
    const Shape& n = args.shape;
    const int64_t weights = 4 * n.H * (n.P + n.I) * n.D;
    // Between calls threads fall asleep, and waking one takes as long as dozens of short steps:
    // where there are few, each must be worth more.
    const int64_t dearer = std::clamp<int64_t>(64 * n.batch_sizes[0] / n.N, 1, 8);
    return {n.D * blocks_of(n.H, L), n.batch_sizes[0] * weights / dearer,
            sequences_worth_a_thread<Tiles>(Tiles::weight_bytes(weights), args.threads, n.N,
                                            rows_worth_a_copy)};
  }

  void walk(const Team& team) {
    [[maybe_unused]] const typename Inputs::Session session;
    const Range mine = team.share(n_.D * groups_);
    const int64_t panels = blocks_of(n_.P, L);
    const Range outputs = a_.w_hr[0] ? team.share(n_.D * panels) : Range{0, 0};
    for (int64_t s = 0; s < steps_; ++s) {
      if (packs(s)) {
        block_inputs(team, s);
        team.barrier.wait();
      }
      // There and back again: what the cache still holds of the last step is used first.
      for (int64_t item = 0; item < mine.end - mine.begin; ++item) {
        const int64_t k = s % 2 == 0 ? mine.begin + item : mine.end - 1 - item;
        const Units units{k, int(k / groups_), k % groups_ * L};
        if (packs(s))
          multiply_packed_inputs(units, s, panels_ + team.rank * 2 * panel_size_);
        else if (chunk_ > 1 && s % chunk_ == 0)
          multiply_inputs(units, s);
        for_tiles(mine_,
                  [&](auto rows, int64_t first) { finish_units<rows.value>(units, s, first); });
      }
      if (a_.w_hr[0]) {
        team.barrier.wait();
        for (int64_t k = outputs.begin; k < outputs.end; ++k)
          for_tiles(mine_, [&](auto rows, int64_t first) {
            project<rows.value>(int(k / panels), k % panels * L, s, first);
          });
      }
      if (s + 1 < steps_) team.barrier.wait();
    }
  }

  static void finish(const ForwardArgs& args, FewSteps* const*, int) {
    Forward<Tiles>::finish(args, nullptr, 0);
  }

 private:
  // Rows of x that stay in the L2 cache while all units pass by.
  static int64_t chunk_rows(const Shape& n) {
    const int64_t row = std::max<int64_t>(n.I, 1) * int64_t(sizeof(S));
    return std::clamp<int64_t>(l2_cache_bytes() / 4 / row, Products::most_rows, 256);
  }

  // Steps whose inputs are multiplied together: all, or as many as stay in the cache, in chunks of
  // nearly equal length.
  static int64_t chunk(const Shape& n, int64_t rows, int64_t steps) {
    const int64_t most = std::clamp<int64_t>(chunk_rows(n) / rows, 1, steps);
    return blocks_of(steps, blocks_of(steps, most));
  }

  // Up to L units of one direction, and the how many-eth of all such groups they are.
  struct Units {
    int64_t index;
    int d;
    int64_t first;
  };

  // Tiles of rows, as few as can be and of nearly equal height.
  template <class Body>
  void for_tiles(Range range, const Body& body) {
    const RowTiles tiles(range.end - range.begin, Products::most_rows);
    for (int64_t first = range.begin; first < range.end; first += tiles.height)
      call_with<Products::most_rows>(std::min(tiles.height, range.end - first), first, body);
  }
  template <int most, class Body>
  FASTLSTM_INLINE void call_with(int64_t rows, int64_t first, const Body& body) {
    if constexpr (most > 1)
      if (rows < most) return call_with<most - 1>(rows, first, body);
    body(RowCount<most>{}, first);
  }

  int64_t time(int d, int64_t s) const { return d == 0 ? s : steps_ - 1 - s; }
  int count_of(const Units& units) const {
    return int(n_.H - units.first < L ? n_.H - units.first : L);
  }

  // Does a chunk begin at step s that has so many rows that W_ih is packed for it?
  bool packs(int64_t s) const {
    return chunk_ > 1 && s % chunk_ == 0 && rows_of_chunk(s) >= rows_worth_packing;
  }
  // The rows of x of the steps from step s on.
  int64_t rows_of_chunk(int64_t s) const { return std::min(chunk_, steps_ - s) * rows_; }
  const S* chunk_of_x(int d, int64_t s) const {
    const int64_t last = std::min(s + chunk_, steps_) - 1;
    return static_cast<const S*>(a_.x) + std::min(time(d, s), time(d, last)) * rows_ * n_.I;
  }
  Operand inputs(int d) const {
    return {inputs_ + d * inputs_size_, Operand::count(n_.I), chunk_tiles_.height};
  }

  void block_inputs(const Team& team, int64_t s) {
    const Range share = team.share(rows_of_chunk(s));
    for (int d = 0; d < n_.D; ++d)
      for (int64_t r = share.begin; r < share.end; ++r)
        note(inputs(d).put_row(r, 0, chunk_of_x(d, s) + r * n_.I, n_.I));
  }

  // What W_ih x contributes to the steps from step s on, into ahead_ (row, gate, unit).
  void multiply_packed_inputs(const Units& units, int64_t s, Element* panels) {
    const S* w_ih = static_cast<const S*>(a_.w_ih[units.d]) + units.first * n_.I;
    const int count = count_of(units);
    for (int gate = 0; gate < 4; ++gate)
      note(Inputs::pack_transposed(w_ih + gate * n_.H * n_.I, n_.I, n_.I, count, gate % 2,
                                   panels + gate / 2 * panel_size_));
    const int64_t rows = rows_of_chunk(s);
    T* const ahead = ahead_ + units.index * chunk_ * rows_ * 4 * L;
    for (int64_t tile = 0; tile < chunk_tiles_.count(rows); ++tile) {
      const int64_t first = tile * chunk_tiles_.height;
      for (int half = 0; half < 2; ++half)
        Inputs::multiply(inputs(units.d).tile(tile), chunk_tiles_.height,
                         chunk_tiles_.end(tile, rows) - first, {panels + half * panel_size_, width},
                         {1, {n_.I}}, Advance::none, ahead + first * 4 * L + half * width, 4 * L,
                         nullptr);
    }
  }
  void multiply_inputs(const Units& units, int64_t s) {
    const S* x = chunk_of_x(units.d, s);
    const Weights w_ih = weights(a_.w_ih, units, n_.I);
    T* ahead = ahead_ + units.index * chunk_ * rows_ * 4 * L;
    for_tiles({0, rows_of_chunk(s)}, [&](auto rows, int64_t first) {
      V products[rows.value][4];
      Products::template multiply<rows.value, 4>(x + first * n_.I, n_.I, w_ih, count_of(units),
                                                 products);
      for (int r = 0; r < rows.value; ++r)
        for (int gate = 0; gate < 4; ++gate)
          store(ahead + ((first + r) * 4 + gate) * L, products[r][gate]);
    });
  }
  // Of one row of step s.
  const T* ahead(const Units& units, int64_t s, int64_t row) const {
    const int64_t begin = s - s % chunk_, steps = std::min(chunk_, steps_ - begin);
    const int64_t step = units.d == 0 ? s - begin : steps - 1 - (s - begin);
    return ahead_ + ((units.index * chunk_ + step) * rows_ + row) * 4 * L;
  }
  Weights weights(const void* const* of_directions, const Units& units, int64_t k_size) const {
    return {static_cast<const S*>(of_directions[units.d]) + units.first * k_size, n_.H * k_size,
            k_size};
  }

  // (eq. 1 to 4) for up to L units and a tile of rows of step s.
  template <int rows>
  void finish_units(const Units& units, int64_t s, int64_t first) {
    const int64_t H = n_.H, D = n_.D, I = n_.I, P = n_.P, unit = units.first;
    const int d = units.d, count = count_of(units);
    const int64_t t = time(d, s), begin = t * rows_ + first;  // row of x
    const S* bias = static_cast<const S*>(a_.bias[d]);
    const S* x = static_cast<const S*>(a_.x) + begin * I;
    const S* h = s == 0
                     ? static_cast<const S*>(a_.h0) + (d * n_.B + first) * P
                     : static_cast<const S*>(a_.y) + ((time(d, s - 1) * rows_ + first) * D + d) * P;
    T* const cells = steps_ > 1 ? cells_ + (units.index * rows_ + first) * L : nullptr;
    V of_h[rows][4], of_x[rows][4];
    Products::template multiply<rows, 4>(h, s == 0 ? P : D * P, weights(a_.w_hh, units, P), count,
                                         of_h);
    if (chunk_ == 1)
      Products::template multiply<rows, 4>(x, I, weights(a_.w_ih, units, I), count, of_x);
    for (int r = 0; r < rows; ++r) {
      V pre[4];
      for (int gate = 0; gate < 4; ++gate) {
        pre[gate] = chunk_ > 1 ? load(ahead(units, s, first + r) + gate * L) : of_x[r][gate];
        if (!cut(d, t, first + r)) pre[gate] += of_h[r][gate];
        if (bias) pre[gate] += load_some(bias + gate * H + unit, count);
      }
      const Gates<V> active = Math::activate({pre[0], pre[1], pre[2], pre[3]});
      const int64_t row = (begin + r) * D + d, state = (d * n_.B + first + r) * H + unit;
      V c_prev{};
      if (!cut(d, t, first + r))
        c_prev =
            s == 0 ? load_some(static_cast<const S*>(a_.c0) + state, count) : load(cells + r * L);
      const V c = Math::cell_state(active, c_prev);
      const auto m = to_storage<S>(Math::cell_output(active, c));
      if (a_.gates) {
        S* gates = static_cast<S*>(a_.gates) + row * 4 * H + unit;
        store_some(gates, active.i, count);
        store_some(gates + H, active.f, count);
        store_some(gates + 2 * H, active.g, count);
        store_some(gates + 3 * H, active.o, count);
      }
      if (a_.c_all) store_some(static_cast<T*>(a_.c_all) + row * H + unit, c, count);
      if (s + 1 < steps_)
        store(cells + r * L, c);
      else
        store_some(static_cast<S*>(a_.c_n) + state, c, count);
      if (a_.w_hr[0]) {
        store_some(m_ + (d * rows_ + first + r) * H + unit, m, count);
        if (a_.m) store_some(static_cast<S*>(a_.m) + row * H + unit, m, count);
      } else {
        store_some(static_cast<S*>(a_.y) + row * H + unit, m, count);
        store_some(static_cast<S*>(a_.h_n) + state, m, count);
      }
    }
  }

  // (eq. 4) h_t = W_hr m_t for up to L outputs of direction d and a tile of rows of step s.
  template <int rows>
  void project(int d, int64_t output, int64_t s, int64_t first) {
    const int64_t H = n_.H, P = n_.P, row = time(d, s) * rows_ + first;
    const int count = int(P - output < L ? P - output : L);
    const S* w_hr = static_cast<const S*>(a_.w_hr[d]);
    V products[rows][1];
    Products::template multiply<rows, 1>(m_ + (d * rows_ + first) * H, H, {w_hr + output * H, 0, H},
                                         count, products);
    for (int r = 0; r < rows; ++r) {
      const auto h = to_storage<S>(products[r][0]);
      store_some(static_cast<S*>(a_.y) + ((row + r) * n_.D + d) * P + output, h, count);
      store_some(static_cast<S*>(a_.h_n) + (d * n_.B + first + r) * P + output, h, count);
    }
  }

  // Does row r enter step t with no state? (As Walk::cut_before.)
  bool cut(int d, int64_t t, int64_t r) const {
    if (a_.reset == nullptr) return false;
    if (d == 0) return a_.reset[t * rows_ + r] != 0;
    return t + 1 < steps_ && a_.reset[(t + 1) * rows_ + r] != 0;
  }

  const ForwardArgs& a_;
  const Shape& n_;
  const int64_t rows_;  // of each step
  const int64_t steps_;
  const Range mine_;  // of them
  const int64_t groups_;
  const int64_t chunk_;  // steps whose inputs are multiplied together
  const int64_t panel_size_;
  const RowTiles chunk_tiles_;  // of the rows of a chunk
  const int64_t inputs_size_;
  Scratch<Element> inputs_;  // (D) Blocked (chunk * rows, I), where W_ih is packed
  Scratch<Element> panels_;  // (threads, 2) panels of I rows, where W_ih is packed
  Scratch<T> ahead_;         // (D * groups, chunk, rows, 4, L)
  Scratch<T> cells_;         // (D * groups, rows, L), between steps
  Scratch<S> m_;             // (D, rows, H), with a projection
};

}  // namespace
}  // namespace fastlstm
