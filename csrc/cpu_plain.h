// Plain calls (fastlstm/plain.py): padded rows, weights and biases as nn.LSTM holds them, a state
// of zeros left out. Of a small call the operators and Python around a layer take longer than its
// arithmetic, so one operator does all that a call needs.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu_layer.h"

namespace {

// The sum of two vectors of n values, rounded as torch's own.
template <class T>
void add_vectors(const void* left, const void* right, void* sum, int64_t n) {
  const T *a = static_cast<const T*>(left), *b = static_cast<const T*>(right);
  for (int64_t k = 0; k < n; ++k) static_cast<T*>(sum)[k] = a[k] + b[k];
}

void add_vectors(fastlstm::Storage storage, const void* left, const void* right, void* sum,
                 int64_t n) {
  switch (storage) {
    case fastlstm::Storage::f32:
      return add_vectors<float>(left, right, sum, n);
    case fastlstm::Storage::f64:
      return add_vectors<double>(left, right, sum, n);
    case fastlstm::Storage::f16:
      return add_vectors<torch::headeronly::Half>(left, right, sum, n);
    case fastlstm::Storage::bf16:
      return add_vectors<torch::headeronly::BFloat16>(left, right, sum, n);
  }
}

const Tensor* given(const Optional& tensor) {
  return tensor ? &*tensor : nullptr;
}

// The call's arguments, and what they say of its shape. `weights` are, of each layer's each
// direction, w_ih, w_hh, both biases if there are any, and w_hr if P is not H. A single step may
// come without T, its states without layers.
struct PlainCall {
  const Tensor& x;
  const Tensor* const h0;  // or null
  const Tensor* const c0;  // or null
  const Tensors& weights;
  const Tensor* const reset;  // or null
  const int64_t D;
  const bool biased;
  const int64_t H, P;
  // By fits():
  ScalarType dtype = ScalarType::Undefined;
  bool step = false;
  int64_t T = 0, B = 0, I = 0, layers = 0;
  int64_t weights_per_direction = 0;

  // Does everything fit together? What does not, whoever calls finds errors for.
  bool fits() {
    step = x.dim() == 2;
    if (!(step || x.dim() == 3) || !x.is_cpu() || x.numel() == 0) return false;
    dtype = x.scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::Half &&
        dtype != ScalarType::BFloat16)
      return false;
    T = step ? 1 : x.size(0), B = x.size(x.dim() - 2), I = x.size(x.dim() - 1);
    if (D < 1 || D > max_directions || P < 1 || P > H) return false;
    weights_per_direction = 2 + 2 * biased + (P != H);
    layers = int64_t(weights.size()) / (weights_per_direction * D);
    if (layers < 1 || int64_t(weights.size()) != layers * weights_per_direction * D) return false;
    if (step && layers * D != 1) return false;
    if (reset && (step || !is(*reset, {T * B}, ScalarType::Byte))) return false;
    if ((h0 && !is(*h0, state_sizes(P))) || (c0 && !is(*c0, state_sizes(H)))) return false;
    for (int64_t layer = 0; layer < layers; ++layer)
      for (int64_t d = 0; d < D; ++d)
        if (!weights_fit(weight(layer, d), layer == 0 ? I : D * P)) return false;
    return true;
  }

  const Tensor* weight(int64_t layer, int64_t d) const {
    return weights.data() + (layer * D + d) * weights_per_direction;
  }
  std::vector<int64_t> state_sizes(int64_t size) const {
    return step ? std::vector<int64_t>{B, size} : std::vector<int64_t>{layers * D, B, size};
  }

 private:
  bool is(const Tensor& tensor, Sizes sizes) const { return is(tensor, sizes, dtype); }
  static bool is(const Tensor& tensor, Sizes sizes, ScalarType type) {
    const auto got = tensor.sizes();
    return tensor.is_cpu() && tensor.scalar_type() == type && got.size() == sizes.size() &&
           std::equal(got.begin(), got.end(), sizes.begin());
  }
  bool weights_fit(const Tensor* w, int64_t inputs) const {
    return is(w[0], {4 * H, inputs}) && is(w[1], {4 * H, P}) &&
           (!biased || (is(w[2], {4 * H}) && is(w[3], {4 * H}))) &&
           (P == H || is(w[weights_per_direction - 1], {P, H}));
  }
};

// A layer's weights as the kernels take them; returns the memory of the sums of its biases.
std::vector<char> set_weights(fastlstm::ForwardArgs& args, const PlainCall& call, int64_t layer,
                              Inputs& input) {
  const int64_t D = call.D, H = call.H;
  const size_t bias_bytes = 4 * size_t(H) * call.x.element_size();
  std::vector<char> biases(call.biased ? size_t(D) * bias_bytes : 0);
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* w = call.weight(layer, d);
    args.w_ih[d] = input.checked(w[0]);
    args.w_hh[d] = input.checked(w[1]);
    if (call.biased) {
      char* const bias = biases.data() + size_t(d) * bias_bytes;
      add_vectors(args.storage, input.checked(w[2]), input.checked(w[3]), bias, 4 * H);
      args.bias[d] = bias;
    }
    if (call.P != H) args.w_hr[d] = input.checked(w[call.weights_per_direction - 1]);
  }
  return biases;
}

Tensor copy_of(const Tensor& tensor) {  // which is contiguous
  Tensor copy = reserved(tensor.sizes(), tensor.scalar_type());
  std::memcpy(copy.mutable_data_ptr(), tensor.const_data_ptr(),
              size_t(tensor.numel()) * tensor.element_size());
  return copy;
}

