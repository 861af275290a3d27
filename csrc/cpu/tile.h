// The inner product of everything here: a tile C = A B of up to `max_tile_rows` rows by
// `panel_width` columns, accumulated in registers over the whole of K.
//
// B is a *panel*: K rows of panel_width = 2 vectors, contiguous, in the order they are used.
// A is *blocked* (see Blocked): everything a tile reads of it is contiguous and in order too.
// K may consist of several segments (the inputs and the hidden state, or the four gates).
#pragma once

#include <utility>

#include "operand.h"

namespace fastlstm {
namespace {

// Two accumulators per row, two vectors of B and one value of A must fit in the registers.
constexpr int max_tile_rows = FASTLSTM_VECTOR_REGISTERS == 32 ? 14 : 6;

// Asks for the row of a panel that comes so many after b.
template <Advance advance, class T>
FASTLSTM_INLINE void prefetch_row([[maybe_unused]] const T* b) {
  constexpr int per_line = 64 / int(sizeof(T));
  for (int k = 0; k < panel_width<T>; k += per_line) {
    if constexpr (advance == Advance::near) __builtin_prefetch(b + 16 * panel_width<T> + k, 0, 3);
    if constexpr (advance == Advance::far) __builtin_prefetch(b + 64 * panel_width<T> + k, 0, 2);
  }
}

FASTLSTM_INLINE void ask_for(const char* pair) {
  __builtin_prefetch(pair, 0, 2);
  __builtin_prefetch(pair + 64, 0, 2);
}

// So many columns of A and rows of B are multiplied in one piece of code. A processor's L1
// prefetcher follows an instruction that loads half a KiB after its last load, but not one that
// skips more: with one row, which waits for B alone, that is half of the speed. (Hence loops that
// the compiler must not unroll.)
template <class T>
constexpr int unrolled_columns = lanes<T> < 4 ? lanes<T> : 4;

template <class T>
using LaneIndex = typename Vector<T>::mask;

// sum += a * b. Where a tile takes all 16 registers, GCC left to itself forms products in place of
// their factors, which costs copies and a sum kept in memory: here they are added to the sum.
template <class T>
FASTLSTM_INLINE void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b) {
#if defined(__FMA__) && FASTLSTM_VECTOR_REGISTERS == 16
  if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(b), "x"(a));
  else
    asm("vfmadd231pd %1, %2, %0" : "+x"(sum) : "x"(b), "x"(a));
#else
  sum += a * b;
#endif
}

// sum (rows, panel_vectors) += one column of A times one row of B.
template <class T, int rows>
FASTLSTM_INLINE void multiply_column(const T* a, const T* b, Vec<T> (&sum)[rows][panel_vectors]) {
  const Vec<T> b0 = in_register<rows>(load(b)), b1 = in_register<rows>(load(b + lanes<T>));
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    Vec<T> value = VectorMath<T>::broadcast(a[r * lanes<T>]);
    add_product<T>(sum[r][0], value, b0);
    add_product<T>(sum[r][1], value, b1);
  }
}

// The same for `lanes` columns of a single row: a load for every two of B's is one too many for the
// L1 cache, so values are spread from a register where that is possible. `lane` counts round and
// round: of its numbers only the last bits are read.
template <class T, int split, Advance advance>
FASTLSTM_INLINE void multiply_row(const T* a, const T* b,
                                  [[maybe_unused]] LaneIndex<T> (&lane)[unrolled_columns<T>],
                                  Vec<T> (&sum)[split][1][panel_vectors]) {
  [[maybe_unused]] const Vec<T> values = load(a);
#pragma GCC unroll 1
  for (int k = 0; k < lanes<T>; k += unrolled_columns<T>) {
#pragma GCC unroll 8
    for (int u = 0; u < unrolled_columns<T>; ++u, b += panel_width<T>) {
      prefetch_row<advance>(b);
#if defined(__AVX512F__)
      const Vec<T> value = lane_of(values, lane[u]);
      lane[u] += unrolled_columns<T>;
#else
      const Vec<T> value = VectorMath<T>::broadcast(a[k + u]);
#endif
      sum[u % split][0][0] += value * load(b);
      sum[u % split][0][1] += value * load(b + lanes<T>);
    }
  }
}

