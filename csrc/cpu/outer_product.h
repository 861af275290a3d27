// The products of (eq. 9) for the weights where there are few rows, as after a call of one step:
// C = or += A^T B with a small K. That is little arithmetic and a large result, so nothing is
// packed: a tile of C is the sum of a few outer products, and is written once.
#pragma once

#include <algorithm>

#include "../layer.h"
#include "team.h"
#include "vec.h"

namespace fastlstm {
namespace {

// With more rows packing pays: see docs/performance.md.
inline bool is_outer_product(const ProductArgs& args) {
  return args.transposed && args.K <= (FASTLSTM_VECTOR_REGISTERS == 32 ? 48 : 24);
}

template <class S>
class OuterProduct {
  using T = typename StateOf<S>::type;
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>;
  // Of a tile: its sums, a row of B and a value of A must fit in the registers.
  static constexpr int most_rows = 4, most_vectors = FASTLSTM_VECTOR_REGISTERS == 32 ? 4 : 2;

 public:
  explicit OuterProduct(const ProductArgs& args) : p_(args) {}

  void run(const Team& team) const {
    const Range mine = team.share(p_.M);
    for (const ProductPart& part : p_.parts)
      for (int64_t row = mine.begin; row < mine.end; row += most_rows)
        for_rows<most_rows>(part, row, std::min<int64_t>(most_rows, mine.end - row));
  }

 private:
  template <int rows>
  void for_rows(const ProductPart& part, int64_t row, int64_t count) const {
    if constexpr (rows > 1)
      if (count < rows) return for_rows<rows - 1>(part, row, count);
    int64_t column = 0;
    for (; column + most_vectors * L <= part.N; column += most_vectors * L)
      tile<rows, most_vectors>(part, row, column, L);
    for (; column < part.N; column += L)
      tile<rows, 1>(part, row, column, int(std::min(L, part.N - column)));
  }

  // C (rows, vectors), of the last vector `count` columns. (What is in registers has to be indexed
  // by constants: hence the unrolled loops.)
  template <int rows, int vectors>
  [[gnu::always_inline]] void tile(const ProductPart& part, int64_t row, int64_t column,
                                   int count) const {
    const T* a = static_cast<const T*>(p_.a) + row;
    const S* b = static_cast<const S*>(part.b) + column;
    T* const c = static_cast<T*>(part.c) + row * part.ldc + column;
    V sum[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = p_.add ? load_some(c + r * part.ldc + v * L, count) : V{};
    for (int64_t k = 0; k < p_.K; ++k, a += p_.lda, b += part.ldb) {
      V values[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) values[v] = load_some(b + v * L, count);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const V factor = VectorMath<T>::broadcast(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] += factor * values[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store_some(c + r * part.ldc + v * L, sum[r][v], count);
  }

  const ProductArgs& p_;
};

// A team as large as the result is worth, which takes longer to write than to compute.
template <class S>
void run_outer_product(const ProductArgs& p) {
  const int64_t work = p.M * p.columns() / (int64_t(1) << 16) + 1;
  run_team(int(std::min<int64_t>(work, p.threads)),
           [&](const Team& team) { OuterProduct<S>(p).run(team); });
}

}  // namespace
}  // namespace fastlstm
