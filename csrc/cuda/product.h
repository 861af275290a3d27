// The product of a block's slice of W_hh with exchanged rows, and the sums of the warps' shares.
//
// The slice is read once, before the walk, and stays in registers, what has no room there in
// shared memory. A lane's operands are its own: no other reads them, in either place. layout.h
// has the indices, and Machine what a GPU's thread can do (device.h; the tests have another).
#pragma once

#include "../gate_math.h"
#include "layout.h"

#if defined(__CUDACC__)
#  define FASTLSTM_DEVICE __device__ __forceinline__
#else
#  define FASTLSTM_DEVICE inline
#endif

namespace fastlstm {
namespace cuda {

struct alignas(piece_bytes) Piece {
  uint32_t word[piece_words];
};

// What a barrier of a block's threads comes before. It is the same to a GPU; tests leave out one.
enum class Before { sums, others, cells };  // are read; are told or multiply; are staged

// What a grid kernel is compiled for.
template <Kind kind_, Storage storage_, int pairs_, int n_tiles_>
struct Config {
  static constexpr Kind kind = kind_;
  static constexpr Storage storage = storage_;
  static constexpr int units = tile_units;
  static constexpr int pairs = warp_pairs(kind, pairs_);
  static constexpr int n_tiles = n_tiles_;
  static constexpr int sequences = n_tiles * mma_columns;
  static constexpr int m_tiles = cuda::m_tiles(kind);  // of a warp
  static constexpr int rows = m_tiles * mma_rows;      // of a block
  static constexpr int cells = cells_of_thread(sequences, units);
  static constexpr int operands = operands_of_lane(kind, pairs_);
  static constexpr int in_registers = operands_in_registers(kind, pairs_, n_tiles);
  static constexpr int operand_bytes = cuda::operand_bytes(kind, pairs_, n_tiles);
  static constexpr int shared_bytes = cuda::shared_bytes(kind, pairs_, n_tiles);
  // Where in shared memory operands that registers have no room for begin, and the sums.
  static constexpr int operands_at = 0;
  static constexpr int partials_at = operand_bytes;
  // A product waits for the one before it in its sum: where there are few sums, each is of several.
  static constexpr int chains = m_tiles * n_tiles >= 4 ? 1 : 4 / (m_tiles * n_tiles);
  // Pairs that are read from memory while the ones before them are multiplied.
  static constexpr int ahead = n_tiles == 4 ? 1 : 8 / n_tiles < pairs ? 8 / n_tiles : pairs;
  static constexpr int sharing = warps;  // the depth: each has a part of it, and all rows
  static constexpr bool rows_in_shared = false;
};

template <class C>
constexpr Instance grid_instance(int pairs, decltype(Instance::together) together,
                                 decltype(Instance::launch) launch) {
  const int most_units = pairs * bytes_of_pairs / item_size(C::storage);
  return {C::kind,    C::storage,      0,        C::units, most_units,
          C::n_tiles, C::shared_bytes, together, launch};
}

template <class C, class Machine>
class Product {
  using Element = typename Machine::template Element<C::storage>;
  using Sums = float[C::chains][C::m_tiles][C::n_tiles][4];

 public:
  // `depth`: elements of an exchanged row.
  FASTLSTM_DEVICE Product(Machine& machine, int depth)
      : machine_(machine),
        lane_(machine.thread() % lanes),
        warp_(machine.thread() / lanes),
        pieces_(depth / piece_elements(C::storage)),
        resident_(reinterpret_cast<Piece*>(machine.shared() + C::operands_at)) {}

  FASTLSTM_DEVICE int pieces() const { return pieces_; }
  FASTLSTM_DEVICE int piece(int pair) const {
    return piece_of(warp_, pair, lane_ % quads, C::sharing);
  }
  // The row of the slice with which this warp's m-th tile begins.
  FASTLSTM_DEVICE int first_row(int m) const {
    return first_row_of(warp_, m, C::m_tiles, C::sharing);
  }

