// torch.ops.fastlstm_C: the kernels as torch operators, through LibTorch's stable ABI, so that
// one library serves every Python and every torch from 2.10 on.
//
// These operators trust nothing: every tensor's device, dtype, shape and contiguity is looked at,
// because a kernel reads and writes through raw pointers. What is not asked for is returned as an
// empty vector. fastlstm/cpu.py calls what a layer needs; the rest is for native.py and for tests.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/processor.h"
#include "cpu/scratch.h"
#include "cpu_layer.h"
#include "cpu_plain.h"
#include "cpu_tangents.h"
#include "cpu_tensors.h"

namespace {

// Overwrites pre with the gates where they have its type.
std::tuple<Tensor, Tensor, Tensor> cpu_recompute(Tensor pre, const Tensor& batch_sizes,
                                                 const Tensor& c0, const Optional& reset,
                                                 bool need_m) {
  if (pre.dim() != 2 || !pre.is_contiguous()) fail("pre: expected a contiguous (N, 4H)");
  Inputs input;
  const ScalarType dtype = c0.scalar_type(), state = state_of(dtype);
  fastlstm::RecomputeArgs args{};
  States states(c0);
  args.shape = shape_of(input, pre.size(0), batch_sizes, states, 1);
  args.storage = storage_of(dtype);
  args.threads = threads();
  const auto [T, N, B, D, I, H, P, sizes] = args.shape;
  if (D != 1) fail("c0: expected one direction");
  args.pre = input("pre", pre, {N, 4 * H}, state);
  args.c0 = input("c0", c0, states.of(H), dtype);
  args.reset = static_cast<const uint8_t*>(input("reset", reset, {N}, ScalarType::Byte));
  Tensor c_all = output({N, H}, state), m = absent();
  Tensor gates = dtype == state ? pre : output({N, 4 * H}, dtype);
  args.c_all = c_all.mutable_data_ptr();
  args.gates = gates.mutable_data_ptr();
  if (need_m) {
    m = output({N, H}, dtype);
    args.m = m.mutable_data_ptr();
  }
  fastlstm::kernels().recompute(args);
  // An output must not alias an input.
  return {c_all, dtype == state ? absent() : gates, m};
}

bool has_contiguous_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1;
}

// A matrix, if its rows are contiguous; returns the distance between them.
int64_t matrix(const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.dim() != 2 || tensor.scalar_type() != dtype || !has_contiguous_rows(tensor))
    fail(std::string(name) + ": expected a matrix of the right dtype with contiguous rows");
  return tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1);
}

// For tests: out = or += op(left) right; `bounded` as in ProductArgs. False, and nothing done, if
// that is better left to torch.
bool cpu_product(const Tensor& left, const Tensor& right, const Tensor& out, bool transposed,
                 bool add, bool bounded) {
  fastlstm::ProductArgs args{};
  const ScalarType dtype = right.scalar_type(), state = state_of(dtype);
  if (left.dim() == 2 && right.dim() == 2 &&
      !(has_contiguous_rows(left) && has_contiguous_rows(right)))
    return false;
  args.lda = matrix("left", left, state);
  const int64_t ldb = matrix("right", right, dtype), ldc = matrix("out", out, state);
  args.M = left.size(transposed ? 1 : 0);
  args.K = left.size(transposed ? 0 : 1);
  if (right.size(0) != args.K || out.size(0) != args.M || out.size(1) != right.size(1))
    fail("left, right, out: their shapes do not make a product");
  args.storage = storage_of(dtype);
  args.threads = threads();
  args.transposed = transposed;
  args.add = add;
  args.bounded = bounded;
  args.a = left.const_data_ptr();
  args.parts[0] = {right.size(1), right.const_data_ptr(), ldb, out.mutable_data_ptr(), ldc};
  return fastlstm::kernels().product(args);
}

using ProbeResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The equations alone, point by point, for tests/test_gate_math.py.
ProbeResult cpu_gate_math(const Tensor& a, const Tensor& c_prev, const Tensor& dm,
                          const Tensor& dc) {
  const ScalarType dtype = a.scalar_type();
  if (dtype != state_of(dtype)) fail("a: expected float32 or float64");
  const int64_t n = c_prev.numel();
  Inputs input;
  Tensor gates = output({4, n}, dtype), c = output({n}, dtype), m = output({n}, dtype);
  Tensor da = output({4, n}, dtype), dc_prev = output({n}, dtype);
  fastlstm::GateProbe probe{n,
                            input("a", a, {4, n}, dtype),
                            input("c_prev", c_prev, {n}, dtype),
                            input("dm", dm, {n}, dtype),
                            input("dc", dc, {n}, dtype),
                            gates.mutable_data_ptr(),
                            c.mutable_data_ptr(),
                            m.mutable_data_ptr(),
                            da.mutable_data_ptr(),
                            dc_prev.mutable_data_ptr()};
  fastlstm::kernels().probe(probe, storage_of(dtype));
  return {gates, c, m, da, dc_prev};
}

// The instruction sets that can be used here, best first, separated by spaces.
std::string cpu_instruction_sets() {
  const fastlstm::Kernels* tables[fastlstm::most_kernels];
  const int count = fastlstm::available_kernels(tables, fastlstm::most_kernels);
  std::string names;
  for (int k = 0; k < count; ++k) names += (k ? " " : "") + std::string(tables[k]->name);
  return names;
}

// For tests and benchmarks: run another instruction set; returns the one used before.
std::string cpu_use_instruction_set(std::string name) {
  const std::string before = fastlstm::kernels().name;
  if (!fastlstm::use_kernels(name.c_str()))
    fail("instruction set: got '" + name + "', expected one of: " + cpu_instruction_sets());
  return before;
}

