// The backward walk of a single sequence, whose weights are not packed: one row of da times W_hh
// where it lies, from one row to the next, as memory foresees it.
//
// Threads share the units. Each multiplies the part of da that it has made itself by the rows of
// W_hh that belong to it, so what they exchange at a step is not da but sums: one barrier.
#pragma once

#include <algorithm>

#include "exchanged_sums.h"
#include "operand.h"
#include "team.h"
#include "vector_math.h"

namespace fastlstm {
namespace {

// c (columns, up to whole vectors) += a (rows) W (rows, columns). W is row-major, without gaps.
template <class T>
class RowTimesMatrix {
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>;
  // So many sums stay in registers while all rows pass by.
  static constexpr int most_vectors = FASTLSTM_VECTOR_REGISTERS == 32 ? 16 : 8;
  // So many rows are taken together; where they are wider, they are added to sums in the L1 cache.
  static constexpr int together = 4;

 public:
  static void multiply(const T* a, const T* w, int64_t rows, int64_t columns, T* c,
                       const char* const*& pair, const char* const* end) {
    if (columns <= most_vectors * L)
      return add_short_rows<most_vectors>(a, w, rows, columns, c, pair, end);
    int64_t row = 0;
    for (; row + together <= rows; row += together) {
      if (pair < end) ask_for(*pair++);
      add_long_rows<together>(a + row, w + row * columns, columns, c);
    }
    for (; row < rows; ++row) add_long_rows<1>(a + row, w + row * columns, columns, c);
  }

 private:
  template <int vectors>
  static void add_short_rows(const T* a, const T* w, int64_t rows, int64_t columns, T* c,
                             const char* const*& pair, const char* const* end) {
    if constexpr (vectors > 1)
      if (columns <= (vectors - 1) * L)
        return add_short_rows<vectors - 1>(a, w, rows, columns, c, pair, end);
    // Few sums do not fill the pipelines.
    constexpr int split = vectors >= 8 ? 1 : vectors >= 4 ? 2 : 4;
    const int count = int(columns - (vectors - 1) * L);  // of the last vector
    V sum[split][vectors] = {};
    int64_t row = 0;
    for (; row + together <= rows; row += together) {
      if (pair < end) ask_for(*pair++);
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r, w += columns)
        add_row(a[row + r], w, count, sum[r % split]);
    }
    for (; row < rows; ++row, w += columns) add_row(a[row], w, count, sum[0]);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
      for (int part = 1; part < split; ++part) sum[0][v] += sum[part][v];
      store(c + v * L, load(c + v * L) + sum[0][v]);
    }
  }

  template <int vectors>
  FASTLSTM_INLINE void add_row(T value, const T* w, int count, V (&sum)[vectors]) {
    const V spread = VectorMath<T>::broadcast(value);
#pragma GCC unroll 16
    for (int v = 0; v < vectors - 1; ++v) sum[v] += spread * load(w + v * L);
    sum[vectors - 1] += spread * load_some(w + (vectors - 1) * L, count);
  }

  template <int rows>
  static void add_long_rows(const T* a, const T* w, int64_t columns, T* c) {
    V value[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) value[r] = VectorMath<T>::broadcast(a[r]);
    int64_t column = 0;
#pragma GCC unroll 1
    for (; column + L <= columns; column += L)
      add_columns<rows>(value, w + column, columns, int(L), c + column);
    if (column < columns)
      add_columns<rows>(value, w + column, columns, int(columns - column), c + column);
  }
  template <int rows>
  FASTLSTM_INLINE void add_columns(const V (&value)[rows], const T* w, int64_t columns, int count,
                                   T* c) {
    V sum = load(c);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum += value[r] * load_some(w + r * columns, count);
    store(c, sum);
  }
};

// The sums that threads exchange: what the units of each contribute to the gradient of h.
template <class T>
class OneRow {
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;
  // Rows of W_hh that pass by before the order turns: see multiply.
  static constexpr int64_t chunk = 64;

 public:
  // Nothing is exchanged without `threads`.
  OneRow(int64_t H, int64_t P, int64_t D, int64_t threads)
      : H_(H), P_(P), panels_(blocks_of(P, width)), sums_(threads, D * panels_, 1) {}

  // The contribution of units [begin, end), of whose gradients at one step `da` has those of gate k
  // from k * gate_distance on.
  template <class Other>
  void multiply(const Team& team, int64_t s, int d, const Range& units, const T* da,
                int64_t gate_distance, const T* w_hh, const Wanted& wanted,
                Other& meanwhile) const {
    T* const c = sums(team.rank, s, d);
    std::fill_n(c, panels_ * width, T{});
    const char* const* pair = wanted.pairs;
    const char* const* const end = pair + wanted.count;
    const int64_t chunks = pauses(units) / 4;
    for (int64_t k = 0; k < 4 * chunks; ++k) {
      // There and back again: what the cache still holds of the last step is used first.
      const int64_t at = s % 2 == 0 ? k : 4 * chunks - 1 - k;
      const int64_t gate = at / chunks, unit = units.begin + at % chunks * chunk;
      RowTimesMatrix<T>::multiply(da + gate * gate_distance + unit, w_hh + (gate * H_ + unit) * P_,
                                  std::min(chunk, units.end - unit), P_, c, pair, end);
      meanwhile();
    }
  }
  // How often multiply calls what is to be done `meanwhile`: it waits for weights.
  static int64_t pauses(const Range& units) {
    return 4 * blocks_of(units.end - units.begin, chunk);
  }

  // What all threads contribute to L columns.
  V sum(const Team& team, int64_t s, int d, int64_t column) const {
    V sum = load(sums(0, s, d) + column);
    for (int rank = 1; rank < team.size; ++rank) sum += load(sums(rank, s, d) + column);
    return sum;
  }

 private:
  // Of all columns: the panels of a single row lie side by side.
  T* sums(int rank, int64_t s, int64_t d) const { return sums_.at(rank, s, d * panels_, 0); }

  const int64_t H_, P_, panels_;
  const GivenSums<T> sums_;
};

}  // namespace
}  // namespace fastlstm
