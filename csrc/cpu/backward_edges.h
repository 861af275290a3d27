// Where a backward walk (backward.h) begins and ends: what one call is given by the call before it
// and leaves for the next, and what is left to do after all parts have walked.
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
  static constexpr int64_t L = lanes<T>;

 public:
  // What the first step of this call is given by the step undone before it, in another call.
  static void receive(Pass& p, const Team& team) {
    const BackwardArgs& a = p.a_;
    const int64_t H = p.n_.H, begin = a.begin - 1;
    for (int d = 0; d < p.n_.D; ++d) {
      const auto blocked = p.da(d, begin);
      const Range share = team.share(p.walk_.rows(p.time(d, begin)));
      for (int64_t r = share.begin; r < share.end; ++r) {
        const T* da = static_cast<const T*>(a.da_carry) + p.state_at(d, r, 4 * H);
        const T* dc = static_cast<const T*>(a.dc_carry) + p.state_at(d, r, H);
        for (int64_t unit = 0; unit < H; unit += L) {
          const int count = int(H - unit < L ? H - unit : L);
          for (int gate = 0; gate < 4; ++gate)
            p.note(blocked.put(blocked.at(r, gate * p.gate_blocks_, unit),
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
        std::memcpy(static_cast<T*>(a.da_carry) + p.state_at(d, r, 4 * H),
                    static_cast<const T*>(a.da) + row * 4 * H, size_t(4 * H) * sizeof(T));
        T* dc = static_cast<T*>(a.dc_carry) + p.state_at(d, r, H);
        for (int64_t unit = 0; unit < H; unit += L)
          store_some(dc + unit, load(p.carried_cell(d, r, unit)), int(H - unit < L ? H - unit : L));
      }
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
