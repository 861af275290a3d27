// How a direction walks through packed rows, and where segments and sequences begin and end.
#pragma once

#include "../layer.h"
#include "scratch.h"

namespace fastlstm {
namespace {

class Walk {
 public:
  Walk(const Shape& shape, const uint8_t* reset)
      : reset_(reset), sizes_(shape.batch_sizes), starts_(shape.T + 1) {
    starts_[0] = 0;
    for (int64_t t = 0; t < shape.T; ++t) starts_[t + 1] = starts_[t] + sizes_[t];
    steps_ = shape.T;
    while (steps_ > 0 && sizes_[steps_ - 1] == 0) --steps_;
  }

  int64_t steps() const { return steps_; }  // those with rows
  int64_t max_rows() const { return steps_ > 0 ? sizes_[0] : 0; }
  int64_t rows(int64_t t) const { return t >= 0 && t < steps_ ? sizes_[t] : 0; }
  int64_t start(int64_t t) const { return starts_[t]; }

  // The time of the s-th step that direction d takes.
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
  Scratch<int64_t> starts_;
  int64_t steps_;
};

}  // namespace
}  // namespace fastlstm
