// Who owns what, and who waits for whom: every index that the kernels compute, as plain functions.
//
// A block owns a tile of hidden units, in one direction and one slice of 8 * n_tiles sequences.
// The blocks of one (direction, slice) are a team. At each step a block of the grid kernel, whose
// tiles have 16 units, multiplies its slice of W_hh with the rows that its team exchanges (those
// of a cluster: cluster_layout.h):
//
//   forward   (64, H)  x (H, sequences)    64 rows: four gates of 16 units; h is exchanged
//   backward  (16, 4H) x (4H, sequences)   16 rows: one of each unit; da is exchanged
//
// The weights are the M side of the tensor cores' product, the sequences the N side, in tiles of
// 16 x 8. The depth K is shared out among the warps, in *pieces* of 16 bytes of an exchanged row:
// a lane reads whole pieces from memory straight into the registers that the product takes them
// from. This permutes K, in the same way for both operands, which no sum minds. Four lanes (a quad
// index each) take four neighbouring pieces, which is the depth of a *pair* of products.
//
// In 4-byte words the layouts of m16n8k16 (fp16, bf16: two elements a word) and of m16n8k8 (tf32:
// one) are the same. Of lane l with g = l / 4, q = l % 4:
//
//   A (16 x 8 words)  a0 (g, q)   a1 (g + 8, q)   a2 (g, q + 4)   a3 (g + 8, q + 4)
//   B (8 words x 8)   b0 (q, g)   b1 (q + 4, g)
//   C (16 x 8)        c0 (g, 2q)  c1 (g, 2q + 1)  c2 (g + 8, 2q)  c3 (g + 8, 2q + 1)
//
// so of the four words of a piece, the pair's first product takes words 0 and 1 as columns q and
// q + 4, and the second takes words 2 and 3.
#pragma once

#include "args.h"

#if defined(__CUDACC__)
#  define FASTLSTM_HOST_DEVICE __host__ __device__
#else
#  define FASTLSTM_HOST_DEVICE
#endif