// For tests: whether the matrix unit leaves small passes to vectors, and dot products take a few
// steps unpacked, which is the default.
void cpu_spare_matrix_unit(bool on) {
  fastlstm::spare_matrix_unit(on);
}

// For tests: choose as on another processor, by its maker and the bytes of its L2 cache; returns
// those before.
std::tuple<std::string, int64_t> cpu_assume_processor(std::string maker, int64_t l2_cache_bytes) {
  using fastlstm::Maker;
  constexpr std::pair<Maker, const char*> makers[] = {
      {Maker::intel, "intel"}, {Maker::amd, "amd"}, {Maker::other, "other"}};
  const auto* const found = std::find_if(std::begin(makers), std::end(makers),
                                         [&](const auto& one) { return maker == one.second; });
  if (found == std::end(makers)) fail("maker: got '" + maker + "', expected intel, amd or other");
  if (l2_cache_bytes < 1 || l2_cache_bytes > int64_t(1) << 40)
    fail("l2_cache_bytes: got " + std::to_string(l2_cache_bytes) + ", expected 1 to 2^40");
  const fastlstm::Processor before = fastlstm::assume_processor({found->first, l2_cache_bytes});
  for (const auto& one : makers)
    if (one.first == before.maker) maker = one.second;
  return {maker, before.l2_cache_bytes};
}

// For tests: fill scratch memory and outputs with NaNs before use.
void poison(bool on) {
  poisoned = on;
  fastlstm::poison_scratch(on);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastlstm_C, m) {
  m.def(
      "cpu_forward(Tensor x, Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih,"
      " Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor? reset, bool need_reserve,"
      " bool need_cells) -> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n, Tensor gates,"
      " Tensor m)");
  m.def(
      "cpu_plain_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? reset,"
      " int directions, bool biased, int hidden_size, int output_size, bool changeable,"
      " bool need_reserve)"
      " -> Tensor[]");
  m.def(
      "cpu_plain_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0,"
      " Tensor[] weights, Tensor? reset, Tensor[] reserve, int directions, bool biased,"
      " int hidden_size, int output_size, bool[] need, int chunk_rows, int chunk_bytes)"
      " -> Tensor[]");
  m.def(
      "cpu_backward(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, Tensor x,"
      " Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] w_hr,"
      " Tensor? reset, Tensor y, Tensor c_all, Tensor gates, Tensor? m, bool[] need,"
      " int chunk_rows, int chunk_bytes) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw_ih,"
      " Tensor[] dw_hh,"
      " Tensor[] dbias, Tensor[] dw_hr)");
  m.def(
      "cpu_walk(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, Tensor batch_sizes,"
      " Tensor c0, Tensor[] w_hh, Tensor[] w_hr, Tensor? reset, Tensor c_all, Tensor gates,"
      " bool[] need) -> (Tensor da, Tensor dh_all, Tensor dh0, Tensor dc0)");
  m.def(
      "cpu_recompute(Tensor(a!) pre, Tensor batch_sizes, Tensor c0, Tensor? reset, bool need_m)"
      " -> (Tensor c_all, Tensor gates, Tensor m)");
  m.def(
      "cpu_tangent(Tensor(a!) pre, Tensor batch_sizes, Tensor h0_tangent, Tensor c0_tangent,"
      " Tensor[] w_hh, Tensor[] w_hr, Tensor? reset, Tensor c0, Tensor c_all, Tensor gates)"
      " -> (Tensor y, Tensor cells, Tensor h_n, Tensor c_n, Tensor m)");
  m.def(
      "cpu_curvature(Tensor batch_sizes, Tensor? reset, Tensor c0, Tensor c_all, Tensor gates,"
      " Tensor c0_tangent, Tensor c_tangents, Tensor a_tangents, Tensor dm, Tensor? dc_all,"
      " Tensor? dc_n, Tensor? m) -> (Tensor a, Tensor c, Tensor c0_out)");
  m.def(
      "cpu_gate_math(Tensor a, Tensor c_prev, Tensor dm, Tensor dc)"
      " -> (Tensor gates, Tensor c, Tensor m, Tensor da, Tensor dc_prev)");
  m.def(
      "cpu_product(Tensor left, Tensor right, Tensor(a!) out, bool transposed, bool add, "
      "bool bounded) -> bool");
  m.def("cpu_instruction_sets() -> str");
  m.def("cpu_use_instruction_set(str name) -> str");
  m.def("cpu_spare_matrix_unit(bool on) -> ()");
  m.def("cpu_assume_processor(str maker, int l2_cache_bytes) -> (str, int)");
  m.def("poison(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm_C, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("cpu_plain_backward", TORCH_BOX(&cpu_plain_backward));
  m.impl("cpu_walk", TORCH_BOX(&cpu_walk));
  m.impl("cpu_product", TORCH_BOX(&cpu_product));
  m.impl("cpu_recompute", TORCH_BOX(&cpu_recompute));
  m.impl("cpu_tangent", TORCH_BOX(&cpu_tangent));
  m.impl("cpu_curvature", TORCH_BOX(&cpu_curvature));
  m.impl("cpu_gate_math", TORCH_BOX(&cpu_gate_math));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_plain_forward", TORCH_BOX(&cpu_plain_forward));  // declines what is not on the CPU
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
  m.impl("cpu_use_instruction_set", TORCH_BOX(&cpu_use_instruction_set));
  m.impl("cpu_spare_matrix_unit", TORCH_BOX(&cpu_spare_matrix_unit));
  m.impl("cpu_assume_processor", TORCH_BOX(&cpu_assume_processor));
  m.impl("poison", TORCH_BOX(&poison));
}
