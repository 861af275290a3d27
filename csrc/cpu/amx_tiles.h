// The products of a walk by the matrix unit of AMX processors: Tiles for float state. AheadTiles
// leave a forward pass's walk to vectors, and only its input part to the unit.
//
// The unit multiplies the terms of term_tiles.h. A product of floats, which have three, is six
// products of terms; the three left out are below 2^-26 of it, less than half of what rounding the
// product itself to float may cost. Where a product overflows, its lower terms may do so the other
// way round: that too is why values too large for several terms are reported. The unit takes
// subnormals for zeros, so results below about 1e-32 lose digits.
#pragma once

#include <algorithm>

#include "processor.h"
#include "scratch.h"
#include "split.h"
#include "term_tiles.h"
#include "vector_tiles.h"

namespace fastlstm {
namespace {

// The shape of the unit's registers, which belongs to the thread that set it: accumulators and
// left operands of `upper` rows (registers 0, 1, 4) and of `lower` rows (2, 3, 5).
class TileShape {
 public:
  static void set(int64_t upper, int64_t lower) {
    const int64_t shape = upper << 8 | lower;
    if (shape == current_) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int k = 0; k < 8; ++k) {  // see AmxProduct::run
      const bool above = k < 2 || k == 4, below = k == 2 || k == 3 || k == 5;
      config.row_bytes[k] = 64;
      config.rows[k] = uint8_t(above ? upper : below ? (lower > 0 ? lower : upper) : 16);
    }
    asm volatile("" : : "r"(&config) : "memory");  // gcc takes the next line to read 8 bytes
    _tile_loadconfig(&config);
    current_ = shape;
  }
  static void release() {
    _tile_release();
    current_ = 0;
  }

 private:
  static thread_local int64_t current_;
};
thread_local int64_t TileShape::current_ = 0;

// C (upper + lower rows, 32) = or += A B over `blocks` blocks of 32 rows of K: A is blocked with
// `left` terms, B a panel with `right` terms, see AmxTiles. The largest product is added last.
template <int left, int right>
struct AmxProduct {
  static constexpr int64_t register_size = 512;  // Elements: 16 rows of 64 bytes

  // The terms of A that meet term j of B.
  static constexpr int met(int j) { return left < 3 - j ? left : 3 - j; }
  static constexpr int pauses() {  // of a block: times that `meanwhile` is called
    int count = 0;
    for (int j = 0; j < right; ++j) count += met(j);
    return count;
  }
  // The n-th of them: the first is the one that the term of B before was multiplied by last, so
  // that one product and the next have a term in common, which is loaded once.
  static constexpr int meets(int j, int n) { return j == 0 ? (n + 1) % met(0) : n; }

  // `two`: are there lower rows? Registers: 0 to 3 are C, 6 and 7 a term of B; 4 and 5 the upper
  // and lower rows of a term of A, or without lower rows its first term and another.
  template <bool two, class Other>
  static void run(const bf16* a, int64_t height, int64_t upper, const bf16* b, int64_t blocks,
                  Other& meanwhile) {
    const int64_t term_stride = height * 32, lower_offset = upper * 32;
    for (; blocks > 0; --blocks, a += left * term_stride, b += block_size) {
      const bf16* next = b + block_size;
      int loaded = -1;  // term of A
#pragma GCC unroll 3
      for (int j = right - 1; j >= 0; --j) {
        for (int n = 0; n < met(j); ++n) {
          const int i = meets(j, n);
          const bf16* const rows = a + i * term_stride;
          // What is new of A and of B. (The first term is met first of all, and then kept.)
          const bool of_a = two || i > 0 ? i != loaded : j == right - 1, of_b = n == 0;
          if (two || i > 0) loaded = i;
          if (of_b) _tile_loadd(6, b + j * register_size, 64);
          if (two || i == 0) {
            if (of_a) _tile_loadd(4, rows, 64);
            _tile_dpbf16ps(0, 4, 6);
          } else {
            if (of_a) _tile_loadd(5, rows, 64);
            _tile_dpbf16ps(0, 5, 6);
          }
          ask(next);
          if (two) {
            if (of_a) _tile_loadd(5, rows + lower_offset, 64);
            _tile_dpbf16ps(2, 5, 6);
            ask(next);
          }
          if (of_b) _tile_loadd(7, b + (right + j) * register_size, 64);
          if (two || i == 0)
            _tile_dpbf16ps(1, 4, 7);
          else
            _tile_dpbf16ps(1, 5, 7);
          ask(next);
          if (two) {
            _tile_dpbf16ps(3, 5, 7);
            ask(next);
          }
          meanwhile();
        }
      }
    }
  }

