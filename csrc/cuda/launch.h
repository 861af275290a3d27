// What the tables of compiled kernels have in common: their names, and what a device is asked once.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "args.h"

#define FASTLSTM_PASTE_(a, b, c) a##b##_##c
#define FASTLSTM_PASTE(a, b, c) FASTLSTM_PASTE_(a, b, c)

namespace fastlstm {
namespace cuda {

constexpr int most_devices = 64;
using Known = std::atomic<int>[most_devices];  // one more than it is, 0 before that is known

// ask(device, &answer) of the current device, kept in `known`; 0 and CUDA's words if it failed.
template <class Ask>
int asked_once(Known& known, const char** words, const Ask& ask) {
  int device = 0, answer = 0;
  cudaError_t error = cudaGetDevice(&device);
  const bool kept = error == cudaSuccess && device < most_devices;
  if (kept && known[device] > 0) return known[device] - 1;
  if (error == cudaSuccess) error = ask(device, &answer);
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error of the question is not the next call's
    *words = cudaGetErrorString(error);
    return 0;
  }
  if (kept) known[device] = answer + 1;
  return answer;
}

inline cudaError_t attribute(cudaDeviceAttr which, int device, int* value) {
  return cudaDeviceGetAttribute(value, which, device);
}

// Null, or CUDA's words for why a launch failed.
inline const char* outcome(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace fastlstm
