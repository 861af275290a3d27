// The pointwise part of the forward pass (forward.h): (eq. 2) to (eq. 4) of one tile.
#pragma once

#include "operand.h"
#include "vector_math.h"
#include "walk.h"

namespace fastlstm {
namespace {

// The cells of one item and the sequences of some tiles, from their pre-activations: row by row,
// and of each row a piece at a time. (m is at most 1: there is nothing to note.)
template <class Pass>
class ForwardCells {
  using Tiles = typename Pass::TilesOf;
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<Tiles>;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  using Step = typename Pass::Step;
  static constexpr int64_t L = lanes<T>;

 public:
  ForwardCells() = default;
  ForwardCells(const Pass& pass, const typename Pass::Item& item, const Step& step, Range rows,
               const T* pre, const T* ahead)
      : p_(&pass),
        d_(item.d),
        count_(item.count),
        unit_(item.unit),
        step_(step),
        r_(rows.begin),
        last_(rows.end),
        pre_(pre),
        ahead_(ahead),
        bias_(pass.items_.bias(item)),
        cell_(pass.cells_ + (item.index * pass.rows_ + r_) * L),
        projected_(pass.out_panels_ > 0) {
    const ForwardArgs& a = pass.a_;
    const int64_t H = pass.n_.H, row = (step.start + r_) * pass.n_.D + d_;
    row_stride_ = pass.n_.D * H;
    H_ = H;
    S* const m_all = static_cast<S*>(a.m);
    y_ = projected_ ? (m_all ? m_all + row * H + unit_ : nullptr)
                    : static_cast<S*>(a.y) + row * H + unit_;
    gates_ = a.gates ? static_cast<S*>(a.gates) + row * 4 * H + unit_ : nullptr;
    c_all_ = a.c_all ? static_cast<T*>(a.c_all) + row * H + unit_ : nullptr;
    const Operand hidden = projected_ ? pass.unprojected(d_) : step.hidden;
    hidden_ = hidden.at(r_, projected_ ? 0 : pass.hidden_block_, unit_);
    height_ = hidden.height;
    tile_end_ = r_ + height_;
    next_tile_ = hidden.blocks * hidden.block_size() - height_ * Operand::columns;
  }

  int64_t pieces() const { return (last_ - r_) * 4; }  // before the first

  // A piece's result takes its time, and the processor looks only so far ahead: so none uses that
  // of the piece before it. A row is kept after the next one was activated.
  void operator()() {
    switch (piece_) {
      case 0:
        activate_input();
        piece_ = 1;
        break;
      case 1:
        activate_output();
        piece_ = waits_ ? 2 : 3;
        break;
      case 2:
        keep();
        waits_ = false;
        piece_ = r_ < last_ ? 3 : 0;
        break;
      default:
        step_state(s_);
        waits_ = true;
        piece_ = r_ < last_ ? 0 : 2;
    }
  }

  // Where nothing else can point to the object, all of it may be held in registers.
  // The state of a row, which waits for its gates, comes after the gates of the next one.
  [[gnu::always_inline]] void all() {
    if (r_ == last_) return;
    activate();
    all_but_last();
    complete();
  }

  // The same in parts: the gates of the first row, all rows but the last, and the last one.
  [[gnu::always_inline]] void activate() {
    activate_input();
    activate_output();
  }
  [[gnu::always_inline]] void all_but_last() {
    for (int64_t left = last_ - r_; left > 1; --left) {
      const Gates<V> gates = s_;
      activate();
      step_state(gates);
      keep();
    }
  }
  [[gnu::always_inline]] void complete() {
    step_state(s_);
    keep();
  }

  // All that is left, of rows that were begun too.
  void rest() {
    while (piece_ > 0) (*this)();
    if (waits_) keep();
    waits_ = false;
    if (r_ == last_) return;
    ForwardCells cells(*this);
    cells.all();
    r_ = last_;
  }

 private:
  FASTLSTM_INLINE V sum_of(const ForwardCells& c, int gate) {
    const V sum = load(c.pre_ + gate * L) + load(c.bias_ + gate * L);
    return c.ahead_ ? sum + load(c.ahead_ + gate * L) : sum;
  }
  [[gnu::always_inline]] void activate_input() {
    s_.i = Math::sigmoid(sum_of(*this, 0));
    s_.f = Math::sigmoid(sum_of(*this, 1));
    if (!gates_) return;
    store_some(gates_, s_.i, count_);
    store_some(gates_ + H_, s_.f, count_);
  }
  [[gnu::always_inline]] void activate_output() {
    s_.g = Math::tanh(sum_of(*this, 2));
    s_.o = Math::sigmoid(sum_of(*this, 3));
    pre_ += 4 * L;
    if (ahead_) ahead_ += 4 * L;
    if (!gates_) return;
    store_some(gates_ + 2 * H_, s_.g, count_);
    store_some(gates_ + 3 * H_, s_.o, count_);
    gates_ += 4 * row_stride_;
    for (int gate = 0; gate < 4; ++gate) ask(gates_ + 4 * row_stride_ + gate * H_);
  }
  // Stores are slow where nobody foresees the place: it is asked for two rows ahead.
  template <class Value>
  FASTLSTM_INLINE void ask(Value* place) {
    if (Tiles::has_pauses) __builtin_prefetch(place, 1);
  }
  // Row r_ is done but for being kept: the next one's turn.
  [[gnu::always_inline]] void step_state(const Gates<V>& gates) {
    c_ = Math::cell_state(gates, load(cell_));
    m_ = to_storage<S>(Math::cell_output(gates, c_));
    cut_ =
        p_->a_.reset != nullptr && r_ < step_.next_rows && p_->walk_.cut_before(d_, step_.next, r_);
    store(cell_, cut_ ? V{} : c_);
    cell_ += L;
    ++r_;
  }
  // The row before r_.
  [[gnu::always_inline]] void keep() {
    step_.hidden.put(hidden_, cut_ && !projected_ ? V{} : from_storage<S>(m_), count_);
    hidden_ += Operand::columns;
    if (r_ == tile_end_) hidden_ += next_tile_, tile_end_ += height_;
    if (c_all_) {
      store_some(c_all_, c_, count_);
      c_all_ += row_stride_;
      ask(c_all_ + row_stride_);
    }
    if (y_) {
      store_some(y_, m_, count_);
      y_ += row_stride_;
      ask(y_ + row_stride_);
    }
    if (r_ <= step_.next_rows) return;
    const int64_t state = p_->walk_.state_at(d_, r_ - 1, H_) + unit_;
    store_some(static_cast<S*>(p_->a_.c_n) + state, c_, count_);
    if (!projected_) store_some(static_cast<S*>(p_->a_.h_n) + state, m_, count_);
  }

  const Pass* p_ = nullptr;
  int d_ = 0, count_ = 0;
  int piece_ = 0;       // the next one
  bool waits_ = false;  // to be kept: the row before r_
  int64_t unit_ = 0;
  Step step_;
  int64_t r_ = 0, last_ = 0;
  const T *pre_, *ahead_, *bias_;  // of gate after gate: (4, L)
  T* cell_;
  bool projected_, cut_;
  int64_t row_stride_, H_;
  S *y_, *gates_;  // y, or m where there is a projection
  T* c_all_;
  Element* hidden_;                        // where m goes to be multiplied, a tile's rows in a run
  int64_t height_, tile_end_, next_tile_;  // of a tile; its end as a row; from there to the next
  Gates<V> s_;                             // of row r_
  V c_;                                    // of the row before, when it is kept
  typename StoredAs<S>::type m_;
};

}  // namespace
}  // namespace fastlstm
