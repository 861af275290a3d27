#include "layer_backward.h"

#include <algorithm>

#include "dispatch.h"
#include "scratch.h"
#include "walk.h"

namespace fastlstm {
namespace {

using Bytes = Scratch<char>;

const char* at(const void* array, int64_t offset) {
  return static_cast<const char*>(array) + offset;
}
char* at(void* array, int64_t offset) {
  return static_cast<char*>(array) + offset;
}

// Where the first of a chunk's rows lies, and how many there are.
struct Rows {
  int64_t first, count;
};

class LayerBackward {
 public:
  LayerBackward(const LayerBackwardArgs& args, Blas blas)
      : a_(args),
        n_(args.walk.shape),
        blas_(blas),
        whole_(n_, args.walk.reset, {0, n_.B}),
        steps_per_chunk_(steps_per_chunk()),
        several_(steps_per_chunk_ < whole_.all_steps()),
        equal_(args.walk.reset == nullptr && n_.T * n_.B == n_.N),
        multiplies_dh0_(a_.walk.dh0 != nullptr && equal_ && n_.T == 1 && n_.B > 1 &&
                        state_ == storage_),
        most_rows_(most_rows()),
        da_(most_rows_ * n_.D * 4 * n_.H * state_),
        dh_all_(a_.dw_hr[0] ? most_rows_ * n_.D * n_.P * state_ : 0),
        dbias_(a_.dbias[0] ? n_.D * 4 * n_.H * state_ : 0),
        da_carry_(several_ ? n_.D * n_.B * 4 * n_.H * state_ : 0),
        dc_carry_(several_ ? n_.D * n_.B * n_.H * state_ : 0),
        h_(a_.dw_hh[0] ? most_copied_rows() * n_.P * storage_ : 0) {}

  void run() {
    clear();
    BackwardArgs walk = a_.walk;
    walk.da = static_cast<char*>(da_);
    walk.dh_all = static_cast<char*>(dh_all_);
    walk.dbias = static_cast<char*>(dbias_);
    walk.da_carry = static_cast<char*>(da_carry_);
    walk.dc_carry = static_cast<char*>(dc_carry_);
    if (multiplies_dh0_) walk.dh0 = nullptr;
    const int64_t steps = whole_.all_steps();
    for (int64_t begin = 0; begin == 0 || begin < steps; begin += steps_per_chunk_) {
      walk.begin = begin;
      walk.end = std::min(begin + steps_per_chunk_, steps);
      Rows rows[max_directions];
      for (int d = 0; d < n_.D; ++d) {
        rows[d] = rows_of(d, walk.begin, walk.end);
        walk.first_row[d] = rows[d].first;
      }
      bounded_ = kernels().backward(walk);
      for (int d = 0; d < n_.D; ++d) add_products(d, rows[d], begin == 0);
    }
  }

 private:
  // ---- chunks ------------------------------------------------------------------------------

  int64_t steps_per_chunk() const {
    const int64_t steps = a_.chunk_rows * whole_.all_steps() / std::max<int64_t>(n_.N, 1);
    return std::max<int64_t>(steps, 1);
  }

  // The rows of direction d in steps [begin, end), counted in the order they are undone.
  Rows rows_of(int d, int64_t begin, int64_t end) const {
    const int64_t steps = whole_.all_steps();
    const int64_t from = whole_.start(d == 0 ? steps - end : begin);
    return {from, whole_.start(d == 0 ? steps - begin : end) - from};
  }

  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t begin = 0; begin < whole_.all_steps(); begin += steps_per_chunk_)
      for (int d = 0; d < n_.D; ++d) {
        const int64_t end = std::min(begin + steps_per_chunk_, whole_.all_steps());
        most = std::max(most, rows_of(d, begin, end).count);
      }
    return most;
  }

  int64_t most_copied_rows() const { return equal_ ? std::min(most_rows_, 4 * n_.H) : most_rows_; }

  // ---- products ----------------------------------------------------------------------------

  // What is added to from the first row on. (A chunk of no rows multiplies nothing.)
  void clear() {
    const auto zero = [&](void* sum, int64_t count) {
      if (sum) std::memset(sum, 0, size_t(count * state_));
    };
    if (several_ && n_.D == 2) zero(a_.dx, n_.N * n_.I);
    for (int d = 0; d < n_.D; ++d) {
      zero(a_.dbias[d], 4 * n_.H);
      if (n_.N > 0) continue;
      zero(a_.dw_ih[d], 4 * n_.H * n_.I);
      zero(a_.dw_hh[d], 4 * n_.H * n_.P);
      zero(a_.dw_hr[d], n_.P * n_.H);
    }
  }

  // What a chunk's rows of direction d contribute.
  void add_products(int d, const Rows& rows, bool first) {
    if (a_.dbias[d]) add_bias(d);
    if (rows.count == 0) return;
    const int64_t D = n_.D, H = n_.H, I = n_.I, P = n_.P;
    const char* da = da_ + d * 4 * H * state_;
    if (a_.dx)
      multiply({rows.count, 4 * H}, da, D * 4 * H, false, d == 1 || (several_ && D == 2),
               {{I, a_.w_ih[d], I, at(a_.dx, rows.first * I * state_), I}});
    if (multiplies_dh0_)
      multiply({n_.B, 4 * H}, da, D * 4 * H, false, false,
               {{P, a_.walk.w_hh[d], P, at(a_.walk.dh0, d * n_.B * P * state_), P}});
    add_weights(d, rows, first);
    if (a_.dw_hr[d])
      multiply({P, rows.count}, dh_all_ + d * P * state_, D * P, true, !first,
               {{H, at(a_.m, (rows.first * D + d) * H * storage_), D * H, a_.dw_hr[d], H}});
  }

