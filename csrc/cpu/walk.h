// How a direction walks through packed rows, and where segments and sequences begin and end.
#pragma once

#include "../layer.h"
#include "scratch.h"
#include "team.h"

namespace fastlstm {
namespace {

// The walk of sequences [first, last) through all steps that any of them has.
class Walk {
 public:
  Walk(const Shape& shape, const uint8_t* reset, Range sequences)
      : reset_(reset),
        sizes_(shape.batch_sizes),
        first_(sequences.begin),
        count_(sequences.end - sequences.begin),
        batch_(shape.B),
        starts_(shape.T + 1),
        before_(shape.T + 1) {
    all_steps_ = shape.T;
    while (all_steps_ > 0 && sizes_[all_steps_ - 1] == 0) --all_steps_;
    steps_ = all_steps_;
    while (steps_ > 0 && sizes_[steps_ - 1] <= first_) --steps_;
    starts_[0] = first_;
    before_[0] = 0;
    for (int64_t t = 0; t < shape.T; ++t) {
      starts_[t + 1] = starts_[t] + sizes_[t];
      before_[t + 1] = before_[t] + rows(t);
    }
  }

  int64_t steps() const { return steps_; }          // those with rows
  int64_t all_steps() const { return all_steps_; }  // those in which any sequence at all has rows
  int64_t first() const { return first_; }          // which sequence is the first
  int64_t max_rows() const { return steps_ > 0 ? rows(0) : 0; }
  int64_t rows(int64_t t) const {  // how many of the sequences have a step t
    if (t < 0 || t >= steps_) return 0;
    const int64_t rows = sizes_[t] - first_;
    return rows < count_ ? rows : count_;
  }
  int64_t start(int64_t t) const { return starts_[t]; }  // the packed row of the first of them
  // How many rows these sequences have before step t: the packed row, where they are all there are.
  int64_t rows_before(int64_t t) const { return before_[t]; }

  // The place of sequence r's state in a (D, B, size) tensor.
  int64_t state_at(int64_t d, int64_t r, int64_t size) const {
    return (d * batch_ + first_ + r) * size;
  }

  // The time of the s-th step that direction d takes. (The reverse direction begins where the
  // longest of the sequences ends.)
  int64_t time(int d, int64_t s) const { return d == 0 ? s : steps_ - 1 - s; }
  // The time after t in the order of direction d; rows() of it is 0 when there is none.
  static int64_t next(int d, int64_t t) { return d == 0 ? t + 1 : t - 1; }
  static int64_t previous(int d, int64_t t) { return d == 0 ? t - 1 : t + 1; }

  // Does sequence r enter its step t of direction d with no state, a segment beginning there?
  // The forward direction loses its state on entering a first step; the reverse direction on
  // leaving one, which for step t is step t + 1.
  bool cut_before(int d, int64_t t, int64_t r) const {
    if (reset_ == nullptr) return false;
    if (d == 0) return reset_[starts_[t] + r] != 0;
    return r < rows(t + 1) && reset_[starts_[t + 1] + r] != 0;
  }

 private:
  const uint8_t* reset_;
  const int64_t* sizes_;
  const int64_t first_, count_, batch_;
  Scratch<int64_t> starts_, before_;
  int64_t steps_, all_steps_;
};

}  // namespace
}  // namespace fastlstm
