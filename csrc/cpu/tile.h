// The inner product of everything here: a tile C = A B of up to `max_tile_rows` rows by the columns
// of a panel, of its first vector, or of two panels, accumulated in registers over the whole of K.
//
// B is a *panel*: K rows of panel_width = 2 vectors, contiguous, in the order they are used.
// A is *blocked* (see Blocked): everything a tile reads of it is contiguous and in order too.
// K may consist of several segments (the inputs and the hidden state, or the four gates).
#pragma once

#include <algorithm>
#include <utility>

#include "operand.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

// Two accumulators per row, two vectors of B and one value of A must fit in the registers. (ARM has
// no multiply-add that loads, so values of A wait in registers too.)
#if defined(__aarch64__)
constexpr int max_tile_rows = 12;
#else
constexpr int max_tile_rows = FASTLSTM_VECTOR_REGISTERS == 32 ? 14 : 6;
#endif
// The same with two panels side by side, each row's four accumulators and four vectors of B: so few
// rows have arithmetic too little for the loads that they share.
#if defined(__aarch64__)
constexpr int max_pair_rows = 5;
#else
constexpr int max_pair_rows = FASTLSTM_VECTOR_REGISTERS == 32 ? 6 : 2;
#endif

// Asks for the row of each panel that comes so many after b, of so many vectors in all.
template <Advance advance, int vectors, class T>
FASTLSTM_INLINE void prefetch_row([[maybe_unused]] const T* b,
                                  [[maybe_unused]] int64_t panel_distance) {
  constexpr int per_line = 64 / int(sizeof(T)),
                columns = std::min(vectors, panel_vectors) * lanes<T>;
  for (int v = 0; v < vectors; v += panel_vectors, b += panel_distance)
    for (int k = 0; k < columns; k += per_line) {
      if constexpr (advance == Advance::near) __builtin_prefetch(b + 16 * panel_width<T> + k, 0, 3);
      if constexpr (advance == Advance::far) __builtin_prefetch(b + 64 * panel_width<T> + k, 0, 2);
    }
}

// So many columns of A and rows of B are multiplied in one piece of code. A processor's L1
// prefetcher follows an instruction that loads half a KiB after its last load, but not one that
// skips more: with one row, which waits for B alone, that is half of the speed. (Hence loops that
// the compiler must not unroll.)
template <class T>
constexpr int unrolled_columns = lanes<T> < 4 ? lanes<T> : 4;

template <class T>
using LaneIndex = typename Vector<T>::mask;

// A value of A, as a row is multiplied by it. (ARM multiplies by one lane of a register; to load a
// value into all of them takes the pipelines that multiply.)
#if defined(__aarch64__)
template <class T>
using Factor = T;
template <class T>
FASTLSTM_INLINE Factor<T> factor(T a) {
  return a;
}
#else
template <class T>
using Factor = Vec<T>;
template <class T>
FASTLSTM_INLINE Factor<T> factor(T a) {
  return VectorMath<T>::broadcast(a);
}
#endif

// sum += a * b. Where a tile takes all registers, or all but one, GCC left to itself forms products
// in place of their factors, which costs copies and sums kept in memory: the instruction is named.
template <class T>
FASTLSTM_INLINE void add_product(Vec<T>& sum, Factor<T> a, Vec<T> b) {
#if defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(sum) : "w"(b), "w"(a));
  else
    asm("fmla %0.2d, %1.2d, %2.d[0]" : "+w"(sum) : "w"(b), "w"(a));
#elif defined(__FMA__) && !(defined(__AVX512F__) && defined(FASTLSTM_EMULATED_AVX512))
  if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(b), "v"(a));
  else
    asm("vfmadd231pd %1, %2, %0" : "+v"(sum) : "v"(b), "v"(a));
#else
  sum += a * b;
#endif
}

// sum (rows, vectors) += one column of A times a row of each of some panels, or of a panel's first
// vector.
template <class T, int rows, int vectors>
FASTLSTM_INLINE void multiply_column(const T* a, const T* b, int64_t panel_distance,
                                     Vec<T> (&sum)[rows][vectors]) {
  Vec<T> row[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v)
    row[v] = in_register<rows>(
        load(b + v / panel_vectors * panel_distance + v % panel_vectors * lanes<T>));
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const Factor<T> value = factor<T>(a[r * lanes<T>]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) add_product<T>(sum[r][v], value, row[v]);
  }
}

