// The forward pass of one step of few rows: what a program calls that has its input one step at a
// time. Packing the weights, as forward.h does, would take longer than all of the step. Here each
// unit's rows of W_ih and W_hh are multiplied where they lie, and read once.
#pragma once

#include "forward.h"
#include "transpose.h"

namespace fastlstm {
namespace {

// From here on packed weights are used often enough to be worth it.
constexpr int64_t most_single_rows = 8;
// Rows that are multiplied together, so that a weight is loaded once for all of them.
constexpr int64_t single_tile = FASTLSTM_VECTOR_REGISTERS == 32 ? 4 : 2;

// One step, in which all rows take part.
inline bool is_single_step(const Shape& n) {
  return n.T > 0 && n.N > 0 && n.N <= most_single_rows && n.batch_sizes[0] == n.N;
}

template <int n>
struct Rows {
  static constexpr int value = n;
};

template <class Tiles>
class SingleStep {
  using S = typename Tiles::S;
  using T = typename Tiles::T;
  using V = Vec<T>;
  using Math = GateMath<VectorMath<T>>;
  static constexpr int64_t L = lanes<T>;

 public:
  SingleStep(const ForwardArgs& args, Range)
      : a_(args), n_(args.shape), groups_(blocks_of(n_.H, L)), m_(n_.N * n_.D * n_.H) {}

  static Work work(const ForwardArgs& args) {
    const Shape& n = args.shape;
    const int64_t weights = 4 * n.H * (n.P + n.I) * n.D;
    // No step follows for which the threads would stay awake: each must be worth more than usual.
    return {n.D * blocks_of(n.H, L), n.N * weights / 8, Tiles::weight_bytes(weights)};
  }

  void walk(const Team& team) {
    const Range mine = team.share(n_.D * groups_);
    for (int64_t k = mine.begin; k < mine.end; ++k)
      for_tiles([&](auto rows, int64_t first) {
        finish_units<rows.value>(int(k / groups_), k % groups_ * L, first);
      });
    if (!a_.w_hr[0]) return;
    team.barrier.wait();
    const int64_t panels = blocks_of(n_.P, L);
    const Range outputs = team.share(n_.D * panels);
    for (int64_t k = outputs.begin; k < outputs.end; ++k)
      for_tiles([&](auto rows, int64_t first) {
        project<rows.value>(int(k / panels), k % panels * L, first);
      });
  }

  bool beyond() const { return false; }

  static void finish(const ForwardArgs& args, SingleStep* const*, int) {
    Forward<Tiles>::finish(args, nullptr, 0);
  }

 private:
  template <class Body>
  void for_tiles(const Body& body) {
    int64_t first = 0;
    for (; first + single_tile <= n_.N; first += single_tile) body(Rows<single_tile>{}, first);
    switch (n_.N - first) {
      case 1:
        return body(Rows<1>{}, first);
      case 2:
        return body(Rows<2>{}, first);
      case 3:
        return body(Rows<3>{}, first);
    }
  }

