"""The CUDA kernels against the reference: on a GPU, or their own code in the emulator.

The emulator (tests/emulator) runs every thread as a fiber, in an order that a seed decides, and
reports races and accesses outside of the tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_checks import (  # noqa: F401 - fixtures among them
    DEVICE,
    DTYPES,
    KERNELS,
    ON_GPU,
    PACKED,
    both_walks,
    emulator_only,
    kernel,
    library,
    poison,
)

import emulated
import fastlstm
from cases import LAYERS, Layer, make_layer, tolerance
from fastlstm import backends, native
from fastlstm import cuda as backend
from fastlstm.contract import OutputGradients, Requested
from kernel_checks import ALL, PROGRAMS, assert_same_bits
from lattice import assert_agreement, lattice

# Those without a projection, with units in eights.
CASES = tuple(
    dict.fromkeys(
        replace(case, hidden=-(-case.hidden // 8) * 8) for case in LAYERS if not case.projection
    )
)
# Mailboxes are used again and again, in both parities.
LONG = Layer((9, 9, 9, 8, 8, 3, 1, 1, 1), 6, 24, directions=2)
both_kernels = pytest.mark.usefixtures("kernel")


@both_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_equals_reference(case: Layer, dtype: torch.dtype) -> None:
    KERNELS.check_layer(case, dtype)


if ON_GPU:

    @pytest.mark.parametrize("case", PROGRAMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sizes_of_programs(case: Layer, dtype: torch.dtype) -> None:
        layer = KERNELS.layer(case, dtype)
        h0, weights = layer.h0, layer.weights[0]
        call = backends.Call(layer.x, layer.batch_sizes, h0, weights, None, True, True)
        if (reason := backend.unsupported(call)) is not None:
            pytest.skip(reason)  # as "auto" would pass it by
        KERNELS.check_layer(case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # Two pairs of products to a warp; more than one piece of a gate to a lane.
        (Layer((3, 2), 6, 264), torch.bfloat16),
        (Layer((3, 2), 6, 136, directions=2), torch.float32),
        # Wider than registers hold: some operands are in shared memory.
        (Layer((3, 2), 6, 520), torch.float32),
    ],
    ids=str,
)
def test_wide_layers_equal_reference(case: Layer, dtype: torch.dtype) -> None:
    KERNELS.check_layer(case, dtype)


@pytest.mark.parametrize("sequences", [7, 8, 9, 16, 17, 32, 33, 70])
def test_slices_of_every_size(sequences: int, kernel: str) -> None:  # noqa: F811
    """Where one slice ends and another begins, by every number of sequences that a block has."""
    case = Layer((sequences, sequences, 1 + sequences // 3), 3, 24)
    name, two = ("blocks", 4) if kernel == "grid" else ("clusters", 16)
    rooms = (1 << 20,) if ON_GPU else (1 << 20, two)
    results = []
    for blocks in rooms:  # room for all teams; for two: slices are wide, and teams go in turns
        if not ON_GPU:
            emulated.setting(name, blocks)
        torch.manual_seed(0)
        KERNELS.check_layer(case, torch.bfloat16)
        torch.manual_seed(0)
        results.append(both_walks(case))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        if kernel == "cluster":  # whose sums have the same order in every slice, backward too
            assert_same_bits(other[1], results[0][1])


@both_kernels
def test_same_bits_every_time() -> None:
    KERNELS.check_same_bits(PACKED)


@both_kernels
@pytest.mark.parametrize("flag", [name for name in Requested._fields if name != "w_hr"])
def test_only_requested_gradients(flag: str) -> None:
    KERNELS.check_requested(PACKED, flag)


@both_kernels
@pytest.mark.parametrize("absent", range(4))
def test_absent_gradients_count_as_zeros(absent: int) -> None:
    KERNELS.check_absent(PACKED, absent)


@both_kernels
def test_expanded_and_strided_gradients() -> None:
    KERNELS.check_strides(8)


@both_kernels
@pytest.mark.parametrize("case", [PACKED, Layer((4,) * 6, 6, 16)], ids=str)
def test_inference_keeps_nothing(case: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    KERNELS.check_inference(case, monkeypatch)


@both_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_stay_in_their_sequence(value: float) -> None:
    KERNELS.check_special_value(value, 24)


@both_kernels
def test_jitter_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KERNELS.layer(PACKED, torch.bfloat16)
    want = backend.layer_forward(*layer, True, True)
    monkeypatch.setattr(backend, "JITTER", 3)
    assert_same_bits(backend.layer_forward(*layer, True, True), want)


# --- the protocol --------------------------------------------------------------------------


@emulator_only
@both_kernels
@pytest.mark.parametrize("seed", range(4))
def test_no_races_under_any_schedule(seed: int) -> None:
    emulated.setting("detect", 1)
    emulated.setting("seed", seed)
    both_walks()
    both_walks(LONG)


@emulator_only
@pytest.mark.parametrize("ordering", emulated.OF_A_GRID)
def test_without_one_ordering_there_are_races(
    ordering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "KERNEL", "grid")
    emulated.setting("detect", 1)
    emulated.omit(ordering)
    with pytest.raises(RuntimeError, match="a race of"):
        both_walks()


@emulator_only
def test_who_gives_up_waiting_is_reported(
    kernel: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next call says so, and the one after is served."""
    first, suffix = ("[12]", "") if kernel == "grid" else ("[012]", "_cluster")
    layer = KERNELS.layer(Layer((3, 3, 3), 4, 40), torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "POLLS", 0)
        backend.layer_forward(*layer, True, True)
    with pytest.raises(
        RuntimeError, match=rf"lstm_forward{suffix} on .* team 0 at step {first} of"
    ):
        backend.layer_forward(*layer, True, True)
    out = backend.layer_forward(*layer, True, True)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "POLLS", 0)
        gradients = OutputGradients(*out[:4])
        need = ALL._replace(w_hr=False)
        backend.layer_backward(gradients, *layer, out.reserve(), need)
    with pytest.raises(
        RuntimeError, match=rf"lstm_backward{suffix} on .* team 0 at step [0123] of"
    ):
        backend.check(DEVICE)
    backend.check(DEVICE)


