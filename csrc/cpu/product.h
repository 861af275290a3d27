// The products of (eq. 9) on the matrix unit: C = or += op(A) B, A of float, B of storage type.
//
// K is taken a slab at a time. A, which is da, has by far the most elements: each thread has a
// share of it, and packs a group of tiles or panels at a time that stays in its L2 cache. A slab
// of B is packed once, for all threads, and passes by.
//
// For A^T B, one operand has to be transposed when it is packed, since the unit wants values that
// are neighbours in K side by side. That is B, so B^T A is computed, with B in tiles and A in
// panels; what comes out is transposed when it is added to C.
#pragma once

#include <type_traits>

#include "amx_tiles.h"
#include "team.h"

namespace fastlstm {
namespace {

constexpr int64_t slab_rows = 512;  // of K, a multiple of 32

template <class Left, class Right, bool transposed>
class Product {
  using LeftTiles = AmxTiles<Left, terms_of<Left>>;
  using RightTiles = AmxTiles<Right, terms_of<Right>>;
  using Tiles = AmxTiles<Right, terms_of<Left>>;
  using Operand = Blocked<LeftTiles>;
  static constexpr int64_t L = LeftTiles::L, width = LeftTiles::width;

 public:
  Product(const ProductArgs& args, int threads)
      : p_(args),
        rows_(transposed ? p_.N : p_.M),
        columns_(transposed ? p_.M : p_.N),
        depth_(p_.K < slab_rows ? blocks_of(p_.K, 32) * 32 : slab_rows),
        tiles_(rows_, LeftTiles::max_rows),
        all_tiles_(tiles_.count(rows_)),
        all_panels_(blocks_of(columns_, width)),
        tile_size_(Operand{nullptr, depth_ / 32, tiles_.height}.block_size() * (depth_ / 32)),
        panel_size_(RightTiles::panel_size(depth_)),
        group_(group(transposed ? panel_size_ : tile_size_)),
        left_((transposed ? all_tiles_ : threads * group_) * tile_size_),
        right_((transposed ? threads * group_ : all_panels_) * panel_size_) {}

