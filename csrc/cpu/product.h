// The products of (eq. 9): C = or += op(A) B, A and C of state type, B of storage type.
//
// K is taken a slab at a time. A, which is da, has by far the most elements: each thread has a
// share of it, and packs a group of tiles or panels at a time that stays in its L2 cache. A slab
// of B is packed once, for all threads, and passes by. Where multiplication leaves pauses, the
// next group is packed in them, the last sums are added to C, and the place of the next is asked
// for.
//
// For A^T B, A goes into panels, which take its rows as they are, and B into tiles: B^T A is
// computed, and transposed when it is added to C. Tiles of two B may pass by, one after the other.
//
// A slab of B that stays in the L2 cache passes by each tile or panel of the group, one after the
// other, so that C is written along its rows, as memory likes it best. One that comes from afar
// passes by once for the whole group.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../layer.h"
#include "operand.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace fastlstm {
namespace {

constexpr int64_t most_slab_rows = 512;  // of K, a multiple of every block's columns

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
  static constexpr int64_t buffers = Tiles::has_pauses ? 2 : 1;        // of a thread: one is packed
  static constexpr int64_t most_values = LeftTiles::max_rows * width;  // of a tile of sums
  // Without pauses sums are added slab by slab as they are multiplied, in the order in which they
  // are visited, and transposed once, at the last slab.
  static constexpr bool keeps = transposed && !Tiles::has_pauses;

 public:
  Product(const ProductArgs& args, int threads)
      : p_(args),
        columns_(transposed ? p_.M : p_.parts[0].N),
        depth_(slab_rows(p_)),
        tiles_{{rows(0), LeftTiles::max_rows}, {rows(1), LeftTiles::max_rows}},
        first_tiles_(tiles_[0].count(rows(0))),
        all_tiles_(first_tiles_ + tiles_[1].count(rows(1))),
        all_panels_(blocks_of(columns_, width)),
        tile_size_(depth_ / block *
                   Operand{nullptr, 0, std::max(tiles_[0].height, tiles_[1].height)}.block_size()),
        panel_size_(RightTiles::panel_size(depth_)),
        along_rows_(slab_stays(p_)),
        group_(group(transposed ? panel_size_ : tile_size_, along_rows_)),
        left_((transposed ? all_tiles_ : threads * buffers * group_) * tile_size_),
        right_((transposed ? threads * buffers * group_ : all_panels_) * panel_size_),
        kept_(keeps && p_.K > depth_ ? all_panels_ * all_tiles_ * most_values : 0) {}

  // Does a packed slab of B stay in the L2 cache?
  static bool slab_stays(const ProductArgs& p) {
    const int64_t depth = slab_rows(p);
    const int64_t panel =
        transposed ? LeftTiles::terms * width * depth : RightTiles::panel_size(depth);
    return blocks_of(p.columns(), width) * panel * int64_t(sizeof(Element)) <= l2_cache_bytes() / 2;
  }

  void run(const Team& team) {
    [[maybe_unused]] const typename Tiles::Session session;
    const Range mine = team.share(transposed ? all_panels_ : all_tiles_);
    const Range shared = team.share(transposed ? all_tiles_ : all_panels_);
    Element* const first = transposed ? right_ + team.rank * buffers * group_ * panel_size_
                                      : left_ + team.rank * buffers * group_ * tile_size_;
    Element* const second =
        first + (buffers - 1) * group_ * (transposed ? panel_size_ : tile_size_);
    Group group = next({-depth_, mine.end, mine.end}, mine);
    Packing<!transposed> packing(*this, group, first);
    Sums sums;
    for (int64_t k = 0, number = 0; k < p_.K; k += depth_) {
      Packing<transposed> all(*this, {k, shared.begin, shared.end}, shared_place(shared.begin));
      all.rest();
      team.barrier.wait();
      for (; group.k == k && group.begin < group.end; ++number, group = next(group, mine)) {
        packing.rest();
        Element* const buffer = number % 2 == 0 ? first : second;
        packing = Packing<!transposed>(*this, next(group, mine), number % 2 == 0 ? second : first);
        multiply_group(group, buffer, packing, sums);
      }
      write_rest(sums);
      team.barrier.wait();
    }
  }

 private:
  // Tiles or panels [begin, end) of the slab that begins with row k.
  struct Group {
    int64_t k, begin, end;
  };