def test_a_first_call_in_inference_mode_can_report() -> None:
    with torch.inference_mode():
        word = backend._fault_word.__wrapped__(DEVICE)
    word.zero_()  # as after a report


# --- the equations -------------------------------------------------------------------------


def test_equations_agree_over_the_lattice() -> None:
    args = lattice(torch.float32)
    given = [t.contiguous().to(DEVICE) for t in args]
    made = [torch.empty_like(given[i]) for i in (0, 1, 1, 0, 1)]  # gates, c, m, da, dc_prev
    stream = torch.cuda.current_stream().cuda_stream if ON_GPU else 0
    torch.ops.fastlstm_cuda.gate_math(*given, *made, stream)
    assert_agreement(tuple(t.cpu() for t in made), args, torch.float32)


# --- the backend ---------------------------------------------------------------------------


def test_module_trains_on_it() -> None:
    """Packed input, two layers, both directions; and the gradient of a gradient."""
    kinds = [
        fastlstm.LSTM(5, 16, 2, bidirectional=True, backend=name).to(DEVICE)
        for name in ("cuda", "reference")
    ]
    kinds[1].load_state_dict(kinds[0].state_dict())
    x = torch.randn(6, 3, 5, device=DEVICE)
    results = []
    for module in kinds:
        leaf = x.clone().requires_grad_()
        packed = torch.nn.utils.rnn.pack_padded_sequence(leaf, [6, 4, 1])
        y, (h_n, c_n) = module(packed)
        loss = y.data.square().sum() + h_n.sum() + c_n.square().sum()
        inputs = [leaf, *module.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs)
        results.append([y.data, h_n, c_n, *first, *second])
    for a, b in zip(*results, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a / scale, b / scale, **tolerance(torch.float16))


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Layer((2, 2), 3, 8), torch.float64, "torch.float64"),
        (Layer((2, 2), 3, 12), torch.float16, "multiple of 8 hidden units, got 12; 'triton'"),
        (Layer((2, 2), 3, 8, projection=8), torch.float16, "no projections; the backend 'triton'"),
        (Layer((2, 2), 3, 4096), torch.float16, "no kernel was compiled for 4096 units"),
    ],
    ids=str,
)
def test_what_it_refuses(case: Layer, dtype: torch.dtype, message: str) -> None:
    layer = make_layer(case, dtype)
    call = backends.Call(
        layer.x.to(DEVICE), layer.batch_sizes, layer.h0, layer.weights[0], None, False, False
    )
    with pytest.raises(RuntimeError, match=f"'cuda' cannot serve this call.*{message}"):
        backends.pick("cuda", call)