  // Reads the slice: weights(row, piece) gives a piece of a row of it.
  template <class Weights>
  FASTLSTM_DEVICE void load(const Weights& weights) {
    load_from<0>(weights, 0);
  }

  // This warp's part of slice x rows. rows[n] is the exchanged row of sequence b_column(lane) of
  // the n-th eight, or null for zeros. take(m, n, sums) is given this lane's four sums of tile m
  // and the n-th eight: see c_row and c_column.
  template <class Take>
  FASTLSTM_DEVICE void multiply(const Element* const (&rows)[C::n_tiles], const Take& take) {
    Sums sum = {};
    Piece b[C::ahead][C::n_tiles];
    read<0>(rows, b, 0);
    multiply_from<0>(rows, b, sum);
#pragma unroll
    for (int m = 0; m < C::m_tiles; ++m)
#pragma unroll
      for (int n = 0; n < C::n_tiles; ++n) {
        float total[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[i] = sum[0][m][n][i];
#pragma unroll
          for (int chain = 1; chain < C::chains; ++chain) total[i] += sum[chain][m][n][i];
        }
        take(m, n, total);
      }
  }

 private:
  static FASTLSTM_DEVICE constexpr int operand(int pair, int step, int m) {
    return (pair * 2 + step) * C::m_tiles + m;
  }

  // Recursions over pairs, not loops: an index into an array of registers must be a constant, and
  // long loops are not sure to be unrolled.
  template <int pair, class Weights>
  FASTLSTM_DEVICE void load_from(const Weights& weights, int zero) {
    const int p = piece(pair) + zero;
    uint32_t some = 0;
#pragma unroll
    for (int m = 0; m < C::m_tiles; ++m) {
      Piece half[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (p < pieces_) half[h] = weights(first_row(m) + a_row(lane_, h), p);
      some |= half[0].word[0] | half[1].word[0];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Piece a;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a.word[i] = Machine::template operand<C::storage>(half[i % 2].word[2 * step + i / 2]);
        keep(operand(pair, step, m), a);
      }
    }
    if constexpr (pair + 1 < C::pairs) load_from<pair + 1>(weights, Machine::zero_after(some));
  }

  // Multiplies the pairs from `first` on, whose pieces are in b, while the next ones are read.
  template <int first>
  FASTLSTM_DEVICE void multiply_from(const Element* const (&rows)[C::n_tiles],
                                     const Piece (&b)[C::ahead][C::n_tiles], Sums& sum) {
    constexpr int next = first + C::ahead;
    Piece following[C::ahead][C::n_tiles];
    // Two groups are on their way, and no more.
    uint32_t some = 0;
#pragma unroll
    for (int n = 0; n < C::n_tiles; ++n)
#pragma unroll
      for (int chain = 0; chain < C::chains; ++chain)
        some |= Machine::bits(sum[chain][C::m_tiles - 1][n][0]);
    const int zero = first > 0 ? Machine::zero_after(some) : 0;
    if constexpr (next < C::pairs) read<next>(rows, following, zero);
#pragma unroll
    for (int k = 0; k < C::ahead; ++k)
      if (first + k < C::pairs) multiply_pair(first + k, b[k], sum, zero);
    if constexpr (next < C::pairs) multiply_from<next>(rows, following, sum);
  }

