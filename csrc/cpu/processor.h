// What is known of the processor at hand, where choices depend on more than its instructions.
#pragma once

#include <cstdint>

namespace fastlstm {

enum class Maker { other, intel, amd };

struct Processor {
  Maker maker;             // they differ in how they fetch and share what a cache does not hold
  int64_t l2_cache_bytes;  // a core's own; 1 MiB where the system does not say
};

// See Advance (operand.h) and split.h.
bool is_intel();
bool is_amd();
int64_t l2_cache_bytes();

// For tests, and not while a call runs: choose as on another one; returns the one before.
Processor assume_processor(const Processor& other);

}  // namespace fastlstm
