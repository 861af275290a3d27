// The cluster kernels of one storage dtype and one division of the hidden units, forward and
// backward, and their launch; sm_90 and newer.
//
// Compiled once for each FASTLSTM_STORAGE (f32, f16, bf16), FASTLSTM_BLOCKS of a cluster and
// FASTLSTM_UNITS of a block; each object has one table, whose name says so.
#include "backward.h"
#include "cluster.h"
#include "cluster_device.h"
#include "forward.h"
#include "launch.h"

namespace fastlstm {
namespace cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(threads, 1)
    lstm_forward_cluster(const __grid_constant__ ForwardArgs a) {
  extern __shared__ __align__(16) char shared[];
  ClusterDevice device(shared);
  Forward<C, ClusterDevice, ClusterForward<C, ClusterDevice>>(a, device).walk();
}

template <class C>
__global__ void __launch_bounds__(threads, 1)
    lstm_backward_cluster(const __grid_constant__ BackwardArgs a) {
  extern __shared__ __align__(16) char shared[];
  ClusterDevice device(shared);
  Backward<C, ClusterDevice, ClusterBackward<C, ClusterDevice>>(a, device).walk();
}

template <class C>
const void* kernel() {
  if constexpr (C::kind == Kind::forward)
    return reinterpret_cast<const void*>(&lstm_forward_cluster<C>);
  else
    return reinterpret_cast<const void*>(&lstm_backward_cluster<C>);
}

// `teams` clusters, a row of the grid each.
template <class C>
class Launch {
 public:
  Launch(int teams, void* stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim.x = C::blocks;
    attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;
    config_.gridDim = dim3(C::blocks, teams);
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = C::shared_bytes;
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

template <class C>
int together(const char** words) {
  static Known known;
  return asked_once(known, words, [](int device, int* answer) {
    int clusters = 0, most_shared = 0, count = 0;
    cudaError_t error = attribute(cudaDevAttrClusterLaunch, device, &clusters);
    if (error == cudaSuccess)
      error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &most_shared);
    if (error != cudaSuccess || most_shared < C::shared_bytes || clusters == 0) return error;
    error = cudaFuncSetAttribute(kernel<C>(), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 C::shared_bytes);
    // More than 8 blocks are not on every device.
    if (error == cudaSuccess && C::blocks > 8)
      error = cudaFuncSetAttribute(kernel<C>(), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveClusters(&count, kernel<C>(), Launch<C>(1, nullptr).config());
    if (error == cudaErrorInvalidClusterSize) {
      cudaGetLastError();
      return cudaSuccess;
    }
    *answer = count * C::blocks;
    return error;
  });
}

// Who has asked together() before has set the kernel's attributes.
template <class C>
const char* launch(const void* args, int, int teams, void* stream) {
  void* pointers[] = {const_cast<void*>(args)};
  return outcome(cudaLaunchKernelExC(Launch<C>(teams, stream).config(), kernel<C>(), pointers));
}

template <Kind kind, int n_tiles>
constexpr Instance instance() {
  if constexpr (is_compiled(Storage::FASTLSTM_STORAGE, FASTLSTM_BLOCKS, FASTLSTM_UNITS, n_tiles)) {
    using C =
        ClusterConfig<kind, Storage::FASTLSTM_STORAGE, FASTLSTM_BLOCKS, FASTLSTM_UNITS, n_tiles>;
    return cluster_instance<C>(&together<C>, &launch<C>);
  }
  return {};
}

}  // namespace

#define FASTLSTM_DIVISION_(blocks, units) blocks##x##units
#define FASTLSTM_DIVISION(blocks, units) FASTLSTM_DIVISION_(blocks, units)
#define FASTLSTM_TABLE \
  FASTLSTM_PASTE(clusters_, FASTLSTM_STORAGE, FASTLSTM_DIVISION(FASTLSTM_BLOCKS, FASTLSTM_UNITS))
extern const Instance FASTLSTM_TABLE[6];
const Instance FASTLSTM_TABLE[6] = {
    instance<Kind::forward, 1>(),  instance<Kind::forward, 2>(),  instance<Kind::forward, 4>(),
    instance<Kind::backward, 1>(), instance<Kind::backward, 2>(), instance<Kind::backward, 4>(),
};

}  // namespace cuda
}  // namespace fastlstm
