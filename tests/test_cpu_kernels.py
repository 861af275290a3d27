"""The C++ kernels against the reference: every feature, dtype and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import settings
from cases import DTYPES, LARGER, LAYERS, Layer, make_layer, tolerance
from fastlstm import cpu, native, products, reference
from fastlstm.contract import Gradients, OutputGradients, Requested, Weights
from kernel_checks import ALL, Kernels, need_of, random_gradients

_C = torch.ops.fastlstm_C
INSTRUCTION_SETS = native.instruction_sets()
pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")
CPU = Kernels(cpu, torch.device("cpu"))


@pytest.mark.parametrize("case", [*LAYERS, *LARGER], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_equals_reference(case: Layer, dtype: torch.dtype, instruction_set: str) -> None:
    CPU.check_layer(case, dtype)


BEYOND_CACHES = (
    Layer((200, 200, 90), 130, 403, reset=0.1),
    Layer((1,) * 40, 3400, 320, directions=2, reset=0.1),  # unpacked, inputs in chunks
)
# Too many weights for threads to walk apart, and da that leaves room in the cache: on the matrix
# unit they exchange sums, of two directions where three or more of them do not have one each.
MEETING = (
    Layer((40, 40, 33, 20, 7), 64, 450, reset=0.1, batch=42),
    Layer((36, 36, 17), 30, 400, directions=2),
)


@pytest.mark.parametrize("case", [*BEYOND_CACHES, *MEETING], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 8])  # of more than there are cores some are helped
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_beyond_the_caches(
    case: Layer, dtype: torch.dtype, threads: int, instruction_set: str
) -> None:
    """Weights and dgates larger than an L2 cache take other ways through it."""
    layer = make_layer(case, dtype)
    want = exactly(dtype, reference.layer_forward, *layer, True, True)
    grads = random_gradients(want)
    inputs = (*layer, want.reserve(), need_of(case))
    with settings.threads(threads):
        got = cpu.layer_forward(*layer, True, True)
        got_back = cpu.layer_backward(grads, *inputs)
    CPU.assert_near(got, want, dtype)
    CPU.assert_near(got_back, exactly(dtype, reference.layer_backward, grads, *inputs), dtype)


def exactly(dtype: torch.dtype, function: Callable[..., Any], *args: Any) -> Any:
    """What it makes of tensors of this dtype, of float32 by way of float64: a BLAS may lose more of
    sums of thousands than the kernels do."""
    if dtype != torch.float32:
        return function(*args)
    found = function(*_converted(args, dtype, torch.float64))
    return _converted(found, torch.float64, dtype)


def _converted(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(new) if isinstance(t, Tensor) and t.dtype == old else t, values)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*LAYERS, *LARGER], ids=str)
def test_a_walk_in_chunks_is_the_same_walk(
    case: Layer, dtype: torch.dtype, threads: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward walk cut after every ``steps`` steps or so, against the whole one."""
    layer = make_layer(case, dtype)
    saved = reference.layer_forward(*layer, True, True)
    grads = random_gradients(saved)
    whole = cpu.layer_backward(grads, *layer, saved.reserve(), need_of(case))
    rows = sum(case.batch_sizes)
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "_CHUNK_ROWS", max(1, steps * rows // max(1, len(case.batch_sizes))))
    with settings.threads(threads):
        chunked = cpu.layer_backward(grads, *layer, saved.reserve(), need_of(case))
    CPU.assert_near(chunked, whole, dtype)


@pytest.mark.parametrize("case", [*LAYERS, *LARGER, *MEETING], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_initial_cells_alone(case: Layer, threads: int, instruction_set: str) -> None:
    """The gradient of c_0 without that of h_0, for which the walk takes one step more."""
    layer = make_layer(case, torch.float32)
    saved = reference.layer_forward(*layer, True, True)
    inputs = (random_gradients(saved), *layer, saved.reserve())
    only_c0 = Requested(*(name == "c0" for name in Requested._fields))
    with settings.threads(threads):
        whole = cpu.layer_backward(*inputs, need_of(case))
        alone = cpu.layer_backward(*inputs, only_c0)
    assert torch.equal(alone.c0, whole.c0)
    assert alone.h0 is None


@pytest.mark.parametrize("case", [*LAYERS, *LARGER, *MEETING], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_walk_alone(case: Layer, dtype: torch.dtype, threads: int, instruction_set: str) -> None:
    """And what follows it where each sample has gradients of weights, for the only one."""
    layer = x, batch_sizes, h0, c0, weights, reset = make_layer(case, dtype)
    saved = reference.layer_forward(*layer, True, True)
    grads, reserve, need = random_gradients(saved), saved.reserve(), need_of(case)
    with settings.threads(threads):
        walked = cpu.layer_walk(grads, batch_sizes, c0, weights, reset, reserve, need)
        inputs = (x, batch_sizes, h0, weights, reset, reserve, need)
        got = products.sample_gradients(1, walked, *inputs)
    alone = [w if w is None else [t.squeeze(0) for t in w] for w in got[3:]]
    want = reference.layer_backward(grads, *layer, reserve, need)
    CPU.assert_near(Gradients(*got[:3], *alone), want, dtype)


@pytest.mark.parametrize("case", MEETING, ids=str)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads_that_meet_walk_in_chunks(
    case: Layer, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a chunk of steps leaves reaches each thread's part of the next one."""
    layer = make_layer(case, dtype)
    saved = reference.layer_forward(*layer, True, True)
    inputs = (random_gradients(saved), *layer, saved.reserve(), need_of(case))
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "_CHUNK_ROWS", 2 * case.batch_sizes[-1])
    with settings.threads(threads):
        chunked = cpu.layer_backward(*inputs)
    CPU.assert_near(chunked, reference.layer_backward(*inputs), dtype)


@pytest.mark.parametrize("flag", Requested._fields)
def test_only_requested_gradients(flag: str) -> None:
    CPU.check_requested(Layer((4, 4, 2), 3, 5, projection=4, directions=2), flag)


@pytest.mark.parametrize("absent", range(4))
@pytest.mark.parametrize("projection", [0, 4])
def test_absent_gradients_count_as_zeros(absent: int, projection: int) -> None:
    CPU.check_absent(Layer((4, 4, 2), 3, 5, projection=projection, batch=5), absent)


def test_nothing_is_saved_for_inference() -> None:
    layer = make_layer(Layer((4, 2), 3, 5, projection=4), torch.float32)
    out = cpu.layer_forward(*layer, False, False)
    assert out.c_all is None and out.gates is None and out.m is None
    out = cpu.layer_forward(*layer, False, True)
    assert out.c_all is not None and out.gates is None and out.m is None


LONG_AND_SHORT = Layer((5, *(1,) * 30), 6, 10)  # one thread would have nearly all of it


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("case", [LAYERS[6], LAYERS[9], LAYERS[15], LONG_AND_SHORT], ids=str)
@pytest.mark.parametrize("hidden", [130, 300])  # by sequences, and together
def test_same_bits_every_time(case: Layer, threads: int, hidden: int) -> None:
    """However threads divide the work, each sum has one order for that number of threads."""
    big = Layer(
        tuple(4 * n for n in case.batch_sizes), 64, hidden, case.projection and 66,
        case.directions, case.bias, case.reset,
    )  # fmt: skip
    layer = make_layer(big, torch.float32)
    results = []
    for count in (1, threads, threads):
        with settings.threads(count):
            out = cpu.layer_forward(*layer, True, True)
            g = cpu.layer_backward(OutputGradients(*out[:4]), *layer, out.reserve(), need_of(big))
        lists = (g.w_ih, g.w_hh, g.bias, g.w_hr)
        gradients = [g.x, g.h0, g.c0, *(t for kind in lists for t in kind or [])]
        results.append([*out, *gradients])
    for a, b, alone in zip(results[1], results[2], results[0], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
        if a is not None:
            torch.testing.assert_close(a, alone, **tolerance(torch.float32))


@pytest.mark.parametrize("case", [*LAYERS, *LARGER], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_as_programs_have_it(case: Layer, dtype: torch.dtype, instruction_set: str) -> None:
    """Small passes by vectors, a few steps unpacked, and of a long sequence the input part not."""
    native.spare_matrix_unit(True)
    test_layer_equals_reference(case, dtype, instruction_set)


@pytest.mark.parametrize("batch_sizes", [(1,) * 8, (4,) * 2, (40,) * 20], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_are_kept_in_state_type(batch_sizes, dtype, instruction_set: str) -> None:
    """What is added to a cell at each step is too little for half precision to hold."""
    native.spare_matrix_unit(True)
    layer = make_layer(Layer(batch_sizes, 3, 20), dtype)
    weights = layer.weights[0]
    weights.w_ih.zero_()
    weights.w_hh.zero_()
    weights.bias.view(4, -1).copy_(torch.tensor([0, 20, 0.001, 0])[:, None])
    layer.c0.fill_(1)
    out = cpu.layer_forward(*layer, True, True)
    want = 1 + 0.5 * float(weights.bias[40].double().tanh()) * len(batch_sizes)
    last = out.c_all[-1].double()
    torch.testing.assert_close(last, torch.full_like(last, want), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "place"), [("x", 1203), ("w_ih", 1203), ("w_ih", -1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_inputs_without_terms_of_a_long_sequence(
    name: str, place: int, value: float, instruction_set: str
) -> None:
    """Vectors start again where the matrix unit was to multiply the inputs of all steps."""
    native.spare_matrix_unit(True)
    layer = make_layer(Layer((1,) * 60, 40, 130), torch.float32)
    tensor = layer.x if name == "x" else layer.weights[0].w_ih
    tensor.view(-1)[place] = value
    want = reference.layer_forward(*layer, True, True)
    got = cpu.layer_forward(*layer, True, True)
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance(torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_stay_in_their_sequence(value: float, instruction_set: str) -> None:
    CPU.check_special_value(value, 18)


# Not 3.4e38 in dy: whether a sum with it overflows depends on the order of the terms.
BEYOND = [(name, value, "middle") for name in ("x", "h0", "w_ih", "w_hh", "dy")
          for value in (float("nan"), float("inf"), 3.4e38)][:-1]  # fmt: skip
# A unit that is left over, whose gates share vectors.
BEYOND += [(name, value, "end") for name in ("w_ih", "w_hh") for value in (float("inf"), 3.4e38)]


@pytest.mark.parametrize(("name", "value", "place"), BEYOND)
@pytest.mark.parametrize("projection", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_without_terms_give_the_same_as_ever(
    dtype: torch.dtype,
    name: str,
    value: float,
    place: str,
    projection: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several terms of bfloat16 do not reach to the end of float: vectors of floats take over.
    A single one does, but it fills blocks, whose ends must not become NaNs.

    Chunks of one step, so that what a first attempt did to the carries must be undone.
    """
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "_CHUNK_ROWS", 9)
    layer = make_layer(Layer((9, 9, 9, 7), 6, 18, projection), dtype)
    dy = torch.randn(34, projection or 18).to(dtype)
    tensors = {
        "x": layer.x, "h0": layer.h0, "dy": dy,
        "w_ih": layer.weights[0].w_ih, "w_hh": layer.weights[0].w_hh,
    }  # fmt: skip
    tensors[name].view(-1)[tensors[name].numel() // 2 if place == "middle" else -1] = value
    saved = reference.layer_forward(*layer, True, True)
    results = []
    for instruction_set in (INSTRUCTION_SETS[0], "baseline"):
        need = need_of(Layer((), 6, 18, projection))
        with settings.instructions(instruction_set):
            out = cpu.layer_forward(*layer, True, True)
            grads = cpu.layer_backward(
                OutputGradients(dy, None, None, None), *layer, saved.reserve(), need
            )
        results.append([*out[:4], *grads[:3], *(t for kind in grads[3:] for t in kind or [])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance(dtype))


def test_overflowing_products_saturate(instruction_set: str) -> None:
    """Finite values whose products overflow: the gates saturate, and nothing becomes NaN."""
    layer = make_layer(Layer((20,) * 4, 1, 18), torch.float32)
    layer.x.mul_(1e25)
    layer.weights[0].w_ih.mul_(1e20)
    want = reference.layer_forward(*layer, True, True)
    CPU.assert_near(cpu.layer_forward(*layer, True, True), want, torch.float32)


# With and without dot products of bfloat16, and the matrix unit.
DOTS, UNIT = ("avx512_bf16", "avx512"), ("amx", "avx512")


def on_each(sets: tuple[str, str], call: Callable[[], Any]) -> list[Any]:
    results = []
    for name in sets:
        with settings.instructions(name):
            results.append(call())
    return results


@pytest.mark.skipif("avx512_bf16" not in INSTRUCTION_SETS, reason="a processor without them")
@pytest.mark.parametrize(
    ("batch_sizes", "inputs", "hidden"),
    [
        ((9,) * 9, 9, 40),
        ((9,) * 9, 3, 5),
        ((40, 40), 200, 200),
        ((3, 3), 200, 200),  # these two are not packed
        ((3,), 200, 200),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_takes_dot_products(dtype, batch_sizes, inputs, hidden) -> None:
    """float16 has the bits of vectors of floats."""
    native.spare_matrix_unit(True)
    case = Layer(batch_sizes, inputs, hidden)
    layer = make_layer(case, dtype)
    forward = on_each(DOTS, lambda: cpu.layer_forward(*layer, False, True))
    assert torch.equal(*(out.c_all for out in forward)) == (dtype == torch.float16)
    out = reference.layer_forward(*layer, True, True)
    CPU.assert_near(cpu.layer_forward(*layer, True, True), out, dtype)
    inputs = (random_gradients(out), *layer, out.reserve(), need_of(case))
    back = on_each(DOTS, lambda: cpu.layer_backward(*inputs))
    assert torch.equal(*(got.h0 for got in back)) == (dtype == torch.float16)


@pytest.mark.skipif("amx" not in INSTRUCTION_SETS, reason="a processor without a matrix unit")
@pytest.mark.parametrize(
    ("steps", "inputs", "spared"), [(13, 40, True), (18, 20, True), (18, 40, False)]
)
def test_the_matrix_unit_takes_the_inputs_of_narrow_steps(steps, inputs, spared) -> None:
    """Steps of four rows are walked by vectors, but many of them have rows enough for W_ih."""
    layer = make_layer(Layer((4,) * steps, inputs, 40), torch.float32)
    native.spare_matrix_unit(True)
    results = on_each(UNIT, lambda: cpu.layer_forward(*layer, True, True))
    assert torch.equal(*(out.c_n for out in results)) == spared


@pytest.mark.skipif("amx" not in INSTRUCTION_SETS, reason="a processor without a matrix unit")
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "spared"), [(9, 40, 40, True), (9, 40, 200, False)]
)
def test_the_matrix_unit_is_spared_small_passes(steps, batch, hidden, spared) -> None:
    """They have the bits of vectors, larger ones not."""
    layer = make_layer(Layer((batch,) * steps, 30, hidden), torch.float32)
    native.spare_matrix_unit(True)
    results = on_each(UNIT, lambda: cpu.layer_forward(*layer, True, True))
    inputs = (random_gradients(results[0]), *layer, results[0].reserve())
    back = on_each(UNIT, lambda: cpu.layer_backward(*inputs, ALL._replace(w_hr=False)))
    assert torch.equal(*(out.y for out in results)) == spared
    assert torch.equal(*(got.h0 for got in back)) == spared


def test_inputs_may_lie_anyhow_and_be_padded() -> None:
    """Strided tensors, and (T, B, ...) for packed rows, give the bits of contiguous rows."""
    x, batch_sizes, h0, c0, weights, _ = make_layer(
        Layer((3, 3), 5, 4, projection=6, directions=2), torch.float32
    )
    want = cpu.layer_forward(x, batch_sizes, h0, c0, weights, None, True, True)
    dy, dc = torch.randn_like(want.y), torch.randn_like(want.c_all)
    grads = OutputGradients(dy, dc, None, None)
    first = (grads, x, batch_sizes, h0, c0, weights, None, want.reserve(), ALL)
    want_back = cpu.layer_backward(*first)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    anyhow = [Weights(*(t if t is None else strided(t) for t in w)) for w in weights]
    padded = strided(x.view(2, 3, 5))
    args = (padded, strided(batch_sizes), strided(h0), strided(c0), anyhow, None)
    got = cpu.layer_forward(*args, True, True)
    assert got.y.shape == (2, 3, 12) and got.c_all.shape == (2, 3, 8)
    grads = OutputGradients(strided(dy.view(2, 3, 12)), strided(dc.view(2, 3, 8)), None, None)
    got_back = cpu.layer_backward(grads, *args, got.reserve(), ALL)
    assert got_back.x.shape == padded.shape
    for a, b in ((got, want), (got_back, want_back)):
        for mine, theirs in zip(a, b, strict=True):
            if theirs is None:
                assert mine is None
                continue
            pairs = zip(mine, theirs, strict=True) if isinstance(mine, list) else [(mine, theirs)]
            assert all(torch.equal(m.flatten(), t.flatten()) for m, t in pairs)


def test_unknown_instruction_set() -> None:
    with pytest.raises(RuntimeError, match=r"expected one of: .*baseline"):
        _C.cpu_use_instruction_set("mmx")


def test_expanded_and_strided_gradients() -> None:
    CPU.check_strides(5)