// The same for `lanes` columns of a single row: a load for every two of B's is one too many for the
// L1 cache, so values are spread from a register where that is possible. `lane` counts round and
// round: of its numbers only the last bits are read.
template <class T, int split, int vectors, Advance advance>
FASTLSTM_INLINE void multiply_row(const T* a, const T* b, int64_t panel_distance,
                                  [[maybe_unused]] LaneIndex<T> (&lane)[unrolled_columns<T>],
                                  Vec<T> (&sum)[split][1][vectors]) {
  [[maybe_unused]] const Vec<T> values = load(a);
#pragma GCC unroll 1
  for (int k = 0; k < lanes<T>; k += unrolled_columns<T>) {
#pragma GCC unroll 8
    for (int u = 0; u < unrolled_columns<T>; ++u, b += panel_width<T>) {
      prefetch_row<advance, vectors>(b, panel_distance);
#if defined(__AVX512F__)
      const Vec<T> value = lane_of(values, lane[u]);
      lane[u] += unrolled_columns<T>;
#else
      const Vec<T> value = VectorMath<T>::broadcast(a[k + u]);
#endif
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[u % split][0][v] +=
            value * load(b + v / panel_vectors * panel_distance + v % panel_vectors * lanes<T>);
    }
  }
}

// C (rows, ldc) = or += A (rows, K) B (K, columns) for one panel B, for its first vector alone, or
// for two neighbours, A being one tile of a Blocked of that `height`.
// A tile of few rows has too few accumulators to fill the pipelines: it keeps `split` partial
// sums, for k modulo split.
template <class T, int rows, int split, int vectors, Advance advance>
void multiply_tile(const T* a, int64_t height, const Panels<T>& b_panels, const Segments& segments,
                   const Target<T>& c, const Wanted* wanted, bool add) {
  const char* const* pair = wanted ? wanted->pairs : nullptr;
  const char* const* const end = wanted ? pair + wanted->count : nullptr;
  const T* b = b_panels.first;
  const int64_t distance = b_panels.distance;
  Vec<T> sum[split][rows][vectors] = {};
  [[maybe_unused]] LaneIndex<T> lane[unrolled_columns<T>];
  for (int u = 0; u < unrolled_columns<T>; ++u) lane[u] = LaneIndex<T>{} + u;
  for (int64_t s = 0; s < segments.count; ++s) {
    int64_t left = segments.size[s];
    for (; left >= lanes<T>; left -= lanes<T>, a += height * lanes<T>) {
      if constexpr (rows == 1) {
        for (int p = 0; p < lanes<T> / 2 && pair < end; ++p, ++pair) ask_for(*pair);
        multiply_row<T, split, vectors, advance>(a, b, distance, lane, sum);
        b += lanes<T> * panel_width<T>;
      } else {
#pragma GCC unroll 1
        for (int k = 0; k < lanes<T>; k += unrolled_columns<T>) {
          for (int p = 0; p < 2 && pair < end; ++p, ++pair) ask_for(*pair);
#pragma GCC unroll 4
          for (int u = 0; u < unrolled_columns<T>; ++u, b += panel_width<T>) {
            prefetch_row<advance, vectors>(b, distance);
            multiply_column<T, rows, vectors>(a + k + u, b, distance, sum[u % split]);
          }
        }
      }
    }
    if (left > 0) {
      for (int k = 0; k < left; ++k, b += panel_width<T>)
        multiply_column<T, rows, vectors>(a + k, b, distance, sum[0]);
      a += height * lanes<T>;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
      for (int p = 1; p < split; ++p) sum[0][r][v] += sum[p][r][v];
      T* const place = c.first + v / panel_vectors * c.distance + r * c.row_distance +
                       v % panel_vectors * lanes<T>;
      store(place, add ? load(place) + sum[0][r][v] : sum[0][r][v]);
    }
}

// A multiply-add takes four cycles, and a processor begins two in each: it needs 8 sums, and does
// better with 16 where there is room for them.
template <class T>
constexpr int split_of(int rows, int vectors) {
  constexpr bool many = FASTLSTM_VECTOR_REGISTERS == 32;
  constexpr int most = unrolled_columns<T>, two = most < 2 ? most : 2;
  if (vectors > panel_vectors) return rows > 1 ? 1 : many ? most : two;
  if (vectors == 1) return rows <= 3 ? most : rows <= 7 ? two : 1;
  if (rows == 1 || (many && rows == 2)) return most;
  return rows <= (many ? 5 : 3) ? two : 1;
}

template <class T>
using TileFunction = void (*)(const T*, int64_t, const Panels<T>&, const Segments&,
                              const Target<T>&, const Wanted*, bool);

template <class T, int vectors, Advance advance, int... less>
TileFunction<T> tile_function(int64_t rows, std::integer_sequence<int, less...>) {
  static constexpr TileFunction<T> table[] = {
      multiply_tile<T, less + 1, split_of<T>(less + 1, vectors), vectors, advance>...};
  return table[rows - 1];
}

// For one panel or its first vector, or for a pair of panels.
template <class T, int vectors>
TileFunction<T> tile_function(int64_t rows, Advance advance) {
  constexpr std::make_integer_sequence<int,
                                       vectors <= panel_vectors ? max_tile_rows : max_pair_rows>
      all{};
  switch (advance) {
    case Advance::near:
      return tile_function<T, vectors, Advance::near>(rows, all);
    case Advance::far:
      return tile_function<T, vectors, Advance::far>(rows, all);
    case Advance::none:
      break;
  }
  return tile_function<T, vectors, Advance::none>(rows, all);
}

}  // namespace
}  // namespace fastlstm
