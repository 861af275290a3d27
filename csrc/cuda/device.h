// Machine: what a thread of an NVIDIA GPU can do, as far as the walks need it; sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "product.h"

namespace fastlstm {
namespace cuda {

template <Storage storage>
struct DeviceElement {
  using type = float;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};
template <>
struct DeviceElement<Storage::f16> {
  using type = uint16_t;
  static __device__ __forceinline__ float widen(uint16_t x) {
    return __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ uint16_t narrow(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
};
template <>
struct DeviceElement<Storage::bf16> {
  using type = uint16_t;
  static __device__ __forceinline__ float widen(uint16_t x) {
    return __bfloat162float(__ushort_as_bfloat16(x));
  }
  static __device__ __forceinline__ uint16_t narrow(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
};

class Device {
 public:
  template <Storage storage>
  using Element = typename DeviceElement<storage>::type;

  explicit __device__ Device(char* shared) : shared_(shared) {}

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int tile() const { return blockIdx.x; }
  __device__ __forceinline__ int team() const { return blockIdx.y; }
  __device__ __forceinline__ char* shared() const { return shared_; }

  __device__ __forceinline__ void sync(Before) { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() { __syncwarp(); }

  // Zero, though the compiler does not know, and not before `bits` are. It would move all reads to
  // the front, where they take more registers than there are.
  static __device__ __forceinline__ int zero_after(uint32_t bits) {
    return int(bits & (blockDim.y - 1));
  }

  // --- memory ---

  template <class T>
  __device__ __forceinline__ T load(const T* from) const {
    return *from;
  }
  __device__ __forceinline__ Piece load(const Piece* from) const {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
  }
  template <class T>
  __device__ __forceinline__ void store(T* to, T value) {
    *to = value;
  }

  // A piece of an exchanged row. At the scope of the device it comes from the L2 cache: a line in
  // L1 may be older than what another block has stored in it.
  __device__ __forceinline__ Piece load_row(const void* from) const {
    Piece p;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
                 : "l"(from)
                 : "memory");
    return p;
  }

  template <class T>
  __device__ __forceinline__ T load_shared(const T* from) const {
    return *from;
  }
  __device__ __forceinline__ Piece load_shared(const Piece* from) const { return load(from); }
  __device__ __forceinline__ Gates<float> load_shared_four(const float* from) const {
    const float4 v = *reinterpret_cast<const float4*>(from);
    return {v.x, v.y, v.z, v.w};
  }
  template <class T>
  __device__ __forceinline__ void store_shared(T* to, T value) {
    *to = value;
  }

  // --- other blocks ---

  // Has the block of this flag published so many positions?
  __device__ __forceinline__ bool arrived(const int32_t* flag, int position) const {
    int32_t seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    return seen >= position;
  }
  // A barrier of the block's threads comes before it: so the release covers what all have stored.
  __device__ __forceinline__ void publish(int32_t* flag, int positions) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(positions) : "memory");
  }
  // The host reads this word, in its own memory, and waits for nothing.
  __device__ __forceinline__ void report(int64_t* word, int64_t place) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(place) : "memory");
  }

  // --- values ---

  template <Storage storage>
  static __device__ __forceinline__ float widen(Element<storage> x) {
    return DeviceElement<storage>::widen(x);
  }
  template <Storage storage>
  static __device__ __forceinline__ Element<storage> narrow(float x) {
    return DeviceElement<storage>::narrow(x);
  }
  static __device__ __forceinline__ uint32_t bits(uint16_t x) { return x; }
  static __device__ __forceinline__ uint32_t bits(float x) { return __float_as_uint(x); }

  // A word of a row as tensor cores take it: floats are rounded to TF32.
  template <Storage storage>
  static __device__ __forceinline__ uint32_t operand(uint32_t word) {
    if (storage != Storage::f32) return word;
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
    return rounded;
  }

  // sum (16 x 8) += a (16 x 8 words) b (8 words x 8), by the whole warp; see layout.h.
  template <Storage storage>
  __device__ __forceinline__ void multiply_add(float (&sum)[4], const Piece& a, uint32_t b0,
                                               uint32_t b1) {
#define FASTLSTM_MMA(shape, types)                                       \
  asm("mma.sync.aligned." shape ".row.col." types                        \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])           \
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1))
    if (storage == Storage::f16)
      FASTLSTM_MMA("m16n8k16", "f32.f16.f16.f32");
    else if (storage == Storage::bf16)
      FASTLSTM_MMA("m16n8k16", "f32.bf16.bf16.f32");
    else
      FASTLSTM_MMA("m16n8k8", "f32.tf32.tf32.f32");
#undef FASTLSTM_MMA
  }

 private:
  char* const shared_;
};

}  // namespace cuda
}  // namespace fastlstm
