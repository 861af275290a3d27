// What clusters of thread blocks cost on this device: compiled and run by micro.py, which reads
// what is printed here, one JSON object a line.
//
// barrier: all blocks of a cluster meet. hop: a value stored into another block's shared memory
// until that block sees it. fit: how many clusters of so many blocks are on the device at once.
// grid: all blocks of a cooperative launch meet at a counter in global memory, as in
// kernels/barrier.py.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 10000;
constexpr int kRepeats = 7;

__global__ void cluster_barriers(int rounds) {
  for (int round = 0; round < rounds; ++round) cg::this_cluster().sync();
}

__device__ int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.cluster.shared::cluster.s32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at)))
               : "memory");
  return value;
}

// Blocks 0 and 1 of a cluster answer each other: two hops a round.
__global__ void hops(int rounds) {
  __shared__ int mine;
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank();
  mine = 0;
  cluster.sync();
  if (rank < 2 && threadIdx.x == 0) {
    const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(&mine));
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(1 - rank));
    for (int round = 1; round <= rounds; ++round) {
      if (rank == 1) {
        while (load_acquire(&mine) < round) {
        }
      }
      asm volatile("st.release.cluster.shared::cluster.s32 [%0], %1;" ::"r"(remote), "r"(round)
                   : "memory");
      if (rank == 0) {
        while (load_acquire(&mine) < round) {
        }
      }
    }
  }
  cluster.sync();  // nobody ends while its shared memory is written to
}

__global__ void grid_barriers(unsigned long long* counter, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned long long enough = (round + 1ull) * gridDim.x;
      asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
      unsigned long long seen;
      do {
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(counter) : "memory");
      } while (seen < enough);
    }
    __syncthreads();
  }
}

bool failed(const char* what, int size, cudaError_t error) {
  if (error == cudaSuccess) return false;
  cudaGetLastError();
  std::printf("{\"what\": \"%s\", \"blocks\": %d, \"error\": \"%s\"}\n", what, size,
              cudaGetErrorString(error));
  return true;
}

// Microseconds of one of `per_launch` events, the median of kRepeats launches, printed.
template <typename Launch>
bool timed(const char* what, int size, int per_launch, Launch launch) {
  cudaEvent_t begin, end;
  if (failed(what, size, cudaEventCreate(&begin)) || failed(what, size, cudaEventCreate(&end)))
    return false;
  std::vector<float> found;
  for (int repeat = 0; repeat <= kRepeats; ++repeat) {
    cudaEventRecord(begin);
    cudaError_t error = launch();
    cudaEventRecord(end);
    if (error == cudaSuccess) error = cudaEventSynchronize(end);
    if (failed(what, size, error)) return false;
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (repeat > 0)
      found.push_back(milliseconds * 1e3f / per_launch);  // the first loads the kernel
  }
  std::sort(found.begin(), found.end());
  std::printf("{\"what\": \"%s\", \"blocks\": %d, \"microseconds\": %.4f}\n", what, size,
              found[kRepeats / 2]);
  return true;
}

cudaLaunchConfig_t config_of(int blocks, int shared, cudaLaunchAttribute* cluster, int size) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = size;
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

template <typename Kernel>
bool allow(Kernel* kernel, int shared) {
  const void* function = reinterpret_cast<const void*>(kernel);
  return !failed(
             "attributes", 0,
             cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) &&
         !failed(
             "attributes", 0,
             cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

bool clusters_that_fit(int size, int shared) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(size, shared, &cluster, size);
  int count = 0;
  if (failed("fit", size, cudaOccupancyMaxActiveClusters(&count, cluster_barriers, &config)))
    return false;
  std::printf("{\"what\": \"fit\", \"blocks\": %d, \"shared\": %d, \"clusters\": %d}\n", size,
              shared, count);
  return true;
}

}  // namespace

int main() {
  int most_shared = 0, multiprocessors = 0;
  if (failed("device", 0,
             cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)) ||
      failed("device", 0,
             cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0)))
    return 1;
  bool good = allow(cluster_barriers, most_shared) && allow(hops, 0);
  for (int size : {2, 4, 8, 16}) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = config_of(size, 0, &cluster, size);
    good &= timed("cluster barrier", size, kRounds,
                  [&] { return cudaLaunchKernelEx(&config, cluster_barriers, kRounds); });
    good &=
        timed("hop", size, 2 * kRounds, [&] { return cudaLaunchKernelEx(&config, hops, kRounds); });
  }
  for (int size : {8, 16})
    for (int shared : {0, 64 << 10, 128 << 10, 192 << 10, most_shared})
      good &= clusters_that_fit(size, shared);

  unsigned long long* counter = nullptr;
  if (failed("grid barrier", 0, cudaMalloc(&counter, sizeof *counter))) return 1;
  for (int blocks : {8, 32, 64, 128, multiprocessors}) {
    int rounds = kRounds;
    void* arguments[] = {&counter, &rounds};
    good &= timed("grid barrier", blocks, kRounds, [&] {
      const cudaError_t error = cudaMemsetAsync(counter, 0, sizeof *counter);
      if (error != cudaSuccess) return error;
      return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(grid_barriers), dim3(blocks),
                                         dim3(kThreads), arguments);
    });
  }
  cudaFree(counter);
  return good ? 0 : 1;
}
