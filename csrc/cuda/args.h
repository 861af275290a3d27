// What a CUDA walk is given: the device's side of the contract in layer.h, and of one launch.
//
// W_ih x + b is computed before a walk and the sums over all rows (eq. 9) after it, by others.
// Every pointer is to a dense row-major array on the device, at a multiple of 16 bytes; letters are
// those of layer.h. A layer has no projection here, so P is H.
#pragma once

#include <cstdint>

#include "../layer.h"

namespace fastlstm {
namespace cuda {

enum class Kind { forward, backward };

struct Walk {
  int32_t steps;          // T, of those that have rows
  int32_t batch;          // B
  int32_t hidden;         // H
  int32_t directions;     // D
  int32_t rows_per_step;  // of the longest step
  const int64_t* starts;  // (steps + 1), first row of each; null where all have rows_per_step
  const uint8_t* reset;   // (N), 1 marks the first step of a segment; or null
  int32_t begin, end;     // positions of the walk, begin <= position < end
  int32_t first_team;     // of this launch
  int32_t* flags;         // (teams, tiles), positions that a block has published; zeros at first
  int64_t* fault;         // (1), what the host looks at
  int32_t polls;          // looks at a flag before a block gives up
  int32_t jitter;         // a stress test's way to shuffle schedules: so many looks more, at most
};

struct ForwardArgs {
  Walk walk;
  int64_t origin[max_directions];  // the row that comes first in `gates`, by direction
  void* gates;                     // (rows, D, 4H), in: W_ih x + b; out if `reserve`: activated
  bool reserve;
  void* y;           // (N, D*H), out; h is exchanged through it
  float* c_all;      // (N, D*H), out; or null
  void* h_n;         // (D, B, H), out where a sequence has steps
  float* c_carry;    // (D, B, H), in and out: c0, in the end c_n
  const void* h0;    // (D, B, H)
  const void* w_hh;  // (D, 4H, H)
};

struct BackwardArgs {
  Walk walk;            // T positions, or T + 1 where dh0 is asked for
  void* da;             // (N, D, 4H), out; exchanged through it
  void* dh0;            // (D, B, H), out where a sequence has steps; or null
  float* dc_carry;      // (D, B, H), in and out: gradient of c_n, in the end of c0
  const void* dy;       // (N, D*H), or null
  const float* dc_all;  // (N, D*H), or null
  const void* dh_n;     // (D, B, H), or null
  const void* gates;    // (N, D, 4H), activated
  const float* c_all;   // (N, D*H)
  const void* c0;       // (D, B, H)
  const void* w_hh;     // (D, 4H, H)
};

// One compiled kernel and how to launch it. Who calls has made the device current.
struct Instance {
  Kind kind;
  Storage storage;
  int cluster;     // blocks of a team, in a thread block cluster; 0: as many as there are tiles
  int units;       // hidden units of a block
  int most_units;  // that it can be used for
  int n_tiles;     // eights of sequences that a block has
  int shared_bytes;
  // How many blocks of whole teams the current device holds at once, 0 if none; or CUDA's words for
  // why it cannot be told.
  int (*together)(const char** error);
  // tiles x teams blocks; null, or CUDA's words for why they were not launched.
  const char* (*launch)(const void* args, int tiles, int teams, void* stream);
};

}  // namespace cuda
}  // namespace fastlstm
