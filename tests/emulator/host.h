// Machine, on the host: what a thread of the emulator can do. device.h and cluster_device.h have
// the same for a GPU.
#pragma once

#include "emulator.h"

namespace fastlstm {
namespace cuda {

template <Storage storage>
struct HostElement {
  using type = uint16_t;
};
template <>
struct HostElement<Storage::f32> {
  using type = float;
};

uint16_t narrow_f16(float x);
float widen_f16(uint16_t x);
uint16_t narrow_bf16(float x);
float widen_bf16(uint16_t x);
uint32_t round_tf32(uint32_t bits);

class Host {
 public:
  template <Storage storage>
  using Element = typename HostElement<storage>::type;

  explicit Host(Grid& grid) : grid_(grid), fiber_(*grid.current) {}

  int thread() const { return fiber_.thread; }
  int tile() const { return fiber_.block % grid_.tiles; }
  int team() const { return fiber_.block / grid_.tiles; }
  char* shared() const { return grid_.shared[size_t(fiber_.block)].data(); }
  void sync(Before what);
  void sync_warp();
  static int zero_after(uint32_t) { return 0; }

  template <class T>
  T load(const T* from) const {
    grid_.check(from, sizeof(T));
    return *from;
  }
  template <class T>
  void store(T* to, T value) {
    grid_.check(to, sizeof(T));
    grid_.wrote(to, sizeof(T));
    *to = value;
  }
  Piece load_row(const void* from) const {
    grid_.check(from, sizeof(Piece));
    grid_.read(from, sizeof(Piece));
    Piece p;
    std::memcpy(&p, from, sizeof p);
    return p;
  }
  template <class T>
  T load_shared(const T* from) const {
    grid_.check_shared(from, sizeof(T));
    grid_.read(from, sizeof(T));
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  Gates<float> load_shared_four(const float* from) const {
    const Piece p = load_shared(reinterpret_cast<const Piece*>(from));
    Gates<float> gates;
    std::memcpy(&gates, &p, sizeof gates);
    return gates;
  }
  template <class T>
  void store_shared(T* to, T value) {
    grid_.check_shared(to, sizeof(T));
    grid_.wrote(to, sizeof(T));
    std::memcpy(to, &value, sizeof value);
  }

  // --- the blocks of a grid ---

  bool arrived(const int32_t* flag, int position) const;
  void publish(int32_t* flag, int positions);
  void report(int64_t* word, int64_t place) { *word = place; }

  // --- the blocks of a cluster ---

  void sync_cluster();
  bool sync_any(Before what, bool said);
  void init_barrier(uint64_t* barrier) { grid_.init_barrier(barrier); }
  void fence_barriers() {
    if (settings.omit != the_fence_of_mbarriers) grid_.fence_barriers();
  }
  void expect(uint64_t* barrier, int bytes) {
    if (settings.omit != the_arrival) grid_.expect(barrier, settings.omit == the_bytes ? 0 : bytes);
  }
  bool complete(const uint64_t* barrier, int parity) const {
    return settings.omit == the_wait || grid_.complete(barrier, parity);
  }
  void send(int rank, Piece* to, const Piece& p, uint64_t* barrier) {
    grid_.send(rank, to, &p, sizeof p, barrier);
  }
  void send(int rank, float* to, float a, float b, uint64_t* barrier) {
    const float both[] = {a, b};
    grid_.send(rank, to, both, sizeof both, barrier);
  }
  void outlast_stores() {
    if (settings.omit != the_outlasting) grid_.outlast_stores();
  }

  // --- values ---

  template <Storage storage>
  static float widen(Element<storage> x) {
    if constexpr (storage == Storage::f32)
      return x;
    else
      return storage == Storage::f16 ? widen_f16(x) : widen_bf16(x);
  }
  template <Storage storage>
  static Element<storage> narrow(float x) {
    if constexpr (storage == Storage::f32)
      return x;
    else
      return storage == Storage::f16 ? narrow_f16(x) : narrow_bf16(x);
  }
  static uint32_t bits(uint16_t x) { return x; }
  static uint32_t bits(float x) {
    uint32_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
  template <Storage storage>
  static uint32_t operand(uint32_t word) {
    return storage == Storage::f32 ? round_tf32(word) : word;
  }

  template <Storage storage>
  void multiply_add(float (&sum)[4], const Piece& a, uint32_t b0, uint32_t b1);

 private:
  int warp() const { return fiber_.block * warps + fiber_.thread / lanes; }

  Grid& grid_;
  Fiber& fiber_;
};

}  // namespace cuda
}  // namespace fastlstm
