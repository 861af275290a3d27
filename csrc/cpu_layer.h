// One layer's passes as operators: fastlstm/cpu.py calls them. What is not asked for is returned as
// an empty vector.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/layer_backward.h"
#include "cpu_tensors.h"

namespace {

// What a backward pass needs of a forward pass besides y: c_all, gates and, with a projection, m.
// Made, and given to the kernel.
Tensors make_reserve(fastlstm::ForwardArgs& args, Rows& rows, ScalarType dtype) {
  const auto [T, N, B, D, I, H, P, sizes] = args.shape;
  Tensors made{reserved(rows.of(D * H), state_of(dtype)), reserved({N, D, 4 * H}, dtype)};
  args.c_all = made[0].mutable_data_ptr();
  args.gates = made[1].mutable_data_ptr();
  if (args.w_hr[0] != nullptr) {
    made.push_back(reserved({N, D * H}, dtype));
    args.m = made[2].mutable_data_ptr();
  }
  return made;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult cpu_forward(const Tensor& x, const Tensor& batch_sizes, const Tensor& h0,
                          const Tensor& c0, const Tensors& w_ih, const Tensors& w_hh,
                          const Tensors& bias, const Tensors& w_hr, const Optional& reset,
                          bool need_reserve, bool need_cells) {
  Rows rows(x);
  States states(c0);
  Inputs input;
  const ScalarType dtype = x.scalar_type(), state = state_of(dtype);
  fastlstm::ForwardArgs args{};
  args.shape = shape_of(input, rows.count(), batch_sizes, states, output_size_of(w_hh));
  args.shape.I = x.size(x.dim() - 1);
  args.storage = storage_of(dtype);
  args.threads = threads();
  const auto [T, N, B, D, I, H, P, sizes] = args.shape;
  args.x = input("x", x, rows.of(I), dtype);
  args.h0 = input("h0", h0, states.of(P), dtype);
  args.c0 = input("c0", c0, states.of(H), dtype);
  input.each("w_ih", w_ih, D, {4 * H, I}, dtype, args.w_ih, true);
  input.each("w_hh", w_hh, D, {4 * H, P}, dtype, args.w_hh, true);
  input.each("bias", bias, D, {4 * H}, dtype, args.bias);
  input.each("w_hr", w_hr, D, {P, H}, dtype, args.w_hr);
  if (w_hr.empty() && P != H) fail("w_hr: expected a projection, since P is not H");
  args.reset = static_cast<const uint8_t*>(input("reset", reset, {N}, ScalarType::Byte));

  Tensor y = (need_reserve ? reserved : output)(rows.of(D * P), dtype);
  Tensor h_n = output(states.of(P), dtype), c_n = output(states.of(H), dtype);
  Tensor c_all = absent(), gates = absent(), m = absent();
  args.y = y.mutable_data_ptr();
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = c_n.mutable_data_ptr();
  if (need_reserve) {
    const Tensors reserve = make_reserve(args, rows, dtype);
    c_all = reserve[0];
    gates = reserve[1];
    if (reserve.size() > 2) m = reserve[2];
  } else if (need_cells) {
    c_all = output(rows.of(D * H), state);
    args.c_all = c_all.mutable_data_ptr();
  }
  fastlstm::kernels().forward(args);
  return {y, c_all, h_n, c_n, gates, m};
}

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// C += a dense matrix.
template <class T>
void add_matrix(const T* matrix, int64_t rows, const fastlstm::ProductPart& part) {
  T* c = static_cast<T*>(part.c);
  for (int64_t row = 0; row < rows; ++row, c += part.ldc, matrix += part.N)
    for (int64_t k = 0; k < part.N; ++k) c[k] += matrix[k];
}

// C = or += op(A) B by torch, for what the kernels leave to it.
void torch_product(const fastlstm::ProductArgs& p, const fastlstm::ProductPart& part) {
  const ScalarType storage = dtype_of(p.storage), state = state_of(storage);
  const auto matrix = [](const void* data, Sizes sizes, Sizes strides, ScalarType dtype) {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype);
  };
  const Tensor left = p.transposed ? matrix(p.a, {p.M, p.K}, {1, p.lda}, state)
                                   : matrix(p.a, {p.M, p.K}, {p.lda, 1}, state);
  const Tensor right = in_dtype(matrix(part.b, {p.K, part.N}, {part.ldb, 1}, storage), state);
  const Tensor out = matrix(part.c, {p.M, part.N}, {part.ldc, 1}, state);
  Tensor product = p.add ? empty({p.M, part.N}, state) : out;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left),
                                    torch::stable::detail::from(right),
                                    torch::stable::detail::from(product)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // it is ours to release
  if (!p.add) return;
  if (state == ScalarType::Double)
    add_matrix(static_cast<const double*>(product.const_data_ptr()), p.M, part);
  else
    add_matrix(static_cast<const float*>(product.const_data_ptr()), p.M, part);
}

