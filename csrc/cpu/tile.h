// The inner product of everything here: a tile C = A B of up to `max_tile_rows` rows by
// `panel_width` columns, accumulated in registers over the whole of K.
//
// B is a *panel*: K rows of panel_width = 2 vectors, contiguous, in the order they are used.
// A is *blocked*: block k holds `lanes` consecutive columns of every row, row after row, so that
// a tile of rows is contiguous within a block, every address is a constant away from one pointer,
// and no two rows alias in the cache whatever the sizes. K may consist of several segments (the
// inputs and the hidden state, or the four gates); each starts a new block.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

constexpr int panel_vectors = 2;
template <class T>
constexpr int panel_width = panel_vectors * lanes<T>;

// Two accumulators per row, two vectors of B and one value of A must fit in the registers.
constexpr int max_tile_rows = vector_registers == 32 ? 12 : 6;

constexpr int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

struct Segments {
  int64_t count;
  int64_t size[4];

  int64_t total() const {
    int64_t sum = 0;
    for (int s = 0; s < count; ++s) sum += size[s];
    return sum;
  }
};

// sum (rows, panel_vectors) += one column of A times one row of B.
template <class T, int rows>
FASTLSTM_INLINE void multiply_column(const T* a, const T* b, Vec<T> (&sum)[rows][panel_vectors]) {
  Vec<T> b0 = load(b), b1 = load(b + lanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    Vec<T> value = VectorMath<T>::broadcast(a[r * lanes<T>]);
    sum[r][0] += value * b0;
    sum[r][1] += value * b1;
  }
}

// C (rows, ldc) = A (rows, K) B (K, panel_width). `block_stride` is the distance between
// consecutive blocks of A. A tile of few rows has too few accumulators to fill the pipelines:
// it keeps `split` partial sums, for k modulo split.
template <class T, int rows, int split>
void multiply_tile(const T* a, int64_t block_stride, const T* b, const Segments& segments, T* c,
                   int64_t ldc) {
  using V = Vec<T>;
  constexpr int unrolled = lanes<T> < 4 ? lanes<T> : 4;
  V sum[split][rows][panel_vectors] = {};
  for (int64_t s = 0; s < segments.count; ++s) {
    int64_t left = segments.size[s];
    for (; left >= lanes<T>; left -= lanes<T>, a += block_stride)
      for (int k = 0; k < lanes<T>; k += unrolled)
#pragma GCC unroll 4
        for (int u = 0; u < unrolled; ++u, b += panel_width<T>)
          multiply_column<T, rows>(a + k + u, b, sum[u % split]);
    if (left > 0) {
      for (int k = 0; k < left; ++k, b += panel_width<T>)
        multiply_column<T, rows>(a + k, b, sum[0]);
      a += block_stride;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int p = 1; p < split; ++p) {
      sum[0][r][0] += sum[p][r][0];
      sum[0][r][1] += sum[p][r][1];
    }
    store(c + r * ldc, sum[0][r][0]);
    store(c + r * ldc + lanes<T>, sum[0][r][1]);
  }
}

template <class T>
using TileFunction = void (*)(const T*, int64_t, const T*, const Segments&, T*, int64_t);

template <class T>
TileFunction<T> tile_function(int rows) {
  static constexpr TileFunction<T> table[12] = {
      multiply_tile<T, 1, 4>, multiply_tile<T, 2, 2>, multiply_tile<T, 3, 2>,
      multiply_tile<T, 4, 1>, multiply_tile<T, 5, 1>, multiply_tile<T, 6, 1>,
#if !defined(FASTLSTM_SMALL_TILES)
      multiply_tile<T, 7, 1>, multiply_tile<T, 8, 1>, multiply_tile<T, 9, 1>,
      multiply_tile<T, 10, 1>, multiply_tile<T, 11, 1>, multiply_tile<T, 12, 1>,
#endif
  };
  return table[rows - 1];
}

// Rows are cut into tiles of nearly equal height: a thin last tile would waste the pipelines.
struct RowTiles {
  int64_t rows, count;

  explicit RowTiles(int64_t rows) : rows(rows), count(blocks_of(rows, max_tile_rows)) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
};

}  // namespace
}  // namespace fastlstm
