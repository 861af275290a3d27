// What is known of the processor at hand, where choices depend on more than its instructions.
#pragma once

#include <cstdint>

namespace fastlstm {

// Who made it? They differ in how they fetch and share what a cache does not hold: see Advance
// (operand.h) and split.h.
bool is_intel();
bool is_amd();

// Bytes of a core's own L2 cache; 1 MiB where the system does not say.
int64_t l2_cache_bytes();

// For tests: choose as on a processor of "intel", "amd" or another maker, with so large a cache;
// null for the one at hand.
void assume_processor(const char* maker, int64_t l2_cache_bytes);

}  // namespace fastlstm