// y (T, B, D*P), h_n (L*D, B, P) and c_n (L*D, B, H), or of a single step without T (B, P) and
// (B, H); or nothing, if anything does not fit. need_reserve is for single layers, and adds what
// cpu_plain_backward wants: y, c_all, gates and, with a projection, m. If the first y is to be
// changeable, it is a copy of that.
Tensors cpu_plain_forward(const Tensor& x, const Optional& h0, const Optional& c0,
                          const Tensors& weights, const Optional& reset, int64_t directions,
                          bool biased, int64_t hidden_size, int64_t output_size, bool changeable,
                          bool need_reserve) {
  PlainCall call{x,          given(h0), given(c0),   weights,    given(reset),
                 directions, biased,    hidden_size, output_size};
  if (!call.fits() || (need_reserve && call.layers != 1)) return {};
  const int64_t T = call.T, B = call.B, D = call.D, H = call.H, P = call.P, L = call.layers;
  const int64_t h_bytes = D * B * P * x.element_size(), c_bytes = D * B * H * x.element_size();
  const std::vector<int64_t> batch_sizes(size_t(T), B);
  const std::vector<char> zeros(h0 && c0 ? 0 : size_t(c_bytes));  // P is at most H
  Inputs input;
  const char* const h_first = h0 ? static_cast<const char*>(input.checked(*h0)) : nullptr;
  const char* const c_first = c0 ? static_cast<const char*>(input.checked(*c0)) : nullptr;
  Tensor h_n = output(call.state_sizes(P), call.dtype);
  Tensor c_n = output(call.state_sizes(H), call.dtype);
  Tensor values = x;  // of the layer below
  Tensors reserve;
  for (int64_t layer = 0; layer < L; ++layer) {
    Rows rows(values);
    fastlstm::ForwardArgs args{};
    args.shape = {T, T * B, B, D, layer == 0 ? call.I : D * P, H, P, batch_sizes.data()};
    args.storage = storage_of(call.dtype);
    args.threads = threads();
    args.x = input.checked(values);
    args.reset = reset ? static_cast<const uint8_t*>(input.checked(*reset)) : nullptr;
    args.h0 = h_first ? h_first + layer * h_bytes : zeros.data();
    args.c0 = c_first ? c_first + layer * c_bytes : zeros.data();
    args.h_n = static_cast<char*>(h_n.mutable_data_ptr()) + layer * h_bytes;
    args.c_n = static_cast<char*>(c_n.mutable_data_ptr()) + layer * c_bytes;
    Tensor y = (need_reserve ? reserved : output)(rows.of(D * P), call.dtype);
    args.y = y.mutable_data_ptr();
    const std::vector<char> biases = set_weights(args, call, layer, input);
    if (need_reserve) reserve = make_reserve(args, rows, call.dtype);
    fastlstm::kernels().forward(args);
    values = y;
  }
  Tensors results{need_reserve && changeable ? copy_of(values) : values, h_n, c_n};
  if (need_reserve) results.push_back(values);
  results.insert(results.end(), reserve.begin(), reserve.end());
  return results;
}

Tensor filled_with_zeros(Sizes sizes, ScalarType dtype) {
  Tensor tensor = empty(sizes, dtype);
  std::memset(tensor.mutable_data_ptr(), 0, size_t(tensor.numel()) * tensor.element_size());
  return tensor;
}

// Gradients of x, h0, c0 and the weights, in the order of a single layer's plain call, whose
// reserve is y, c_all, gates and, with a projection, m. need: as cpu_backward's. What is not asked
// for, or was not given, is an empty vector.
Tensors cpu_plain_backward(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                           const Tensor& x, const Optional& h0, const Optional& c0,
                           const Tensors& weights, const Optional& reset, const Tensors& reserve,
                           int64_t directions, bool biased, int64_t hidden_size,
                           int64_t output_size, const std::vector<bool>& need, int64_t chunk_rows,
                           int64_t chunk_bytes) {
  PlainCall call{x,          given(h0), given(c0),   weights,    given(reset),
                 directions, biased,    hidden_size, output_size};
  if (!call.fits() || call.layers != 1) fail("weights: they do not make a layer for x, h0 and c0");
  const int64_t T = call.T, B = call.B, D = call.D, H = call.H, P = call.P;
  if (reserve.size() != (P == H ? 3 : 4)) fail("reserve: expected y, c_all, gates[, m]");
  Tensor batch_sizes = empty({T}, ScalarType::Long);
  std::fill_n(static_cast<int64_t*>(batch_sizes.mutable_data_ptr()), T, B);
  Tensors w_ih, w_hh, w_hr;
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* w = call.weight(0, d);
    w_ih.push_back(w[0]);
    w_hh.push_back(w[1]);
    if (P != H) w_hr.push_back(w[call.weights_per_direction - 1]);
  }
  const auto [dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr] =
      cpu_backward(dy, std::nullopt, dh_n, dc_n, x, batch_sizes,
                   h0 ? *h0 : filled_with_zeros(call.state_sizes(P), call.dtype),
                   c0 ? *c0 : filled_with_zeros(call.state_sizes(H), call.dtype), w_ih, w_hh, w_hr,
                   reset, reserve[0], reserve[1], reserve[2],
                   P == H ? std::nullopt : Optional(reserve[3]), need, chunk_rows, chunk_bytes);
  Tensors gradients{dx, dh0, dc0};
  const Tensor nothing = absent();
  const auto add = [&](const Tensors& of, int64_t d) {
    gradients.push_back(of.empty() ? nothing : of[size_t(d)]);
  };
  for (int64_t d = 0; d < D; ++d) {
    add(dw_ih, d);
    add(dw_hh, d);
    if (biased) {  // two gradients: whoever changes one has not changed both
      add(dbias, d);
      gradients.push_back(dbias.empty() ? nothing : copy_of(dbias[size_t(d)]));
    }
    if (P != H) add(dw_hr, d);
  }
  return gradients;
}

}  // namespace
