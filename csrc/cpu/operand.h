// How matrices are laid out and cut for the products of a walk, whoever multiplies them.
//
// A pass multiplies a *blocked* matrix of activations by *panels* of weights, a tile of rows at a
// time, through a `Tiles`: VectorTiles (vector_tiles.h), AmxTiles (amx_tiles.h) or DotTiles
// (dot_tiles.h). They have
//   S, T, Element       storage type, state type, and what blocks and panels are made of
//   max_rows            of a tile
//   block_columns       of a block, a multiple of L
//   Rows                how rows that are not packed are read and multiplied (row_products.h)
//   terms               how many matrices of Elements stand for one blocked matrix
//   panel_size(k)       Elements of k rows of a panel, which is panel_width<T> columns wide
//   put                 writes L values into a blocked matrix, of which `count` belong to it
//   pack_transposed, pack_rows                          write a panel
//   rows_together, row_offset, pack_some_rows           write so many rows of a panel, which are
//                       there from row_offset(k) on; k_size of them exist
//   pack_block_row, pack_block_columns                  write one block from a row of a matrix, or
//                       from up to L columns of it, transposed; `count` and `depth` are what is
//                       there of them
//   transpose_block     writes a part of a block from one of a panel (Form::upright, product.h)
//   multiply            a tile times a Panel, which may be added to what is there
//   pair_rows, multiply_pair   a tile of up to so many rows times two panels is faster at once
//   in_place            whether one row can be multiplied by weights that are not packed
//   gate_by_gate        whether of da, where it is too large for the L2 cache, a gate's part is
//                       multiplied by all panels before the next one's is (backward.h)
//   asks                whether multiply asks for what is Wanted
//   has_pauses, pauses  whether multiply calls what is given as `meanwhile` while it waits, and
//                       how often
//   overlaps            whether that is worth doing for cells, with a tile of so many rows
//   few_rows            up to so many rows all items are multiplied before any of their cells
//   walk_rows           of a tile of a walk, given a step's rows and a panel's Elements: max_rows,
//                       or pair_rows where it is to be multiplied by two panels
//   ahead, ahead_rows(inputs, rows), Inputs  see forward.h
//   own_sequences       that a thread should have to walk backward with many weights by itself
//   Session             held by a thread while it multiplies
// What writes Elements of a walk returns nonzero if a value was beyond what may be multiplied. (Of
// products it is known before; what packs blocks for them returns nothing.)
#pragma once

#include "storage.h"

namespace fastlstm {
namespace {

// A pass, whose threads note if there was such a value. Then nothing that was written counts.
class FindsBeyond {
 public:
  bool beyond() const { return beyond_; }
  void note(unsigned beyond) {
    if (beyond) __atomic_store_n(&beyond_, true, __ATOMIC_RELAXED);
  }

 private:
  bool beyond_ = false;
};

constexpr int panel_vectors = 2;
template <class T>
constexpr int panel_width = panel_vectors * lanes<T>;

constexpr int64_t blocks_of(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// K in several parts (the inputs and the hidden state, or the four gates), each in blocks of its
// own.
struct Segments {
  int64_t count;
  int64_t size[4];
};

// A panel of weights. Its first `columns` are wanted, or all if it has fewer: a vector without any
// of them may be computed and written, or not.
template <class Element>
struct Panel {
  const Element* first;
  int64_t columns;
};
// Panels side by side.
template <class Element>
struct Panels {
  const Element* first;
  int64_t distance;
};
// Where the products of a tile's rows with each of them go.
template <class T>
struct Target {
  T* first;
  int64_t row_distance, distance;
};

// What a multiplication does about a panel that is not in the L2 cache: nothing, or ask for its
// rows in advance: so few ahead that they come just in time, or more of them, into the L2 cache.
enum class Advance { none, near, far };

// Pairs of cache lines to ask for, a few at a time, while a tile is multiplied: all at once they
// would keep the multiplication's own loads waiting.
struct Wanted {
  static constexpr int64_t capacity = 512;
  const char* pairs[capacity];
  int64_t count = 0;

  bool has_room(int64_t pairs) const { return count + pairs <= capacity; }
  void add(const void* pair) { pairs[count++] = static_cast<const char*>(pair); }
};

FASTLSTM_INLINE void ask_for(const char* pair) {
  __builtin_prefetch(pair, 0, 2);
  __builtin_prefetch(pair + 64, 0, 2);
}

// Nothing to be done meanwhile.
struct Idle {
  void operator()() {}
};

// A number of pieces of work, spread evenly over a number of pauses. `work()` does the next piece.
template <class Work>
class Spread {
 public:
  Spread(Work& work, int64_t pieces, int64_t pauses)
      : work_(work), pieces_(pieces), pauses_(pauses), left_(pieces) {}
  void operator()() {
    for (due_ += pieces_; due_ >= pauses_ && left_ > 0; due_ -= pauses_, --left_) work_();
  }
  void rest() {
    for (; left_ > 0; --left_) work_();
  }

 private:
  Work& work_;
  const int64_t pieces_, pauses_;
  int64_t left_, due_ = 0;
};

// How rows are cut into tiles: into as few as can be, and of nearly equal height, since a thin
// last tile would waste the pipelines.
struct RowTiles {
  int64_t height;

  RowTiles(int64_t rows, int64_t max_rows)
      : height(rows > 0 ? blocks_of(rows, blocks_of(rows, max_rows)) : 1) {}
  int64_t count(int64_t rows) const { return blocks_of(rows, height); }
  int64_t end(int64_t tile, int64_t rows) const {
    return (tile + 1) * height < rows ? (tile + 1) * height : rows;
  }
};

// A matrix in the order in which tiles read it: tile by tile, within a tile block by block of
// columns, within a block term by term and row by row. A tile is one run of memory, every address
// in it a constant away from one pointer, and no two rows alias in the cache whatever the sizes.
template <class Tiles>
struct Blocked {
  using Element = typename Tiles::Element;
  static constexpr int64_t columns = Tiles::block_columns;

  Element* data;
  int64_t blocks, height;

  // How many blocks a segment of `size` columns takes.
  static int64_t count(int64_t size) { return blocks_of(size, columns); }
  static int64_t size(int64_t blocks, int64_t rows, const RowTiles& tiles) {
    return tiles.count(rows) * tiles.height * blocks * Tiles::terms * columns;
  }
  Element* tile(int64_t tile) const { return data + tile * blocks * block_size(); }
  int64_t block_size() const { return Tiles::terms * height * columns; }
  // Where the columns from `column` on of the segment that begins with `block` are.
  Element* at(int64_t row, int64_t block, int64_t column) const {
    return tile(row / height) + (block + column / columns) * block_size() + row % height * columns +
           column % columns;
  }

  template <class V>
  unsigned put(Element* place, V values, int count) const {
    return Tiles::put(place, height * columns, values, count);
  }
  // One row of a segment, from `size` consecutive values, or zeros without any.
  unsigned put_row(int64_t row, int64_t block, const typename Tiles::S* values,
                   int64_t size) const {
    constexpr int64_t L = lanes<typename Tiles::T>;
    unsigned beyond = 0;
    Element* place = at(row, block, 0);
    for (int64_t k = 0; k < size; k += L) {
      const int64_t offset = k / columns * block_size() + k % columns;
      const int some = int(size - k < L ? size - k : L);
      beyond |= put(place + offset, values ? load_some(values + k, some) : Vec<typename Tiles::T>{},
                    some);
    }
    return beyond;
  }
};

}  // namespace
}  // namespace fastlstm
