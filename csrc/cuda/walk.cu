// The grid kernels of one storage dtype and one width of rows, forward and backward, and their
// launch.
//
// Compiled once for each FASTLSTM_STORAGE (f32, f16, bf16) and FASTLSTM_PAIRS (see layout.h); each
// object has one table, whose name says so.
#include "backward.h"
#include "device.h"
#include "forward.h"
#include "launch.h"
#include "rows.h"

namespace fastlstm {
namespace cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(threads, 1) lstm_forward(const __grid_constant__ ForwardArgs a) {
  extern __shared__ __align__(16) char shared[];
  Device device(shared);
  Forward<C, Device, Rows<C, Device>>(a, device).walk();
}

template <class C>
__global__ void __launch_bounds__(threads, 1)
    lstm_backward(const __grid_constant__ BackwardArgs a) {
  extern __shared__ __align__(16) char shared[];
  Device device(shared);
  Backward<C, Device, Rows<C, Device>>(a, device).walk();
}

template <class C>
const void* kernel() {
  if constexpr (C::kind == Kind::forward)
    return reinterpret_cast<const void*>(&lstm_forward<C>);
  else
    return reinterpret_cast<const void*>(&lstm_backward<C>);
}

template <class C>
int together(const char** words) {
  static Known known;
  return asked_once(known, words, [](int device, int* answer) {
    int multiprocessors = 0, most_shared = 0, cooperative = 0, each = 0;
    cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, device, &multiprocessors);
    if (error == cudaSuccess)
      error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &most_shared);
    if (error == cudaSuccess) error = attribute(cudaDevAttrCooperativeLaunch, device, &cooperative);
    if (error != cudaSuccess || most_shared < C::shared_bytes || cooperative == 0) return error;
    error = cudaFuncSetAttribute(kernel<C>(), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 C::shared_bytes);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel<C>(), threads,
                                                            C::shared_bytes);
    *answer = each * multiprocessors;
    return error;
  });
}

// Who has asked together() before has set the kernel's share of shared memory.
template <class C>
const char* launch(const void* args, int tiles, int teams, void* stream) {
  void* pointers[] = {const_cast<void*>(args)};
  return outcome(cudaLaunchCooperativeKernel(kernel<C>(), dim3(tiles, teams), dim3(threads),
                                             pointers, C::shared_bytes,
                                             static_cast<cudaStream_t>(stream)));
}

template <Kind kind, int n_tiles>
constexpr Instance instance() {
  if constexpr (is_compiled(kind, FASTLSTM_PAIRS, n_tiles)) {
    using C = Config<kind, Storage::FASTLSTM_STORAGE, FASTLSTM_PAIRS, n_tiles>;
    return grid_instance<C>(FASTLSTM_PAIRS, &together<C>, &launch<C>);
  }
  return {};
}

}  // namespace

extern const Instance FASTLSTM_PASTE(instances_, FASTLSTM_STORAGE, FASTLSTM_PAIRS)[6];
const Instance FASTLSTM_PASTE(instances_, FASTLSTM_STORAGE, FASTLSTM_PAIRS)[6] = {
    instance<Kind::forward, 1>(),  instance<Kind::forward, 2>(),  instance<Kind::forward, 4>(),
    instance<Kind::backward, 1>(), instance<Kind::backward, 2>(), instance<Kind::backward, 4>(),
};

}  // namespace cuda
}  // namespace fastlstm
