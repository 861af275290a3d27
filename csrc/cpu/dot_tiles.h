// The products of a walk in bfloat16, and those of eq. 9, by AVX-512's dot products: Tiles that
// take two columns of K an instruction, so twice as many multiply-adds as vectors of floats, and
// half of the bytes. All that is multiplied is one term (term_tiles.h).
//
// The instruction takes subnormals for zeros, as the matrix unit does.
#pragma once

#include <cstring>
#include <utility>

#include "row_products.h"
#include "split.h"
#include "term_tiles.h"
#include "tile.h"
#include "vector_policy.h"

namespace fastlstm {
namespace {

// Products of unpacked rows, see row_products.h: 32 neighbours at once.
struct DotRows {
  using S = bf16;
  using T = float;
  using V = Vec<T>;  // of 32 bfloat16, or of sums
  static constexpr int together = 32;
  static constexpr int64_t unpacked_per_cache = 32, most_unpacked = 128;
  FASTLSTM_INLINE V read(const bf16* from, int count) {
#if defined(__SANITIZE_ADDRESS__)  // which does not see what masks leave out
    bf16 some[32] = {};
    std::memcpy(some, from, size_t(count) * sizeof(bf16));
    return bit_cast<V>(_mm512_loadu_si512(some));
#else
    const auto mask = uint32_t((uint64_t(1) << count) - 1);
    return bit_cast<V>(_mm512_maskz_loadu_epi16(mask, from));
#endif
  }
  FASTLSTM_INLINE void multiply(V& sum, V values, V weights) {
    sum = bit_cast<V>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(values),
                                       bit_cast<__m512bh>(weights)));
  }
};

template <class Storage>
struct DotTiles : TermTiles<Storage, 1, 1>, VectorPolicy<bf16> {
  using Layout = TermTiles<Storage, 1, 1>;
  using Layout::block_columns;
  using Layout::L;
  using Layout::register_size;
  using Inputs = DotTiles;
  using Rows = DotRows;
  static constexpr int64_t own_sequences = sequences_per_thread;
  // Two accumulators per row, two vectors of weights and one value of h must fit in the registers.
  static constexpr int64_t max_rows = 14;

  // C (rows, 16 * vectors) = or += a tile times a panel or the first half of one. A segment's last
  // block is multiplied as far as it is filled. A tile of few rows has too few accumulators to fill
  // the pipelines: it keeps `split` partial sums.
  template <int rows, int vectors, int split, bool in_advance>
  static void multiply_rows(const bf16* a, int64_t height, const bf16* b, const Segments& segments,
                            float* c, int64_t ldc, const Wanted* wanted, bool add) {
    constexpr int64_t ahead = 4 * 2 * register_size;  // how far a panel is asked for in advance
    constexpr int unrolled = 4;
    const char* const* pair_of_lines = wanted ? wanted->pairs : nullptr;
    const char* const* const end = wanted ? pair_of_lines + wanted->count : nullptr;
    __m512 sum[split][rows][vectors];
    for (auto& part : sum)
      for (auto& row : part)
        for (__m512& value : row) value = _mm512_setzero_ps();
    for (int64_t s = 0; s < segments.count; ++s)
      for (int64_t left = segments.size[s]; left > 0; left -= block_columns) {
        const int pairs = left < block_columns ? int(left + 1) / 2 : block_columns / 2;
#pragma GCC unroll 1  // see unrolled_columns (tile.h)
        for (int pair = 0; pair < pairs; pair += unrolled) {
          for (int p = 0; p < 2 && pair_of_lines < end; ++p) ask_for(*pair_of_lines++);
#pragma GCC unroll 8
          for (int u = 0; u < unrolled; ++u) {
            const bf16* const at = b + 32 * (pair + u);
            if (in_advance) {
              for (int v = 0; v < vectors; ++v)
                __builtin_prefetch(at + ahead + v * register_size, 0, 2);
            }
            __m512bh weights[vectors];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) weights[v] = load_pairs<rows>(at + v * register_size);
#pragma GCC unroll 14
            for (int r = 0; r < rows; ++r) {
              const __m512bh value = spread(a + r * block_columns + 2 * (pair + u));
              __m512* const sums = sum[u % split][r];
#pragma GCC unroll 2
              for (int v = 0; v < vectors; ++v)
                sums[v] = _mm512_dpbf16_ps(sums[v], value, weights[v]);
            }
          }
        }
        a += height * block_columns;
        b += 2 * register_size;
      }
#pragma GCC unroll 14
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
        for (int part = 1; part < split; ++part)
          sum[0][r][v] = _mm512_add_ps(sum[0][r][v], sum[part][r][v]);
        float* const place = c + r * ldc + v * L;
        if (add) sum[0][r][v] = _mm512_add_ps(_mm512_loadu_ps(place), sum[0][r][v]);
        _mm512_storeu_ps(place, sum[0][r][v]);
      }
  }

  template <class Other = Idle>
  static void multiply(const bf16* tile, int64_t height, int64_t rows, const Panel<bf16>& panel,
                       const Segments& segments, Advance advance, float* c, int64_t ldc,
                       const Wanted* wanted, bool add = false, Other&& = {}) {
    constexpr std::make_integer_sequence<int, max_rows> all{};
    const bool in_advance = advance != Advance::none;
    auto multiply_tile =
        in_advance ? tile_function<2, true>(rows, all) : tile_function<2, false>(rows, all);
    if (panel.columns <= L)
      multiply_tile =
          in_advance ? tile_function<1, true>(rows, all) : tile_function<1, false>(rows, all);
    multiply_tile(tile, height, panel.first, segments, c, ldc, wanted, add);
  }

  static constexpr int64_t pair_rows = 0;
  static int64_t walk_rows(int64_t, int64_t) { return max_rows; }
  static constexpr bool in_place = false;
  static constexpr bool gate_by_gate = false, asks = true;

 private:
  template <int rows>
  static __m512bh load_pairs(const bf16* from) {
    return bit_cast<__m512bh>(in_register<rows>(_mm512_loadu_si512(from)));
  }
  // A pair of columns, for every lane.
  static __m512bh spread(const bf16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return bit_cast<__m512bh>(_mm512_set1_epi32(pair));
  }

  // A dot product takes five or six cycles, and some processors begin two in each. (A single row
  // waits for the panel.)
  static constexpr int split_of(int rows, int vectors) {
    return rows <= 3 ? 4 : rows <= 7 || vectors == 1 ? 2 : 1;
  }

  template <int vectors, bool in_advance, int... less>
  static auto tile_function(int64_t rows, std::integer_sequence<int, less...>) {
    static constexpr decltype(&multiply_rows<1, 1, 1, in_advance>) table[] = {
        multiply_rows<less + 1, vectors, split_of(less + 1, vectors), in_advance>...};
    return table[rows - 1];
  }
};

}  // namespace
}  // namespace fastlstm
