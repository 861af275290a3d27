"""The Triton kernels against the reference: every feature and dtype, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fastlstm
from cases import LAYERS, Layer, LayerTensors, make_layer, tolerance
from fastlstm import backends, reference
from fastlstm import triton as backend
from fastlstm.contract import OutputGradients, Outputs, Requested
from fastlstm.kernels import barrier, config, exchange, launch

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = Requested(*[True] * 7)
PACKED = Layer((7, 5, 5, 1), 6, 20, directions=2, reset=0.3)
PROJECTED = Layer((7, 5, 5, 1), 6, 20, projection=17, directions=2, reset=0.3)
# Small tiles, so that small layers have several programs in a team and several chunks.
TEAMS = config.Config(batch_tile=16, hidden_tile=16, chunk=16, warps=4, split=1, resident=True)
SPLIT = TEAMS._replace(chunk=128, warps=8, split=8)
TILINGS = {"chosen": None, "teams": TEAMS, "split": SPLIT}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New tensors start as NaNs: what is not written shows. And nothing may be left to report."""
    torch.use_deterministic_algorithms(True)
    if DEVICE.type == "cpu":  # an interpreted spin is slow, and nobody else runs meanwhile
        monkeypatch.setattr(launch, "POLLS", 3)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    launch.check(DEVICE)


@pytest.fixture(params=TILINGS)
def tiling(request, monkeypatch):
    use(monkeypatch, TILINGS[request.param])


def use(monkeypatch: pytest.MonkeyPatch, tiles: config.Config | None) -> None:
    if tiles is not None:
        monkeypatch.setattr(config, "choose", lambda *_: tiles)


def on_device(values: Any) -> Any:
    """The same tree of tensors on DEVICE; batch_sizes, the only int64, stays where it is."""
    if isinstance(values, Tensor):
        return values if values.dtype == torch.int64 else values.to(DEVICE)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*map(on_device, values))
    return list(map(on_device, values)) if isinstance(values, list) else values


def layer_of(case: Layer, dtype: torch.dtype) -> LayerTensors:
    return on_device(make_layer(case, dtype))


def need_of(case: Layer) -> Requested:
    return ALL._replace(bias=case.bias, w_hr=bool(case.projection))


def random_gradients(out: Outputs) -> OutputGradients:
    return OutputGradients(*(None if t is None else torch.randn_like(t) for t in out[:4]))


def flat(results: Any) -> list[tuple[str, Tensor | None]]:
    """(name, tensor) of every tensor in a named tuple."""
    pairs = []
    for name in results._fields:
        value = getattr(results, name)
        pairs += [(name, t) for t in (value if isinstance(value, list) else [value])]
    return pairs