  // sum[r][j] += row r of a (rows, a_distance) times row j of w (count, w_distance), over k_size
  // columns, lane by lane.
  template <int rows, int count>
  FASTLSTM_INLINE void add_products(const S* a, int64_t a_distance, const S* w, int64_t w_distance,
                                    int64_t k_size, V (&sum)[rows][count]) {
    int64_t k = 0;
    for (; k + L <= k_size; k += L) {
      V weight[count];
#pragma GCC unroll 4
      for (int j = 0; j < count; ++j) weight[j] = load(w + j * w_distance + k);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const V value = load(a + r * a_distance + k);
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) sum[r][j] += value * weight[j];
      }
    }
    if (k == k_size) return;
    const int left = int(k_size - k);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < count; ++j)
        sum[r][j] +=
            load_some(a + r * a_distance + k, left) * load_some(w + j * w_distance + k, left);
  }

  // The sum of each vector's lanes, in the lane of the vector's index.
  FASTLSTM_INLINE V sums_of(V (&square)[L]) {
    transpose<T>(square);
    V sum = square[0];
    for (int k = 1; k < L; ++k) sum += square[k];
    return sum;
  }

  // (eq. 1 to 4) for up to L units of direction d and a tile of rows.
  template <int rows>
  void finish_units(int d, int64_t unit, int64_t first) {
    const int64_t H = n_.H, D = n_.D, I = n_.I, P = n_.P;
    const int count = int(H - unit < L ? H - unit : L);
    const S *w_ih = static_cast<const S*>(a_.w_ih[d]), *w_hh = static_cast<const S*>(a_.w_hh[d]),
            *bias = static_cast<const S*>(a_.bias[d]);
    const S* x = static_cast<const S*>(a_.x) + first * I;
    const S* h0 = static_cast<const S*>(a_.h0) + (d * n_.B + first) * P;
    const S* c0 = static_cast<const S*>(a_.c0) + (d * n_.B + first) * H + unit;
    alignas(64) V products[rows][4][L] = {};
    for (int j = 0; j < count; ++j) {
      V sum[rows][4] = {};
      add_products<rows, 4>(h0, P, w_hh + (unit + j) * P, H * P, P, sum);
      for (int r = 0; r < rows; ++r)  // what a segment's first step has no use for
        if (cut(d, first + r))
          for (V& s : sum[r]) s = V{};
      add_products<rows, 4>(x, I, w_ih + (unit + j) * I, H * I, I, sum);
      for (int r = 0; r < rows; ++r)
        for (int gate = 0; gate < 4; ++gate) products[r][gate][j] = sum[r][gate];
    }
    for (int r = 0; r < rows; ++r) {
      V pre[4];
      for (int gate = 0; gate < 4; ++gate) {
        pre[gate] = sums_of(products[r][gate]);
        if (bias) pre[gate] += load_some(bias + gate * H + unit, count);
      }
      const Gates<V> s = Math::activate({pre[0], pre[1], pre[2], pre[3]});
      const V c = Math::cell_state(s, cut(d, first + r) ? V{} : load_some(c0 + r * H, count));
      const V m = Math::cell_output(s, c);
      const int64_t row = (first + r) * D + d, state = (d * n_.B + first + r) * H + unit;
      if (a_.gates) {
        S* gates = static_cast<S*>(a_.gates) + row * 4 * H + unit;
        store_some(gates, s.i, count);
        store_some(gates + H, s.f, count);
        store_some(gates + 2 * H, s.g, count);
        store_some(gates + 3 * H, s.o, count);
      }
      if (a_.c_all) store_some(static_cast<T*>(a_.c_all) + row * H + unit, c, count);
      store_some(static_cast<S*>(a_.c_n) + state, c, count);
      if (a_.w_hr[0]) {
        store_some(m_ + (d * n_.N + first + r) * H + unit, m, count);
        if (a_.m) store_some(static_cast<S*>(a_.m) + row * H + unit, m, count);
      } else {
        store_some(static_cast<S*>(a_.y) + row * H + unit, m, count);
        store_some(static_cast<S*>(a_.h_n) + state, m, count);
      }
    }
  }

  // (eq. 4) h_t = W_hr m_t for up to L outputs of direction d and a tile of rows.
  template <int rows>
  void project(int d, int64_t output, int64_t first) {
    const int64_t H = n_.H, P = n_.P;
    const int count = int(P - output < L ? P - output : L);
    const S* w_hr = static_cast<const S*>(a_.w_hr[d]);
    alignas(64) V products[rows][L] = {};
    for (int j = 0; j < count; ++j) {
      V sum[rows][1] = {};
      add_products<rows, 1>(m_ + (d * n_.N + first) * H, H, w_hr + (output + j) * H, H, H, sum);
      for (int r = 0; r < rows; ++r) products[r][j] = sum[r][0];
    }
    for (int r = 0; r < rows; ++r) {
      const V h = sums_of(products[r]);
      store_some(static_cast<S*>(a_.y) + ((first + r) * n_.D + d) * P + output, h, count);
      store_some(static_cast<S*>(a_.h_n) + (d * n_.B + first + r) * P + output, h, count);
    }
  }

  bool cut(int d, int64_t r) const { return d == 0 && a_.reset && a_.reset[r] != 0; }

  const ForwardArgs a_;
  const Shape n_;
  const int64_t groups_;
  Scratch<S> m_;  // (D, rows, H)
};

}  // namespace
}  // namespace fastlstm
