// The products of a walk by the matrix unit of AMX processors: Tiles for float state. AheadTiles
// leave a forward pass's walk to vectors, and only its input part to the unit.
//
// The unit multiplies bfloat16 and adds in float. A float is the sum of three bfloat16, each the
// nearest to what the ones before it leave: 24 bits in all, as many as it has. So a product of
// floats is six products of these *terms*; the three left out are below 2^-26 of it, less than
// half of what rounding the product itself to float may cost. Storage types need fewer: bfloat16
// is one term, and float16 two.
//
// Infinities have no terms (inf - inf), and where a product overflows, its lower terms may do so
// the other way round. What writes Elements reports values too large for that to be excluded, and
// the caller starts again with vectors. NaNs do have terms. The unit takes subnormals for zeros, so
// results below about 1e-32 lose digits.
#pragma once

#include <algorithm>

#include "../layer.h"
#include "operand.h"
#include "scratch.h"
#include "split.h"
#include "transpose.h"
#include "vector_tiles.h"

namespace fastlstm {
namespace {

template <class S>
constexpr int terms_of = 3;
template <>
constexpr int terms_of<bf16> = 1;
template <>
constexpr int terms_of<fp16> = 2;

FASTLSTM_INLINE Vector<float>::bits widened(HalfVec half) {
  return bit_cast<Vector<float>::bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
}

// Which values are 2^55 or more, infinities included and NaNs not: a sum of 2^17 products of
// smaller ones does not overflow.
FASTLSTM_INLINE unsigned too_large(Vec<float> values) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(bit_cast<__m512>(values)), _mm512_set1_ps(0x1p55f),
                            _CMP_GE_OQ);
}

// The nearest bfloat16 of each value, as floats and packed.
struct Nearest {
  Vec<float> value;
  HalfVec bits;

  explicit Nearest(Vec<float> v)
      : bits(bit_cast<HalfVec>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)))) {
    value = bit_cast<Vec<float>>(widened(bits) << 16);
  }
};

// One term after the other of two vectors, which lie side by side in a block (`second` after
// `first`) or belong to a pair of rows of K (value by value).
template <bool pair>
struct Terms {
  Vec<float> first, second;

  unsigned beyond() const { return too_large(first) | too_large(second); }

  // The next term of both: 32 bfloat16 as the unit wants them.
  Vec<float> next() {
    typedef Vector<float>::bits Bits;
    __m512i term =
        bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
    Bits low, high;
    if (pair) {
      term = _mm512_permutexvar_epi16(interleaving(), term);
      low = bit_cast<Bits>(term) << 16;
      high = bit_cast<Bits>(term) & 0xffff0000;
    } else {
      low = widened(bit_cast<HalfVec>(_mm512_castsi512_si256(term))) << 16;
      high = widened(bit_cast<HalfVec>(_mm512_extracti64x4_epi64(term, 1))) << 16;
    }
    const __m512 a = bit_cast<__m512>(low), b = bit_cast<__m512>(high);
    first -= bit_cast<Vec<float>>(a);
    second -= bit_cast<Vec<float>>(b);
    return bit_cast<Vec<float>>(term);
  }

 private:
  // 0 16 1 17 2 18 ...
  static __m512i interleaving() {
    typedef uint16_t Indices __attribute__((vector_size(64)));
    Indices indices{};
    for (int k = 0; k < 32; ++k) indices[k] = uint16_t(k / 2 + k % 2 * 16);
    return bit_cast<__m512i>(indices);
  }
};

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
#pragma GCC unroll 3
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

template <class Storage, int left_terms>
struct AmxTiles {
  using S = Storage;
  using T = float;
  using Element = bf16;
  using Inputs = AmxTiles;
  static constexpr int64_t L = lanes<float>, width = panel_width<float>;
  static constexpr int64_t max_rows = 32, block_columns = 32;
  // With fewer rows a step the unit waits for weights of three terms (amx.cpp's backward_rule).
  static constexpr int64_t own_sequences = terms_of<S> == 3 ? 16 : sequences_per_thread;
  static constexpr int terms = left_terms, weight_terms = terms_of<S>;
  static constexpr int64_t register_size = AmxProduct<1, 1>::register_size;

  // panel[block of 32 k][half][term][pair of k][lane][k of the pair]
  static int64_t panel_size(int64_t k) {
    return blocks_of(k, block_columns) * panel_vectors * weight_terms * register_size;
  }
  static int64_t weight_bytes(int64_t weights) {
    return weights * weight_terms * int64_t(sizeof(Element));
  }

  static unsigned put(bf16* place, int64_t term_stride, Vec<float> values) {
    const unsigned beyond = too_large(values);
    for (int term = 0; term < terms; ++term) {
      const Nearest nearest(values);
      std::memcpy(place + term * term_stride, &nearest.bits, sizeof nearest.bits);
      values -= nearest.value;
    }
    return beyond;
  }

  static unsigned pack_transposed(const S* w, int64_t ld, int64_t k_size, int64_t count, int half,
                                  bf16* panel) {
    unsigned beyond = 0;
    panel += half * weight_terms * register_size;
    for (int64_t k = 0; k < k_size; k += 32, panel += 2 * weight_terms * register_size) {
      Vec<float> square[weight_terms][L];  // (term, lane) of pairs of k
      for (int lane = 0; lane < L; ++lane) {
        Vec<float> low{}, high{};
        if (lane < count) {
          low = load_up_to(w + lane * ld + k, k_size - k);
          high = load_up_to(w + lane * ld + k + L, k_size - k - L);
        }
        Terms<false> terms{low, high};
        beyond |= terms.beyond();
        for (int term = 0; term < weight_terms; ++term) square[term][lane] = terms.next();
      }
      for (int term = 0; term < weight_terms; ++term) {
        transpose<float>(square[term]);
        std::memcpy(panel + term * register_size, square[term], sizeof square[term]);
      }
    }
    return beyond;
  }

