// The pointwise part of the backward walk (backward.h): (eq. 5) to (eq. 7) of one tile.
#pragma once

#include "operand.h"
#include "vector_math.h"
#include "walk.h"

namespace fastlstm {
namespace {

// The cells of one panel of units and of sequences [first, last), all of them carried from the
// step undone before, or none: undone unit group by unit group, and row by row. `sums` (rows,
// width) is the gradient of m or, where there is no projection, what is carried of the gradient of
// h.
template <class Pass>
class BackwardCells {
  using Tiles = typename Pass::TilesOf;
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<Tiles>;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  using Step = typename Pass::Step;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;

 public:
  BackwardCells() = default;
  BackwardCells(Pass& pass, const Step& step, Range rows, int64_t unit, const T* sums)
      : p_(&pass), step_(step), rows_(rows), H_(pass.n_.H), sums_(sums) {
    if (rows.begin >= rows.end) return;
    last_unit_ = unit + width < H_ ? unit + width : H_;
    left_ = (rows.end - rows.begin) * blocks_of(last_unit_ - unit, L);
    begin(unit);
  }

  // Wants what is read and written to undo the cells of one panel of units, up to `most_asked`
  // pairs of lines a row. It lies kilobytes apart, where no processor foresees it, and has not been
  // touched for long.
  static constexpr int64_t most_asked = 11;
  static void ask(const Pass& p, Wanted& wanted, const Step& step, const Range& rows,
                  int64_t unit) {
    const BackwardArgs& a = p.a_;
    const int64_t H = p.n_.H, D = p.n_.D, before = Walk::previous(step.d, step.t);
    const int64_t end = rows.end < step.rows ? rows.end : step.rows;
    const int64_t rows_before = p.walk_.rows(before);
    for (int64_t r = rows.begin; r < end; ++r) {
      const int64_t row = (step.start + r) * D + step.d;
      const S* gates = static_cast<const S*>(a.gates) + row * 4 * H + unit;
      const T* da = static_cast<const T*>(a.da) + (row - a.first_row[step.d] * D) * 4 * H + unit;
      const T* c_all = static_cast<const T*>(a.c_all) + unit;
      for (int gate = 0; gate < 4; ++gate) {
        wanted.add(gates + gate * H);
        wanted.add(da + gate * H);
      }
      wanted.add(c_all + row * H);
      if (r < rows_before) wanted.add(c_all + ((p.walk_.start(before) + r) * D + step.d) * H);
      if (a.dy) wanted.add(static_cast<const S*>(a.dy) + row * H + unit);
    }
  }

  int64_t rows() const { return rows_.end - rows_.begin; }
  int64_t pieces() const { return left_; }

  // A piece.
  void operator()() {
    row();
    if (r_ == rows_.end) end();
  }

  // Where nothing else can point to the object, all of it may be held in registers.
  [[gnu::always_inline]] void all() {
    while (left_ > 0) {
      do row();
      while (r_ < rows_.end);
      end();
    }
  }

  // All that is left.
  void rest() {
    if (left_ == 0) return;
    BackwardCells cells(*this);
    cells.all();
    left_ = 0;
  }

 private:
  // The cells of L units, from unit `unit` on.
  void begin(int64_t unit) {
    const BackwardArgs& a = p_->a_;
    const int64_t D = p_->n_.D, first = rows_.begin, row = (step_.start + first) * D + step_.d;
    const int64_t before = Walk::previous(step_.d, step_.t);
    const int64_t state = p_->walk_.state_at(step_.d, first, H_) + unit;
    const T* c_all = static_cast<const T*>(a.c_all) + unit;
    const Operand blocked = p_->da(step_.d, step_.index, step_.units);
    r_ = first;
    unit_ = unit;
    count_ = int(H_ - unit < L ? H_ - unit : L);
    row_stride_ = D * H_;
    rows_before_ = p_->walk_.rows(before);
    ends_here_ = first >= step_.carried;
    sums_at_ = sums_ + unit % width;
    dy_ = a.dy && !p_->projected_ ? static_cast<const S*>(a.dy) + row * H_ + unit : nullptr;
    dh_n_ = a.dh_n && !p_->projected_ ? static_cast<const S*>(a.dh_n) + state : nullptr;
    dc_n_ = a.dc_n ? static_cast<const S*>(a.dc_n) + state : nullptr;
    dc_all_ = a.dc_all ? static_cast<const T*>(a.dc_all) + row * H_ + unit : nullptr;
    c_ = c_all + row * H_;
    c_before_ = rows_before_ == 0 ? nullptr
                                  : c_all + ((p_->walk_.start(before) + first) * D + step_.d) * H_;
    c0_ = static_cast<const S*>(a.c0) + state;
    gates_ = static_cast<const S*>(a.gates) + row * 4 * H_ + unit;
    da_ = static_cast<T*>(a.da) + (row - a.first_row[step_.d] * D) * 4 * H_ + unit;
    carried_ = p_->carried_cell(step_.d, first, unit);
    exchanged_ = blocked.at(first, 0, unit - step_.units.begin);
    gate_stride_ = blocked.blocks / 4 * blocked.block_size();
    height_ = blocked.height;
    tile_end_ = (first / height_ + 1) * height_;
    term_stride_ = height_ * Operand::columns;
    // From the end of one tile's rows of a block to the next tile's.
    next_tile_ = blocked.blocks * blocked.block_size() - term_stride_;
    beyond_ = 0;
    sum_ = Gates<V>{};
  }

