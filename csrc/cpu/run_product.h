// How the products of (eq. 9) are divided among threads, which share the rows of C, or its columns.
#pragma once

#include <algorithm>

#include "product.h"
#include "split.h"

namespace fastlstm {
namespace {

// The product for a range of the rows of op(A), which are those of C.
inline ProductArgs some_rows(ProductArgs p, const Range& rows, int64_t state_bytes) {
  const auto after = [&](const void* from, int64_t count) {
    return static_cast<char*>(const_cast<void*>(from)) + count * state_bytes;
  };
  p.M = rows.end - rows.begin;
  p.a = after(p.a, rows.begin * (p.transposed ? 1 : p.lda));
  for (ProductPart& part : p.parts)
    if (part.N > 0) part.c = after(part.c, rows.begin * part.ldc);
  return p;
}

// With so many rows for each, threads do better with a packed B of their own, where what passes by
// leaves room in their L2 caches: they need not wait for each other at every slab. (Vectors do as
// well either way.)
template <class Part, class Tiles>
bool worth_copies(const ProductArgs& p, int threads) {
  return Tiles::has_pauses && threads > 1 && threads <= max_parts &&
         p.M >= int64_t(256) * threads && Part::slab_stays(p);
}

// A team as large as the work is worth. Everything is allocated before the threads start.
template <Form form, class LeftTiles, class RightTiles, class Tiles>
void run_product(const ProductArgs& p) {
  using Part = Product<LeftTiles, RightTiles, Tiles, form>;
  constexpr int64_t unit = form == Form::flipped ? Tiles::width : LeftTiles::max_rows;
  const int64_t work = p.M * p.columns() * p.K / (int64_t(1) << 20) + 1;
  const int threads = work < p.threads ? int(work) : p.threads;
  if (!worth_copies<Part, Tiles>(p, threads)) {
    Part product(p, threads);
    return run_team(threads, [&](const Team& team) { product.run(team); });
  }
  ProductArgs args[max_parts];
  Parts<Part> parts;
  for (int k = 0; k < threads; ++k) {
    const auto cut = [&](int64_t part) {
      return std::min(blocks_of(p.M, unit) * part / threads * unit, p.M);
    };
    args[k] = some_rows(p, {cut(k), cut(k + 1)}, sizeof(typename Tiles::T));
    parts.of[k] = new Part(args[k], 1);
  }
  run_team(threads, [&](const Team& team) {
    run_parts(team, threads, [&](int k, const Team& alone) { parts.of[k]->run(alone); });
  });
}

}  // namespace
}  // namespace fastlstm
