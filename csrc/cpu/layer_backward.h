// The whole backward pass of a layer: the walk of backward.h and the products of (eq. 9).
//
// They take turns, chunk by chunk: dgates are as large as all that the forward pass saved, and a
// chunk of them is still in the cache when it is multiplied.
#pragma once

#include "../layer.h"

namespace fastlstm {

struct LayerBackwardArgs {
  BackwardArgs walk;                 // begin to dh_all and the carries are left to layer_backward
  const void* x;                     // (N, I)
  const void* h0;                    // (D, B, P)
  const void* y;                     // (N, D*P)
  const void* m;                     // (N, D*H), or null without a projection
  const void* w_ih[max_directions];  // (4H, I)
  int64_t chunk_rows;                // about so many rows of dgates at a time
  void* dx;                          // (N, I), state; or null, as all that follow
  void* dw_ih[max_directions];       // (4H, I), state
  void* dw_hh[max_directions];       // (4H, P), state
  void* dbias[max_directions];       // (4H), state
  void* dw_hr[max_directions];       // (P, H), state
};

// Does the products that Kernels::product leaves to others.
using Blas = void (*)(const ProductArgs&);

void layer_backward(const LayerBackwardArgs& args, Blas blas);

}  // namespace fastlstm
