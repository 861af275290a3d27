// SIMD values of one instruction set. This and all that builds on it is compiled once for each, and
// internal to that object (see isa.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
// GCC 12's own header leaves "undefined" vectors uninitialised on purpose, and warns about it.
#  pragma GCC diagnostic push
#  if !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  endif
#  include <immintrin.h>
#  pragma GCC diagnostic pop
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

#include "../gate_math.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#  define FASTLSTM_VECTOR_REGISTERS 32
#else
#  define FASTLSTM_VECTOR_REGISTERS 16
#endif

namespace fastlstm {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
  typedef uint32_t bits __attribute__((vector_size(vector_bytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
  typedef uint64_t bits __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

template <class To, class From>
inline __attribute__((always_inline)) To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

#if defined(__AVX512F__)
// The lanes of v that `lane` names, each in its place.
FASTLSTM_INLINE Vec<float> lane_of(Vec<float> v, Vector<float>::mask lane) {
  return bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(lane), bit_cast<__m512>(v)));
}
FASTLSTM_INLINE Vec<double> lane_of(Vec<double> v, Vector<double>::mask lane) {
  return bit_cast<Vec<double>>(
      _mm512_permutexvar_pd(bit_cast<__m512i>(lane), bit_cast<__m512d>(v)));
}
#endif

// A value that so many rows are multiplied by is to stay in a register. GCC makes it an operand in
// memory of each row where there are two or three; more are left to it. (Only where there are
// registers to spare, and such operands.)
template <int rows, class V>
FASTLSTM_INLINE V in_register(V value) {
#if defined(__AVX512F__) && !defined(FASTLSTM_EMULATED_AVX512)
  if (rows == 2 || rows == 3) asm("" : "+v"(value));
#endif
  return value;
}

}  // namespace
}  // namespace fastlstm
