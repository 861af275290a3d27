// The products of (eq. 9): C = or += op(A) B, A and C of state type, B of storage type.
//
// K is taken a slab at a time. The side that has the most elements is divided: each thread has a
// share of it, and packs a group of tiles or panels at a time that stays in its L2 cache. A slab
// of the other side is packed once, for all threads, and passes by. Where multiplication leaves
// pauses, the next group is packed in them, the last sums are added to C, and the place of the next
// is asked for. (How it is all laid out is its Form.)
//
// A slab that stays in the L2 cache passes by each tile or panel of the group, one after the other,
// so that of a large C each thread writes some rows at a time, as memory likes it best. One that
// comes from afar passes by once for the whole group.
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

enum class Form {
  rows,     // A B. A, of which each thread has some rows, goes into tiles, and B into panels.
  columns,  // The same where B is the larger one: each thread has some of its columns.
  upright,  // A^T B, A going into tiles column by column. There may be two B, side by side.
  flipped,  // A^T B as B^T A, whose tiles of sums are transposed when they are added to C: A goes
            // into panels, which take its rows as they are, and the two B into tiles.
};
constexpr bool is_transposed(Form form) {
  return form == Form::upright || form == Form::flipped;
}

// LeftTiles says how what goes into tiles is packed, RightTiles how what goes into panels, and
// Tiles multiplies the two.
template <class LeftTiles, class RightTiles, class Tiles, Form form>
class Product {
  using Left = typename LeftTiles::S;
  using Right = typename RightTiles::S;
  using T = typename Tiles::T;
  using Element = typename Tiles::Element;
  using Operand = Blocked<LeftTiles>;
  static constexpr int64_t L = Tiles::L, width = Tiles::width, block = LeftTiles::block_columns;
  static constexpr bool flipped = form == Form::flipped;
  static constexpr bool own_panels = flipped || form == Form::columns;  // of a thread, not tiles
  static constexpr int64_t buffers = Tiles::has_pauses ? 2 : 1;  // of a thread: one is packed
  // The next group is packed while this one is multiplied, or threads do what others have not
  // begun.
  static constexpr bool helps = !Tiles::has_pauses;
  static constexpr int64_t most_values = LeftTiles::max_rows * width;  // of a tile of sums
  // Of a block of A that is packed column by column, see Packing::staged_piece.
  static constexpr int64_t staged_pieces =
      block / LeftTiles::rows_together + panel_vectors * LeftTiles::terms;
  static constexpr int64_t staged_size =
      form == Form::upright ? block * width * LeftTiles::terms : 0;
  // Without pauses sums are added slab by slab as they are multiplied, in the order in which they
  // are visited, and transposed once, at the last slab.
  static constexpr bool keeps = flipped && !Tiles::has_pauses;

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

