// Tangents of one layer, and what differentiates its backward pass again, as operators:
// fastlstm/cpu.py calls them. All tensors are of one state type; every row is packed.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu_tensors.h"

namespace {

ScalarType state_type_of(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail(std::string(name) + ": expected float32 or float64");
  return dtype;
}

using TangentResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// y (N, D*P), c_all (N, D*H), h_n, c_n and m (N, D*H, with a projection) of tangents, from those of
// the initial states and from `pre` (N, D, 4H), those of the pre-activations but for W_hh h, which
// is added to it. c0 (D, B, H), c_all (N, D*H) and gates (N, D, 4H) are the layer's own.
TangentResult cpu_tangent(Tensor pre, const Tensor& batch_sizes, const Tensor& h0_tangent,
                          const Tensor& c0_tangent, const Tensors& w_hh, const Tensors& w_hr,
                          const Optional& reset, const Tensor& c0, const Tensor& c_all,
                          const Tensor& gates) {
  if (pre.dim() != 3 || !pre.is_contiguous()) fail("pre: expected a contiguous (N, D, 4H)");
  Inputs input;
  States states(c0);
  const ScalarType dtype = state_type_of("pre", pre);
  fastlstm::TangentArgs args{};
  args.shape = shape_of(input, pre.size(0), batch_sizes, states, output_size_of(w_hh));
  args.storage = storage_of(dtype);
  args.threads = threads();
  const auto [T, N, B, D, I, H, P, sizes] = args.shape;
  check("pre", pre, {N, D, 4 * H}, dtype);
  args.pre = pre.mutable_data_ptr();
  args.h0 = input("h0_tangent", h0_tangent, states.of(P), dtype);
  args.c0 = input("c0_tangent", c0_tangent, states.of(H), dtype);
  input.each("w_hh", w_hh, D, {4 * H, P}, dtype, args.w_hh, true);
  input.each("w_hr", w_hr, D, {P, H}, dtype, args.w_hr);
  if (w_hr.empty() && P != H) fail("w_hr: expected a projection, since P is not H");
  args.reset = static_cast<const uint8_t*>(input("reset", reset, {N}, ScalarType::Byte));
  args.layer_c0 = input("c0", c0, states.of(H), dtype);
  args.layer_c_all = input("c_all", c_all, {N, D * H}, dtype);
  args.layer_gates = input("gates", gates, {N, D, 4 * H}, dtype);

  Tensor y = output({N, D * P}, dtype), cells = output({N, D * H}, dtype);
  Tensor h_n = output(states.of(P), dtype), c_n = output(states.of(H), dtype);
  Tensor m = w_hr.empty() ? absent() : output({N, D * H}, dtype);
  args.y = y.mutable_data_ptr();
  args.c_all = cells.mutable_data_ptr();
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = c_n.mutable_data_ptr();
  if (!w_hr.empty()) args.m = m.mutable_data_ptr();
  fastlstm::kernels().tangent(args);
  return {y, cells, h_n, c_n, m};
}

using CurvatureResult = std::tuple<Tensor, Tensor, Tensor>;

// What reaches the pre-activations (N, D, 4H), every c_t (N, D*H) and c0; see CurvatureArgs.
CurvatureResult cpu_curvature(const Tensor& batch_sizes, const Optional& reset, const Tensor& c0,
                              const Tensor& c_all, const Tensor& gates, const Tensor& c0_tangent,
                              const Tensor& c_tangents, const Tensor& a_tangents, const Tensor& dm,
                              const Optional& dc_all, const Optional& dc_n, const Optional& m) {
  if (c_all.dim() != 2) fail("c_all: expected (N, D*H)");
  Inputs input;
  States states(c0);
  const ScalarType dtype = state_type_of("c0", c0);
  fastlstm::CurvatureArgs args{};
  args.shape = shape_of(input, c_all.size(0), batch_sizes, states, 1);
  args.storage = storage_of(dtype);
  args.threads = threads();
  const auto [T, N, B, D, I, H, P, sizes] = args.shape;
  args.reset = static_cast<const uint8_t*>(input("reset", reset, {N}, ScalarType::Byte));
  args.c0 = input("c0", c0, states.of(H), dtype);
  args.c_all = input("c_all", c_all, {N, D * H}, dtype);
  args.gates = input("gates", gates, {N, D, 4 * H}, dtype);
  args.c0_tangent = input("c0_tangent", c0_tangent, states.of(H), dtype);
  args.c_tangents = input("c_tangents", c_tangents, {N, D * H}, dtype);
  args.a_tangents = input("a_tangents", a_tangents, {N, D, 4 * H}, dtype);
  args.dm = input("dm", dm, {N, D * H}, dtype);
  args.dc_all = input("dc_all", dc_all, {N, D * H}, dtype);
  args.dc_n = input("dc_n", dc_n, states.of(H), dtype);
  args.m = input("m", m, {N, D * H}, dtype);

  Tensor a_out = output({N, D, 4 * H}, dtype), c_out = output({N, D * H}, dtype);
  Tensor c0_out = output(states.of(H), dtype);
  args.a_out = a_out.mutable_data_ptr();
  args.c_out = c_out.mutable_data_ptr();
  args.c0_out = c0_out.mutable_data_ptr();
  fastlstm::kernels().curvature(args);
  return {a_out, c_out, c0_out};
}

}  // namespace
