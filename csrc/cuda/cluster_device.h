// Machine, in a thread block cluster: sm_90 and newer.
//
// Barriers and what arrives at them are those of the PTX manual's "mbarrier". A block's own are
// addressed in its shared memory (.shared::cta), others' in the cluster's (.shared::cluster).
#pragma once

#include "device.h"

namespace fastlstm {
namespace cuda {

class ClusterDevice : public Device {
  static constexpr int looks = 16;

 public:
  using Device::Device;

  // All threads of all blocks; what was before is seen by what comes after. Not ".aligned": lanes
  // of a warp may come here apart, from initialising barriers and from waits.
  __device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
  // sync(), and whether any thread has said so.
  __device__ __forceinline__ bool sync_any(Before, bool said) { return __syncthreads_or(said); }

  // One arrival, and all bytes that it has said to expect, complete a phase.
  __device__ __forceinline__ void init_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
  }
  // Other blocks may use what this thread has initialised, once they have met it.
  __device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                     address(barrier)),
                 "r"(bytes)
                 : "memory");
  }
  // Is the phase of this parity over? It is the current one or the one before that. Looks do not
  // suspend the thread, so they can be counted; some of them take as long as one at a flag in the
  // L2 cache, and a wait is bounded by as many of either.
  __device__ __forceinline__ bool complete(const uint64_t* barrier, int parity) const {
    uint32_t done = 0;
#pragma unroll 1
    for (int look = 0; look < looks && done == 0; ++look)
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(address(barrier)), "r"(parity)
          : "memory");
    return done != 0;
  }

  // Stores into block `rank` of the cluster, where this block has `to`; the bytes are counted at
  // that block's `barrier`.
  __device__ __forceinline__ void send(int rank, Piece* to, const Piece& p, uint64_t* barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4},"
        " [%5];" ::"r"(address_in(rank, to)),
        "r"(p.word[0]), "r"(p.word[1]), "r"(p.word[2]), "r"(p.word[3]),
        "r"(address_in(rank, barrier))
        : "memory");
  }
  __device__ __forceinline__ void send(int rank, float* to, float a, float b, uint64_t* barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2},"
        " [%3];" ::"r"(address_in(rank, to)),
        "r"(bits(a)), "r"(bits(b)), "r"(address_in(rank, barrier))
        : "memory");
  }
  // A thousand times as long as a store into another block takes.
  __device__ __forceinline__ void outlast_stores() { __nanosleep(1000000); }

 private:
  static __device__ __forceinline__ uint32_t address(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
  }
  static __device__ __forceinline__ uint32_t address_in(int rank, const void* shared) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(rank));
    return there;
  }
};

}  // namespace cuda
}  // namespace fastlstm