 private:
  static constexpr int64_t block_size = 2 * right * register_size;  // of a panel

  // The unit's loads wait for each other, so the first half of the panel's next block is asked for,
  // two lines after each product: more would keep those loads waiting, and the processor brings
  // the second half by itself.
  static void ask(const bf16*& next) {
    for (int line = 0; line < 2; ++line, next += 32) __builtin_prefetch(next);
  }
};

template <class Storage, int left_terms, int right_terms = terms_of<Storage>>
struct AmxTiles : TermTiles<Storage, left_terms, right_terms> {
  using Layout = TermTiles<Storage, left_terms, right_terms>;
  using Layout::block_columns;
  using Layout::blocks;
  using Layout::L;
  using Layout::terms;
  using Layout::weight_bytes;
  using Layout::weight_terms;
  using typename Layout::S;
  using Inputs = AmxTiles;
  static constexpr int64_t max_rows = 32;
  // With fewer rows a step the unit waits for weights of three terms (amx.cpp's backward_rule).
  static constexpr int64_t own_sequences = terms_of<S> == 3 ? 16 : sequences_per_thread;

  // Two products of 32 rows keep the unit busy for 64 cycles, in which the rest of the core waits
  // (the unit's registers can't be loaded far ahead) or does what is to be done `meanwhile`: at
  // each pause a piece of some 60 instructions is free. (One of 200, a backward cell, is not, but
  // costs no more than in four pieces, which hand each other its state through memory.)
  static int64_t pauses(const Segments& segments) {
    return blocks(segments) * AmxProduct<terms, weight_terms>::pauses();
  }

  // With few rows the unit waits for its own loads, and there is nothing to gain.
  static constexpr bool overlaps(int64_t rows) { return rows > 8; }
  static constexpr int64_t few_rows = 0;

  template <class Other = Idle>
  static void multiply(const bf16* tile, int64_t height, int64_t rows, const Panel<bf16>& panel,
                       const Segments& segments, Advance, float* c, int64_t ldc, const Wanted*,
                       bool add = false, Other&& meanwhile = {}) {
    const int64_t blocks = Layout::blocks(segments);
    const int64_t upper = rows > 16 ? (rows + 1) / 2 : rows, lower = rows - upper;
    const int64_t stride = ldc * int64_t(sizeof(float));
    float* below = c + upper * ldc;
    using Product = AmxProduct<terms, weight_terms>;
    TileShape::set(upper, lower);
    asm volatile("" ::: "memory");  // what was stored is read below, by asm that does not say so
    if (add) {
      _tile_loadd(0, c, stride);
      _tile_loadd(1, c + L, stride);
      if (lower > 0) {
        _tile_loadd(2, below, stride);
        _tile_loadd(3, below + L, stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    if (lower > 0) {
      Product::template run<true>(tile, height, upper, panel.first, blocks, meanwhile);
      _tile_stored(2, below, stride);
      _tile_stored(3, below + L, stride);
    } else {
      Product::template run<false>(tile, height, upper, panel.first, blocks, meanwhile);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + L, stride);
  }

  static constexpr int64_t pair_rows = 0;
  static int64_t walk_rows(int64_t, int64_t) { return max_rows; }
  static constexpr bool in_place = false;

  // Where a thread's weights would not stay in its L2 cache.
  static bool ahead(const Shape& n, int64_t, int threads) {
    return n.I >= 128 &&
           weight_bytes(4 * n.H * (n.I + n.P) * n.D) / threads > l2_cache_bytes() / 4 * 3;
  }
  // The rows of a chunk stay in the L2 cache while all panels pass by.
  static int64_t ahead_rows(int64_t inputs, int64_t) {
    const int64_t row =
        blocks_of(std::max<int64_t>(inputs, 1), block_columns) * terms * block_columns * 2;
    return std::clamp<int64_t>(l2_cache_bytes() / 8 * 3 / row, max_rows, 256);
  }

  static constexpr bool gate_by_gate = true, asks = false, has_pauses = true;

  // Panels are asked for wherever they come from.
  static Advance advance(int64_t, int64_t) { return Advance::none; }

  struct Session {
    ~Session() { TileShape::release(); }
  };
};

// Vectors walk, and the unit multiplies the inputs of a chunk of steps: for steps of few rows.
template <class Unit>
struct AheadTiles : VectorTiles<typename Unit::S> {
  using Inputs = Unit;
  static bool ahead(const Shape&, int64_t, int) { return true; }
};

}  // namespace
}  // namespace fastlstm