  void run(const Team& team) {
    const typename Tiles::Session session;
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
  const Left* left_at(int64_t row, int64_t k) const {
    const int64_t offset = transposed ? k * p_.ldb + row : row * p_.lda + k;
    return static_cast<const Left*>(transposed ? p_.b : p_.a) + offset;
  }

  // Tiles or panels [begin, end), in a buffer that begins with the one numbered `base`.
  struct Group {
    int64_t base, begin, end;
  };

  static int64_t group(int64_t size) {
    return l2_cache_bytes() / 2 / (size * int64_t(sizeof(bf16))) + 1;
  }

  // A slab that is not full leaves the ends of its tiles and panels unused.
  void multiply_group(const Group& group, int rank, int64_t k, int64_t depth) {
    const bool add = p_.add || k > 0;
    bf16* buffer =
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

  void multiply(const bf16* left, int64_t tile, const bf16* right, int64_t panel, int64_t depth,
                bool add) {
    alignas(64) float sums[LeftTiles::max_rows * width];
    const int64_t first = tile * tiles_.height, count = tiles_.end(tile, rows_) - first;
    Tiles::multiply(left, tiles_.height, count, right, {1, {depth}}, false, sums, width);
    write(first, count, panel * width, sums, add);
  }

  void pack_tiles(bf16* buffer, const Group& group, int64_t k, int64_t depth) {
    for (int64_t tile = group.begin; tile < group.end; ++tile) {
      const Operand operand{buffer + (tile - group.base) * tile_size_, blocks_of(depth, 32),
                            tiles_.height};
      const int64_t first = tile * tiles_.height, count = tiles_.end(tile, rows_) - first;
      if constexpr (transposed) {
        for (int64_t block = 0; block < operand.blocks; ++block)
          for (int64_t row = 0; row < count; row += L)
            pack_columns(operand, row, left_at(first + row, k + block * 32),
                         count - row < L ? count - row : L, block, depth - block * 32);
      } else {
        for (int64_t block = 0; block < operand.blocks; ++block)
          for (int64_t row = 0; row < count; ++row)
            pack_row(operand, row, left_at(first + row, k + block * 32), block, depth - block * 32);
      }
    }
  }

  // Up to 32 columns of K of one row, into one block.
  void pack_row(const Operand& operand, int64_t row, const Left* from, int64_t block,
                int64_t depth) {
    Terms<false> terms{LeftTiles::load_up_to(from, depth),
                       LeftTiles::load_up_to(from + L, depth - L)};
    bf16* place = operand.at(row, block, 0);
    for (int term = 0; term < terms_of<Left>; ++term, place += operand.height * 32)
      store(reinterpret_cast<float*>(place), terms.next());
  }

  // Up to 32 rows of K of up to L columns, transposed into one block.
  void pack_columns(const Operand& operand, int64_t row, const Left* from, int64_t count,
                    int64_t block, int64_t depth) {
    Vec<float> square[terms_of<Left>][L];  // (term, pair of k) of rows, then (term, row) of pairs
    for (int64_t pair = 0; pair < L; ++pair) {
      Vec<float> even{}, odd{};
      if (2 * pair < depth) even = load_some(from + 2 * pair * p_.ldb, int(count));
      if (2 * pair + 1 < depth) odd = load_some(from + (2 * pair + 1) * p_.ldb, int(count));
      Terms<true> terms{even, odd};
      for (int term = 0; term < terms_of<Left>; ++term) square[term][pair] = terms.next();
    }
    bf16* place = operand.at(row, block, 0);
    for (int term = 0; term < terms_of<Left>; ++term) {
      transpose<float>(square[term]);
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(place + (term * operand.height + r) * 32, &square[term][r], 64);
    }
  }

  // All panels side by side: memory is read in the order in which it lies.
  void pack_panels(bf16* buffer, const Group& group, int64_t k, int64_t depth) {
    const int64_t ld = transposed ? p_.lda : p_.ldb;
    const Right* from = static_cast<const Right*>(transposed ? p_.a : p_.b) + k * ld;
    for (int64_t row = 0; row < blocks_of(depth, 32) * 32; row += 2) {
      const int64_t place = RightTiles::panel_size(row / 32 * 32) + row % 32 / 2 * 32;
      for (int64_t panel = group.begin; panel < group.end; ++panel)
        RightTiles::pack_pair(from + row * ld + panel * width, ld, depth - row,
                              columns_ - panel * width,
                              buffer + (panel - group.base) * panel_size_ + place);
    }
  }

  // sums (count, width) into C, whose rows are the tile's columns if `transposed`.
  void write(int64_t first, int64_t count, int64_t column, const float* sums, bool add) {
    const int64_t columns = columns_ - column < width ? columns_ - column : width;
    for (int64_t part = 0; part < columns; part += L) {
      const int64_t some = columns - part < L ? columns - part : L;
      for (int64_t r = 0; r < count; r += L) {
        const int64_t rows = count - r < L ? count - r : L;
        Vec<float> square[L];
        for (int64_t k = 0; k < L; ++k)
          square[k] = k < rows ? load(sums + (r + k) * width + part) : Vec<float>{};
        if constexpr (transposed) transpose<float>(square);
        const int64_t row = transposed ? column + part : first + r;
        float* c = p_.c + row * p_.ldc + (transposed ? first + r : column + part);
        const int64_t height = transposed ? some : rows;
        const int wide = int(transposed ? rows : some);
        for (int64_t k = 0; k < height; ++k, c += p_.ldc)
          store_some(c, add ? load_some(c, wide) + square[k] : square[k], wide);
      }
    }
  }

  const ProductArgs& p_;
  const int64_t rows_, columns_;  // of what is computed: C or its transpose
  const int64_t depth_;           // of a slab
  const RowTiles tiles_;
  const int64_t all_tiles_, all_panels_, tile_size_, panel_size_;
  const int64_t group_;  // how many of them a thread packs at a time
  Scratch<bf16> left_, right_;
};

// Whether no value of a (rows, columns) matrix is too large (see amx_tiles.h).
template <class S>
bool none_too_large(const S* values, int64_t rows, int64_t columns, int64_t ld) {
  unsigned beyond = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; k += lanes<float>) {
      const int some = int(columns - k < lanes<float> ? columns - k : lanes<float>);
      beyond |= too_large(load_some(values + r * ld + k, some));
    }
  return beyond == 0;
}

template <class S, bool transposed>
bool run_product(const ProductArgs& p) {
  if (!none_too_large(static_cast<const S*>(p.b), p.K, p.N, p.ldb)) return false;
  using Left = typename std::conditional<transposed, S, float>::type;
  using Right = typename std::conditional<transposed, float, S>::type;
  const int64_t work = p.M * p.N * p.K / (int64_t(1) << 20) + 1;
  const int threads = work < p.threads ? int(work) : p.threads;
  Product<Left, Right, transposed> product(p, threads);
  run_team(threads, [&](const Team& team) { product.run(team); });
  return true;
}

}  // namespace
}  // namespace fastlstm
