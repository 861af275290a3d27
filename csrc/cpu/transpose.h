// A square of values transposed in registers, for packing weights.
#pragma once

#include "vec.h"

namespace fastlstm {
namespace {

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

}  // namespace
}  // namespace fastlstm
