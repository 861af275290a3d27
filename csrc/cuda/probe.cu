#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "probe.h"

namespace fastlstm {
namespace cuda {
namespace {

__global__ void probe_kernel(const __grid_constant__ Probe p) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < p.n; k += stride)
    probe_point(p, k);
}

}  // namespace

void probe(const Probe& p, void* stream) {
  probe_kernel<<<256, 256, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastlstm: gate_math: ") + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace fastlstm
