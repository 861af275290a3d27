// The products of (eq. 9): C = or += op(A) B, A and C of state type, B of storage type.
//
// K is taken a slab at a time. The side that has the most elements is divided: each thread has a
// share of it, and packs a group of tiles or panels at a time that stays in its L2 cache. A slab
// of the other side is packed once, for all threads, and passes by. Where multiplication leaves
// pauses, the next group is packed in them, the last sums are added to C, and the place of the next
// is asked for. (How it is all laid out is its Form; product_packing.h packs.)
//
// A slab that stays in the L2 cache passes by each tile or panel of the group, one after the other,
// so that of a large C each thread writes some rows at a time, as memory likes it best. One that
// comes from afar passes by once for the whole group.
#pragma once

#include <algorithm>

#include "../layer.h"
#include "operand.h"
#include "processor.h"
#include "product_packing.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace fastlstm {
namespace {

constexpr int64_t most_slab_rows = 512;  // of K, a multiple of every block's columns

// LeftTiles says how what goes into tiles is packed, RightTiles how what goes into panels, and
// Tiles multiplies the two.
template <class LeftTiles, class RightTiles, class Tiles, Form form>
class Product {
  using LeftOf = LeftTiles;
  using RightOf = RightTiles;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<LeftTiles>;
  static constexpr int64_t L = Tiles::L, width = Tiles::width, block = LeftTiles::block_columns;
  static constexpr Form form_of = form;
  static constexpr bool flipped = form == Form::flipped, has_pauses = Tiles::has_pauses;
  static constexpr bool own_panels = flipped || form == Form::columns;  // of a thread, not tiles
  static constexpr int64_t buffers = has_pauses ? 2 : 1;  // of a thread: one is packed
  // The next group is packed while this one is multiplied, or threads do what others have not
  // begun.
  static constexpr bool helps = !has_pauses;
  static constexpr int64_t most_values = LeftTiles::max_rows * width;  // of a tile of sums
  // Of a block of A that is packed column by column, see ProductPacking::staged_piece.
  static constexpr int64_t staged_pieces =
      block / LeftTiles::rows_together + panel_vectors * LeftTiles::terms;
  static constexpr int64_t staged_size =
      form == Form::upright ? block * width * LeftTiles::terms : 0;
  // Without pauses sums are added slab by slab as they are multiplied, in the order in which they
  // are visited, and transposed once, at the last slab.
  static constexpr bool keeps = flipped && !has_pauses;

 public:
  Product(const ProductArgs& args, int threads)
      : p_(args),
        depth_(slab_rows(p_)),
        tiles_{{rows(0), LeftTiles::max_rows}, {rows(1), LeftTiles::max_rows}},
        first_tiles_(tiles_[0].count(rows(0))),
        all_tiles_(first_tiles_ + tiles_[1].count(rows(1))),
        first_panels_(blocks_of(columns(0), width)),
        all_panels_(first_panels_ + blocks_of(columns(1), width)),
        tile_size_(depth_ / block *
                   Operand{nullptr, 0, std::max(tiles_[0].height, tiles_[1].height)}.block_size()),
        panel_size_(RightTiles::panel_size(depth_)),
        along_rows_(slab_stays(p_)),
        group_(group(threads, own_panels ? all_panels_ : all_tiles_,
                     own_panels ? panel_size_ : tile_size_, along_rows_)),
        left_((own_panels ? all_tiles_ : threads * buffers * group_) * tile_size_),
        right_((own_panels ? threads * buffers * group_ : all_panels_) * panel_size_),
        staged_(threads * staged_size),
        kept_(keeps && p_.K > depth_ ? all_panels_ * all_tiles_ * most_values : 0) {}

  // Does a packed slab of what passes by stay in the L2 cache?
  static bool slab_stays(const ProductArgs& p) {
    return slab_bytes(p, slab_rows(p)) <= l2_cache_bytes() / 2;
  }