  void add_bias(int d) {
    const int64_t count = 4 * n_.H;
    const char* part = dbias_ + d * count * state_;
    if (a_.walk.storage == Storage::f64)
      add(static_cast<double*>(a_.dbias[d]), reinterpret_cast<const double*>(part), count);
    else
      add(static_cast<float*>(a_.dbias[d]), reinterpret_cast<const float*>(part), count);
  }
  template <class T>
  static void add(T* sum, const T* part, int64_t count) {
    for (int64_t k = 0; k < count; ++k) sum[k] += part[k];
  }

  // dW_ih += da^T x and dW_hh += da^T h, the h that entered each of the rows. Of equal sizes
  // without cuts it is y moved by one step, and only its edge comes from h0: two pieces, or one
  // where copying h costs less than another pass over the result.
  void add_weights(int d, const Rows& rows, bool first) {
    const int64_t D = n_.D, P = n_.P, B = n_.B;
    if (!a_.dw_hh[d]) return add_rows(d, rows, 0, rows.count, nullptr, 0, !first);
    const int64_t last = rows.first + rows.count;
    const bool edge = d == 0 ? rows.first == 0 : last == n_.N;
    if (!equal_ || (edge && rows.count < 4 * n_.H)) {
      copy_entered(d, rows);
      return add_rows(d, rows, 0, rows.count, h_, P, !first);
    }
    const int64_t known = rows.count - (edge ? B : 0);
    const char* h0 = at(a_.h0, d * B * P * storage_);
    if (d == 0) {
      const int64_t from = edge ? 0 : rows.first - B;
      if (edge) add_rows(d, rows, 0, B, h0, P, !first);
      add_rows(d, rows, edge ? B : 0, known, y_row(d, from), D * P, !first || edge);
    } else {
      add_rows(d, rows, 0, known, y_row(d, rows.first + B), D * P, !first);
      if (edge) add_rows(d, rows, known, B, h0, P, !first || known > 0);
    }
  }

  // `count` rows of a chunk, from its row `begin` on, and the h that entered them.
  void add_rows(int d, const Rows& rows, int64_t begin, int64_t count, const char* h, int64_t ld,
                bool add) {
    const int64_t D = n_.D, H = n_.H, I = n_.I, P = n_.P;
    if (count == 0) return;
    const ProductPart of_x{a_.dw_ih[d] ? I : 0, at(a_.x, (rows.first + begin) * I * storage_), I,
                           a_.dw_ih[d], I};
    const ProductPart of_h{a_.dw_hh[d] ? P : 0, h, ld, a_.dw_hh[d], P};
    multiply({4 * H, count}, da_ + (begin * D + d) * 4 * H * state_, D * 4 * H, true, add,
             {of_x, of_h});
  }

  const char* y_row(int d, int64_t row) const {
    return at(a_.y, (row * n_.D + d) * n_.P * storage_);
  }

  // The h that entered each of the rows, from y or h0, or zero at a cut; into h_ (rows, P).
  void copy_entered(int d, const Rows& rows) {
    const size_t size = size_t(n_.P * storage_);
    char* h = h_;
    for (int64_t t = 0; t < whole_.all_steps(); ++t) {
      if (whole_.start(t) < rows.first || whole_.start(t) >= rows.first + rows.count) continue;
      const int64_t before = Walk::previous(d, t), known = whole_.rows(before);
      for (int64_t r = 0; r < whole_.rows(t); ++r, h += size) {
        if (whole_.cut_before(d, t, r))
          std::memset(h, 0, size);
        else if (r < known)
          std::memcpy(h, y_row(d, whole_.start(before) + r), size);
        else
          std::memcpy(h, at(a_.h0, (d * n_.B + r) * n_.P * storage_), size);
      }
    }
  }

  struct Sizes {
    int64_t M, K;
  };
  struct Parts {
    ProductPart first, second{};
  };

  void multiply(const Sizes& sizes, const char* left, int64_t lda, bool transposed, bool add,
                const Parts& parts) {
    const ProductArgs args{sizes.M,
                           sizes.K,
                           a_.walk.storage,
                           a_.walk.threads,
                           transposed,
                           add,
                           bounded_,
                           left,
                           lda,
                           {parts.first, parts.second}};
    if (sizes.M == 0 || args.columns() == 0) return;
    if (!kernels().product(args)) blas_(args);
  }

  const LayerBackwardArgs& a_;
  const Shape& n_;
  const Blas blas_;
  const Walk whole_;
  const int64_t state_ = a_.walk.storage == Storage::f64 ? 8 : 4;  // bytes of a value
  const int64_t storage_ = a_.walk.storage == Storage::f64   ? 8
                           : a_.walk.storage == Storage::f32 ? 4
                                                             : 2;
  const int64_t steps_per_chunk_;
  const bool several_;  // chunks
  const bool equal_;    // sizes of all steps, and no cuts
  // Is the gradient of h0 a product like the others? To pack W_hh does not pay for a single step.
  const bool multiplies_dh0_;
  const int64_t most_rows_;
  Bytes da_;        // (most_rows, D, 4H), state
  Bytes dh_all_;    // (most_rows, D*P), state
  Bytes dbias_;     // (D, 4H), state, of one chunk
  Bytes da_carry_;  // (D, B, 4H), state
  Bytes dc_carry_;  // (D, B, H), state
  Bytes h_;         // (most_copied_rows, P), storage
  bool bounded_ = false;
};

}  // namespace

void layer_backward(const LayerBackwardArgs& args, Blas blas) {
  LayerBackward(args, blas).run();
}

}  // namespace fastlstm
