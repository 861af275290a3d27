// What the operators of bindings.cpp share: inputs as checked pointers, the shape of a layer, and
// outputs.
#pragma once

#include "cpu/scratch.h"
#include "tensor_checks.h"

// Not in torch 2.10, whose stable ABI the library is built for: null there.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace {

int threads() {
  return int(torch::stable::get_num_threads());
}

// The inputs of one call, as pointers: each is checked, and copied where it is not contiguous.
class Inputs {
 public:
  // Null for an absent optional tensor.
  const void* operator()(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype) {
    check(name, tensor, sizes, dtype);
    return checked(tensor);
  }
  const void* checked(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    copies_.push_back(torch::stable::contiguous(tensor));
    return copies_.back().const_data_ptr();
  }
  const void* operator()(const char* name, const Optional& tensor, Sizes sizes, ScalarType dtype) {
    return tensor ? (*this)(name, *tensor, sizes, dtype) : nullptr;
  }

  // A list over directions, or an empty one where the layer has no such weights.
  void each(const char* name, const Tensors& tensors, int64_t directions, Sizes sizes,
            ScalarType dtype, const void* (&out)[max_directions], bool required = false) {
    for (auto& pointer : out) pointer = nullptr;
    if (tensors.empty() && !required) return;
    if (int64_t(tensors.size()) != directions)
      fail(std::string(name) + ": got " + std::to_string(tensors.size()) + " tensors, expected " +
           std::to_string(directions));
    for (size_t d = 0; d < tensors.size(); ++d) out[d] = (*this)(name, tensors[d], sizes, dtype);
  }

 private:
  Tensors copies_;
};

// States of a layer: (D, B, size), or (B, size) where c0 comes so, as LSTMCell's do.
class States {
 public:
  explicit States(const Tensor& c0) : several_(c0.dim() == 3) {
    const int64_t first = several_ ? 1 : 0;
    if ((c0.dim() != 2 && !several_) || c0.size(0) < first || c0.size(first + 1) < 1 ||
        (several_ && c0.size(0) > max_directions))
      fail("c0: expected shape (D, B, H) with D 1 or 2 and H at least 1, or (B, H)");
    shape_[0] = several_ ? c0.size(0) : 1;
    shape_[1] = c0.size(first);
    hidden_size_ = c0.size(first + 1);
  }
  int64_t directions() const { return shape_[0]; }
  int64_t batch() const { return shape_[1]; }
  int64_t hidden_size() const { return hidden_size_; }
  // Until the next call.
  Sizes of(int64_t size) {
    shape_[2] = size;
    return {shape_ + !several_, several_ ? size_t(3) : size_t(2)};
  }

 private:
  const bool several_;
  int64_t shape_[3], hidden_size_;
};

// Shape and the values of batch_sizes, which index memory. T, B, D, H and P come from these; the
// caller adds I where it matters.
fastlstm::Shape shape_of(Inputs& input, int64_t rows, const Tensor& batch_sizes,
                         const States& states, int64_t output_size) {
  if (batch_sizes.dim() != 1) fail("batch_sizes: expected a vector");
  if (output_size < 1) fail("w_hh: expected at least one column");
  fastlstm::Shape shape{};
  shape.T = batch_sizes.size(0);
  shape.N = rows;
  shape.D = states.directions();
  shape.B = states.batch();
  shape.H = states.hidden_size();
  shape.P = output_size;
  shape.batch_sizes =
      static_cast<const int64_t*>(input("batch_sizes", batch_sizes, {shape.T}, ScalarType::Long));
  int64_t sum = 0, last = shape.B;
  for (int64_t t = 0; t < shape.T; ++t) {
    const int64_t size = shape.batch_sizes[t];
    if (size < 0 || size > last)
      fail("batch_sizes: got " + std::to_string(size) + " at step " + std::to_string(t) +
           ", expected between 0 and " + std::to_string(last) + ": sizes never increase");
    sum += last = size;
  }
  if (sum != rows)
    fail("batch_sizes: they add up to " + std::to_string(sum) + ", expected the number of rows, " +
         std::to_string(rows));
  return shape;
}

// Rows of a layer: (N, size), or (T, B, size) where all sequences have all steps and x comes so.
class Rows {
 public:
  explicit Rows(const Tensor& x) : padded_(x.dim() == 3) {
    if (x.dim() != 2 && !padded_) fail("x: expected shape (N, I) or (T, B, I)");
    for (int64_t k = 0; k < x.dim() - 1; ++k) shape_[k] = x.size(k);
  }
  int64_t count() const { return padded_ ? shape_[0] * shape_[1] : shape_[0]; }
  // Until the next call.
  Sizes of(int64_t size) {
    shape_[padded_ ? 2 : 1] = size;
    return {shape_, size_t(padded_ ? 3 : 2)};
  }

 private:
  const bool padded_;
  int64_t shape_[3];
};

int64_t output_size_of(const Tensors& w_hh) {
  if (w_hh.empty() || w_hh[0].dim() != 2) fail("w_hh: expected matrices, one per direction");
  return w_hh[0].size(1);
}

bool poisoned = false;  // tests: outputs come filled with NaNs, as scratch memory does

// Of a contiguous tensor of up to four dimensions.
struct Strides {
  explicit Strides(Sizes sizes) {
    for (size_t k = sizes.size(); k-- > 1;) values[k - 1] = values[k] * sizes[k];
  }
  int64_t values[4] = {1, 1, 1, 1};
};

int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// torch's allocator itself: the dispatcher's new_empty would cost more than a small layer.
Tensor empty(Sizes sizes, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(
                      int64_t(sizes.size()), sizes.data(), Strides(sizes).values, code_of(dtype),
                      aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
                  "fastlstm: out of memory");
  return Tensor(handle);
}

Tensor output(Sizes sizes, ScalarType dtype) {
  Tensor tensor = empty(sizes, dtype);
  const size_t size = size_t(tensor.numel()) * size_t(tensor.element_size());
  fastlstm::advise_huge_pages(tensor.mutable_data_ptr(), size);
  if (poisoned) torch::stable::fill_(tensor, __builtin_nan(""));
  return tensor;
}
// What a training step makes, in memory that an earlier step had where there is some. It can't be
// resized, as memory that comes from elsewhere never can: torch resizes no tensor that requires a
// gradient either, and gradients have their parameters' sizes.
Tensor reserved(Sizes sizes, ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(code_of(dtype));
  for (int64_t size : sizes) bytes *= size_t(size);
  if (bytes < fastlstm::least_kept || torch_from_blob == nullptr) return output(sizes, dtype);
  const fastlstm::Block block = fastlstm::allocate_reserve(bytes);
  const auto release = [](void* memory, void* held) {
    fastlstm::free_reserve({memory, reinterpret_cast<size_t>(held)});
  };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      block.memory, int64_t(sizes.size()), sizes.data(), Strides(sizes).values, 0, code_of(dtype),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, release,
      reinterpret_cast<void*>(block.bytes));
  // The block is lost then: torch may have released it already.
  if (error != AOTI_TORCH_SUCCESS) fail("torch made no tensor of kept memory");
  Tensor tensor(handle);
  if (poisoned) torch::stable::fill_(tensor, __builtin_nan(""));
  return tensor;
}

Tensor absent() {
  return empty({0}, ScalarType::Float);
}

}  // namespace