  void run(const Team& team) {
    [[maybe_unused]] const typename Tiles::Session session;
    const Range mine = team.share(own_panels ? all_panels_ : all_tiles_);
    const Range shared = team.share(own_panels ? all_tiles_ : all_panels_);
    Element* const first = own_panels ? right_ + team.rank * buffers * group_ * panel_size_
                                      : left_ + team.rank * buffers * group_ * tile_size_;
    Element* const second =
        first + (buffers - 1) * group_ * (own_panels ? panel_size_ : tile_size_);
    Group group = next({-depth_, mine.end, mine.end}, mine);  // where nobody helps
    Element* const staged = staged_ + team.rank * staged_size;
    Packing<!own_panels> packing(*this, helps ? Group{} : group, first, staged);
    Sums sums;
    for (int64_t k = 0, number = 0; k < p_.K; k += depth_) {
      Packing<own_panels> all(*this, {k, shared.begin, shared.end}, shared_place(shared.begin));
      all.rest();
      team.barrier.wait();
      if constexpr (helps) {
        const auto multiply = [&](const Range& own) {
          const Group piece{k, own.begin, own.end};
          packing = Packing<!own_panels>(*this, piece, first, staged);
          packing.rest();
          multiply_group(piece, first, packing, sums);
        };
        team.each_piece(own_panels ? all_panels_ : all_tiles_, group_, false, k / depth_, multiply);
      } else {
        for (; group.k == k && group.begin < group.end; ++number, group = next(group, mine)) {
          packing.rest();
          Element* const buffer = number % 2 == 0 ? first : second;
          packing = Packing<!own_panels>(*this, next(group, mine), number % 2 == 0 ? second : first,
                                         staged);
          multiply_group(group, buffer, packing, sums);
        }
      }
      write_rest(sums);
      team.barrier.wait();
    }
  }

 private:
  template <class, bool>
  friend class ProductPacking;
  template <bool tiles>
  using Packing = ProductPacking<Product, tiles>;

  // Tiles or panels [begin, end) of the slab that begins with row k.
  struct Group {
    int64_t k, begin, end;
  };

  // Rows, or columns, of what is computed, C or its transpose; the second part's follow the
  // first's.
  struct Tile {
    int part;
    int64_t first, count;
  };
  int64_t rows(int part) const { return flipped ? p_.parts[part].N : part == 0 ? p_.M : 0; }
  int64_t columns(int part) const { return flipped ? part == 0 ? p_.M : 0 : p_.parts[part].N; }
  Tile panel(int64_t index) const {
    const int part = index < first_panels_ ? 0 : 1;
    const int64_t first = (index - (part == 1 ? first_panels_ : 0)) * width;
    return {part, first, std::min(columns(part) - first, width)};
  }
  Tile tile(int64_t index) const {
    const int part = index < first_tiles_ ? 0 : 1;
    if (part == 1) index -= first_tiles_;
    const RowTiles& tiles = tiles_[part];
    return {part, index * tiles.height, tiles.end(index, rows(part)) - index * tiles.height};
  }

  // What was multiplied last, which waits to be added to C: (rows, width).
  struct Sums {
    Tile rows, columns;
    bool add;
    int64_t piece = 0, pieces = 0;  // done, and in all
    int buffer = 0;                 // which one is its own
    const T* from = nullptr;        // where they are: there, or in kept_
    alignas(64) T values[2][most_values];
  };

  // A slab that fills the L2 cache leaves no room for the groups that it meets there.
  static int64_t slab_rows(const ProductArgs& p) {
    const bool fills = slab_bytes(p, most_slab_rows) > l2_cache_bytes() / 2;
    const int64_t most = fills ? most_slab_rows / 2 : most_slab_rows;
    return p.K < most ? blocks_of(p.K, block) * block : most;
  }
  // Of what passes by.
  static int64_t slab_bytes(const ProductArgs& p, int64_t depth) {
    const int64_t elements = own_panels
                                 ? (flipped ? p.columns() : p.M) * LeftTiles::terms * depth
                                 : blocks_of(p.columns(), width) * RightTiles::panel_size(depth);
    return elements * int64_t(sizeof(Element));
  }

  // Where a slab stays in the L2 cache, groups leave it room. One that comes from afar is to come
  // seldom: then they take half of the cache, together with the one that is packed beside.
  // Threads that help each other do so with an eighth of a share at most.
  static int64_t group(int threads, int64_t items, int64_t size, bool stays) {
    const int64_t part = stays ? (has_pauses ? 16 : 8) : 2;
    const int64_t most = l2_cache_bytes() / part / buffers / (size * int64_t(sizeof(Element))) + 1;
    return helps && threads > 1 ? std::min(most, blocks_of(items, int64_t(8) * threads)) : most;
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
    return own_panels ? left_ + index * tile_size_ : right_ + index * panel_size_;
  }