def assert_near(got: Any, want: Any, dtype: torch.dtype) -> None:
    for (name, a), (_, b) in zip(flat(got), flat(want), strict=True):
        assert (a is None) == (b is None), name
        if a is None or b is None:
            continue
        assert a.dtype == b.dtype and a.is_contiguous(), name
        # Sums over many rows grow; compare them on their own scale.
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double() / scale, b.double() / scale, **tolerance(dtype),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def assert_same_bits(got: Any, want: Any) -> None:
    for (name, a), (_, b) in zip(flat(got), flat(want), strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_equals_reference(case: Layer, dtype: torch.dtype) -> None:
    check_layer(case, dtype)


@pytest.mark.parametrize("tiles", ["teams", "split"])
@pytest.mark.parametrize("case", [LAYERS[n] for n in (4, 8, 9, 14, 16)], ids=str)
def test_teams_equal_reference(case: Layer, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TILINGS[tiles])
    check_layer(case, torch.float32)


@pytest.mark.parametrize("case", [LAYERS[4], PACKED, PROJECTED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streamed_weights_equal_reference(
    case: Layer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, (SPLIT if dtype == torch.float16 else TEAMS)._replace(resident=False))
    check_layer(case, dtype)


def check_layer(case: Layer, dtype: torch.dtype) -> None:
    layer = layer_of(case, dtype)
    want = reference.layer_forward(*layer, True, True)
    assert_near(backend.layer_forward(*layer, True, True), want, dtype)
    grads = random_gradients(want)
    inputs = (*layer, want.reserve())
    assert_near(
        backend.layer_backward(grads, *inputs, need_of(case)),
        reference.layer_backward(grads, *inputs, need_of(case)),
        dtype,
    )


@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_same_bits_every_time(case: Layer, tiling: None) -> None:
    """Over two forward and two backward passes: sums have one order, and nothing saved changes."""
    layer = layer_of(case, torch.bfloat16)
    first, second = (backend.layer_forward(*layer, True, True) for _ in range(2))
    assert_same_bits(first, second)
    grads = random_gradients(first)
    results = [
        backend.layer_backward(grads, *layer, first.reserve(), need_of(case)) for _ in range(2)
    ]
    assert_same_bits(*results)
    assert_same_bits(first, second)


@pytest.mark.parametrize("flag", Requested._fields)
def test_only_requested_gradients(flag: str) -> None:
    layer = layer_of(PROJECTED, torch.float32)
    saved = reference.layer_forward(*layer, True, True)
    inputs = (random_gradients(saved), *layer, saved.reserve())
    need = Requested(*(name == flag for name in Requested._fields))
    got = backend.layer_backward(*inputs, need)
    assert_near(got, reference.layer_backward(*inputs, need), torch.float32)
    assert [name for name in got._fields if getattr(got, name) is not None] == [flag]


@pytest.mark.parametrize("absent", range(4))
@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_absent_gradients_count_as_zeros(case: Layer, absent: int) -> None:
    layer = layer_of(case, torch.float32)
    saved = reference.layer_forward(*layer, True, True)
    grads = list(random_gradients(saved))
    rest = (*layer, saved.reserve(), need_of(case))
    zeros = [torch.zeros_like(g) if i == absent else g for i, g in enumerate(grads)]
    grads[absent] = None
    assert_same_bits(
        backend.layer_backward(OutputGradients(*grads), *rest),
        backend.layer_backward(OutputGradients(*zeros), *rest),
    )


def test_expanded_and_strided_gradients() -> None:
    layer = layer_of(Layer((4, 4, 2), 3, 6), torch.float32)
    saved = reference.layer_forward(*layer, True, True)
    rest = (*layer, saved.reserve(), need_of(Layer((4, 4, 2), 3, 6)))
    ones = torch.ones((), device=DEVICE).expand(10, 6)
    wide = torch.randn(1, 4, 12, device=DEVICE)[..., ::2]
    given = OutputGradients(ones, None, wide, None)
    copied = OutputGradients(ones.clone(), None, wide.clone(), None)
    assert_same_bits(backend.layer_backward(given, *rest), backend.layer_backward(copied, *rest))


@pytest.mark.parametrize("case", [LAYERS[8], PACKED, PROJECTED], ids=str)
def test_inference_keeps_nothing(
    case: Layer, tiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes the same bits, however few steps' gates there is room for at a time."""
    layer = layer_of(case, torch.bfloat16)
    want = backend.layer_forward(*layer, True, True)
    step = max(case.batch_sizes) * case.directions * 4 * case.hidden * 2
    for steps, cells in ((100, True), (2, False), (1, True)):
        monkeypatch.setattr(backend, "_GATES_BYTES", steps * step)
        got = backend.layer_forward(*layer, False, cells)
        assert got.gates is None and got.m is None
        assert_same_bits(
            got, want._replace(gates=None, m=None, c_all=want.c_all if cells else None)
        )


@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_the_whole_walk_equals_its_steps(case: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of programs that wait for nobody, and a launch for each step."""
    use(monkeypatch, TEAMS._replace(hidden_tile=64))
    layer = layer_of(case, torch.float16)

    def run() -> tuple:
        out = backend.layer_forward(*layer, True, True)
        gradients = backend.layer_backward(
            OutputGradients(*out[:4]), *layer, out.reserve(), need_of(case)
        )
        return out, gradients

    whole = run()
    by_steps = launch.plan
    monkeypatch.setattr(
        launch, "plan", lambda begin, end, teams, *_: by_steps(begin, end, teams, 2, 0)
    )
    for a, b in zip(run(), whole, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_stay_in_their_sequence(value: float) -> None:
    layer = layer_of(Layer((5, 5, 5, 3), 4, 18, directions=2), torch.float32)
    layer.x[7, 2] = value
    want = reference.layer_forward(*layer, True, True)
    got = backend.layer_forward(*layer, True, True)
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance(torch.float32))


def test_jitter_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TEAMS)
    layer = layer_of(PACKED, torch.float32)
    want = backend.layer_forward(*layer, True, True)
    monkeypatch.setattr(launch, "JITTER", 3)
    assert_same_bits(backend.layer_forward(*layer, True, True), want)


@pytest.mark.parametrize("projection", [0, 20])
def test_who_gives_up_waiting_is_reported(projection: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk whose first step nobody takes: the next call says so, and the one after is served."""
    use(monkeypatch, TEAMS)
    layer = layer_of(Layer((3, 3), 4, 40, projection=projection), torch.float32)
    real = launch.plan
    with monkeypatch.context() as patch:
        patch.setattr(launch, "POLLS", 3)
        patch.setattr(launch, "plan", lambda begin, *rest: real(begin + 1, *rest))
        backend.layer_forward(*layer, True, True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"lstm_forward on .* team 0 at step"):
        backend.layer_forward(*layer, True, True)
    out = backend.layer_forward(*layer, True, True)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "POLLS", 3)
        patch.setattr(launch, "plan", lambda begin, *rest: real(begin + 1, *rest))
        gradients = OutputGradients(*out[:4])
        backend.layer_backward(gradients, *layer, out.reserve(), ALL._replace(w_hr=projection > 0))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"lstm_backward on .* team 0 at step"):
        backend.check(DEVICE)
    backend.check(DEVICE)


def test_a_whole_team_may_give_up_at_once() -> None:
    """The counter passes every epoch then, and does not overflow."""
    epochs, programs = 2 * 2**31, 2**12  # exchanges of the longest walk
    added = barrier._GIVEN_UP.value
    assert epochs * programs < added and added * programs + epochs * programs < 2**63


def test_module_trains_on_it() -> None:
    """Packed input, two layers, both directions; and the gradient of a gradient."""
    kinds = [
        fastlstm.LSTM(5, 18, 2, bidirectional=True, backend=name).to(DEVICE)
        for name in ("triton", "reference")
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
        torch.testing.assert_close(a, b, **tolerance(torch.float32))


def test_what_it_refuses() -> None:
    layer = make_layer(Layer((2, 2), 3, 4), torch.float64)
    call = backends.Call(
        layer.x.to(DEVICE), layer.batch_sizes, layer.h0, layer.weights[0], None, False, False
    )
    assert "torch.float64" in backend.unsupported(call)
    elsewhere = call._replace(x=layer.x.to("meta"))
    assert "meta" in backend.unsupported(elsewhere)
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve this call.*float64"):
        backends.pick("triton", call)


def test_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastlstm.available_backends()["triton"] is None
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastlstm.available_backends()["triton"] == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in backend.missing()
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert backend.missing() == "triton is not installed"


def test_auto_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [backends._TABLE[name] for name in ("triton", "reference")]
    monkeypatch.setattr(backends, "_AUTOMATIC", [each for each in table if each.automatic])
    layer = layer_of(PACKED, torch.float32)
    call = backends.Call(layer.x, layer.batch_sizes, layer.h0, layer.weights[0], None, False, True)
    assert backends.pick("auto", call).name == "reference"


@pytest.mark.parametrize(
    ("tiles", "together", "want"),
    [
        (1, 0, [(2, 5, 0, 7)]),
        (4, 0, [(2, 3, 0, 7), (3, 4, 0, 7), (4, 5, 0, 7)]),
        (4, 3, [(2, 5, 0, 3), (2, 5, 3, 3), (2, 5, 6, 1)]),
        (4, 9, [(2, 5, 0, 7)]),
    ],
)
def test_plan(tiles: int, together: int, want: list[tuple[int, ...]]) -> None:
    assert list(launch.plan(2, 5, 7, tiles, together)) == want


def test_teams_that_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences do not depend on each other: any share of the teams may walk first."""
    use(monkeypatch, TEAMS)
    layer = layer_of(Layer((40, 33, 17), 5, 20, directions=2), torch.float32)
    want = backend.layer_forward(*layer, True, True)

    def one_team_at_a_time(begin: int, end: int, teams: int, *_: int):
        for team in reversed(range(teams)):
            for position in range(begin, end):
                yield launch.Launch(position, position + 1, team, 1)

    monkeypatch.setattr(launch, "plan", one_team_at_a_time)
    assert_same_bits(backend.layer_forward(*layer, True, True), want)


H100 = config.Limits(132, 232448, 233472, 65536, 2048)
A100 = config.Limits(108, 166912, 167936, 65536, 2048)


def test_configurations() -> None:
    def choose(hidden: int, product: str, limits: config.Limits, kind: str = config.FORWARD):
        return config.choose(kind, hidden, hidden, product, 1, 16, limits)

    assert choose(128, "half", H100).tiles(128, 128) == 1  # no barrier
    assert choose(1024, "half", H100).tiles(1024, 1024) == 64
    assert choose(1024, "tf32", H100).tiles(1024, 1024) == 128
    assert not choose(1024, "tf32", A100).resident  # 128 programs, 108 multiprocessors
    assert choose(1024, "half", A100, config.BACKWARD).resident  # with a shorter chunk
    assert not choose(2048, "half", H100).resident
    for hidden in (1, 16, 100, 333, 1000, 5000):
        for product in ("half", "tf32", "ieee"):
            for limits in (H100, A100):
                for kind in (config.FORWARD, config.BACKWARD):
                    chosen = choose(hidden, product, limits, kind)
                    taken = config.shared_bytes(kind, chosen, hidden, hidden, product)
                    assert not chosen.resident or taken <= limits.shared
                    assert chosen.chunk // chosen.split >= 16 and chosen.batch_tile >= 16


@pytest.mark.parametrize("batch", [1, 16, 17, 64, 65, 10_000])
def test_batch_size_matters_by_class_only(batch: int) -> None:
    sizes = {
        config.choose(kind, hidden, hidden, "half", 1, batch, H100)
        for kind in (config.FORWARD, config.BACKWARD)
        for hidden in (128, 1024, 4096)
    }
    assert {c.batch_tile for c in sizes} <= {16, 32, 64}


def test_small_batch_tiles_where_every_program_has_a_multiprocessor() -> None:
    def rows(hidden: int, sequences: int, directions: int = 1) -> int:
        found = config.choose(config.FORWARD, hidden, hidden, "half", directions, sequences, H100)
        return found.batch_tile

    assert rows(512, 64) == 16 and rows(512, 65) == 32  # 32 programs a team, 132 multiprocessors
    assert rows(512, 32, directions=2) == 16 and rows(512, 33, directions=2) == 32
    assert rows(1024, 32) == 16 and rows(1024, 64) == 32
    assert rows(1024, 16, directions=2) == 16  # the larger tile would be half empty
    assert rows(128, 10_000) == 16  # nobody waits


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_lie_beyond_32_bits(offset: int) -> None:
    """Where step 70 000 of 70 000 sequences begins, padded and packed."""
    rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    steps = 70_000
    starts = torch.arange(steps + 1, device=DEVICE) * steps if offset else None
    rows_kernel[(1,)](rows, starts, steps - 1, steps, steps)
    assert rows.tolist() == [(steps - 1) * steps, steps]


@triton.jit(do_not_specialize=["t", "steps", "rows_per_step"])
def rows_kernel(out, starts, t: tl.int32, steps: tl.int32, rows_per_step: tl.int32):
    start, count = exchange.step_rows(starts, t, steps, rows_per_step)
    tl.store(out, start)
    tl.store(out + 1, count.to(tl.int64))
