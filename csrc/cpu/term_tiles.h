// The layout of operands made of bfloat16 *terms*, which the matrix unit (amx_tiles.h) and the dot
// products of vectors (dot_tiles.h) multiply: both take pairs of neighbours in K, and add in float.
//
// A float is the sum of three bfloat16, each the nearest to what the ones before it leave: 24 bits
// in all, as many as it has. Storage types need fewer: bfloat16 is one term, and float16 two.
//
// Infinities have no second term (inf - inf), so what writes Elements of a walk in several terms
// reports values too large, for the caller to start again with vectors of floats. NaNs do have
// terms.
#pragma once

#include <cstring>

#include "../layer.h"
#include "operand.h"
#include "transpose.h"

namespace fastlstm {
namespace {

template <class S>
constexpr int terms_of = 3;
template <>
constexpr int terms_of<bf16> = 1;
template <>
constexpr int terms_of<fp16> = 2;

// Of the states that a backward pass multiplies, the gradients of pre-activations and of h: in
// bfloat16 they are rounded to storage first.
template <class S>
constexpr int gradient_terms = terms_of<float>;
template <>
constexpr int gradient_terms<bf16> = 1;

FASTLSTM_INLINE Vector<float>::bits widened(HalfVec half) {
  return bit_cast<Vector<float>::bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
}

// Which values of several terms are 2^55 or more, infinities included and NaNs not: a sum of 2^17
// products of smaller ones does not overflow.
template <int terms>
FASTLSTM_INLINE unsigned too_large(Vec<float> values) {
  if (terms == 1) return 0;
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

  template <int terms>
  unsigned beyond() const {
    return too_large<terms>(first) | too_large<terms>(second);
  }

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

// The part of Tiles (operand.h) that says where Elements are: blocks of 32 columns, a row's 64
// bytes.
template <class Storage, int left_terms, int right_terms>
struct TermTiles {
  using S = Storage;
  using T = float;
  using Element = bf16;
  static constexpr int64_t L = lanes<float>, width = panel_width<float>;
  static constexpr int64_t block_columns = 32;
  static constexpr int terms = left_terms, weight_terms = right_terms;
  static constexpr int64_t register_size = 512;  // Elements: 16 pairs of k for 16 lanes

  // panel[block of 32 k][half][term][pair of k][lane][k of the pair]
  static int64_t panel_size(int64_t k) {
    return blocks_of(k, block_columns) * panel_vectors * weight_terms * register_size;
  }
  static int64_t weight_bytes(int64_t weights) {
    return weights * weight_terms * int64_t(sizeof(Element));
  }

  // What belongs to no column is multiplied by zeros, as part of a block: it must not be infinite.
  static unsigned put(bf16* place, int64_t term_stride, Vec<float> values, int count) {
    values = bit_cast<Vec<float>>(
        _mm512_maskz_mov_ps(uint16_t((1u << count) - 1), bit_cast<__m512>(values)));
    const unsigned beyond = too_large<terms>(values);
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
        beyond |= terms.template beyond<weight_terms>();
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
      beyond |= terms.template beyond<weight_terms>();
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

  // A block of a tile from one of a panel of as many terms: a half of it and one term, transposed.
  static void transpose_block(const bf16* panel, int64_t part, bf16* place, int64_t height,
                              int64_t rows) {
    static_assert(terms == weight_terms, "a panel of the same terms");
    const int64_t first = part / terms * L, term = part % terms;
    Vec<float> square[L];
    for (int64_t k = 0; k < L; ++k)
      square[k] = load(reinterpret_cast<const float*>(panel + part * register_size) + k * L);
    transpose<float>(square);
    for (int64_t r = 0; r < L && first + r < rows; ++r)
      store(reinterpret_cast<float*>(place + (term * height + first + r) * block_columns),
            square[r]);
  }

  static int64_t blocks(const Segments& segments) {
    int64_t count = 0;
    for (int64_t s = 0; s < segments.count; ++s)
      count += blocks_of(segments.size[s], block_columns);
    return count;
  }

  // Up to L values from p on, zeros for the others.
  static Vec<float> load_up_to(const S* p, int64_t count) {
    return count > 0 ? load_some(p, count < L ? int(count) : int(L)) : Vec<float>{};
  }
};

}  // namespace
}  // namespace fastlstm