  void multiply_group(const Group& group, Element* buffer, Packing<!own_panels>& packing,
                      Sums& sums) {
    const Segments segments{1, {depth(group.k)}};
    const int64_t others = own_panels ? all_tiles_ : all_panels_;
    const int64_t pauses = Tiles::pauses(segments) - most_pieces;  // the others are for the sums
    Spread<Packing<!own_panels>> pack(
        packing, packing.left(), (group.end - group.begin) * others * (pauses > 1 ? pauses : 1));
    Destination wanted{};
    const auto meanwhile = [&] {
      if (sums.piece < sums.pieces)
        write_piece(sums);
      else
        pack();
      ask_for_row(wanted);
    };
    const bool kept = keeps && p_.K > depth_, last = group.k + depth_ >= p_.K;
    const bool add = p_.add || (group.k > 0 && !kept);
    const int64_t size = group.end - group.begin;
    for (int64_t n = 0; n < others * size; ++n) {
      const int64_t other = along_rows_ ? n % others : n / size;
      const int64_t own = group.begin + (along_rows_ ? n / others : n % size);
      const Tile rows = tile(own_panels ? other : own), columns = panel(own_panels ? own : other);
      Element* const mine = buffer + (own - group.begin) * (own_panels ? panel_size_ : tile_size_);
      wanted = destination(rows, columns);
      // A whole tile of C that there was nothing of before is written at once.
      const bool at_once = !flipped && !add && columns.count == width;
      T* const values = at_once ? c_at(rows, columns)
                        : kept  ? kept_values(group, other, own)
                                : sums.values[1 - sums.buffer];
      Wanted lines;
      if (kept && group.k > 0) ask_for(lines, values);
      if (!has_pauses && (last || !kept)) add_rows(lines, wanted);
      Tiles::multiply(own_panels ? shared_place(other) : mine, tiles_[rows.part].height, rows.count,
                      {own_panels ? mine : shared_place(other), columns.count}, segments,
                      Advance::none, values, at_once ? wanted.ld : width, &lines,
                      kept && group.k > 0, meanwhile);
      write_rest(sums);
      if (at_once || (kept && !last)) continue;
      sums.rows = rows, sums.columns = columns, sums.add = add;
      sums.buffer = 1 - sums.buffer, sums.from = values;
      sums.piece = 0, sums.pieces = blocks_of(rows.count, piece_rows) * piece_parts;
      if (!has_pauses) write_rest(sums);
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
  Destination destination(const Tile& rows, const Tile& columns) const {
    return {c_at(rows, columns), part_of(rows, columns).ldc, flipped ? columns.count : rows.count};
  }
  const ProductPart& part_of(const Tile& rows, const Tile& columns) const {
    return p_.parts[flipped ? rows.part : columns.part];
  }
  T* c_at(const Tile& rows, const Tile& columns) const {
    const ProductPart& part = part_of(rows, columns);
    const int64_t row = flipped ? columns.first : rows.first;
    return static_cast<T*>(part.c) + row * part.ldc + (flipped ? rows.first : columns.first);
  }

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
  static constexpr int64_t piece_rows = flipped ? L : 4;
  static constexpr int64_t piece_parts = flipped ? panel_vectors : 1;
  static constexpr int64_t most_pieces = blocks_of(LeftTiles::max_rows, piece_rows) * piece_parts;

  void write_rest(Sums& sums) {
    while (sums.piece < sums.pieces) write_piece(sums);
  }

  void write_piece(Sums& sums) {
    const int64_t columns = sums.columns.count;
    const int64_t piece = sums.piece++, r = piece / piece_parts * piece_rows;
    const int64_t rows = std::min(sums.rows.count - r, piece_rows);
    const int64_t ld = part_of(sums.rows, sums.columns).ldc;
    T* const c = c_at(sums.rows, sums.columns);
    const T* const values = sums.from + r * width;
    if constexpr (flipped) {
      const int64_t part = piece % piece_parts * L;
      if (part >= columns) return;
      Vec<T> square[L];
      for (int k = 0; k < L; ++k) square[k] = k < rows ? load(values + k * width + part) : Vec<T>{};
      transpose<T>(square);
      for (int64_t k = 0; k < L && part + k < columns; ++k)
        put(c + (part + k) * ld + r, square[k], int(rows), sums.add);
    } else {
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t part = 0; part < columns; part += L)
          put(c + (r + k) * ld + part, load(values + k * width + part),
              int(std::min(columns - part, L)), sums.add);
    }
  }

  static void put(T* c, Vec<T> values, int count, bool add) {
    store_some(c, add ? load_some(c, count) + values : values, count);
  }

  const ProductArgs& p_;
  const int64_t depth_;  // of a slab
  const RowTiles tiles_[ProductArgs::most_parts];
  const int64_t first_tiles_;  // of the first part
  const int64_t all_tiles_, first_panels_, all_panels_, tile_size_, panel_size_;
  const bool along_rows_;  // do others pass by one tile or panel of a group after the other?
  const int64_t group_;    // how many tiles or panels a thread packs at a time
  Scratch<Element> left_, right_, staged_;
  Scratch<T> kept_;
};

}  // namespace
}  // namespace fastlstm