def test_float32_in_full_precision_is_refused() -> None:
    layer = KERNELS.layer(PACKED, torch.float32)
    call = backends.Call(*layer[:3], layer.weights[0], None, False, False)
    assert backend.unsupported(call) is None
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        assert "set_float32_matmul_precision('high')" in backend.unsupported(call)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elsewhere = call._replace(x=layer.x.to("meta"))
    assert "meta" in backend.unsupported(elsewhere)


@emulator_only
def test_blocks_that_do_not_fit_are_refused() -> None:
    layer = KERNELS.layer(PACKED, torch.bfloat16)
    call = backends.Call(*layer[:3], layer.weights[0], None, False, False)
    emulated.setting("blocks", 2)
    emulated.setting("clusters", 0)
    reason = "40 units of bfloat16 take 3 blocks .* holds 2 at once; the backends 'triton'"
    with pytest.raises(RuntimeError, match=reason):
        backends.pick("cuda", call)
    with pytest.raises(RuntimeError, match=reason):
        backend.layer_forward(*layer, False, False)


def test_auto_leaves_it_alone() -> None:
    """Though it is there."""
    assert fastlstm.available_backends()["cuda"] is None
    layer = KERNELS.layer(PACKED, torch.bfloat16)
    call = backends.Call(*layer[:3], layer.weights[0], None, False, True)
    assert backends.pick("cuda", call).name == "cuda"
    assert backends.pick("auto", call).name != "cuda"
    assert "cuda" not in {entry.name for entry in backends._AUTOMATIC}


@emulator_only
def test_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_device_type", lambda: "cuda")
    assert backend.missing() == "torch finds no CUDA device"
    monkeypatch.setenv("FASTLSTM_CUDA_LIBRARY", "absent.so")
    native.missing_cuda.cache_clear()
    assert backend.missing() == "FASTLSTM_CUDA_LIBRARY=absent.so: no such file"
    native.missing_cuda.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in backend.missing()


@emulator_only
def test_an_access_outside_of_the_tensors_is_reported() -> None:
    """The emulator's own control: a walk of one row more than there is."""
    layer = KERNELS.layer(Layer((3, 3), 4, 16), torch.float32)
    weights = [layer.weights[0]]
    walk = backend.walk_of(layer.batch_sizes, DEVICE)
    gates, c = torch.zeros(6, 1, 64), torch.zeros(1, 3, 16)
    given = backend._launch(walk, 1, 16, DEVICE)
    with pytest.raises(RuntimeError, match="an access outside of all tensors"):
        torch.ops.fastlstm_cuda.forward(
            **given, gates=gates, y=torch.zeros(6, 16), c_all=None, h_n=c.clone(), c_carry=c,
            h0=c.clone(), w_hh=backend.stacked([w.w_hh for w in weights]), reset=None,
            reserve=False, begin=0, end=2, origin_forward=-1, origin_reverse=0,
        )  # fmt: skip
