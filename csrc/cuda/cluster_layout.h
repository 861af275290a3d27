// Who owns what in a thread block cluster, and where it lies in shared memory.
//
// A team is a cluster of 8 or 16 blocks, which owns all hidden units of one direction and slice:
// block `rank` those from rank * units on. A block without units waits for the end. Each block
// keeps the rows of W_hh that make the gates of its units, and multiplies them
//
//   forward   (4 * units, H) x (H, sequences)   with h, which it has received from all blocks
//   backward  (H, 4 * units) x (4 * units, sequences)   transposed, with its own units' da
//
// Forward, four warps share the depth and each four have half of the rows: with more to share it,
// more sums would go through shared memory, with fewer more rows of h. The backward product's depth
// is what a block owns: a warp has rows of its own, sums of them all, and sends each to the block
// that owns the unit, which adds what it has received from all blocks, in the order of their ranks.
//
// Shared memory has two mailboxes, for what arrives while what arrived before is still in use.
#pragma once

#include "product.h"

namespace fastlstm {
namespace cuda {

constexpr int mailboxes = 2;
constexpr int mailbox_barriers_bytes = mailboxes * 8;
constexpr int most_expected_bytes = (1 << 20) - 1;  // that an mbarrier can count
// Lanes read pieces of two rows at a time: the second row's are in the other half of the banks.
constexpr int row_padding = 64;

// --- what there is -----------------------------------------------------------------------

FASTLSTM_HOST_DEVICE constexpr int cluster_units(int blocks, int units) {
  return blocks * units;
}
// The widest layers are held by 16 blocks of 32 units, or by as many of floats as take no more
// bytes. All operands are in registers, which blocks of 32 units have none left of for the sums of
// 32 sequences.
FASTLSTM_HOST_DEVICE constexpr bool is_compiled(Storage storage, int blocks, int units,
                                                int n_tiles) {
  return cluster_units(blocks, units) * item_size(storage) <= 1024 && units * n_tiles <= 64;
}

// --- the product ---------------------------------------------------------------------------

// Warps that share the depth.
FASTLSTM_HOST_DEVICE constexpr int cluster_sharing(Kind kind) {
  return kind == Kind::forward ? 4 : 1;
}
// Rows of a block's product, and its depth in elements.
FASTLSTM_HOST_DEVICE constexpr int cluster_rows(Kind kind, int blocks, int units) {
  return kind == Kind::forward ? 4 * units : cluster_units(blocks, units);
}
FASTLSTM_HOST_DEVICE constexpr int cluster_depth(Kind kind, int blocks, int units) {
  return kind == Kind::forward ? cluster_units(blocks, units) : 4 * units;
}
FASTLSTM_HOST_DEVICE constexpr int cluster_m_tiles(Kind kind, int blocks, int units) {
  return cluster_rows(kind, blocks, units) / mma_rows / (warps / cluster_sharing(kind));
}
FASTLSTM_HOST_DEVICE constexpr int cluster_pairs(Kind kind, Storage storage, int blocks,
                                                 int units) {
  return cluster_depth(kind, blocks, units) * item_size(storage) /
         (cluster_sharing(kind) * quads * piece_bytes);
}

// --- mailboxes -----------------------------------------------------------------------------

FASTLSTM_HOST_DEVICE constexpr int row_bytes(int elements, Storage storage) {
  return elements * item_size(storage) + row_padding;
}
// Of floats that a block receives: its units' shares from block `rank`, sequence n of an eight in
// neighbouring lanes' stores of 8 bytes. Swapped so that a warp's loads, which go along the units,
// are spread over the banks.
FASTLSTM_HOST_DEVICE constexpr int share_of(int rank, int n, int unit, int units, int n_tiles) {
  return ((rank * n_tiles + n / mma_columns) * units + unit) * mma_columns +
         (n % mma_columns / 2 ^ unit / 4 % 4) * 2 + n % 2;
}

// What a cluster kernel is compiled for.
template <Kind kind_, Storage storage_, int blocks_, int units_, int n_tiles_>
struct ClusterConfig {
  static constexpr Kind kind = kind_;
  static constexpr Storage storage = storage_;
  static constexpr int blocks = blocks_;
  static constexpr int units = units_;
  static constexpr int pairs = cluster_pairs(kind, storage, blocks, units);
  static constexpr int n_tiles = n_tiles_;
  static constexpr int sequences = n_tiles * mma_columns;
  static constexpr int m_tiles = cluster_m_tiles(kind, blocks, units);  // of a warp
  static constexpr int rows = cluster_rows(kind, blocks, units);
  static constexpr int cells = cells_of_thread(sequences, units);
  static constexpr int operands = m_tiles * 2 * pairs;
  static constexpr int in_registers = operands;
  static constexpr int sharing = cluster_sharing(kind);
  static constexpr bool rows_in_shared = true;
  // Not by n_tiles: the bits of a sum do not depend on how the sequences are cut into slices.
  static constexpr int chains = m_tiles >= 4 ? 1 : 4 / m_tiles;
  static constexpr int ahead = pairs < 2 ? pairs : 2;

  // Bytes of an exchanged row, and of what a block receives each time, at most.
  static constexpr int row = row_bytes(cluster_depth(kind, blocks, units), storage);
  static constexpr int mailbox_bytes =
      kind == Kind::forward ? sequences * row : blocks * units * sequences * 4;
  static_assert(mailbox_bytes <= most_expected_bytes, "more bytes than an mbarrier counts");
  // Shared memory, in this order.
  static constexpr int barriers_at = 0;
  static constexpr int operands_at = barriers_at + mailbox_barriers_bytes;  // none
  static constexpr int partials_at = operands_at;
  static constexpr int mailboxes_at =
      partials_at + (kind == Kind::forward ? partial_bytes(rows, sequences, sharing) : 0);
  // Of one's own: h (sequences, units), or two times da (sequences, row).
  static constexpr int own_at = mailboxes_at + mailboxes * mailbox_bytes;
  static constexpr int shared_bytes =
      own_at + (kind == Kind::forward ? sequences * units * item_size(storage)
                                      : mailboxes * sequences * row);
};

template <class C>
constexpr Instance cluster_instance(decltype(Instance::together) together,
                                    decltype(Instance::launch) launch) {
  return {C::kind,    C::storage,      C::blocks, C::units, cluster_units(C::blocks, C::units),
          C::n_tiles, C::shared_bytes, together,  launch};
}

}  // namespace cuda
}  // namespace fastlstm