  // Rows of what is computed, C or its transpose; those of the second part follow the first's.
  struct Tile {
    int part;
    int64_t first, count;
  };
  int64_t rows(int part) const { return transposed ? p_.parts[part].N : part == 0 ? p_.M : 0; }
  Tile tile(int64_t index) const {
    const int part = index < first_tiles_ ? 0 : 1;
    if (part == 1) index -= first_tiles_;
    const RowTiles& tiles = tiles_[part];
    return {part, index * tiles.height, tiles.end(index, rows(part)) - index * tiles.height};
  }

  // What was multiplied last, which waits to be added to C: (count, width).
  struct Sums {
    int part;
    int64_t first, count, column;
    bool add;
    int64_t piece = 0, pieces = 0;  // done, and in all
    int buffer = 0;                 // which one is its own
    const T* from = nullptr;        // where they are: there, or in kept_
    alignas(64) T values[2][most_values];
  };

  // A slab of B that fills the L2 cache leaves no room for the groups that it meets there.
  static int64_t slab_rows(const ProductArgs& p) {
    const int64_t bytes = blocks_of(p.columns(), width) * RightTiles::panel_size(most_slab_rows) *
                          int64_t(sizeof(Element));
    const int64_t most = bytes > l2_cache_bytes() / 2 ? most_slab_rows / 2 : most_slab_rows;
    return p.K < most ? blocks_of(p.K, block) * block : most;
  }

  // A group takes a quarter of the L2 cache, and another one is packed beside it. A slab of B that
  // stays there too leaves less for them; one that comes from afar is to come seldom.
  static int64_t group(int64_t size, bool stays) {
    const int64_t part = Tiles::has_pauses && stays ? 16 : 2;
    return l2_cache_bytes() / part / buffers / (size * int64_t(sizeof(Element))) + 1;
  }

  // The group after this one of a thread's share; the last one of all is followed by an empty one.
  Group next(const Group& group, const Range& mine) const {
    const bool same = group.end < mine.end;
    const int64_t k = same ? group.k : group.k + depth_, begin = same ? group.end : mine.begin;
    if (k >= p_.K) return {k, 0, 0};
    return {k, begin, begin + group_ < mine.end ? begin + group_ : mine.end};
  }

  int64_t depth(int64_t k) const { return p_.K - k < depth_ ? p_.K - k : depth_; }

  Element* shared_place(int64_t index) const {
    return transposed ? left_ + index * tile_size_ : right_ + index * panel_size_;
  }

  // A group is packed a piece at a time, in the order in which its source lies in memory. A slab
  // that is not full leaves the ends of its tiles and panels unused.
  template <bool tiles>
  class Packing {
   public:
    Packing(const Product& product, const Group& group, Element* buffer)
        : p_(&product), buffer_(buffer), begin_(group.begin), end_(group.end), item_(begin_) {
      if (begin_ == end_) return;
      depth_ = product.depth(group.k);
      first_k_ = group.k;
      const int64_t blocks = blocks_of(depth_, block);
      if constexpr (tiles) {
        for (int64_t item = begin_; item < end_; ++item)
          left_ += blocks_of(p_->tile(item).count, rows_at_once) * blocks;
        enter_tile();
      } else {
        left_ = (end_ - begin_) * (blocks * block / RightTiles::rows_together);
        begin_at(transposed ? args().a : args().parts[0].b,
                 transposed ? args().lda : args().parts[0].ldb);
        enter_rows();
      }
    }
    int64_t left() const { return left_; }
    void rest() {
      while (left_ > 0) (*this)();
    }
    void operator()() {
      --left_;
      if constexpr (tiles)
        tile_piece();
      else
        panel_piece();
    }

   private:
    using Source = std::conditional_t<tiles, Left, Right>;
    static constexpr int64_t rows_at_once = transposed ? L : 1;  // of a tile

    const ProductArgs& args() const { return p_->p_; }

    // Where row first_k_ of K begins, or its column.
    void begin_at(const void* matrix, int64_t ld) {
      ld_ = ld;
      from_ = static_cast<const Source*>(matrix) + first_k_ * (transposed || !tiles ? ld : 1);
    }

    void enter_tile() {
      tile_ = p_->tile(item_);
      const ProductPart& part = args().parts[tile_.part];
      begin_at(transposed ? part.b : args().a, transposed ? part.ldb : args().lda);
      operand_ = {buffer_ + (item_ - begin_) * p_->tile_size_, blocks_of(depth_, block),
                  p_->tiles_[tile_.part].height};
      enter_row();
    }

