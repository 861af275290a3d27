// The products of a walk by vectors of T: the Tiles of every instruction set (see operand.h).
#pragma once

#include <type_traits>

#include "../layer.h"
#include "processor.h"
#include "row_products.h"
#include "split.h"
#include "tile.h"
#include "transpose.h"
#include "vector_policy.h"

namespace fastlstm {
namespace {

template <class Storage>
struct VectorTiles : VectorPolicy<typename StateOf<Storage>::type> {
  using S = Storage;
  using T = typename StateOf<S>::type;
  using Element = T;
  using Inputs = VectorTiles;
  using Rows = RowVectors<S>;
  static constexpr int64_t L = lanes<T>, width = panel_width<T>;
  static constexpr int64_t max_rows = max_tile_rows, block_columns = L;
  static constexpr int64_t own_sequences = sequences_per_thread;
  static constexpr int terms = 1;
  // Where some things are done that were measured with AVX2 alone; see docs/performance.md.
  static constexpr bool short_vectors = FASTLSTM_VECTOR_REGISTERS == 16;

  // panel[k][column]
  static int64_t panel_size(int64_t k) { return k * width; }
  static int64_t weight_bytes(int64_t weights) { return weights * int64_t(sizeof(T)); }

  static unsigned put(T* place, int64_t, Vec<T> values, int) {
    store(place, values);
    return 0;
  }

  // Half of a panel: panel[k][lane] = w[lane][k] for the first `count` lanes, zero for the others,
  // which belong to no unit. w is row-major with row stride ld.
  static unsigned pack_transposed(const S* w, int64_t ld, int64_t k_size, int64_t count, int half,
                                  T* panel) {
    panel += half * L;
    constexpr int64_t per_line = 64 / int64_t(sizeof(S));
    for (int64_t k = 0; k < k_size; k += L) {
      const int some = int(k_size - k < L ? k_size - k : L);
      // The rows of the next units, since a processor does not follow so many rows by itself.
      if (short_vectors && k % per_line == 0)
        for (int64_t lane = 0; lane < count; ++lane) __builtin_prefetch(w + (lane + L) * ld + k);
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane)
        square[lane] = lane < count ? load_some(w + lane * ld + k, some) : Vec<T>{};
      transpose<T>(square);
      for (int j = 0; j < some; ++j, panel += width) store(panel, square[j]);
    }
    return 0;
  }

  // panel[k][lane] = w[k][lane] for the first `count` lanes of a row-major w, zero for the others.
  static unsigned pack_rows(const S* w, int64_t ld, int64_t k_size, int64_t count, T* panel) {
    for (int64_t k = 0; k < k_size; ++k, w += ld, panel += width)
      for (int64_t column = 0; column < width; column += L)
        store(panel + column,
              count > column ? load_some(w + column, int(count - column)) : Vec<T>{});
    return 0;
  }

  static constexpr int64_t rows_together = 1;
  static int64_t row_offset(int64_t k) { return panel_size(k); }
  static void pack_some_rows(const S* row, int64_t ld, int64_t k_size, int64_t count, T* panel) {
    if (k_size > 0) pack_rows(row, ld, 1, count, panel);
  }

  static void pack_block_row(T* place, int64_t, const S* from, int64_t count) {
    store(place, load_some(from, count < L ? int(count) : int(L)));
  }

  static void pack_block_columns(T* place, int64_t, const S* from, int64_t ld, int64_t count,
                                 int64_t depth) {
    const int some = count < L ? int(count) : int(L);
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int64_t k = 0; k < L; ++k)
      square[k] = k < depth ? load_some(from + k * ld, some) : Vec<T>{};
    transpose<T>(square);
    for (int64_t r = 0; r < some; ++r) store(place + r * L, square[r]);
  }

  // C (rows, ldc) = or += the first rows of a tile of that height, times a panel.
  template <class Other = Idle>
  static void multiply(const T* tile, int64_t height, int64_t rows, const Panel<T>& panel,
                       const Segments& segments, Advance advance, T* c, int64_t ldc,
                       const Wanted* wanted, bool add = false, Other&& = {}) {
    const auto multiply_tile = panel.columns > L ? tile_function<T, panel_vectors>(rows, advance)
                                                 : tile_function<T, 1>(rows, advance);
    multiply_tile(tile, height, {panel.first, 0}, segments, {c, ldc, 0}, wanted, add);
  }

  static constexpr int64_t pair_rows = max_pair_rows;
  // Intel's processors load 1.3 vectors of 64 bytes a cycle, where a tile of 8 rows times one panel
  // would need 1.25, of 6 rows times two 0.8. More tiles read their panels more often, so a single
  // one is not cut, and two panels have to stay in the L2 cache.
  static int64_t walk_rows(int64_t rows, int64_t panel_size) {
    const bool pairs = !short_vectors && is_intel() && rows > max_rows &&
                       2 * panel_size * int64_t(sizeof(T)) <= l2_cache_bytes() / 2;
    return pairs ? pair_rows : max_rows;
  }
  static void multiply_pair(const T* tile, int64_t height, int64_t rows, const Panels<T>& panels,
                            const Segments& segments, Advance advance, const Target<T>& c,
                            const Wanted* wanted) {
    tile_function<T, 2 * panel_vectors>(rows, advance)(tile, height, panels, segments, c, wanted,
                                                       false);
  }

  static constexpr bool gate_by_gate = short_vectors, asks = true;
  static constexpr bool in_place = std::is_same<S, T>::value;
};

}  // namespace
}  // namespace fastlstm
