// Where a backward walk (backward.h) and its sequences begin and end: what one call is given by the
// call before it and leaves for the next, what comes in from outside and goes to the initial
// states, and what is left to do after all parts have walked.
#pragma once

#include <cstring>

#include "operand.h"
#include "team.h"

namespace fastlstm {
namespace {

template <class Pass>
class BackwardEdges {
  using S = typename Pass::S;
  using T = typename Pass::T;
  using V = Vec<T>;
  using Step = typename Pass::Step;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;

 public:
  // What the first step of this call is given by the step undone before it, in another call.
  static void receive(Pass& p, const Team& team, const typename Pass::Thread& thread) {
    const BackwardArgs& a = p.a_;
    const int64_t H = p.n_.H, begin = a.begin - 1;
    for (int d = 0; d < p.n_.D; ++d) {
      const Range units = thread.units[d];
      const auto blocked = p.da(d, begin, units);
      const int64_t rows = p.walk_.rows(p.time(d, begin));
      const Range share = p.exchanges_sums_ ? Range{0, rows} : team.share(rows);
      for (int64_t r = share.begin; r < share.end; ++r) {
        const T* da = static_cast<const T*>(a.da_carry) + p.walk_.state_at(d, r, 4 * H);
        const T* dc = static_cast<const T*>(a.dc_carry) + p.walk_.state_at(d, r, H);
        for (int64_t unit = units.begin; unit < units.end; unit += L) {
          const int count = int(H - unit < L ? H - unit : L);
          for (int gate = 0; gate < 4; ++gate)
            p.note(blocked.put(blocked.at(r, gate * (blocked.blocks / 4), unit - units.begin),
                               load_some(da + gate * H + unit, count), count));
          store(p.carried_cell(d, r, unit), load_some(dc + unit, count));
        }
      }
    }
  }

  // What the last step of this call leaves for the next one.
  static void leave(const Pass& p, const Team& team) {
    const BackwardArgs& a = p.a_;
    const int64_t H = p.n_.H;
    for (int d = 0; d < p.n_.D; ++d) {
      const int64_t t = p.time(d, a.end - 1);
      const Range share = team.share(p.walk_.rows(t));
      for (int64_t r = share.begin; r < share.end; ++r) {
        const int64_t row = (p.walk_.start(t) + r - a.first_row[d]) * p.n_.D + d;
        std::memcpy(static_cast<T*>(a.da_carry) + p.walk_.state_at(d, r, 4 * H),
                    static_cast<const T*>(a.da) + row * 4 * H, size_t(4 * H) * sizeof(T));
        T* dc = static_cast<T*>(a.dc_carry) + p.walk_.state_at(d, r, H);
        for (int64_t unit = 0; unit < H; unit += L)
          store_some(dc + unit, load(p.carried_cell(d, r, unit)), int(H - unit < L ? H - unit : L));
      }
    }
  }

  // The carried gradient of h of some rows, all of them carried or none, for L columns: what comes
  // in from outside joins it, in place.
  static void join(Pass& p, const Step& step, const Range& rows, int64_t column, T* sums) {
    const BackwardArgs& a = p.a_;
    const int64_t P = p.n_.P, D = p.n_.D, d = step.d;
    const int count = int(P - column < L ? P - column : L);
    const bool ends_here = rows.begin >= step.carried, resets = a.reset != nullptr;
    for (int64_t r = rows.begin; r < rows.end; ++r, sums += width) {
      const int64_t state = p.walk_.state_at(d, r, P) + column;
      V dh = load(sums);
      if (ends_here && a.dh_n) dh = load_some(static_cast<const S*>(a.dh_n) + state, count);
      if (!ends_here && resets && p.walk_.cut_before(step.d, step.after, r)) dh = V{};
      if (r >= step.rows) {  // nothing is left of this sequence but its initial state
        if (a.dh0) store_some(static_cast<S*>(a.dh0) + state, dh, count);
        continue;
      }
      const int64_t here = ((step.start + r) * D + d) * P + column;
      if (a.dy) dh += load_some(static_cast<const S*>(a.dy) + here, count);
      store(sums, dh);
      if (!p.projected_) continue;
      if (a.dh_all)
        store_some(static_cast<T*>(a.dh_all) + here - a.first_row[d] * D * P, dh, count);
      p.note(p.dh(step.d).put(p.dh(step.d).at(r, 0, column), dh, count));
    }
  }

  // The gradient of the initial cell state of sequences that this step carries to it, of L units.
  static void finish_sequences(const Pass& p, const Step& step, const Range& rows, int64_t unit) {
    const BackwardArgs& a = p.a_;
    if (a.dc0 == nullptr) return;
    const int count = int(p.n_.H - unit < L ? p.n_.H - unit : L);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const bool cut = p.walk_.cut_before(step.d, step.after, r);
      const V dc = cut ? V{} : load(p.carried_cell(step.d, r, unit));
      store_some(static_cast<S*>(a.dc0) + p.walk_.state_at(step.d, r, p.n_.H) + unit, dc, count);
    }
  }

  // The same of the step undone last, where nobody wants the gradient of the initial h: a thread's
  // share of the units.
  static void finish_cells(const Pass& p, const Team& team, const typename Pass::Thread& thread) {
    const int64_t groups = blocks_of(p.n_.H, L);
    const Range share = team.share(p.n_.D * groups);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const Step step = p.step(int(k / groups), p.walk_.all_steps(), thread);
      finish_sequences(p, step, {0, step.carried}, k % groups * L);
    }
  }

  // Sequences without steps: what comes in for their final state goes out for their initial one.
  // The bias gradients of the parts add up, in their order.
  static void finish(const BackwardArgs& args, Pass* const* parts, int count) {
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
  static void copy_row(const void* from, void* to, int64_t offset, int64_t size) {
    if (to == nullptr) return;
    S* out = static_cast<S*>(to) + offset;
    if (from == nullptr) {
      std::memset(static_cast<void*>(out), 0, size_t(size) * sizeof(S));
    } else {
      std::memcpy(out, static_cast<const S*>(from) + offset, size_t(size) * sizeof(S));
    }
  }
};

}  // namespace
}  // namespace fastlstm