    // `row_at_` and `place_`: where the next block comes from and goes to.
    void enter_row() {
      const int64_t row = tile_.first + row_;
      row_at_ = from_ + (transposed ? row : row * ld_);
      place_ = operand_.data + row_ * block;
    }

    // One block of one row, or of L rows that are columns where they come from.
    void tile_piece() {
      if constexpr (transposed) {
        LeftTiles::pack_block_columns(place_, operand_.height, row_at_, ld_, tile_.count - row_,
                                      depth_ - k_);
        row_at_ += block * ld_;
      } else {
        prefetch(row_at_ + (Tiles::has_pauses ? 1 : 2) * ld_, block);
        LeftTiles::pack_block_row(place_, operand_.height, row_at_, depth_ - k_);
        row_at_ += block;
      }
      place_ += operand_.block_size();
      if ((k_ += block) < depth_) return;
      k_ = 0;
      if ((row_ += rows_at_once) < tile_.count) return enter_row();
      row_ = 0;
      if (++item_ < end_) enter_tile();
    }

    // The first panel's rows from k_ on.
    void enter_rows() {
      item_ = begin_;
      row_at_ = from_ + k_ * ld_ + item_ * width;
      place_ = buffer_ + RightTiles::row_offset(k_);
    }

    // Some rows of one panel.
    void panel_piece() {
      if (transposed)
        for (int64_t k = 0; k < RightTiles::rows_together; ++k)
          prefetch(row_at_ + (8 + k) * ld_, width);
      RightTiles::pack_some_rows(row_at_, ld_, depth_ - k_, p_->columns_ - item_ * width, place_);
      row_at_ += width;
      place_ += p_->panel_size_;
      if (++item_ < end_) return;
      k_ += RightTiles::rows_together;
      enter_rows();
    }

    // What will be packed in some microseconds: a piece that waits for memory stops the unit too.
    // (Without pauses a group is packed in one go, and asks a row earlier.)
    template <class S>
    static void prefetch(const S* from, int64_t count) {
      const char* const bytes = reinterpret_cast<const char*>(from);
      for (int64_t k = 0; k < count * int64_t(sizeof(S)); k += 64) __builtin_prefetch(bytes + k);
    }

    const Product* p_;
    Element* buffer_;
    int64_t begin_, end_;
    int64_t item_, row_ = 0, k_ = 0;  // which tile or panel, and what of it, is next
    Tile tile_{};
    Operand operand_{};
    const Source* row_at_ = nullptr;
    Element* place_ = nullptr;
    int64_t left_ = 0, first_k_ = 0, depth_ = 0, ld_ = 0;
    const Source* from_ = nullptr;
  };

  void multiply_group(const Group& group, Element* buffer, Packing<!transposed>& packing,
                      Sums& sums) {
    const Segments segments{1, {depth(group.k)}};
    const int64_t others = transposed ? all_tiles_ : all_panels_;
    const int64_t pauses = Tiles::pauses(segments) - most_pieces;  // the others are for the sums
    Spread<Packing<!transposed>> pack(
        packing, packing.left(), (group.end - group.begin) * others * (pauses > 1 ? pauses : 1));
    Destination wanted{};
    const auto meanwhile = [&] {
      if (sums.piece < sums.pieces)
        write_piece(sums);
      else
        pack();
      ask_for_row(wanted);
    };
    const int64_t size = group.end - group.begin;
    for (int64_t n = 0; n < others * size; ++n) {
      const int64_t other = along_rows_ ? n % others : n / size;
      const int64_t own = group.begin + (along_rows_ ? n / others : n % size);
      const auto [part, first, count] = tile(transposed ? other : own);
      const int64_t panel = transposed ? own : other;
      const Element* const left =
          transposed ? shared_place(other) : buffer + (own - group.begin) * tile_size_;
      const Element* const right =
          transposed ? buffer + (own - group.begin) * panel_size_ : shared_place(other);
      wanted = transposed ? destination(part, panel * width, columns_, width, first)
                          : destination(part, first, first + count, count, panel * width);
      const bool kept = keeps && p_.K > depth_, last = group.k + depth_ >= p_.K;
      T* const values = kept ? kept_values(group, other, own) : sums.values[1 - sums.buffer];
      Wanted rows;
      if (kept && group.k > 0) ask_for(rows, values);
      if (!Tiles::has_pauses && (last || !kept)) add_rows(rows, wanted);
      Tiles::multiply(left, tiles_[part].height, count, right, segments, Advance::none, values,
                      width, &rows, kept && group.k > 0, meanwhile);
      write_rest(sums);
      if (kept && !last) continue;
      sums.part = part, sums.first = first, sums.count = count, sums.column = panel * width;
      sums.add = p_.add || (group.k > 0 && !kept);
      sums.buffer = 1 - sums.buffer, sums.from = values;
      sums.piece = 0, sums.pieces = blocks_of(count, piece_rows) * piece_parts;
      if (!Tiles::has_pauses) write_rest(sums);
    }
  }