  static unsigned pack_rows(const S* w, int64_t ld, int64_t k_size, int64_t count, bf16* panel) {
    unsigned beyond = 0;
    for (int64_t k = 0; k < blocks_of(k_size, 32) * 32; k += 2)
      beyond |= pack_some_rows(w + k * ld, ld, k_size - k, count, panel + row_offset(k));
    return beyond;
  }

  static constexpr int64_t rows_together = 2;
  static int64_t row_offset(int64_t k) { return panel_size(k / 32 * 32) + k % 32 / 2 * 32; }
  static unsigned pack_some_rows(const S* row, int64_t ld, int64_t k_size, int64_t count,
                                 bf16* panel) {
    unsigned beyond = 0;
    for (int64_t column = 0; column < width; column += L, panel += weight_terms * register_size) {
      Vec<float> even{}, odd{};
      if (k_size > 1 && count - column >= L) {
        even = load(row + column);
        odd = load(row + ld + column);
      } else {
        if (k_size > 0) even = load_up_to(row + column, count - column);
        if (k_size > 1) odd = load_up_to(row + ld + column, count - column);
      }
      Terms<true> terms{even, odd};
      beyond |= terms.beyond();
      for (int term = 0; term < weight_terms; ++term) {
        const Vec<float> both = terms.next();
        std::memcpy(panel + term * register_size, &both, sizeof both);
      }
    }
    return beyond;
  }

  static void pack_block_row(bf16* place, int64_t height, const S* from, int64_t count) {
    Terms<false> values =
        count >= 2 * L ? Terms<false>{load(from), load(from + L)}
                       : Terms<false>{load_up_to(from, count), load_up_to(from + L, count - L)};
    for (int term = 0; term < terms; ++term, place += height * 32)
      store(reinterpret_cast<float*>(place), values.next());
  }

  static void pack_block_columns(bf16* place, int64_t height, const S* from, int64_t ld,
                                 int64_t count, int64_t depth) {
    Vec<float> square[terms][L];  // (term, pair of k) of rows, then (term, row) of pairs
    for (int64_t pair = 0; pair < L; ++pair) {
      Vec<float> even{}, odd{};
      if (2 * pair < depth) even = load_up_to(from + 2 * pair * ld, count);
      if (2 * pair + 1 < depth) odd = load_up_to(from + (2 * pair + 1) * ld, count);
      Terms<true> values{even, odd};
      for (int term = 0; term < terms; ++term) square[term][pair] = values.next();
    }
    for (int term = 0; term < terms; ++term) {
      transpose<float>(square[term]);
      for (int64_t r = 0; r < L && r < count; ++r)
        std::memcpy(place + (term * height + r) * 32, &square[term][r], 64);
    }
  }

  static int64_t blocks(const Segments& segments) {
    int64_t count = 0;
    for (int64_t s = 0; s < segments.count; ++s)
      count += blocks_of(segments.size[s], block_columns);
    return count;
  }

  // Two products of 32 rows keep the unit busy for 64 cycles, in which the rest of the core waits
  // (the unit's registers can't be loaded far ahead) or does what is to be done `meanwhile`: at
  // each pause a piece of some 60 instructions is free, a larger one is not.
  static int64_t pauses(const Segments& segments) {
    return blocks(segments) * AmxProduct<terms, weight_terms>::pauses();
  }

  // With few rows the unit waits for its own loads, and there is nothing to gain.
  static constexpr bool overlaps(int64_t rows) { return rows > 8; }

  template <class Other = Idle>
  static void multiply(const bf16* tile, int64_t height, int64_t rows, const bf16* panel,
                       const Segments& segments, bool, float* c, int64_t ldc, const Wanted*,
                       bool add = false, Other&& meanwhile = {}) {
    const int64_t blocks = AmxTiles::blocks(segments);
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
      Product::template run<true>(tile, height, upper, panel, blocks, meanwhile);
      _tile_stored(2, below, stride);
      _tile_stored(3, below + L, stride);
    } else {
      Product::template run<false>(tile, height, upper, panel, blocks, meanwhile);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + L, stride);
  }

  // Where a thread's weights would not stay in its L2 cache.
  static bool ahead(const Shape& n, int64_t, int threads) {
    return n.I >= 128 &&
           weight_bytes(4 * n.H * (n.I + n.P) * n.D) / threads > l2_cache_bytes() / 4 * 3;
  }
  // The rows of a chunk stay in the L2 cache while all panels pass by.
  static int64_t ahead_rows(int64_t inputs) {
    const int64_t row =
        blocks_of(std::max<int64_t>(inputs, 1), block_columns) * terms * block_columns * 2;
    return std::clamp<int64_t>(l2_cache_bytes() / 8 * 3 / row, max_rows, 256);
  }

  static constexpr bool adds = true, asks = false, has_pauses = true;

  // Panels are asked for wherever they come from.
  static bool worth_prefetching(int64_t, int64_t) { return false; }

  struct Session {
    ~Session() { TileShape::release(); }
  };

  // Up to L values from p on, zeros for the others.
  static Vec<float> load_up_to(const S* p, int64_t count) {
    return count > 0 ? load_some(p, count < L ? int(count) : int(L)) : Vec<float>{};
  }
};

// Vectors walk, and the unit multiplies the inputs of a chunk of steps: for steps of few rows.
template <class Unit>
struct AheadTiles : VectorTiles<typename Unit::S> {
  using Inputs = Unit;
  static bool ahead(const Shape&, int64_t, int) { return true; }
};

}  // namespace
}  // namespace fastlstm