  // A group takes a quarter of the L2 cache, and another one is packed beside it. A slab that
  // stays there too leaves less for them; one that comes from afar is to come seldom.
  // Threads that help each other do so with an eighth of a share at most.
  static int64_t group(int threads, int64_t items, int64_t size, bool stays) {
    const int64_t part = Tiles::has_pauses && stays ? 16 : 2;
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

  // A group is packed a piece at a time, in the order in which its source lies in memory. A slab
  // that is not full leaves the ends of its tiles and panels unused.
  template <bool tiles>
  class Packing {
   public:
    Packing(const Product& product, const Group& group, Element* buffer, Element* staged = nullptr)
        : p_(&product),
          buffer_(buffer),
          staged_(staged),
          begin_(group.begin),
          end_(group.end),
          item_(begin_) {
      if (begin_ == end_) return;
      depth_ = product.depth(group.k);
      first_k_ = group.k;
      const int64_t blocks = blocks_of(depth_, block);
      if constexpr (tiles) {
        for (int64_t item = begin_; item < end_; ++item)
          left_ += pieces(p_->tile(item).count) * blocks;
        enter_tile();
      } else {
        left_ = (end_ - begin_) * (blocks * block / RightTiles::rows_together);
        enter_panel();
      }
    }
    int64_t left() const { return left_; }
    void rest() {
      if constexpr (tiles && !by_columns)
        while (left_ > 0) row_piece(depth_);
      else
        while (left_ > 0) (*this)();
    }
    void operator()() {
      if constexpr (tiles && !by_columns) return row_piece(block);
      --left_;
      if constexpr (!tiles)
        panel_piece();
      else if constexpr (staged)
        staged_piece();
      else
        columns_piece();
    }

   private:
    static constexpr bool of_a = tiles != flipped;           // or of B?
    static constexpr bool by_columns = is_transposed(form);  // tiles
    static constexpr bool own = tiles != own_panels;         // of a thread
    static constexpr bool staged = tiles && form == Form::upright;
    using Source = std::conditional_t<tiles, Left, Right>;

    // Of a block of a tile.
    static int64_t pieces(int64_t rows) {
      if constexpr (staged) return staged_pieces;
      return by_columns ? blocks_of(rows, L) : rows;
    }

    // Where row first_k_ of K begins, or its column.
    void begin_at(int part) {
      const ProductArgs& p = p_->p_;
      ld_ = of_a ? p.lda : p.parts[part].ldb;
      from_ = static_cast<const Source*>(of_a ? p.a : p.parts[part].b) +
              first_k_ * (tiles && !by_columns ? 1 : ld_);
    }

    void enter_tile() {
      tile_ = p_->tile(item_);
      begin_at(flipped ? tile_.part : 0);
      operand_ = {buffer_ + (item_ - begin_) * p_->tile_size_, blocks_of(depth_, block),
                  p_->tiles_[tile_.part].height};
      enter_row();
    }

    // `row_at_` and `place_`: where the next block comes from and goes to.
    void enter_row() {
      const int64_t row = tile_.first + row_;
      row_at_ = from_ + (by_columns ? k_ * ld_ + row : row * ld_);
      place_ = operand_.data + row_ * block + k_ / block * operand_.block_size();
    }

    // Up to so many columns of one row, a piece for each block: a row of a tile after the other.
    void row_piece(int64_t columns) {
      const int64_t end = std::min(k_ + columns, depth_), stride = operand_.block_size();
      const Source* from = row_at_;
      Element* place = place_;
      int64_t k = k_;
      for (; k < end; k += block, from += block, place += stride) {
        prefetch(from + (Tiles::has_pauses ? 1 : 2) * ld_, block);
        LeftTiles::pack_block_row(place, operand_.height, from, depth_ - k);
      }
      left_ -= (k - k_) / block;
      k_ = k, row_at_ = from, place_ = place;
      if (k_ < depth_) return;
      k_ = 0;
      if (++row_ < tile_.count) return enter_row();
      row_ = 0;
      if (++item_ < end_) enter_tile();
    }

    // One block of L rows that are columns where they come from: of all tiles, and then the next.
    void columns_piece() {
      LeftTiles::pack_block_columns(place_, operand_.height, row_at_, ld_, tile_.count - row_,
                                    depth_ - k_);
      if ((row_ += L) < tile_.count) return enter_row();
      row_ = 0;
      next_block();
    }

    // The same in pieces that fit into pauses: some rows at a time as of a panel, `staged_`, and
    // then a part of that transposed.
    void staged_piece() {
      constexpr int64_t together = LeftTiles::rows_together, all = block / together;
      if (piece_ < all) {
        const Left* const row = row_at_ + piece_ * together * ld_;
        if (k_ + block < depth_)
          for (int64_t k = 0; k < together; ++k) prefetch(row + (block + k) * ld_, tile_.count);
        LeftTiles::pack_some_rows(row, ld_, depth_ - k_ - piece_ * together, tile_.count,
                                  staged_ + LeftTiles::row_offset(piece_ * together));
      } else {
        LeftTiles::transpose_block(staged_, piece_ - all, place_, operand_.height, tile_.count);
      }
      if (++piece_ < staged_pieces) return;
      piece_ = 0;
      next_block();
    }

    // Of the next tile, or of the first one again.
    void next_block() {
      if (++item_ < end_) return enter_tile();
      item_ = begin_;
      if ((k_ += block) < depth_) enter_tile();
    }

    // Where a panel's rows from k_ on come from and go to.
    void enter_panel() {
      const Tile panel = p_->panel(item_);
      begin_at(flipped ? 0 : panel.part);
      row_at_ = from_ + k_ * ld_ + panel.first;
      left_columns_ = p_->columns(panel.part) - panel.first;
      place_ = buffer_ + (item_ - begin_) * p_->panel_size_ + RightTiles::row_offset(k_);
    }

    // Some rows of one panel: of all panels, and then the next.
    void panel_piece() {
      if (own)
        for (int64_t k = 0; k < RightTiles::rows_together; ++k)
          prefetch(row_at_ + (8 + k) * ld_, width);
      RightTiles::pack_some_rows(row_at_, ld_, depth_ - k_, left_columns_, place_);
      row_at_ += width;
      place_ += p_->panel_size_;
      left_columns_ -= width;
      if (++item_ == end_) {
        item_ = begin_;
        k_ += RightTiles::rows_together;
        enter_panel();
      } else if (item_ == p_->first_panels_) {
        enter_panel();
      }
    }

    // What will be packed in some microseconds: a piece that waits for memory stops the unit too.
    // (Without pauses a group is packed in one go, and asks a row earlier.)
    template <class S>
    static void prefetch(const S* from, int64_t count) {
      const char* const bytes = reinterpret_cast<const char*>(from);
      for (int64_t k = 0; k < count * int64_t(sizeof(S)); k += 64) __builtin_prefetch(bytes + k);
    }

    const Product* p_;
    Element *buffer_, *staged_;
    int64_t begin_, end_;
    int64_t item_, row_ = 0, k_ = 0, piece_ = 0;  // which tile or panel, and what of it, is next
    Tile tile_{};
    Operand operand_{};
    int64_t left_columns_ = 0;  // of B, from a panel's first on
    const Source* row_at_ = nullptr;
    Element* place_ = nullptr;
    int64_t left_ = 0, first_k_ = 0, depth_ = 0, ld_ = 0;
    const Source* from_ = nullptr;
  };

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
      if (!Tiles::has_pauses && (last || !kept)) add_rows(lines, wanted);
      Tiles::multiply(own_panels ? shared_place(other) : mine, tiles_[rows.part].height, rows.count,
                      own_panels ? mine : shared_place(other), segments, Advance::none, values,
                      at_once ? wanted.ld : width, &lines, kept && group.k > 0, meanwhile);
      write_rest(sums);
      if (at_once || (kept && !last)) continue;
      sums.rows = rows, sums.columns = columns, sums.add = add;
      sums.buffer = 1 - sums.buffer, sums.from = values;
      sums.piece = 0, sums.pieces = blocks_of(rows.count, piece_rows) * piece_parts;
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
