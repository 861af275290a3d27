// A step of the backward walk (backward.h) by threads that hand each other sums. What one thread
// writes at a step and another reads has to come from the other's cache. Of da that is 4H values a
// row. Here each thread multiplies the da that it has made itself by the rows of W_hh that belong
// to it, and gives the others the sums for their columns, at most P values a row.
//
// What others need is multiplied first. So it is there when they look for it, and meeting once a
// step, between the two, costs nearly nothing.
#pragma once

#include "operand.h"
#include "scratch.h"
#include "team.h"

namespace fastlstm {
namespace {

// What each thread gives the others, by items: panels of columns. (one_row.h has some too.)
template <class T>
class GivenSums {
  static constexpr int64_t width = panel_width<T>;

 public:
  // Nothing is given without `threads`.
  GivenSums(int64_t threads, int64_t items, int64_t rows)
      : items_(items), rows_(rows), sums_(threads * 2 * items * rows * width) {}

  // What thread `rank` gives at step s for rows of an item, from `row` on: (rows, width).
  T* at(int rank, int64_t s, int64_t item, int64_t row) const {
    return sums_ + (((rank * 2 + (s & 1)) * items_ + item) * rows_ + row) * width;
  }

 private:
  const int64_t items_, rows_;
  Scratch<T> sums_;  // (threads, 2, items, rows, width): the next step's while one's are read
};

template <class Pass>
class ExchangingStep {
  using Tiles = typename Pass::TilesOf;
  using T = typename Pass::T;
  using Step = typename Pass::Step;
  using Thread = typename Pass::Thread;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;

 public:
  static void carry(Pass& p, const Team& team, const Range& items, int64_t s, Thread& thread) {
    for (int d = 0; d < p.n_.D; ++d) give(p, team, items, p.step(d, s, thread));
    const int phase = team.barrier.arrive();
    bool met = false;
    const auto meet = [&] {
      if (!met) team.barrier.wait(phase);
      met = true;
    };
    const auto receive = [&](const Step& step, int64_t item, const Range& rows, T* sums) {
      meet();
      add_given(p, team, step, item, rows, sums);
    };
    // There and back again: what the cache still holds of the last step is used first.
    for (int64_t k = 0; k < items.end - items.begin; ++k) {
      const int64_t item = s % 2 == 0 ? items.begin + k : items.end - 1 - k;
      p.carry_tiles(item, s, Advance::none, thread, receive);
      p.begin_sequences(item, s, thread);
    }
    thread.cells.rest();
    meet();  // those who had nothing to receive too: see GivenSums
  }

 private:
  // What this thread's da contributes to the items of others. (Of panels all columns, which whoever
  // receives them adds.)
  static void give(const Pass& p, const Team& team, const Range& mine, const Step& step) {
    if (step.units.begin == step.units.end) return;
    const Segments segments = Pass::segments(step.units);
    const auto da = p.da(step.d, step.index - 1, step.units);
    for (int64_t panel = 0; panel < p.output_panels_; ++panel) {
      const int64_t item = step.d * p.output_panels_ + panel;
      if (mine.begin <= item && item < mine.end) continue;
      for (int64_t tile = 0; tile < p.tiles_.count(step.carried); ++tile) {
        const int64_t first = tile * p.tiles_.height;
        Tiles::multiply(da.tile(tile), p.tiles_.height, p.tiles_.end(tile, step.carried) - first,
                        {p.recurrent(step.d, step.units, panel), width}, segments, Advance::none,
                        p.given_.at(team.rank, step.index, item, first), width, nullptr);
      }
    }
  }

  // What the da of others contributes to some rows of an item, in the order of the threads.
  static void add_given(const Pass& p, const Team& team, const Step& step, int64_t item,
                        const Range& rows, T* sums) {
    for (int rank = 0; rank < team.size; ++rank) {
      const Range units = p.units_of(team.share(p.n_.D * p.output_panels_, rank), step.d);
      if (rank == team.rank || units.begin == units.end) continue;
      const T* given = p.given_.at(rank, step.index, item, rows.begin);
      for (int64_t k = 0; k < (rows.end - rows.begin) * width; k += L)
        store(sums + k, load(sums + k) + load(given + k));
    }
  }
};

}  // namespace
}  // namespace fastlstm