namespace fastlstm {
namespace cuda {

constexpr int lanes = 32;
constexpr int warps = 8;
constexpr int threads = warps * lanes;
constexpr int tile_units = 16;
constexpr int mma_rows = 16, mma_columns = 8;
constexpr int quads = 4;
constexpr int piece_bytes = 16, piece_words = 4;

FASTLSTM_HOST_DEVICE constexpr int item_size(Storage storage) {
  return storage == Storage::f32 ? 4 : 2;
}
FASTLSTM_HOST_DEVICE constexpr int piece_elements(Storage storage) {
  return piece_bytes / item_size(storage);
}
FASTLSTM_HOST_DEVICE constexpr int divided_up(int n, int by) {
  return (n + by - 1) / by;
}

// --- blocks and teams --------------------------------------------------------------------

FASTLSTM_HOST_DEVICE constexpr int tiles_of(int hidden, int units = tile_units) {
  return divided_up(hidden, units);
}

// Slices of the sequences, each of one team for each direction.
FASTLSTM_HOST_DEVICE constexpr int slices_of(int rows_per_step, int sequences) {
  return divided_up(rows_per_step, sequences);
}
FASTLSTM_HOST_DEVICE constexpr int direction_of(int team, int slices) {
  return team / slices;
}
FASTLSTM_HOST_DEVICE constexpr int first_sequence(int team, int slices, int sequences) {
  return team % slices * sequences;
}

// --- the product ---------------------------------------------------------------------------

FASTLSTM_HOST_DEVICE constexpr int m_tiles(Kind kind) {
  return (kind == Kind::forward ? 4 : 1) * tile_units / mma_rows;
}
// Elements of an exchanged row.
FASTLSTM_HOST_DEVICE constexpr int depth(Kind kind, int hidden) {
  return kind == Kind::forward ? hidden : 4 * hidden;
}
// A warp's pairs in the kernel for rows of h of up to 512 * pairs bytes. Rows of da are four times
// as long; where one M tile is a quarter of the forward kernel's four, that is as many products.
FASTLSTM_HOST_DEVICE constexpr int warp_pairs(Kind kind, int pairs) {
  return kind == Kind::forward ? pairs : 4 * pairs;
}
constexpr int bytes_of_pairs = warps * quads * piece_bytes;

// `sharing`: so many warps share the depth, each group of them with rows of its own.
//
// The piece that lane `quad` of a warp's pair takes.
FASTLSTM_HOST_DEVICE constexpr int piece_of(int warp, int pair, int quad, int sharing = warps) {
  return (pair * sharing + warp % sharing) * quads + quad;
}
// The row of the slice with which a warp's m-th tile begins, of m_tiles.
FASTLSTM_HOST_DEVICE constexpr int first_row_of(int warp, int m, int m_tiles, int sharing) {
  return (warp / sharing * m_tiles + m) * mma_rows;
}
// The tile whose block publishes a piece. H is a multiple of 8, so no piece is in two gates or two
// tiles.
FASTLSTM_HOST_DEVICE constexpr int producer_of(int piece, int elements, int hidden) {
  return piece * elements % hidden / tile_units;
}

// The row of W_hh (4H, H) that is row m of a block's slice, forward: the gates of a unit are
// neighbours. Its unit may be beyond H.
FASTLSTM_HOST_DEVICE constexpr int unit_of_row(int tile, int m, int units) {
  return tile * units + m / 4;
}
FASTLSTM_HOST_DEVICE constexpr int gate_of_row(int m) {
  return m % 4;
}

// Of the product's operands and result.
FASTLSTM_HOST_DEVICE constexpr int a_row(int lane, int half) {
  return lane / quads + 8 * half;
}
FASTLSTM_HOST_DEVICE constexpr int b_column(int lane) {
  return lane / quads;
}
FASTLSTM_HOST_DEVICE constexpr int c_row(int lane, int i) {
  return lane / quads + 8 * (i / 2);
}
FASTLSTM_HOST_DEVICE constexpr int c_column(int lane, int i) {
  return lane % quads * 2 + i % 2;
}

// --- sums of the warps ---------------------------------------------------------------------

// Where the part of the sum for row m and sequence n is left that is the share-th of the depth. The
// four floats between the sequences spread both the stores of a product's result and the loads of a
// cell over all banks.
FASTLSTM_HOST_DEVICE constexpr int partial_of(int share, int n, int m, int rows, int sequences) {
  return (share * sequences + n) * (rows + 4) + m;
}
FASTLSTM_HOST_DEVICE constexpr int partial_bytes(int rows, int sequences, int sharing = warps) {
  return sharing * sequences * (rows + 4) * 4;
}

// --- cells ---------------------------------------------------------------------------------

// A thread owns cells thread, thread + 256, ... of the block's units x sequences.
FASTLSTM_HOST_DEVICE constexpr int cells_of_thread(int sequences, int units) {
  return divided_up(sequences * units, threads);
}
FASTLSTM_HOST_DEVICE constexpr int cell_unit(int thread, int k, int units) {
  return (thread + k * threads) % units;
}
FASTLSTM_HOST_DEVICE constexpr int cell_sequence(int thread, int k, int units) {
  return (thread + k * threads) / units;
}

// --- registers -----------------------------------------------------------------------------

// A lane's operands of the weights, 16 bytes each, of which so many are in registers and the rest
// in shared memory.
FASTLSTM_HOST_DEVICE constexpr int operands_of_lane(Kind kind, int pairs) {
  return m_tiles(kind) * 2 * warp_pairs(kind, pairs);
}
FASTLSTM_HOST_DEVICE constexpr int operands_in_registers(Kind kind, int pairs, int n_tiles) {
  // What a walk needs beside them grows with the sequences.
  const int most = kind == Kind::forward ? (n_tiles == 4 ? 16 : 32)
                   : n_tiles == 4        ? 24
                   : n_tiles == 2        ? 28
                                         : 32;
  const int all = operands_of_lane(kind, pairs);
  return all < most ? all : most;
}
// The widest rows with the most sequences would take more registers or shared memory than there is.
FASTLSTM_HOST_DEVICE constexpr bool is_compiled(Kind kind, int pairs, int n_tiles) {
  return kind == Kind::backward || pairs <= 4 || n_tiles <= 2;
}
FASTLSTM_HOST_DEVICE constexpr int shared_operand(int operand, int in_registers, int thread) {
  return (operand - in_registers) * threads + thread;
}
FASTLSTM_HOST_DEVICE constexpr int operand_bytes(Kind kind, int pairs, int n_tiles) {
  return (operands_of_lane(kind, pairs) - operands_in_registers(kind, pairs, n_tiles)) * threads *
         piece_bytes;
}
FASTLSTM_HOST_DEVICE constexpr int shared_bytes(Kind kind, int pairs, int n_tiles) {
  return operand_bytes(kind, pairs, n_tiles) +
         partial_bytes(m_tiles(kind) * mma_rows, n_tiles * mma_columns);
}

}  // namespace cuda
}  // namespace fastlstm
