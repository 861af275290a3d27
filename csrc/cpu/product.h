// The products of (eq. 9): C = or += op(A) B, A and C of state type, B of storage type.
//
// K is taken a slab at a time. A, which is da, has by far the most elements: each thread has a
// share of it, and packs a group of tiles or panels at a time that stays in its L2 cache. A slab
// of B is packed once, for all threads, and passes by.
//
// For A^T B, A goes into panels, which take its rows as they are, and B into tiles: B^T A is
// computed, and transposed when it is added to C.
#pragma once

#include "../layer.h"
#include "operand.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace fastlstm {
namespace {

constexpr int64_t slab_rows = 512;  // of K, a multiple of every block's columns

// LeftTiles says how what goes into tiles is packed, RightTiles how what goes into panels, and
// Tiles multiplies the two.
template <class LeftTiles, class RightTiles, class Tiles, bool transposed>
class Product {
  using Left = typename LeftTiles::S;
  using Right = typename RightTiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<LeftTiles>;
  static constexpr int64_t L = Tiles::L, width = Tiles::width, block = LeftTiles::block_columns;

 public:
  Product(const ProductArgs& args, int threads)
      : p_(args),
        rows_(transposed ? p_.N : p_.M),
        columns_(transposed ? p_.M : p_.N),
        depth_(p_.K < slab_rows ? blocks_of(p_.K, block) * block : slab_rows),
        tiles_(rows_, LeftTiles::max_rows),
        all_tiles_(tiles_.count(rows_)),
        all_panels_(blocks_of(columns_, width)),
        tile_size_(Operand{nullptr, depth_ / block, tiles_.height}.block_size() * (depth_ / block)),
        panel_size_(RightTiles::panel_size(depth_)),
        group_(group(transposed ? panel_size_ : tile_size_)),
        left_((transposed ? all_tiles_ : threads * group_) * tile_size_),
        right_((transposed ? threads * group_ : all_panels_) * panel_size_) {}

  void run(const Team& team) {
    [[maybe_unused]] const typename Tiles::Session session;
    const Range tiles = team.share(all_tiles_), panels = team.share(all_panels_);
    for (int64_t k = 0; k < p_.K; k += depth_) {
      const int64_t depth = p_.K - k < depth_ ? p_.K - k : depth_;
      if constexpr (transposed) {
        pack_tiles(left_, {0, tiles.begin, tiles.end}, k, depth);
      } else {
        pack_panels(right_, {0, panels.begin, panels.end}, k, depth);
      }
      team.barrier.wait();
      const Range mine = transposed ? panels : tiles;
      for (int64_t begin = mine.begin; begin < mine.end; begin += group_) {
        const int64_t end = begin + group_ < mine.end ? begin + group_ : mine.end;
        multiply_group({begin, begin, end}, team.rank, k, depth);
      }
      team.barrier.wait();
    }
  }

 private:
  // Tiles or panels [begin, end), in a buffer that begins with the one numbered `base`.
  struct Group {
    int64_t base, begin, end;
  };

  static int64_t group(int64_t size) {
    return l2_cache_bytes() / 2 / (size * int64_t(sizeof(Element))) + 1;
  }

  // A slab that is not full leaves the ends of its tiles and panels unused.
  void multiply_group(const Group& group, int rank, int64_t k, int64_t depth) {
    const bool add = p_.add || k > 0;
    Element* buffer =
        transposed ? right_ + rank * group_ * panel_size_ : left_ + rank * group_ * tile_size_;
    if constexpr (transposed) {
      pack_panels(buffer, group, k, depth);
      for (int64_t tile = 0; tile < all_tiles_; ++tile)
        for (int64_t panel = group.begin; panel < group.end; ++panel)
          multiply(left_ + tile * tile_size_, tile, buffer + (panel - group.base) * panel_size_,
                   panel, depth, add);
    } else {
      pack_tiles(buffer, group, k, depth);
      for (int64_t panel = 0; panel < all_panels_; ++panel)
        for (int64_t tile = group.begin; tile < group.end; ++tile)
          multiply(buffer + (tile - group.base) * tile_size_, tile, right_ + panel * panel_size_,
                   panel, depth, add);
    }
  }