  template <int first>
  FASTLSTM_DEVICE void read(const Element* const (&rows)[C::n_tiles],
                            Piece (&b)[C::ahead][C::n_tiles], int zero) {
    // From the first piece on, all others are a constant distance away.
    const int start = piece(0) + zero;
#pragma unroll
    for (int k = 0; k < C::ahead; ++k)
#pragma unroll
      for (int n = 0; n < C::n_tiles; ++n) {
        constexpr int distance = C::sharing * quads;
        b[k][n] = Piece{};
        // Rows in shared memory are there, all of them: a look at their address would cost time.
        const bool there = C::rows_in_shared || rows[n] != nullptr;
        if (first + k < C::pairs && there && start + (first + k) * distance < pieces_)
          b[k][n] = row_piece(rows[n] + start * piece_elements(C::storage) +
                              (first + k) * distance * piece_elements(C::storage));
      }
  }
  FASTLSTM_DEVICE Piece row_piece(const Element* from) const {
    if constexpr (C::rows_in_shared)
      return machine_.load_shared(reinterpret_cast<const Piece*>(from));
    else
      return machine_.load_row(from);
  }

  FASTLSTM_DEVICE void keep(int operand, const Piece& a) {
    if (operand < C::in_registers)
      a_[operand] = a;
    else
      resident_[shared_operand(operand, C::in_registers, machine_.thread())] = a;
  }
  FASTLSTM_DEVICE Piece kept(int operand, int zero) const {
    if (operand < C::in_registers) return a_[operand];
    return resident_[shared_operand(operand, C::in_registers, machine_.thread()) + zero];
  }

  FASTLSTM_DEVICE void multiply_pair(int pair, const Piece (&b)[C::n_tiles], Sums& sum, int zero) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t lo[C::n_tiles], hi[C::n_tiles];
#pragma unroll
      for (int n = 0; n < C::n_tiles; ++n) {
        lo[n] = Machine::template operand<C::storage>(b[n].word[2 * step]);
        hi[n] = Machine::template operand<C::storage>(b[n].word[2 * step + 1]);
      }
#pragma unroll
      for (int m = 0; m < C::m_tiles; ++m) {
        const Piece a = kept(operand(pair, step, m), zero);
#pragma unroll
        for (int n = 0; n < C::n_tiles; ++n)
          machine_.template multiply_add<C::storage>(sum[(2 * pair + step) % C::chains][m][n], a,
                                                     lo[n], hi[n]);
      }
    }
  }

  Machine& machine_;
  const int lane_, warp_, pieces_;
  Piece* const resident_;
  Piece a_[C::in_registers];
};

// The sums of the warps that share a product's depth, in shared memory.
template <class C, class Machine>
class Partials {
 public:
  explicit FASTLSTM_DEVICE Partials(Machine& machine)
      : machine_(machine), at_(reinterpret_cast<float*>(machine.shared() + C::partials_at)) {}

  // Of a product, by its warps; the sums are there once all threads have come past a barrier.
  FASTLSTM_DEVICE void put(int m, int n, const float (&sums)[4]) {
    const int warp = machine_.thread() / lanes, lane = machine_.thread() % lanes;
    const int share = warp % C::sharing, first = first_row_of(warp, m, C::m_tiles, C::sharing);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      machine_.store_shared(at_ + partial_of(share, n * mma_columns + c_column(lane, i),
                                             first + c_row(lane, i), C::rows, C::sequences),
                            sums[i]);
  }

  // The sum over all shares of the depth for row m of sequence n.
  FASTLSTM_DEVICE float sum(int n, int m) const {
    float total = 0;
#pragma unroll
    for (int share = 0; share < C::sharing; ++share)
      total += machine_.load_shared(at_ + partial_of(share, n, m, C::rows, C::sequences));
    return total;
  }
  // The same for rows 4m to 4m + 3.
  FASTLSTM_DEVICE Gates<float> sum_of_four(int n, int m) const {
    Gates<float> total{};
#pragma unroll
    for (int share = 0; share < C::sharing; ++share) {
      const Gates<float> part =
          machine_.load_shared_four(at_ + partial_of(share, n, 4 * m, C::rows, C::sequences));
      total.i += part.i;
      total.f += part.f;
      total.g += part.g;
      total.o += part.o;
    }
    return total;
  }

 private:
  Machine& machine_;
  float* const at_;
};

}  // namespace cuda
}  // namespace fastlstm
