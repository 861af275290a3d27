// Chooses the kernels for the processor at hand.
#pragma once

#include "isa.h"

namespace fastlstm {

constexpr int most_kernels = 5;

// The instruction sets this library was built with and this processor runs, best first.
int available_kernels(const Kernels** out, int capacity);

// Those in use: the best, unless use_kernels chose others (tests and benchmarks do).
const Kernels& kernels();
bool use_kernels(const char* name);

// Does the matrix unit leave small passes to vectors, and do dot products take a few steps
// unpacked? They do, unless a test asks for the unit and for packed weights.
bool spares_matrix_unit();
void spare_matrix_unit(bool on);

}  // namespace fastlstm
