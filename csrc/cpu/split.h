// How a pass is divided among threads.
//
// Sequences are independent of each other: where there are enough of them, and the weights are
// few enough for every thread's own L2 cache, each thread takes some sequences all the way, with
// nothing to wait for. Otherwise all threads walk together, each with its own share of the
// hidden units and of the weights, which others may help it with, and meet at every step.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "processor.h"
#include "vec.h"
#include "walk.h"

namespace fastlstm {
namespace {

constexpr int max_parts = 64;
// A thread is worth its barriers from this many multiply-adds a step on,
constexpr int64_t work_per_thread = 1 << 15;
// and worth its own sequences from this many on, if the weights leave room in its L2 cache.
constexpr int64_t sequences_per_thread = 4;
// With so many, arithmetic also hides that weights come from the L3 cache: some of them on Intel's
// processors, all on AMD's, whose L3 cache is three times as fast. (With few registers
// six rows are a tile; threads with fewer than two such tiles do better to share the weights.)
constexpr int64_t many_sequences = 16, some_sequences = FASTLSTM_VECTOR_REGISTERS == 32 ? 6 : 12;

// Many weights take long to pack, for each thread again: of all steps, so many of a thread's rows
// have to meet its copy, transposed and not.
constexpr int64_t rows_worth_a_copy = 256, rows_worth_a_plain_copy = 128;

// Where threads walk together, however many sequences there are.
constexpr int64_t never = 0;

// The sequences that are worth a thread of their own, which reads all weights at every step.
// `fewest`: where the weights leave room in the L2 cache. Elsewhere `rows`, of all steps, have to
// be `least` for each thread. (Threads that meet at each step hand each other h or da, and AMD's
// cores have an L3 cache for some of them: to those of another it is far. The copies of larger
// weights must find room in it, so they are fewer with many threads.)
template <class Tiles>
int64_t sequences_worth_a_thread(int64_t weight_bytes, int threads, int64_t rows, int64_t least,
                                 int64_t fewest = sequences_per_thread) {
  const int64_t l2 = l2_cache_bytes();
  if (weight_bytes <= l2 / 4 * 3) return fewest;
  if (Tiles::has_pauses || rows < least * threads) return never;
  if (is_amd() && weight_bytes <= std::min(4 * l2, 16 * l2 / threads)) return some_sequences;
  return weight_bytes <= l2 / 4 * 5 ? many_sequences : never;
}

struct Work {
  int64_t items;      // what threads that walk together can share
  int64_t step;       // multiply-adds of the widest step
  int64_t sequences;  // that are worth a thread of their own, or `never`
  int64_t ahead = 0;  // multiply-adds of a step's input part, where it is multiplied ahead
};

// Where threads meet at every step, do they help each other with their items? A step has to take
// so long that looking for what others have not begun, a few per cent of 5 us, is nothing. (It was
// measured with vectors. The matrix unit is quick, and weights of another's cache are far.)
template <class Tiles>
bool worth_helping(const Work& work, int threads) {
  return !Tiles::has_pauses && work.step >= (int64_t(1) << 20) * threads;
}

// Where threads meet at every step of a backward walk, do they hand each other sums, not da
// (exchanged_sums.h)? (It is worth one per cent to vectors, which then can't help each other. On
// the matrix unit a multiplication by a few units is over before it is in full swing.)
template <class Tiles>
bool worth_exchanging_sums(const Shape& shape, int threads) {
  return Tiles::has_pauses && threads > 1 &&
         (!spares_matrix_unit() || shape.D * shape.H >= int64_t(128) * threads);
}

struct Split {
  int threads;
  bool by_sequence;
};

// The share of sequences of one part, cut so that all parts have about as many rows.
inline Range share_of_sequences(const Shape& shape, int part, int parts) {
  const int64_t sequences = shape.T > 0 ? shape.batch_sizes[0] : 0;
  auto rows_before = [&](int64_t sequence) {
    int64_t rows = 0;
    for (int64_t t = 0; t < shape.T; ++t)
      rows += shape.batch_sizes[t] < sequence ? shape.batch_sizes[t] : sequence;
    return rows;
  };
  auto cut = [&](int64_t part) {
    int64_t low = 0, high = sequences;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (rows_before(middle) * parts < shape.N * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {cut(part), cut(part + 1)};
}

// Do parts of whole sequences share the rows about evenly? One long sequence among many short ones
// would leave the others waiting for whoever has it.
inline bool even_by_sequence(const Shape& shape, int parts) {
  for (int part = 0; part < parts; ++part) {
    const Range share = share_of_sequences(shape, part, parts);
    int64_t rows = 0;
    for (int64_t t = 0; t < shape.T; ++t) {
      const int64_t size = shape.batch_sizes[t];
      rows += (size < share.end ? size : share.end) - (size < share.begin ? size : share.begin);
    }
    if (rows * parts * 4 > shape.N * 5) return false;
  }
  return true;
}

inline Split split_work(const Shape& shape, int threads, const Work& work) {
  const int64_t sequences = shape.T > 0 ? shape.batch_sizes[0] : 0;
  int64_t size = (work.step + work.ahead) / work_per_thread;
  if (size > threads) size = threads;
  if (size > max_parts) size = max_parts;
  if (size > 1 && work.sequences != never && sequences >= work.sequences * size &&
      even_by_sequence(shape, int(size)))
    return {int(size), true};
  if (size > work.items) size = work.items;
  return {size < 1 ? 1 : int(size), false};
}

// Parts of some work that need not meet; null where there is none.
template <class Part>
struct Parts {
  Part* of[max_parts] = {};
  ~Parts() {
    for (Part* part : of) delete part;
  }
};

// body(part, Team) for each of so many parts, each by one thread alone. The team may be smaller
// than asked for: whoever is there takes them in turn.
template <class Body>
void run_parts(const Team& team, int count, const Body& body) {
  for (int k = team.rank; k < count; k += team.size) {
    Barrier alone(1);
    body(k, Team{1, 0, alone, nullptr});
  }
}

// Runs Pass, forward or backward, on its arguments, divided as split_work says. Everything is
// allocated before the threads start: an exception must not leave a parallel region. Returns
// whether the results count (see Pass::beyond).
template <class Pass, class Args>
bool run_pass(const Args& args) {
  const Split split = split_work(args.shape, args.threads, Pass::work(args));
  Parts<Pass> parts;
  const int count = split.by_sequence ? split.threads : 1;
  for (int k = 0; k < count; ++k)
    parts.of[k] = new Pass(args, share_of_sequences(args.shape, k, count));
  run_team(split.threads, [&](const Team& team) {
    if (!split.by_sequence) return parts.of[0]->walk(team);
    run_parts(team, count, [&](int k, const Team& alone) { parts.of[k]->walk(alone); });
  });
  for (int k = 0; k < count; ++k)
    if (parts.of[k]->beyond()) return false;
  Pass::finish(args, parts.of, count);
  return true;
}

}  // namespace
}  // namespace fastlstm