  T* kept_values(const Group& group, int64_t other, int64_t own) const {
    const int64_t before = group.begin * all_tiles_ + other * (group.end - group.begin);
    return kept_ + (before + own - group.begin) * most_values;
  }

  static void ask_for(Wanted& lines, const T* values) {
    const char* const bytes = reinterpret_cast<const char*>(values);
    for (int64_t k = 0; k < most_values * int64_t(sizeof(T)); k += 128) lines.add(bytes + k);
  }

  // Rows of C that sums will be added to. They lie far from each other, in the L3 cache at best, so
  // one is asked for at each pause of the multiplication: what waits for memory stops the unit.
  struct Destination {
    const T* row;
    int64_t ld, left;
  };
  Destination destination(int part, int64_t row, int64_t rows, int64_t most, int64_t column) const {
    const auto [c, ld] = result(part);
    return {c + row * ld + column, ld, std::min(rows - row, most)};
  }
  struct Result {
    T* c;
    int64_t ld;
  };
  Result result(int part) const { return {static_cast<T*>(p_.parts[part].c), p_.parts[part].ldc}; }

  void ask_for_row(Destination& wanted) const {
    if (wanted.left == 0) return;
    --wanted.left;
    for (int64_t part = 0; part < width; part += L) __builtin_prefetch(wanted.row + part, 1);
    wanted.row += wanted.ld;
  }

  // The same without pauses.
  void add_rows(Wanted& rows, Destination from) const {
    for (; from.left > 0; --from.left, from.row += from.ld) rows.add(from.row);
  }

  // So many rows and columns of sums are a piece, and such a number of them is the most there is.
  static constexpr int64_t piece_rows = transposed ? L : 4;
  static constexpr int64_t piece_parts = transposed ? panel_vectors : 1;
  static constexpr int64_t most_pieces = blocks_of(LeftTiles::max_rows, piece_rows) * piece_parts;

  void write_rest(Sums& sums) {
    while (sums.piece < sums.pieces) write_piece(sums);
  }

  void write_piece(Sums& sums) {
    const int64_t columns = columns_ - sums.column < width ? columns_ - sums.column : width;
    const int64_t piece = sums.piece++, r = piece / piece_parts * piece_rows;
    const int64_t rows = sums.count - r < piece_rows ? sums.count - r : piece_rows;
    const auto [c, ld] = result(sums.part);
    const T* const values = sums.from + r * width;
    if constexpr (transposed) {
      const int64_t part = piece % piece_parts * L;
      Vec<T> square[L];
      for (int k = 0; k < L; ++k) square[k] = k < rows ? load(values + k * width + part) : Vec<T>{};
      transpose<T>(square);
      for (int64_t k = 0; k < L && part + k < columns; ++k)
        put(c + (sums.column + part + k) * ld + sums.first + r, square[k], int(rows), sums.add);
    } else {
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t part = 0; part < columns; part += L)
          put(c + (sums.first + r + k) * ld + sums.column + part, load(values + k * width + part),
              int(columns - part < L ? columns - part : L), sums.add);
    }
  }

  static void put(T* c, Vec<T> values, int count, bool add) {
    store_some(c, add ? load_some(c, count) + values : values, count);
  }

  const ProductArgs& p_;
  const int64_t columns_;  // of what is computed
  const int64_t depth_;    // of a slab
  const RowTiles tiles_[ProductArgs::most_parts];
  const int64_t first_tiles_;  // of the first part
  const int64_t all_tiles_, all_panels_, tile_size_, panel_size_;
  const bool along_rows_;  // is C written along its rows?
  const int64_t group_;    // how many tiles or panels a thread packs at a time
  Scratch<Element> left_, right_;
  Scratch<T> kept_;
};

}  // namespace
}  // namespace fastlstm
