"""The Triton kernels against the reference: every feature and dtype, on a GPU or interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import fastlstm
from cases import LAYERS, Layer, make_layer, tolerance
from fastlstm import backends
from fastlstm import triton as backend
from fastlstm.contract import OutputGradients, Requested
from fastlstm.kernels import barrier, config, exchange, launch
from kernel_checks import ALL, PROGRAMS, Kernels, assert_same_bits, need_of

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = Kernels(backend, DEVICE)
PACKED = Layer((7, 5, 5, 1), 6, 20, directions=2, reset=0.3)
PROJECTED = Layer((7, 5, 5, 1), 6, 20, projection=17, directions=2, reset=0.3)


def _shortened(case: Layer) -> Layer:
    """Interpreted, a step takes up to a second, and the kernels' loops know no number of steps."""
    steps = case.batch_sizes
    if DEVICE.type == "cuda" or len(steps) <= 9:
        return case
    return replace(case, batch_sizes=steps[:5] + steps[-3:])


CASES = [_shortened(case) for case in LAYERS]
CASES += PROGRAMS if DEVICE.type == "cuda" else ()
# Small tiles, so that small layers have several programs in a team and several chunks.
TEAMS = config.Config(batch_tile=16, hidden_tile=16, chunk=16, warps=4, split=1, resident=True)
SPLIT = TEAMS._replace(chunk=128, warps=8, split=8)
REGISTERS = SPLIT._replace(batch_tile=8, registers=True)
TILINGS = {"chosen": None, "teams": TEAMS, "split": SPLIT, "registers": REGISTERS}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New tensors start as NaNs: what is not written shows. And nothing may be left to report."""
    torch.use_deterministic_algorithms(True)
    # An interpreted spin is slow, and nobody else runs meanwhile; on a GPU less than a second.
    monkeypatch.setattr(launch, "POLLS", 3 if DEVICE.type == "cpu" else 1 << 20)
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


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_equals_reference(case: Layer, dtype: torch.dtype) -> None:
    KERNELS.check_layer(case, dtype)


@pytest.mark.parametrize("tiles", ["teams", "split", "registers"])
@pytest.mark.parametrize("case", [CASES[n] for n in (4, 8, 9, 14, 16)], ids=str)
def test_teams_equal_reference(case: Layer, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TILINGS[tiles])
    KERNELS.check_layer(case, torch.float32)


@pytest.mark.parametrize("case", [CASES[4], PACKED, PROJECTED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streamed_weights_equal_reference(
    case: Layer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, (SPLIT if dtype == torch.float16 else TEAMS)._replace(resident=False))
    KERNELS.check_layer(case, dtype)


@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_same_bits_every_time(case: Layer, tiling: None) -> None:
    KERNELS.check_same_bits(case)


@pytest.mark.parametrize("flag", Requested._fields)
def test_only_requested_gradients(flag: str) -> None:
    KERNELS.check_requested(PROJECTED, flag)


@pytest.mark.parametrize("absent", range(4))
@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_absent_gradients_count_as_zeros(case: Layer, absent: int) -> None:
    KERNELS.check_absent(case, absent)


def test_expanded_and_strided_gradients() -> None:
    KERNELS.check_strides(6)


@pytest.mark.parametrize("case", [CASES[8], PACKED, PROJECTED], ids=str)
def test_inference_keeps_nothing(
    case: Layer, tiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    KERNELS.check_inference(case, monkeypatch)


@pytest.mark.parametrize("case", [PACKED, PROJECTED], ids=str)
def test_the_whole_walk_equals_its_steps(case: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of programs that wait for nobody, and a launch for each step."""
    use(monkeypatch, TEAMS._replace(hidden_tile=64))
    layer = KERNELS.layer(case, torch.float16)

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
    KERNELS.check_special_value(value, 18)


def test_jitter_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TEAMS)
    layer = KERNELS.layer(PACKED, torch.float32)
    want = backend.layer_forward(*layer, True, True)
    monkeypatch.setattr(launch, "JITTER", 3)
    assert_same_bits(backend.layer_forward(*layer, True, True), want)


@pytest.mark.parametrize("projection", [0, 20])
def test_who_gives_up_waiting_is_reported(projection: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk whose first step nobody takes: the next call says so, and the one after is served."""
    use(monkeypatch, TEAMS)
    layer = KERNELS.layer(Layer((3, 3), 4, 40, projection=projection), torch.float32)
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


def test_a_first_call_in_inference_mode_can_report() -> None:
    with torch.inference_mode():
        word = launch._fault_word.__wrapped__(DEVICE)
    word.zero_()  # as after a report


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
    layer = KERNELS.layer(PACKED, torch.float32)
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
    layer = KERNELS.layer(Layer((40, 33, 17), 5, 20, directions=2), torch.float32)
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
                    assert chosen.chunk // chosen.split >= 16
                    assert chosen.batch_tile >= (8 if chosen.registers else 16)


@pytest.mark.parametrize("batch", [1, 16, 17, 64, 65, 10_000])
def test_batch_size_matters_by_class_only(batch: int) -> None:
    sizes = {
        config.choose(kind, hidden, hidden, "half", 1, batch, H100)
        for kind in (config.FORWARD, config.BACKWARD)
        for hidden in (128, 1024, 4096)
    }
    assert {c.batch_tile for c in sizes} <= {8, 16, 32, 64}


def test_small_batch_tiles_where_every_program_has_a_multiprocessor() -> None:
    def rows(hidden: int, sequences: int, directions: int = 1) -> int:
        found = config.choose(config.FORWARD, hidden, hidden, "half", directions, sequences, H100)
        return found.batch_tile

    # 32 programs a team, 132 multiprocessors
    assert [rows(512, n) for n in (1, 32, 33, 64, 65)] == [8, 8, 16, 16, 32]
    assert [rows(512, n, directions=2) for n in (16, 17, 32, 33)] == [8, 16, 16, 32]
    assert rows(1024, 8) == 16  # a slice that registers have no room for
    assert rows(1024, 32) == 16 and rows(1024, 64) == 32
    assert rows(1024, 16, directions=2) == 16  # the larger tile would be half empty
    assert rows(128, 10_000) == 16  # nobody waits


def test_slices_of_half_a_register_file_stay_there() -> None:
    def chosen(hidden: int, product: str, output: int = 0, kind: str = config.BACKWARD):
        return config.choose(kind, hidden, output or hidden, product, 1, 16, H100)

    assert chosen(512, "half").registers and chosen(512, "half", kind=config.FORWARD).registers
    assert chosen(256, "tf32").registers and not chosen(512, "tf32").registers
    assert not chosen(1024, "half").registers and chosen(1024, "half").resident
    assert not chosen(512, "half", output=128).registers  # a projection needs registers, too
    assert not chosen(512, "ieee").registers


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