  void multiply(const Element* left, int64_t tile, const Element* right, int64_t panel,
                int64_t depth, bool add) {
    alignas(64) T sums[LeftTiles::max_rows * width];
    const int64_t first = tile * tiles_.height, count = tiles_.end(tile, rows_) - first;
    Tiles::multiply(left, tiles_.height, count, right, {1, {depth}}, false, sums, width, nullptr);
    write(first, count, panel * width, sums, add);
  }

  void pack_tiles(Element* buffer, const Group& group, int64_t k, int64_t depth) {
    const int64_t ld = transposed ? p_.ldb : p_.lda;
    const Left* from =
        static_cast<const Left*>(transposed ? p_.b : p_.a) + k * (transposed ? ld : 1);
    for (int64_t tile = group.begin; tile < group.end; ++tile) {
      const Operand operand{buffer + (tile - group.base) * tile_size_, blocks_of(depth, block),
                            tiles_.height};
      const int64_t first = tile * tiles_.height, count = tiles_.end(tile, rows_) - first;
      for (int64_t begin = 0; begin < depth; begin += block)
        for (int64_t row = 0; row < count; row += transposed ? L : 1) {
          Element* place = operand.at(row, begin / block, 0);
          if constexpr (transposed) {
            LeftTiles::pack_block_columns(place, tiles_.height, from + begin * ld + first + row, ld,
                                          count - row, depth - begin);
          } else {
            LeftTiles::pack_block_row(place, tiles_.height, from + (first + row) * ld + begin,
                                      depth - begin);
          }
        }
    }
  }

  // All panels side by side: memory is read in the order in which it lies.
  void pack_panels(Element* buffer, const Group& group, int64_t k, int64_t depth) {
    const int64_t ld = transposed ? p_.lda : p_.ldb;
    const Right* from = static_cast<const Right*>(transposed ? p_.a : p_.b) + k * ld;
    for (int64_t row = 0; row < blocks_of(depth, block) * block; row += RightTiles::rows_together)
      for (int64_t panel = group.begin; panel < group.end; ++panel)
        RightTiles::pack_some_rows(
            from + row * ld + panel * width, ld, depth - row, columns_ - panel * width,
            buffer + (panel - group.base) * panel_size_ + RightTiles::row_offset(row));
  }

  // sums (count, width) into C.
  void write(int64_t first, int64_t count, int64_t column, const T* sums, bool add) {
    const int64_t columns = columns_ - column < width ? columns_ - column : width;
    T* c = static_cast<T*>(p_.c);
    for (int64_t part = 0; part < columns; part += L) {
      const int some = int(columns - part < L ? columns - part : L);
      if constexpr (transposed) {
        for (int64_t r = 0; r < count; r += L) {
          const int rows = int(count - r < L ? count - r : L);
          Vec<T> square[L];
          for (int k = 0; k < L; ++k)
            square[k] = k < rows ? load(sums + (r + k) * width + part) : Vec<T>{};
          transpose<T>(square);
          for (int k = 0; k < some; ++k)
            put(c + (column + part + k) * p_.ldc + first + r, square[k], rows, add);
        }
      } else {
        for (int64_t r = 0; r < count; ++r)
          put(c + (first + r) * p_.ldc + column + part, load(sums + r * width + part), some, add);
      }
    }
  }

  static void put(T* c, Vec<T> values, int count, bool add) {
    store_some(c, add ? load_some(c, count) + values : values, count);
  }

  const ProductArgs& p_;
  const int64_t rows_, columns_;  // of what is computed: C or its transpose
  const int64_t depth_;           // of a slab
  const RowTiles tiles_;
  const int64_t all_tiles_, all_panels_, tile_size_, panel_size_;
  const int64_t group_;  // how many of them a thread packs at a time
  Scratch<Element> left_, right_;
};

// A team as large as the work is worth.
template <class LeftTiles, class RightTiles, class Tiles, bool transposed>
void run_product(const ProductArgs& p) {
  const int64_t work = p.M * p.N * p.K / (int64_t(1) << 20) + 1;
  const int threads = work < p.threads ? int(work) : p.threads;
  Product<LeftTiles, RightTiles, Tiles, transposed> product(p, threads);
  run_team(threads, [&](const Team& team) { product.run(team); });
}

}  // namespace
}  // namespace fastlstm
