// What all Tiles (operand.h) that multiply by vectors decide alike: VectorTiles and DotTiles.
#pragma once

#include <algorithm>

#include "../layer.h"
#include "operand.h"
#include "processor.h"

namespace fastlstm {
namespace {

template <class Element>
struct VectorPolicy {
  // A multiplication leaves the processor nothing to wait for.
  static int64_t pauses(const Segments&) { return 0; }
  static constexpr bool overlaps(int64_t) { return false; }
  static constexpr bool has_pauses = false;

  // Up to so many rows of a step are few: their arithmetic is too little for the weights that it
  // waits for, and their cells are too few to follow each other closely. See docs/performance.md.
  static constexpr int64_t few_rows = 5;

  // Is the input part computed ahead, and for how many rows, about? With few rows, and where W_ih
  // would have to come from a slow L3 cache at every step.
  static bool ahead(const Shape& n, int64_t rows, int threads) {
    if (rows <= few_rows) return true;
    const int64_t bytes = 4 * n.H * (n.I + n.P) * n.D * int64_t(sizeof(Element));
    return is_intel() && rows <= 64 && n.I >= 64 && bytes / threads > l2_cache_bytes();
  }
  static int64_t ahead_rows(int64_t, int64_t rows) { return std::max<int64_t>(96, 4 * rows); }

  // How does a thread do well to ask for the weights that it multiplies at each step? They do not
  // stay in its L2 cache if they are many; with few rows the arithmetic is too short to hide it.
  // Processors differ, see docs/performance.md.
  static Advance advance(int64_t rows, int64_t elements) {
    if (elements * int64_t(sizeof(Element)) <= l2_cache_bytes() / 2) return Advance::none;
    if (is_intel()) return rows > 2 ? Advance::near : Advance::none;
    return rows > 4 ? Advance::far : Advance::none;
  }

  struct Session {};
};

}  // namespace
}  // namespace fastlstm
