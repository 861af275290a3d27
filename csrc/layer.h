// The layer contract: what a kernel is given, and what it must write.
//
// A layer is all its directions, run together over packed rows: row `start[t] + b` is step t of
// sequence b, for b < batch_sizes[t], where start[t] is the sum of the batch sizes before t.
// batch_sizes never increases; a padded batch is the case of equal sizes. Sequences
// b >= batch_sizes[0] have no steps: their final state is their initial state. The reverse
// direction (d == 1) starts each sequence at that sequence's own last step.
//
// Letters: N rows, T steps, B sequences, D directions, I inputs, H hidden (cell) size, P output
// size (H without a projection). Every pointer is to a dense row-major array of the shape beside
// it; none aliases another. Storage is float, double, fp16 or bf16; "state" is float for the
// half-precision types, else the storage type. A pointer marked "or null" may be absent.
#pragma once

#include <cstdint>

namespace fastlstm {

enum class Storage { f32, f64, f16, bf16 };

constexpr int max_directions = 2;

struct Shape {
  int64_t T, N, B, D, I, H, P;
  const int64_t* batch_sizes;  // (T)
};

struct ForwardArgs {
  Shape shape;
  Storage storage;
  int threads;                       // at most so many; fewer where the work is small
  const void* x;                     // (N, I)
  const void* h0;                    // (D, B, P)
  const void* c0;                    // (D, B, H)
  const void* w_ih[max_directions];  // (4H, I), gate order i f g o
  const void* w_hh[max_directions];  // (4H, P)
  const void* bias[max_directions];  // (4H), or null
  const void* w_hr[max_directions];  // (P, H), or null
  const uint8_t* reset;              // (N), 1 marks the first step of a new segment; or null
  void* y;                           // (N, D*P)
  void* h_n;                         // (D, B, P)
  void* c_n;                         // (D, B, H)
  void* c_all;                       // (N, D*H), state; or null
  void* gates;                       // (N, D, 4H), after activation; or null
  void* m;                           // (N, D*H), the unprojected h; or null
};

// What a forward pass makes of tangents (eq. 10). The members of ForwardArgs are those of the
// tangents, but for weights and reset: x, bias and gates are null, and I is 0, since `pre` has what
// the walk need not make. Storage is the state type.
struct TangentArgs : ForwardArgs {
  const void* layer_c0;     // (D, B, H): the layer's own
  const void* layer_c_all;  // (N, D*H)
  const void* layer_gates;  // (N, D, 4H)
  void* pre;  // (N, D, 4H): of the pre-activations, but for W_hh h', which is added in place
};

// What differentiates the cells of a backward pass again (eq. 11), step by step from the last one.
// Storage is the state type, and d is the gradient that reaches a tangent, from the backward pass.
struct CurvatureArgs {
  Shape shape;  // I and P do not matter
  Storage storage;
  int threads;
  const uint8_t* reset;    // (N), or null
  const void* c0;          // (D, B, H)
  const void* c_all;       // (N, D*H)
  const void* gates;       // (N, D, 4H)
  const void* c0_tangent;  // (D, B, H)
  const void* c_tangents;  // (N, D*H)
  const void* a_tangents;  // (N, D, 4H)
  const void* dm;          // (N, D*H)
  const void* dc_all;      // (N, D*H), from outside; or null
  const void* dc_n;        // (D, B, H), or null
  const void* m;           // (N, D*H), what reaches m_t besides; or null
  void* a_out;             // (N, D, 4H), what reaches the pre-activations here
  void* c_out;             // (N, D*H), what reaches every c_t
  void* c0_out;            // (D, B, H)
};

struct BackwardArgs {
  Shape shape;
  Storage storage;
  int threads;
  const void* dy;                    // (N, D*P), or null
  const void* dc_all;                // (N, D*H), state; or null
  const void* dh_n;                  // (D, B, P), or null
  const void* dc_n;                  // (D, B, H), or null
  const void* c0;                    // (D, B, H)
  const void* w_hh[max_directions];  // (4H, P)
  const void* w_hr[max_directions];  // (P, H), or null
  const uint8_t* reset;              // (N), or null
  const void* c_all;                 // (N, D*H), state
  const void* gates;                 // (N, D, 4H)
  // The walk may be cut into several calls. This one undoes steps [begin, end), counted in the
  // order in which they are undone, of all T that have rows; first_row[d] is the first packed row
  // that direction d then has, and da and dh_all hold this call's rows only.
  int64_t begin, end;
  int64_t first_row[max_directions];
  void* da;        // (rows, D, 4H), state: gradients of the pre-activations
  void* dh_all;    // (rows, D*P), state: gradients of every h_t; or null
  void* dbias;     // (D, 4H), state: da summed over these rows; or null
  void* dh0;       // (D, B, P), or null; written as sequences end, so the same for all calls
  void* dc0;       // (D, B, H), or null; likewise
  void* da_carry;  // (D, B, 4H), state: what a call leaves for the next; null if it is the only one
  void* dc_carry;  // (D, B, H), state; likewise
};

// The gates and cells of one direction, forward, whose every h is known. `gates` may be `pre` where
// storage is the state type.
struct RecomputeArgs {
  Shape shape;  // D is 1; I and P do not matter
  Storage storage;
  int threads;
  const void* pre;       // (N, 4H), state: (eq. 1)
  const void* c0;        // (B, H)
  const uint8_t* reset;  // (N), or null
  void* c_all;           // (N, H), state
  void* gates;           // (N, 4H)
  void* m;               // (N, H), or null
};

// One B that a product's A is multiplied by, and where the result goes; N = 0 for none.
struct ProductPart {
  int64_t N;
  const void* b;  // (K, N)
  int64_t ldb;
  void* c;  // (M, N), state
  int64_t ldc;
};

// C (M, N) = or += op(A) B, rows ld elements apart: one of the products that follow a walk, (eq.
// 9), or two that share A^T. Where storage is bf16, A may be rounded to it first.
struct ProductArgs {
  static constexpr int most_parts = 2;

  int64_t M, K;
  Storage storage;  // of B
  int threads;
  bool transposed;  // op(A) is A^T, A then being (K, M)
  bool add;
  bool bounded;   // no value of A is too large for its terms; what Kernels::backward said of it
  const void* a;  // (M, K), or (K, M); state
  int64_t lda;
  ProductPart parts[most_parts];  // the second one only if transposed

  int64_t columns() const { return parts[0].N + parts[1].N; }
};

}  // namespace fastlstm
