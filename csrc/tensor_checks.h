// What the bindings share: every tensor that a kernel is given is checked here, because kernels
// read and write through raw pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer.h"

namespace {

using fastlstm::max_directions;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string shown(const int64_t* sizes, size_t count) {
  std::string text = "(";
  for (size_t k = 0; k < count; ++k) text += (k ? ", " : "") + std::to_string(sizes[k]);
  return text + ")";
}

[[noreturn]] inline void fail(const std::string& message) {
  throw std::runtime_error("fastlstm: " + message);
}

inline void check(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype,
                  bool on_cpu = true) {
  if (tensor.is_cpu() != on_cpu)
    fail(std::string(name) + ": expected a " + (on_cpu ? "cpu" : "cuda") + " tensor");
  if (tensor.scalar_type() != dtype) fail(std::string(name) + ": has an unexpected dtype");
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  for (size_t k = 0; same && k < sizes.size(); ++k) same = got[k] == sizes[k];
  if (!same) {
    fail(std::string(name) + ": got shape " + shown(got.data(), got.size()) + ", expected " +
         shown(sizes.data(), sizes.size()));
  }
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) fail(std::string(name) + ": expected a contiguous tensor");
}

inline fastlstm::Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return fastlstm::Storage::f32;
    case ScalarType::Double:
      return fastlstm::Storage::f64;
    case ScalarType::Half:
      return fastlstm::Storage::f16;
    case ScalarType::BFloat16:
      return fastlstm::Storage::bf16;
    default:
      fail("expected float32, float64, float16 or bfloat16 tensors");
  }
}

inline ScalarType dtype_of(fastlstm::Storage storage) {
  switch (storage) {
    case fastlstm::Storage::f64:
      return ScalarType::Double;
    case fastlstm::Storage::f16:
      return ScalarType::Half;
    case fastlstm::Storage::bf16:
      return ScalarType::BFloat16;
    case fastlstm::Storage::f32:
      break;
  }
  return ScalarType::Float;
}

inline ScalarType state_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace
