// Products of weights that are not packed: rows of activations times rows of weights, both of
// which lie along K, as torch has them.
//
// Lane by lane the products of two rows are a vector, whose lanes are still to be added. For a
// vector of units there is a vector each: adding two as a transpose would interleave them leaves
// one vector for both, and after log2(L) times there is one for all, each unit in its lane.
// How some neighbours of a row are read and multiplied is `Rows`: RowVectors, or DotRows
// (dot_tiles.h).
#pragma once

#include "storage.h"
#include "transpose.h"

namespace fastlstm {
namespace {

// As many neighbours as a vector has lanes.
template <class Storage>
struct RowVectors {
  using S = Storage;
  using T = typename StateOf<S>::type;
  using V = Vec<T>;
  static constexpr int together = lanes<T>;
  // See most_unpacked_rows (few_steps.h).
  static constexpr int64_t unpacked_per_cache = 16, most_unpacked = 48;
  FASTLSTM_INLINE V read(const S* from, int count) { return load_some(from, count); }
  FASTLSTM_INLINE void multiply(V& sum, V values, V weights) { sum += values * weights; }
};

template <class Rows>
class RowProducts {
  using S = typename Rows::S;
  using T = typename Rows::T;
  using V = Vec<T>;
  static constexpr int L = lanes<T>;
  static constexpr int levels = L == 16 ? 4 : L == 8 ? 3 : L == 4 ? 2 : 1;

 public:
  // Rows that are multiplied together, so that a weight is loaded once for all of them: the sums of
  // four gates, their weights or the rows' values, and one more must fit in the registers.
  static constexpr int most_rows = FASTLSTM_VECTOR_REGISTERS == 32 ? 6 : 3;

  // Rows of weights: of some units their rows of each gate.
  struct Weights {
    const S* first;
    int64_t gate_distance, k_size;
    const S* row(int unit) const { return first + unit * k_size; }
  };

  // products[r][gate] = row r of a times the weights' rows of up to L units, in the lane of each.
  // As soon as there are sums of as many units twice, they become one: of each level one waits.
  template <int rows, int gates>
  FASTLSTM_INLINE void multiply(const S* a, int64_t a_distance, const Weights& w, int count,
                                V (&products)[rows][gates]) {
    // One gate of a few rows has too few sums to fill the pipelines, so two units share them. (With
    // four gates a single row waits for weights, and four runs of them come faster than eight.)
    constexpr int together = gates == 1 && rows <= 4 ? 2 : 1;
    V waiting[levels][rows][gates];
    for (int unit = 0; unit < L; unit += together) {
      V sum[together][rows][gates] = {};
      if (together == 2 && unit + 1 < count)
        add_products<together>(a, a_distance, w.row(unit), w, sum);
      else if (unit < count)
        add_products<1>(a, a_distance, w.row(unit), w, sum);
      int level = 0;
      if constexpr (together == 2) merge(sum[0], sum[1]), ++level;
      auto& merged = sum[together - 1];
      for (; (unit + together - 1) >> level & 1; ++level) merge(waiting[level], merged);
      copy(merged, level < levels ? waiting[level] : products);
    }
    for (int r = 0; r < rows; ++r)
      for (int gate = 0; gate < gates; ++gate) products[r][gate] = in_order(products[r][gate]);
  }

 private:
  // sum[unit][r][gate] += row r of a (rows, a_distance) times the rows of weights of some units,
  // lane by lane.
  template <int units, int rows, int gates>
  FASTLSTM_INLINE void add_products(const S* a, int64_t a_distance, const S* row, const Weights& w,
                                    V (*sum)[rows][gates]) {
    constexpr int all = Rows::together;
    int64_t k = 0;
    for (; k + all <= w.k_size; k += all)
      add_columns<units>(a + k, a_distance, row + k, w, all, sum);
    if (k < w.k_size) add_columns<units>(a + k, a_distance, row + k, w, int(w.k_size - k), sum);
  }

  // The same for as many columns as are read together, or fewer. Registers are indexed by
  // constants: hence the unrolled loops.
  template <int units, int rows, int gates>
  FASTLSTM_INLINE void add_columns(const S* a, int64_t a_distance, const S* row, const Weights& w,
                                   int count, V (*sum)[rows][gates]) {
    V weight[units][gates];
#pragma GCC unroll 2
    for (int unit = 0; unit < units; ++unit)
#pragma GCC unroll 4
      for (int gate = 0; gate < gates; ++gate)
        weight[unit][gate] =
            in_register<rows>(Rows::read(row + unit * w.k_size + gate * w.gate_distance, count));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V value = Rows::read(a + r * a_distance, count);
#pragma GCC unroll 2
      for (int unit = 0; unit < units; ++unit)
#pragma GCC unroll 4
        for (int gate = 0; gate < gates; ++gate)
          Rows::multiply(sum[unit][r][gate], value, weight[unit][gate]);
    }
  }

  template <int rows, int gates>
  FASTLSTM_INLINE void merge(const V (&first)[rows][gates], V (&second)[rows][gates]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int gate = 0; gate < gates; ++gate)
        second[r][gate] = interleave<T, 0>(first[r][gate], second[r][gate]) +
                          interleave<T, 1>(first[r][gate], second[r][gate]);
  }

  template <int rows, int gates>
  FASTLSTM_INLINE void copy(const V (&from)[rows][gates], V (&to)[rows][gates]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int gate = 0; gate < gates; ++gate) to[r][gate] = from[r][gate];
  }

  // Merging leaves each unit in the lane of its index's bits in reverse order.
  FASTLSTM_INLINE V in_order(V lanes_of_units) {
    typename Vector<T>::mask index{};
    for (int k = 0; k < L; ++k)
      for (int bit = 0; bit < levels; ++bit) index[k] |= (k >> bit & 1) << (levels - 1 - bit);
#if defined(__clang__)
    V out{};
    for (int k = 0; k < L; ++k) out[k] = lanes_of_units[index[k]];
    return out;
#else
    return __builtin_shuffle(lanes_of_units, index);
#endif
  }
};

}  // namespace
}  // namespace fastlstm