  void end() {
    T* dbias = p_->dbias_ + step_.d * 4 * H_ + unit_;  // nobody else's in this step
    store_some(dbias, load_some(dbias, count_) + sum_.i, count_);
    store_some(dbias + H_, load_some(dbias + H_, count_) + sum_.f, count_);
    store_some(dbias + 2 * H_, load_some(dbias + 2 * H_, count_) + sum_.g, count_);
    store_some(dbias + 3 * H_, load_some(dbias + 3 * H_, count_) + sum_.o, count_);
    p_->note(beyond_);
    if (left_ > 0) begin(unit_ + L);
  }

  // The next row's.
  [[gnu::always_inline]] void row() {
    const bool resets = p_->a_.reset != nullptr;
    --left_;
    if (Tiles::has_pauses && unit_ % width == 0) ask_for_next();
    V dm = load(sums_at_), dc{}, c_prev{};
    if (ends_here_) {
      if (dh_n_) dm = load_some(dh_n_, count_), dh_n_ += H_;
      if (dc_n_) dc = load_some(dc_n_, count_), dc_n_ += H_;
    } else if (!resets || !p_->walk_.cut_before(step_.d, step_.after, r_)) {
      dc = load(carried_);
    } else if (!p_->projected_) {
      dm = V{};
    }
    if (dy_) dm += load_some(dy_, count_), dy_ += row_stride_;
    if (dc_all_) dc += load_some(dc_all_, count_), dc_all_ += row_stride_;
    if (!resets || !p_->walk_.cut_before(step_.d, step_.t, r_)) c_prev = previous_cell();
    const Gates<V> saved{load_some(gates_, count_), load_some(gates_ + H_, count_),
                         load_some(gates_ + 2 * H_, count_), load_some(gates_ + 3 * H_, count_)};
    const CellGradient<V> gradient =
        Math::cell_backward(saved, c_prev, load_some(c_, count_), dm, dc);
    store(carried_, gradient.dc_prev);
    const Gates<V>& da = gradient.da;
    sum_.i += da.i, sum_.f += da.f, sum_.g += da.g, sum_.o += da.o;
    give(0, da.i);
    give(1, da.f);
    give(2, da.g);
    give(3, da.o);
    advance();
  }

  // What the panel's units of the next row need lies kilobytes from theirs of this row, where no
  // processor foresees it. A piece that waits for memory stops the multiplication too.
  [[gnu::always_inline]] void ask_for_next() const {
    for (int gate = 0; gate < 4; ++gate) {
      ask<0>(gates_ + 4 * row_stride_ + gate * H_);
      ask<1>(da_ + 4 * row_stride_ + gate * H_);
    }
    ask<0>(c_ + row_stride_);
    if (c_before_) ask<0>(c_before_ + row_stride_);
    if (dy_) ask<0>(dy_ + row_stride_);
  }
  template <int write, class Value>
  [[gnu::always_inline]] static void ask(const Value* values) {
    const char* const bytes = reinterpret_cast<const char*>(values);
    for (int64_t k = 0; k < width * int64_t(sizeof(Value)); k += 64)
      __builtin_prefetch(bytes + k, write);
  }

  [[gnu::always_inline]] V previous_cell() const {
    if (r_ < rows_before_) return load_some(c_before_, count_);
    return load_some(c0_, count_);
  }

  // da goes where it is multiplied, and out.
  [[gnu::always_inline]] void give(int gate, V da) {
    beyond_ |= Tiles::put(exchanged_ + gate * gate_stride_, term_stride_, da, count_);
    store_some(da_ + gate * H_, da, count_);
  }
  [[gnu::always_inline]] void advance() {
    gates_ += 4 * row_stride_;
    da_ += 4 * row_stride_;
    c_ += row_stride_;
    if (c_before_) c_before_ += row_stride_;
    c0_ += H_;
    carried_ += L;
    sums_at_ += width;
    exchanged_ += Operand::columns;
    if (++r_ == tile_end_) exchanged_ += next_tile_, tile_end_ += height_;
  }

  Pass* p_ = nullptr;
  Step step_;
  Range rows_{0, 0};
  int64_t H_ = 0, left_ = 0;  // rows of unit groups
  const T* sums_ = nullptr;
  // Of the L units whose turn it is:
  int64_t unit_, last_unit_, r_ = 0, row_stride_, rows_before_;
  int count_;
  bool ends_here_;
  const T* sums_at_;
  const S *dy_, *dh_n_, *dc_n_, *c0_, *gates_;
  const T *dc_all_, *c_, *c_before_;
  T *da_, *carried_;
  Element* exchanged_;
  int64_t gate_stride_, term_stride_, height_, tile_end_, next_tile_;
  Gates<V> sum_;
  unsigned beyond_ = 0;
};

}  // namespace
}  // namespace fastlstm
