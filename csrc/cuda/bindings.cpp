// torch.ops.fastlstm_cuda: the CUDA walks as torch operators, through LibTorch's stable ABI.
//
// Every tensor's device, dtype, shape, contiguity and alignment is checked. Not the values of
// `starts`, which are on the device: fastlstm/cuda.py, the only caller, computes them from batch
// sizes that were checked. The caller makes the device current and hands over its stream, which
// the stable ABI of a torch without CUDA does not know.
#include <torch/csrc/stable/library.h>

#include "../tensor_checks.h"
#include "dispatch.h"
#include "probe.h"

// Tests compile this file for the host, with an emulator in the kernels' place.
#if defined(FASTLSTM_EMULATED)
#  include "emulator.h"
#  define FASTLSTM_KEY CPU
#else
#  define FASTLSTM_KEY CUDA
#endif

namespace {

#if defined(FASTLSTM_EMULATED)
constexpr bool on_cpu = true;
void begin_call() {
  fastlstm::cuda::forget_allowed();
}
void seen(const Tensor& tensor, const void* data) {
  fastlstm::cuda::allow(data, size_t(tensor.numel()) * size_t(tensor.element_size()));
}
#else
constexpr bool on_cpu = false;
void begin_call() {}
void seen(const Tensor&, const void*) {}
#endif

void check_aligned(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype) {
  check(name, tensor, sizes, dtype, on_cpu);
  check_contiguous(name, tensor);
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % fastlstm::cuda::piece_bytes != 0)
    fail(std::string(name) + ": expected an address that is a multiple of 16 bytes");
}