void torch_products(const fastlstm::ProductArgs& p) {
  for (const fastlstm::ProductPart& part : p.parts)
    if (part.N > 0) torch_product(p, part);
}

// What a walk is given; what it is to make is left to the caller.
fastlstm::BackwardArgs walk_args(Inputs& input, ScalarType dtype, Rows& rows, States& states,
                                 const Optional& dy, const Optional& dc_all, const Optional& dh_n,
                                 const Optional& dc_n, const Tensor& batch_sizes, const Tensor& c0,
                                 const Tensors& w_hh, const Tensors& w_hr, const Optional& reset,
                                 const Tensor& c_all, const Tensor& gates) {
  const ScalarType state = state_of(dtype);
  fastlstm::BackwardArgs walk{};
  walk.shape = shape_of(input, rows.count(), batch_sizes, states, output_size_of(w_hh));
  walk.storage = storage_of(dtype);
  walk.threads = threads();
  const auto [T, N, B, D, I, H, P, sizes] = walk.shape;
  walk.dy = input("dy", dy, rows.of(D * P), dtype);
  walk.dc_all = input("dc_all", dc_all, rows.of(D * H), state);
  walk.dh_n = input("dh_n", dh_n, states.of(P), dtype);
  walk.dc_n = input("dc_n", dc_n, states.of(H), dtype);
  walk.c0 = input("c0", c0, states.of(H), dtype);
  input.each("w_hh", w_hh, D, {4 * H, P}, dtype, walk.w_hh, true);
  input.each("w_hr", w_hr, D, {P, H}, dtype, walk.w_hr);
  if (w_hr.empty() && P != H) fail("w_hr: expected a projection, since P is not H");
  walk.reset = static_cast<const uint8_t*>(input("reset", reset, {N}, ScalarType::Byte));
  walk.c_all = input("c_all", c_all, rows.of(D * H), state);
  walk.gates = input("gates", gates, {N, D, 4 * H}, dtype);
  return walk;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensors>;

// need: of x, h0, c0, w_ih, w_hh, bias, w_hr. A list that is not asked for is empty. The walk stops
// for the products every `chunk_bytes` of da, but not before `chunk_rows`.
BackwardResult cpu_backward(const Optional& dy, const Optional& dc_all, const Optional& dh_n,
                            const Optional& dc_n, const Tensor& x, const Tensor& batch_sizes,
                            const Tensor& h0, const Tensor& c0, const Tensors& w_ih,
                            const Tensors& w_hh, const Tensors& w_hr, const Optional& reset,
                            const Tensor& y, const Tensor& c_all, const Tensor& gates,
                            const Optional& m, const std::vector<bool>& need, int64_t chunk_rows,
                            int64_t chunk_bytes) {
  Rows rows(x);
  States states(c0);
  Inputs input;
  if (need.size() != 7) fail("need: expected seven flags");
  const ScalarType dtype = x.scalar_type(), state = state_of(dtype);
  fastlstm::LayerBackwardArgs args{};
  fastlstm::BackwardArgs& walk = args.walk;
  walk = walk_args(input, dtype, rows, states, dy, dc_all, dh_n, dc_n, batch_sizes, c0, w_hh, w_hr,
                   reset, c_all, gates);
  walk.shape.I = x.size(x.dim() - 1);
  const auto [T, N, B, D, I, H, P, sizes] = walk.shape;
  const int64_t row_bytes = D * 4 * H * (state == ScalarType::Double ? 8 : 4);
  args.chunk_rows = std::max(chunk_rows, chunk_bytes / row_bytes);
  args.x = input("x", x, rows.of(I), dtype);
  args.h0 = input("h0", h0, states.of(P), dtype);
  input.each("w_ih", w_ih, D, {4 * H, I}, dtype, args.w_ih, true);
  args.y = input("y", y, rows.of(D * P), dtype);
  args.m = input("m", m, {N, D * H}, dtype);
  if (need[6] && !m) fail("m: expected a tensor, needed for the gradient of w_hr");

  Tensor dx = need[0] ? reserved(rows.of(I), state) : absent();
  Tensor dh0 = need[1] ? output(states.of(P), dtype) : absent();
  Tensor dc0 = need[2] ? output(states.of(H), dtype) : absent();
  if (need[0]) args.dx = dx.mutable_data_ptr();
  if (need[1]) walk.dh0 = dh0.mutable_data_ptr();
  if (need[2]) walk.dc0 = dc0.mutable_data_ptr();
  const auto each = [&, D = D](bool needed, Sizes sizes, void*(&out)[max_directions]) {
    Tensors made;
    for (int64_t d = 0; needed && d < D; ++d) {
      made.push_back(reserved(sizes, state));
      out[d] = made.back().mutable_data_ptr();
    }
    return made;
  };
  Tensors dw_ih = each(need[3], {4 * H, I}, args.dw_ih);
  Tensors dw_hh = each(need[4], {4 * H, P}, args.dw_hh);
  Tensors dbias = each(need[5], {4 * H}, args.dbias);
  Tensors dw_hr = each(need[6], {P, H}, args.dw_hr);
  fastlstm::layer_backward(args, torch_products);
  for (Tensors* list : {&dw_ih, &dw_hh, &dbias, &dw_hr})
    for (Tensor& tensor : *list) tensor = in_dtype(tensor, dtype);
  return {in_dtype(dx, dtype), dh0, dc0, dw_ih, dw_hh, dbias, dw_hr};
}

using WalkResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The walk of a backward pass alone: da (N, D, 4H) and dh_all (N, D*P) in state type, dh0, dc0.
// need: of dh_all, dh0 and dc0.
WalkResult cpu_walk(const Optional& dy, const Optional& dc_all, const Optional& dh_n,
                    const Optional& dc_n, const Tensor& batch_sizes, const Tensor& c0,
                    const Tensors& w_hh, const Tensors& w_hr, const Optional& reset,
                    const Tensor& c_all, const Tensor& gates, const std::vector<bool>& need) {
  Rows rows(c_all);
  States states(c0);
  Inputs input;
  if (need.size() != 3) fail("need: expected three flags");
  const ScalarType dtype = c0.scalar_type(), state = state_of(dtype);
  fastlstm::BackwardArgs walk = walk_args(input, dtype, rows, states, dy, dc_all, dh_n, dc_n,
                                          batch_sizes, c0, w_hh, w_hr, reset, c_all, gates);
  const auto [T, N, B, D, I, H, P, sizes] = walk.shape;
  walk.end = std::count_if(sizes, sizes + T, [](int64_t size) { return size > 0; });

  Tensor da = output({N, D, 4 * H}, state);
  Tensor dh_all = need[0] ? output({N, D * P}, state) : absent();
  Tensor dh0 = need[1] ? output(states.of(P), dtype) : absent();
  Tensor dc0 = need[2] ? output(states.of(H), dtype) : absent();
  walk.da = da.mutable_data_ptr();
  if (need[0]) walk.dh_all = dh_all.mutable_data_ptr();
  if (need[1]) walk.dh0 = dh0.mutable_data_ptr();
  if (need[2]) walk.dc0 = dc0.mutable_data_ptr();
  fastlstm::kernels().backward(walk);
  return {da, dh_all, dh0, dc0};
}

}  // namespace
