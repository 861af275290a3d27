// Copies into the layouts that tile.h multiplies: weights into panels, activations into blocks.
#pragma once

#include "scratch.h"
#include "tile.h"

namespace fastlstm {
namespace {

// Does a thread do well to ask in advance for the weights that it multiplies at each step? They do
// not stay in its L2 cache if they are many; with few rows the arithmetic is too short to hide it.
template <class T>
bool worth_prefetching(int64_t rows, int64_t weights) {
  return rows > 4 && weights * int64_t(sizeof(T)) > l2_cache_bytes() / 2;
}

// a[0] b[0] a[1] b[1] ... : the first half of that, or the second.
template <class T, int half>
FASTLSTM_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  typename Vector<T>::mask index{};
  for (int k = 0; k < lanes<T>; ++k) index[k] = half * lanes<T> / 2 + k / 2 + k % 2 * lanes<T>;
#if defined(__clang__)
  Vec<T> out{};
  for (int k = 0; k < lanes<T>; ++k) out[k] = k % 2 ? b[index[k] - lanes<T>] : a[index[k]];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Interleaving the two halves of a square, as often as its side can be halved, transposes it.
template <class T>
FASTLSTM_INLINE void transpose(Vec<T> (&square)[lanes<T>]) {
  for (int done = 1; done < lanes<T>; done *= 2) {
    Vec<T> next[lanes<T>];
#pragma GCC unroll 16
    for (int k = 0; k < lanes<T> / 2; ++k) {
      next[2 * k] = interleave<T, 0>(square[k], square[k + lanes<T> / 2]);
      next[2 * k + 1] = interleave<T, 1>(square[k], square[k + lanes<T> / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < lanes<T>; ++k) square[k] = next[k];
  }
}

// One vector's column of a panel: panel[k][lane] = w[lane][k] for the first `count` lanes, zero
// for the others, which belong to no unit. w is row-major with row stride ld.
template <class S, class T>
void pack_transposed(const S* w, int64_t ld, int64_t k_size, int64_t count, T* panel) {
  for (int64_t k = 0; k < k_size; k += lanes<T>) {
    const int some = int(k_size - k < lanes<T> ? k_size - k : lanes<T>);
    Vec<T> square[lanes<T>];
#pragma GCC unroll 16
    for (int lane = 0; lane < lanes<T>; ++lane)
      square[lane] = lane < count ? load_some(w + lane * ld + k, some) : Vec<T>{};
    transpose<T>(square);
    for (int j = 0; j < some; ++j, panel += panel_width<T>) store(panel, square[j]);
  }
}

// panel[k][lane] = w[k][lane] for the first `count` lanes of a row-major w, zero for the others.
template <class S, class T>
void pack_rows(const S* w, int64_t ld, int64_t k_size, int64_t count, T* panel) {
  for (int64_t k = 0; k < k_size; ++k, w += ld, panel += panel_width<T>)
    for (int64_t column = 0; column < panel_width<T>; column += lanes<T>)
      store(panel + column, count > column ? load_some(w + column, int(count - column)) : Vec<T>{});
}

// One row of a blocked matrix, from `size` consecutive values; `out` is its place in the first
// block, `stride` the distance between blocks.
template <class S, class T>
void block_row(const S* values, int64_t size, T* out, int64_t stride) {
  for (int64_t k = 0; k < size; k += lanes<T>, out += stride)
    store(out, load_some(values + k, int(size - k < lanes<T> ? size - k : lanes<T>)));
}

template <class T>
void clear_row(int64_t size, T* out, int64_t stride) {
  for (int64_t k = 0; k < size; k += lanes<T>, out += stride) store(out, Vec<T>{});
}

}  // namespace
}  // namespace fastlstm