// A checked pointer; null for an absent optional tensor.
template <class T = void>
const T* input(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype) {
  check_aligned(name, tensor, sizes, dtype);
  seen(tensor, tensor.const_data_ptr());
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
const T* input(const char* name, const Optional& tensor, Sizes sizes, ScalarType dtype) {
  return tensor ? input<T>(name, *tensor, sizes, dtype) : nullptr;
}
template <class T = void>
T* output(const char* name, Tensor tensor, Sizes sizes, ScalarType dtype) {
  check_aligned(name, tensor, sizes, dtype);
  seen(tensor, tensor.const_data_ptr());
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T = void>
T* output(const char* name, const Optional& tensor, Sizes sizes, ScalarType dtype) {
  return tensor ? output<T>(name, *tensor, sizes, dtype) : nullptr;
}

int32_t narrow(const char* name, int64_t value) {
  if (value < 0 || value > INT32_MAX)
    fail(std::string(name) + ": got " + std::to_string(value) + ", expected 0 to 2^31 - 1");
  return int32_t(value);
}

// What both walks are given. D, B and H come from `states`, (D, B, H).
struct WalkTensors {
  const Tensor& states;
  const Optional &reset, &starts;
  const Tensor &flags, &fault;
  int64_t steps, rows_per_step, begin, end, polls, jitter;
};

fastlstm::cuda::Walk walk_of(const WalkTensors& t, int64_t rows) {
  if (t.states.dim() != 3 || t.states.size(0) < 1 || t.states.size(0) > max_directions)
    fail("states: expected shape (D, B, H) with D 1 or 2");
  if (t.states.size(2) % 8 != 0 || t.states.size(2) == 0)
    fail("states: got " + std::to_string(t.states.size(2)) + " units, expected a multiple of 8");
  begin_call();
  fastlstm::cuda::Walk walk{};
  walk.steps = narrow("steps", t.steps);
  walk.directions = int32_t(t.states.size(0));
  walk.batch = narrow("B", t.states.size(1));
  walk.hidden = narrow("H", t.states.size(2));
  walk.rows_per_step = narrow("rows_per_step", t.rows_per_step);
  if (t.rows_per_step > t.states.size(1)) fail("rows_per_step: expected at most B");
  if (!t.starts && t.steps * t.rows_per_step != rows)
    fail("starts: expected them where steps differ in their rows");
  walk.starts = input<int64_t>("starts", t.starts, {t.steps + 1}, ScalarType::Long);
  walk.reset = input<uint8_t>("reset", t.reset, {rows}, ScalarType::Byte);
  walk.begin = narrow("begin", t.begin);
  walk.end = narrow("end", t.end);
  if (t.begin >= t.end) fail("begin: expected less than end");
  const int64_t tiles = fastlstm::cuda::tiles_of(walk.hidden);
  const int64_t slices = fastlstm::cuda::slices_of(walk.rows_per_step, fastlstm::cuda::mma_columns);
  walk.flags =
      output<int32_t>("flags", t.flags, {walk.directions * slices, tiles}, ScalarType::Int);
  check("fault", t.fault, {1}, ScalarType::Long, true);  // the host's memory, pinned
  seen(t.fault, t.fault.const_data_ptr());
  walk.fault = static_cast<int64_t*>(Tensor(t.fault).mutable_data_ptr());
  walk.polls = narrow("polls", t.polls);
  walk.jitter = narrow("jitter", t.jitter);
  return walk;
}

fastlstm::cuda::Choice choice_of(const std::string& kernel) {
  using fastlstm::cuda::Choice;
  if (kernel == "best") return Choice::best;
  if (kernel == "grid") return Choice::grid;
  if (kernel != "cluster") fail("kernel: got " + kernel + ", expected best, grid or cluster");
  return Choice::cluster;
}

void* stream_of(int64_t stream) {
  return reinterpret_cast<void*>(stream);
}

void forward(const Tensor& gates, const Tensor& y, const Optional& c_all, const Tensor& h_n,
             const Tensor& c_carry, const Tensor& h0, const Tensor& w_hh, const Optional& reset,
             const Optional& starts, const Tensor& flags, const Tensor& fault, int64_t steps,
             int64_t rows_per_step, int64_t begin, int64_t end, int64_t origin_forward,
             int64_t origin_reverse, bool reserve, int64_t polls, int64_t jitter,
             std::string kernel, int64_t stream) {
  const ScalarType dtype = y.scalar_type();
  const int64_t N = y.size(0), D = c_carry.size(0), B = c_carry.size(1), H = c_carry.size(2);
  fastlstm::cuda::ForwardArgs args{};
  args.walk = walk_of(
      {c_carry, reset, starts, flags, fault, steps, rows_per_step, begin, end, polls, jitter}, N);
  if (end > steps) fail("end: expected at most as many positions as steps");
  args.origin[0] = origin_forward;
  args.origin[1] = origin_reverse;
  args.gates = output("gates", gates, {gates.size(0), D, 4 * H}, dtype);
  args.reserve = reserve;
  args.y = output("y", y, {N, D * H}, dtype);
  args.c_all = output<float>("c_all", c_all, {N, D * H}, ScalarType::Float);
  args.h_n = output("h_n", h_n, {D, B, H}, dtype);
  args.c_carry = output<float>("c_carry", c_carry, {D, B, H}, ScalarType::Float);
  args.h0 = input("h0", h0, {D, B, H}, dtype);
  args.w_hh = input("w_hh", w_hh, {D, 4 * H, H}, dtype);
  fastlstm::cuda::run(args, storage_of(dtype), choice_of(kernel), stream_of(stream));
}

void backward(const Tensor& da, const Optional& dh0, const Tensor& dc_carry, const Optional& dy,
              const Optional& dc_all, const Optional& dh_n, const Tensor& gates,
              const Tensor& c_all, const Tensor& c0, const Tensor& w_hh, const Optional& reset,
              const Optional& starts, const Tensor& flags, const Tensor& fault, int64_t steps,
              int64_t rows_per_step, int64_t begin, int64_t end, int64_t polls, int64_t jitter,
              std::string kernel, int64_t stream) {
  const ScalarType dtype = da.scalar_type();
  const int64_t N = da.size(0), D = dc_carry.size(0), B = dc_carry.size(1), H = dc_carry.size(2);
  fastlstm::cuda::BackwardArgs args{};
  args.walk = walk_of(
      {dc_carry, reset, starts, flags, fault, steps, rows_per_step, begin, end, polls, jitter}, N);
  if (end > steps + 1) fail("end: expected at most one position more than steps");
  args.da = output("da", da, {N, D, 4 * H}, dtype);
  args.dh0 = output("dh0", dh0, {D, B, H}, dtype);
  args.dc_carry = output<float>("dc_carry", dc_carry, {D, B, H}, ScalarType::Float);
  args.dy = input("dy", dy, {N, D * H}, dtype);
  args.dc_all = input<float>("dc_all", dc_all, {N, D * H}, ScalarType::Float);
  args.dh_n = input("dh_n", dh_n, {D, B, H}, dtype);
  args.gates = input("gates", gates, {N, D, 4 * H}, dtype);
  args.c_all = input<float>("c_all", c_all, {N, D * H}, ScalarType::Float);
  args.c0 = input("c0", c0, {D, B, H}, dtype);
  args.w_hh = input("w_hh", w_hh, {D, 4 * H, H}, dtype);
  fastlstm::cuda::run(args, storage_of(dtype), choice_of(kernel), stream_of(stream));
}

fastlstm::cuda::Shape shape_of(fastlstm::cuda::Kind kind, const std::string& dtype, int64_t hidden,
                               int64_t directions, int64_t rows_per_step) {
  using fastlstm::Storage;
  const Storage storage = dtype == "float16"    ? Storage::f16
                          : dtype == "bfloat16" ? Storage::bf16
                          : dtype == "float32"  ? Storage::f32
                                                : Storage::f64;
  return {kind, storage, narrow("H", hidden), narrow("D", directions),
          narrow("rows_per_step", rows_per_step)};
}

// Why the current device cannot serve a walk of either kind, or an empty string.
std::string refusal(std::string dtype, int64_t hidden, int64_t directions, int64_t rows_per_step,
                    std::string kernel) {
  using fastlstm::cuda::Kind;
  fastlstm::cuda::Plan plan;
  for (const Kind kind : {Kind::forward, Kind::backward}) {
    const std::string reason = fastlstm::cuda::make_plan(
        shape_of(kind, dtype, hidden, directions, rows_per_step), choice_of(kernel), &plan);
    if (!reason.empty()) return reason;
  }
  return "";
}

// What would serve a walk, in words, for tests and records; why nothing would, if so.
std::string plan(bool backward, std::string dtype, int64_t hidden, int64_t directions,
                 int64_t rows_per_step, std::string kernel) {
  using fastlstm::cuda::Kind;
  fastlstm::cuda::Plan plan;
  const std::string reason = fastlstm::cuda::make_plan(
      shape_of(backward ? Kind::backward : Kind::forward, dtype, hidden, directions, rows_per_step),
      choice_of(kernel), &plan);
  if (!reason.empty()) return reason;
  const auto words = [](int count, const char* what) { return std::to_string(count) + what; };
  return std::string(plan.instance->cluster > 0 ? "cluster" : "grid") + ": " +
         words(plan.tiles, " blocks of ") + words(plan.instance->units, " units, ") +
         words(plan.instance->n_tiles * fastlstm::cuda::mma_columns, " sequences; ") +
         words(plan.teams, " teams, ") + words(plan.teams_at_once, " at once");
}

// "cuda", or "cpu" where an emulator has taken the kernels' place.
std::string device_type() {
  return on_cpu ? "cpu" : "cuda";
}

// The equations alone, point by point, as cpu_gate_math in ../bindings.cpp.
void gate_math(const Tensor& a, const Tensor& c_prev, const Tensor& dm, const Tensor& dc,
               const Tensor& gates, const Tensor& c, const Tensor& m, const Tensor& da,
               const Tensor& dc_prev, int64_t stream) {
  const int64_t n = c_prev.numel();
  const ScalarType dtype = ScalarType::Float;
  fastlstm::cuda::probe(
      {n, input<float>("a", a, {4, n}, dtype), input<float>("c_prev", c_prev, {n}, dtype),
       input<float>("dm", dm, {n}, dtype), input<float>("dc", dc, {n}, dtype),
       output<float>("gates", gates, {4, n}, dtype), output<float>("c", c, {n}, dtype),
       output<float>("m", m, {n}, dtype), output<float>("da", da, {4, n}, dtype),
       output<float>("dc_prev", dc_prev, {n}, dtype)},
      stream_of(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(fastlstm_cuda, m) {
  m.def(
      "forward(Tensor(a!) gates, Tensor(b!) y, Tensor(c!)? c_all, Tensor(d!) h_n,"
      " Tensor(e!) c_carry, Tensor h0, Tensor w_hh, Tensor? reset, Tensor? starts,"
      " Tensor(f!) flags, Tensor(g!) fault, int steps, int rows_per_step, int begin, int end,"
      " int origin_forward, int origin_reverse, bool reserve, int polls, int jitter, str kernel,"
      " int stream)"
      " -> ()");
  m.def(
      "backward(Tensor(a!) da, Tensor(b!)? dh0, Tensor(c!) dc_carry, Tensor? dy, Tensor? dc_all,"
      " Tensor? dh_n, Tensor gates, Tensor c_all, Tensor c0, Tensor w_hh, Tensor? reset,"
      " Tensor? starts, Tensor(d!) flags, Tensor(e!) fault, int steps, int rows_per_step,"
      " int begin, int end, int polls, int jitter, str kernel,"
      " int stream) -> ()");
  m.def(
      "gate_math(Tensor a, Tensor c_prev, Tensor dm, Tensor dc, Tensor(a!) gates, Tensor(b!) c,"
      " Tensor(c!) m, Tensor(d!) da, Tensor(e!) dc_prev, int stream) -> ()");
  m.def("refusal(str dtype, int hidden, int directions, int rows_per_step, str kernel) -> str");
  m.def(
      "plan(bool backward, str dtype, int hidden, int directions, int rows_per_step, str kernel)"
      " -> str");
  m.def("device_type() -> str");
#if defined(FASTLSTM_EMULATED)
  m.def("emulator_set(str name, int value) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm_cuda, FASTLSTM_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("gate_math", TORCH_BOX(&gate_math));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm_cuda, CompositeExplicitAutograd, m) {
  m.impl("refusal", TORCH_BOX(&refusal));
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("device_type", TORCH_BOX(&device_type));
#if defined(FASTLSTM_EMULATED)
  m.impl("emulator_set", TORCH_BOX(&fastlstm::cuda::emulator_set));
#endif
}
