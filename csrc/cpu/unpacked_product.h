// The products of (eq. 9) where packing does not pay: C = or += op(A) B with few rows, as after a
// call of one step (a small K for the weights, a small M for the inputs), or with a narrow C. Too
// little is made of a value of B or of A: a tile of C is held in registers while rows of B pass by
// where they lie.
#pragma once

#include <algorithm>

#include "../layer.h"
#include "team.h"
#include "tile.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

// With more rows packing pays: see docs/performance.md. (What is packed is (M + N) K values, for M
// N K products; those of half precision have to be converted too.) But a row of A that meets one
// full tile of columns only is read once, packed or not.
inline bool is_unpacked_product(const ProductArgs& args) {
  constexpr bool wide = FASTLSTM_VECTOR_REGISTERS == 32;
  const bool exact = args.storage == Storage::f32 || args.storage == Storage::f64;
  const int64_t M = args.M, N = args.columns();
  if ((args.transposed ? args.K : M) <= (wide ? 64 : 40)) return true;
  if (!exact || args.transposed || args.K < 16) return false;
  const int64_t tile = 4 * (args.storage == Storage::f32 ? lanes<float> : lanes<double>);
  return (wide && N == tile) || (M <= (wide ? 512 : 128) && M * N <= 80 * (M + N));
}

template <class S, bool transposed>
class UnpackedProduct {
  using T = typename StateOf<S>::type;
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>;
  // Of a tile: its sums, a row of B and a value of A must fit in the registers. (Of a large C fewer
  // rows are better written at a time, unless short vectors make little of a row of B.)
  static constexpr bool wide = FASTLSTM_VECTOR_REGISTERS == 32;
  static constexpr int most_rows = transposed && wide ? 4 : 6;
  static constexpr int most_vectors = wide ? 4 : 2;
  static constexpr int64_t width = most_vectors * L;
  static constexpr int64_t slab_rows = 256;
  static constexpr int64_t ahead = 16;  // rows of B that are asked for before they are read

 public:
  explicit UnpackedProduct(const ProductArgs& args)
      : p_(args),
        row_distance_(transposed ? 1 : args.lda),
        k_distance_(transposed ? args.lda : 1),
        slab_(transposed ? args.K : slab_rows),
        tiles_(args.M, most_rows) {}

  // How many threads can have a part of C.
  int64_t shares() const {
    return transposed ? p_.M : std::max(blocks_of(p_.parts[0].N, width), tiles_.count(p_.M));
  }

  void run(const Team& team) const {
    for (const ProductPart& part : p_.parts)
      for (int64_t k = 0; k < p_.K; k += slab_)
        add_slab(team, part, {k, std::min(k + slab_, p_.K)});
  }

 private:
  // The larger side of C is shared, and the smaller one the inner loop.
  void add_slab(const Team& team, const ProductPart& part, const Range& slab) const {
    if (transposed) {
      const Range mine = team.share(p_.M);
      for (int64_t row = mine.begin; row < mine.end; row += most_rows)
        for (int64_t column = 0; column < part.N; column += width)
          for_rows<most_rows>(part, slab, row, mine.end - row, column);
      return;
    }
    const int64_t blocks = blocks_of(part.N, width), tiles = tiles_.count(p_.M);
    const Range columns = blocks < tiles ? Range{0, blocks} : team.share(blocks);
    const Range rows = blocks < tiles ? team.share(tiles) : Range{0, tiles};
    for (int64_t block = columns.begin; block < columns.end; ++block)
      for (int64_t tile = rows.begin; tile < rows.end; ++tile) {
        const int64_t row = tile * tiles_.height;
        for_rows<most_rows>(part, slab, row, tiles_.end(tile, p_.M) - row, block * width);
      }
  }

  template <int rows>
  void for_rows(const ProductPart& part, const Range& slab, int64_t row, int64_t count,
                int64_t column) const {
    if constexpr (rows > 1)
      if (count < rows) return for_rows<rows - 1>(part, slab, row, count, column);
    for_columns<rows, most_vectors>(part, slab, row, column);
  }

  template <int rows, int vectors>
  void for_columns(const ProductPart& part, const Range& slab, int64_t row, int64_t column) const {
    const int64_t left = part.N - column - (vectors - 1) * L;  // for the last vector
    if constexpr (vectors > 1)
      if (left <= 0) return for_columns<rows, vectors - 1>(part, slab, row, column);
    multiply<rows, vectors>(part, slab, row, column, int(std::min(L, left)));
  }

  // A tile of C (rows, vectors), of whose last vector `count` columns are there. (What is in
  // registers has to be indexed by constants: hence the unrolled loops.)
  template <int rows, int vectors>
  void multiply(const ProductPart& part, const Range& slab, int64_t row, int64_t column,
                int count) const {
    const T* a = static_cast<const T*>(p_.a) + row * row_distance_ + slab.begin * k_distance_;
    const S* b = static_cast<const S*>(part.b) + slab.begin * part.ldb + column;
    T* const c = static_cast<T*>(part.c) + row * part.ldc + column;
    V sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = p_.add || slab.begin > 0
                        ? load_some(c + r * part.ldc + v * L, v + 1 < vectors ? int(L) : count)
                        : V{};
    for (int64_t k = slab.begin; k < slab.end; ++k, a += k_distance_, b += part.ldb) {
      V values[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        values[v] = in_register<rows>(load_some(b + v * L, v + 1 < vectors ? int(L) : count));
        if (!transposed) __builtin_prefetch(b + ahead * part.ldb + v * L);
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const V factor = VectorMath<T>::broadcast(a[r * row_distance_]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) add_product<T>(sum[r][v], factor, values[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        store_some(c + r * part.ldc + v * L, sum[r][v], v + 1 < vectors ? int(L) : count);
  }

  const ProductArgs& p_;
  const int64_t row_distance_, k_distance_;  // of A
  const int64_t slab_;                       // rows of B that pass by all of C before the next ones
  const RowTiles tiles_;                     // of C
};

// A team as large as the work is worth: of few rows C, or B, takes longer to move than to multiply.
template <class S, bool transposed>
void run_unpacked_product(const ProductArgs& p) {
  const int64_t moved = (transposed ? p.M : p.K) * p.columns(), work = p.M * p.columns() * p.K;
  const UnpackedProduct<S, transposed> product(p);
  const int64_t worth = std::max(moved / (int64_t(1) << 16), work / (int64_t(1) << 20)) + 1;
  const int64_t most = std::min(worth, product.shares());
  run_team(int(std::min<int64_t>(most, p.threads)), [&](const Team& team) { product.run(team); });
}

}  // namespace
}  // namespace fastlstm
