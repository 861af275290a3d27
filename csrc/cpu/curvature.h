// The pointwise part of what differentiates a backward pass again (eq. 11), for all steps: only
// gradients of cell states go from step to step, and unit by unit, so there is nothing to exchange.
#pragma once

#include "split.h"
#include "storage.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

template <class Tiles>
class Curvature {
  using T = typename Tiles::T;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  static constexpr int64_t L = lanes<T>;

 public:
  Curvature(const CurvatureArgs& args, Range sequences)
      : a_(args),
        n_(args.shape),
        walk_(n_, args.reset, sequences),
        dc_(n_.D * n_.B * n_.H),
        c_(n_.D * n_.B * n_.H) {}

  // About thirty operations a unit: worth a thread as many multiply-adds are.
  static Work work(const CurvatureArgs& args) {
    const Shape& n = args.shape;
    return {n.D * blocks_of(n.H, L), 2 * n.N * n.D * n.H, never};
  }

  void walk(const Team& team) {
    const int64_t groups = blocks_of(n_.H, L);
    const Range mine = team.share(n_.D * groups);
    for (int d = 0; d < n_.D; ++d) {
      const int64_t zero = d * groups;
      const int64_t begin = (std::max(mine.begin, zero) - zero) * L;
      const int64_t end = std::min((std::min(mine.end, zero + groups) - zero) * L, n_.H);
      if (begin >= end) continue;
      for (int64_t k = walk_.steps() - 1; k >= 0; --k) {
        const int64_t t = walk_.time(d, k);
        for (int64_t r = 0; r < walk_.rows(t); ++r) finish_row(d, t, r, begin, end);
      }
      begin_sequences(d, begin, end);
    }
  }

  bool beyond() const { return false; }
  static void finish(const CurvatureArgs&, Curvature* const*, int) {}

 private:
  // One row's cells, of units [begin, end).
  void finish_row(int d, int64_t t, int64_t r, int64_t begin, int64_t end) {
    const int64_t H = n_.H, before = Walk::previous(d, t), after = Walk::next(d, t);
    const int64_t row = (walk_.start(t) + r) * n_.D + d, state = walk_.state_at(d, r, H);
    const bool last = r >= walk_.rows(after), first = r >= walk_.rows(before);
    const bool left = !last && !walk_.cut_before(d, after, r);  // does c_t enter another step?
    const bool entered = !walk_.cut_before(d, t, r);
    const int64_t row_before = first ? 0 : (walk_.start(before) + r) * n_.D + d;
    const auto entering = [&](const void* initial, const void* all, int64_t unit, int count) {
      if (!entered) return V{};
      return first ? load_some(static_cast<const T*>(initial) + state + unit, count)
                   : load_some(static_cast<const T*>(all) + row_before * H + unit, count);
    };
    const auto at = [&](const void* values, int64_t unit, int count) {
      return values ? load_some(static_cast<const T*>(values) + row * H + unit, count) : V{};
    };
    const auto gates_at = [&](const void* values, int64_t unit, int count) {
      const T* of = static_cast<const T*>(values) + row * 4 * H + unit;
      return Gates<V>{load_some(of, count), load_some(of + H, count), load_some(of + 2 * H, count),
                      load_some(of + 3 * H, count)};
    };
    for (int64_t unit = begin; unit < end; unit += L) {
      const int count = int(end - unit < L ? end - unit : L);
      T *const dc_carried = dc_ + state + unit, *const c_carried = c_ + state + unit;
      V dc = at(a_.dc_all, unit, count), c_out{};
      if (left) dc += load_some(dc_carried, count), c_out = load_some(c_carried, count);
      if (last && a_.dc_n) dc += load_some(static_cast<const T*>(a_.dc_n) + state + unit, count);
      const V dm = at(a_.dm, unit, count), c = at(a_.c_all, unit, count);
      const Gates<V> s = gates_at(a_.gates, unit, count);
      const V c_prev = entering(a_.c0, a_.c_all, unit, count);
      const CellCurvature<V> made =
          Math::cell_curvature(s, c_prev, c, gates_at(a_.a_tangents, unit, count),
                               entering(a_.c0_tangent, a_.c_tangents, unit, count),
                               at(a_.c_tangents, unit, count), dm, dc, at(a_.m, unit, count));
      c_out += made.c;
      store_some(dc_carried, made.dc_prev, count);
      store_some(c_carried, made.c_prev, count);
      store_some(static_cast<T*>(a_.c_out) + row * H + unit, c_out, count);
      T* const out = static_cast<T*>(a_.a_out) + row * 4 * H + unit;
      store_some(out, made.a.i, count);
      store_some(out + H, made.a.f, count);
      store_some(out + 2 * H, made.a.g, count);
      store_some(out + 3 * H, made.a.o, count);
    }
  }

  // What their first steps leave for the initial cell states: nothing without steps, or if cut.
  void begin_sequences(int d, int64_t begin, int64_t end) {
    for (int64_t b = 0; b < n_.B; ++b) {
      const int64_t t = d == 0 ? 0 : steps_of(b) - 1, state = walk_.state_at(d, b, n_.H);
      const bool enters = b < walk_.max_rows() && !walk_.cut_before(d, t, b);
      for (int64_t unit = begin; unit < end; unit += L) {
        const int count = int(end - unit < L ? end - unit : L);
        store_some(static_cast<T*>(a_.c0_out) + state + unit,
                   enters ? load_some(c_ + state + unit, count) : V{}, count);
      }
    }
  }
  int64_t steps_of(int64_t b) const {
    int64_t steps = walk_.steps();
    while (steps > 0 && walk_.rows(steps - 1) <= b) --steps;
    return steps;
  }

  const CurvatureArgs a_;
  const Shape& n_;
  const Walk walk_;
  Scratch<T> dc_;  // (D, B, H): what a step leaves of dc for the step before it
  Scratch<T> c_;   // (D, B, H): the same of what differentiates it
};

}  // namespace
}  // namespace fastlstm
