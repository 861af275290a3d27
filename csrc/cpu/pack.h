// Copies into the layouts that tile.h multiplies: weights into panels, activations into blocks.
#pragma once

#include "tile.h"

namespace fastlstm {
namespace {

// From so many weights on, a thread's share does not stay in its L2 cache from step to step.
template <class T>
constexpr int64_t cached_weights = (int64_t(1) << 20) / int64_t(sizeof(T));

// One vector's column of a panel: panel[k][lane] = w[lane][k] for the first `count` lanes, zero
// for the others, which belong to no unit. w is row-major with row stride ld.
template <class S, class T>
void pack_transposed(const S* w, int64_t ld, int64_t k_size, int64_t count, T* panel) {
  for (int64_t k = 0; k < k_size; ++k, panel += panel_width<T>)
    for (int lane = 0; lane < lanes<T>; ++lane)
      panel[lane] = lane < count ? T(as_state(w[lane * ld + k])) : T(0);
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
