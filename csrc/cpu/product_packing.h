// How the operands of the products of (eq. 9) (product.h) are packed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "operand.h"

namespace fastlstm {
namespace {

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

// A group is packed a piece at a time, in the order in which its source lies in memory. A slab
// that is not full leaves the ends of its tiles and panels unused.
template <class Product, bool tiles>
class ProductPacking {
  using LeftTiles = typename Product::LeftOf;
  using RightTiles = typename Product::RightOf;
  using Left = typename LeftTiles::S;
  using Right = typename RightTiles::S;
  using Element = typename Product::Element;
  using Operand = typename Product::Operand;
  using Group = typename Product::Group;
  using Tile = typename Product::Tile;
  static constexpr int64_t L = Product::L, width = Product::width, block = Product::block;
  static constexpr int64_t staged_pieces = Product::staged_pieces;
  static constexpr bool flipped = Product::flipped, own_panels = Product::own_panels;
  static constexpr bool has_pauses = Product::has_pauses;

 public:
  ProductPacking(const Product& product, const Group& group, Element* buffer,
                 Element* staged = nullptr)
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
  static constexpr bool of_a = tiles != flipped;                       // or of B?
  static constexpr bool by_columns = is_transposed(Product::form_of);  // tiles
  static constexpr bool own = tiles != own_panels;                     // of a thread
  static constexpr bool staged = tiles && Product::form_of == Form::upright;
  static constexpr bool asks_for_columns = FASTLSTM_VECTOR_REGISTERS == 16;  // measured with AVX2
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
      prefetch(from + (has_pauses ? 1 : 2) * ld_, block);
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
    if (asks_for_columns && k_ + block < depth_)
      for (int64_t k = 0; k < block; ++k) prefetch(row_at_ + (block + k) * ld_, 1);
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

}  // namespace
}  // namespace fastlstm