// C (rows, ldc) = or += A (rows, K) B (K, panel_width), A being one tile of a Blocked of that
// `height`.
// A tile of few rows has too few accumulators to fill the pipelines: it keeps `split` partial
// sums, for k modulo split.
template <class T, int rows, int split, Advance advance>
void multiply_tile(const T* a, int64_t height, const T* b, const Segments& segments, T* c,
                   int64_t ldc, const Wanted* wanted, bool add) {
  const char* const* pair = wanted ? wanted->pairs : nullptr;
  const char* const* const end = wanted ? pair + wanted->count : nullptr;
  Vec<T> sum[split][rows][panel_vectors] = {};
  [[maybe_unused]] LaneIndex<T> lane[unrolled_columns<T>];
  for (int u = 0; u < unrolled_columns<T>; ++u) lane[u] = LaneIndex<T>{} + u;
  for (int64_t s = 0; s < segments.count; ++s) {
    int64_t left = segments.size[s];
    for (; left >= lanes<T>; left -= lanes<T>, a += height * lanes<T>) {
      if constexpr (rows == 1) {
        for (int p = 0; p < lanes<T> / 2 && pair < end; ++p, ++pair) ask_for(*pair);
        multiply_row<T, split, advance>(a, b, lane, sum);
        b += lanes<T> * panel_width<T>;
      } else {
#pragma GCC unroll 1
        for (int k = 0; k < lanes<T>; k += unrolled_columns<T>) {
          for (int p = 0; p < 2 && pair < end; ++p, ++pair) ask_for(*pair);
#pragma GCC unroll 4
          for (int u = 0; u < unrolled_columns<T>; ++u, b += panel_width<T>) {
            prefetch_row<advance>(b);
            multiply_column<T, rows>(a + k + u, b, sum[u % split]);
          }
        }
      }
    }
    if (left > 0) {
      for (int k = 0; k < left; ++k, b += panel_width<T>)
        multiply_column<T, rows>(a + k, b, sum[0]);
      a += height * lanes<T>;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int p = 1; p < split; ++p) {
      sum[0][r][0] += sum[p][r][0];
      sum[0][r][1] += sum[p][r][1];
    }
    for (int v = 0; v < panel_vectors; ++v) {
      T* const place = c + r * ldc + v * lanes<T>;
      store(place, add ? load(place) + sum[0][r][v] : sum[0][r][v]);
    }
  }
}

// A multiply-add takes four cycles, and a processor begins two in each: it needs 8 sums, and does
// better with 16 where there is room for them.
template <class T>
constexpr int split_of(int rows) {
  constexpr bool many = FASTLSTM_VECTOR_REGISTERS == 32;
  const int split = rows == 1 || (many && rows == 2) ? 4 : rows <= (many ? 5 : 3) ? 2 : 1;
  return split < unrolled_columns<T> ? split : unrolled_columns<T>;
}

template <class T>
using TileFunction = void (*)(const T*, int64_t, const T*, const Segments&, T*, int64_t,
                              const Wanted*, bool);

template <class T, Advance advance, int... less>
TileFunction<T> tile_function(int64_t rows, std::integer_sequence<int, less...>) {
  static constexpr TileFunction<T> table[] = {
      multiply_tile<T, less + 1, split_of<T>(less + 1), advance>...};
  return table[rows - 1];
}

template <class T>
TileFunction<T> tile_function(int64_t rows, Advance advance) {
  constexpr std::make_integer_sequence<int, max_tile_rows> all{};
  switch (advance) {
    case Advance::near:
      return tile_function<T, Advance::near>(rows, all);
    case Advance::far:
      return tile_function<T, Advance::far>(rows, all);
    case Advance::none:
      break;
  }
  return tile_function<T, Advance::none>(rows, all);
}

}  // namespace
}  // namespace fastlstm
