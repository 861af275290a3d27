"""dispatch.json: made from recorded runs, looked up by calls, refused where it is damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastlstm import backends, dispatch
from fastlstm.contract import Weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benches"))

import make_dispatch  # noqa: E402
from recording import write_json  # noqa: E402

from gpu import measure  # noqa: E402
from gpu.cases import Case  # noqa: E402

DEVICE, CPU = "NVIDIA H200", torch.device("cpu")
PASSED = dict.fromkeys(("describe", "tests", "stress", "cuda", "micro"), "ok")
SHAPES = ((1, 256), (16, 256), (16, 512), (64, 512), (64, 1024))
Times = Callable[[Case, str], tuple[float, float]]  # microseconds per step: ours, theirs


class Contest:
    """Stands where DeviceContest would, and takes the time that it is told to."""

    device, theirs, ours = CPU, nn.Identity(), nn.Identity()

    def __init__(self, case: Case, device: torch.device, times: Times) -> None:
        self.case, self.times = case, times
        self.train = self.infer = lambda module: ()

    def problem(self) -> str | None:
        ours, _ = self.times(self.case, "train")
        return "output differs by up to 1" if ours == 0 else None

    def time(self, mode: str, seconds: float) -> dict[str, Any]:
        def around(value: float) -> dict[str, float]:
            return dict(q1=0.99 * value, median=value, q3=1.01 * value)

        ours, theirs = (each * self.case.steps / 1e6 for each in self.times(self.case, mode))
        return dict(
            pairs=9, calls=1, ours=around(ours), theirs=around(theirs), ratio=around(theirs / ours)
        )

    def plans(self) -> dict[str, str]:
        return {}

    def fill(self) -> float:
        return 0.6 if self.case.variant == "packed" else 1.0

    def clear(self) -> None:
        pass


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A run with such times, through the functions that record one."""

    def run(
        times: Times, cases: list[Case], date: str = "2026-11-24T00:00:00+00:00", **steps: str
    ) -> Path:
        monkeypatch.setattr(measure, "DeviceContest", partial(Contest, times=times))
        monkeypatch.setattr(measure, "now", lambda: date)
        machine = dict(device=dict(name=DEVICE), versions=dict(commit="0123456789ab"))
        write_json(tmp_path / "machine.json", machine)
        ended = [dict(step=name, result=how) for name, how in (PASSED | dict(steps)).items()]
        write_json(tmp_path / "steps.json", ended)
        result = measure.new_result(tmp_path, CPU)
        for case in cases:
            result["rows"] += measure.measure_case(case, CPU, 0.0)
        path = measure.path_of(result, tmp_path)
        write_json(path, result | dict(dry=False))
        return path

    return run


def table_of(*paths: Path) -> dict[str, Any]:
    return make_dispatch.table({path.name: json.loads(path.read_text()) for path in paths})


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Look things up in this table, on a device of that name."""

    def put(table: dict[str, Any]) -> None:
        parsed = dispatch.parse(table)
        monkeypatch.setattr(dispatch, "_records", lambda: parsed)
        dispatch._lookup.cache_clear()

    monkeypatch.setattr(dispatch, "_name", lambda device: DEVICE)
    yield put
    dispatch._lookup.cache_clear()


def call_of(
    batch: int,
    hidden: int,
    steps: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    directions: int = 1,
    rows: int | None = None,
    reset: bool = False,
    padded: bool = False,
    **more: Any,
) -> backends.Call:
    """A call on a GPU, as far as it is looked at."""
    shape = (steps, batch, 1) if padded else (steps * batch if rows is None else rows, 1)
    x = SimpleNamespace(
        is_cuda=True,
        dtype=dtype,
        device=torch.device("cuda", 0),
        shape=torch.Size(shape),
        size=shape.__getitem__,
    )
    weights = Weights(
        *(torch.empty(4 * hidden, 1, device="meta"),) * 2, None, more.pop("w_hr", None)
    )
    h0 = torch.empty(directions, batch, 1, device="meta")
    sizes = torch.full((steps,), batch)
    marks = torch.zeros(1) if reset else None
    return backends.Call(x, sizes, h0, weights, marks, False, **dict(need_reserve=True) | more)


def plain(*shapes: tuple[int, int], **more: Any) -> list[Case]:
    return [Case(*shape, "bf16", **more) for shape in shapes or SHAPES]


def test_a_win_is_recorded_as_far_as_it_reaches(record, use) -> None:
    """Ours takes 2 us, theirs grows with both sizes; one shape is lost, another is wrong."""

    def times(case: Case, mode: str) -> tuple[float, float]:
        if (case.batch, case.hidden) == (64, 1024):
            return 0, 1  # fails its check
        if (case.batch, case.hidden) == (1, 256):
            return 2.0, 2.0
        return 2.0, 3.0 + case.hidden / 512

    use(table_of(record(times, plain())))

    def known(*sizes: int, **more: Any) -> bool:
        return dispatch.recorded(call_of(*sizes, **more)) == ("triton",)

    assert known(16, 256) and known(16, 512) and known(64, 512)
    assert known(16, 384) and known(40, 448)  # between those
    assert not known(1, 256) and not known(64, 1024)  # lost, wrong
    assert not known(8, 256) and not known(65, 512) and not known(16, 768)  # nothing beyond
    assert not known(16, 300)  # no multiple of what was recorded
    assert known(16, 512, steps=10_000) and not known(16, 512, steps=511)
    assert known(16, 512, need_reserve=False)  # inference was as fast
    assert not known(16, 512, dtype=torch.float16) and not known(16, 512, dtype=torch.float64)
    assert not known(16, 512, directions=2) and not known(16, 512, reset=True)
    assert not known(16, 512, rows=500 * 16)  # packed
    assert known(16, 512, padded=True) and not known(8, 512, padded=True)
    assert not known(16, 512, w_hr=torch.empty(1, device="meta"))


def test_a_span_needs_more_than_its_corners(record) -> None:
    """Ours at the upper corner must be faster than theirs at the lower one."""
    path = record(lambda case, mode: (case.hidden / 256, case.hidden / 192), plain())
    spans = [(tuple(r["batch"]), tuple(r["hidden"])) for r in table_of(path)["records"]]
    assert set(spans) == {((1, 1), (256, 256)), *(((16, 64), (h, h)) for h in (512,)),
                          ((16, 16), (256, 256)), ((64, 64), (1024, 1024))}  # fmt: skip


def test_a_loss_inside_of_a_span_ends_it(record) -> None:
    lost = (64, 512)
    shapes = ((16, 512), lost, (128, 512))
    path = record(lambda case, mode: (2, 1 if case.batch == lost[0] else 4), plain(*shapes))
    spans = {tuple(r["batch"]) for r in table_of(path)["records"]}
    assert spans == {(16, 16), (128, 128)}


def test_short_sequences_have_a_record_of_their_own(record, use) -> None:
    cases = [*plain((16, 512)), *plain((16, 512), steps=32)]
    use(table_of(record(lambda case, mode: (2, 4 if case.steps == 512 else 2), cases)))
    assert dispatch.recorded(call_of(16, 512)) and not dispatch.recorded(call_of(16, 512, 100))
    use(table_of(record(lambda case, mode: (2, 4), cases)))
    assert dispatch.recorded(call_of(16, 512, 100))
    use(table_of(record(lambda case, mode: (2, 4 if case.steps == 32 else 1), cases)))
    assert not dispatch.recorded(call_of(16, 512, 100))  # longer ones were slower


def test_variants(record, use) -> None:
    """Resets are compared with nn.LSTM without them, and packed rows count."""
    cases = [case for v in ("plain", "packed", "bidirectional", "resets", "two layers")
             for case in plain((16, 512), variant=v)]  # fmt: skip
    use(table_of(record(lambda case, mode: (2, 2 if case.variant == "resets" else 4), cases)))
    assert dispatch.recorded(call_of(16, 512, directions=2))
    assert dispatch.recorded(call_of(16, 512, reset=True))
    assert dispatch.recorded(call_of(16, 512, rows=int(0.7 * 512 * 16)))
    assert not dispatch.recorded(call_of(16, 512, rows=int(0.5 * 512 * 16)))  # emptier
    assert not dispatch.recorded(call_of(16, 512, directions=2, reset=True))
    slow = record(lambda case, mode: (5, 9) if case.variant == "resets" else (2, 4), cases)
    use(table_of(slow))
    assert not dispatch.recorded(call_of(16, 512, reset=True))


def test_float32_is_looked_up_as_both_sides_multiply(record, use) -> None:
    cases = [Case(16, 512, precision) for precision in ("tf32", "fp32")]
    use(table_of(record(lambda case, mode: (2, 4), cases)))
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [switch.fp32_precision for switch in switches]
    try:
        for values, found in (
            (("tf32",) * 2, True),
            (("ieee",) * 2, True),
            (("ieee", "tf32"), False),
        ):
            for switch, value in zip(switches, values, strict=True):
                switch.fp32_precision = value
            assert bool(dispatch.recorded(call_of(16, 512, dtype=torch.float32))) == found
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def test_the_newest_run_of_each_backend_counts(record, use) -> None:
    old = record(lambda case, mode: (2, 4), plain((16, 512), (64, 512)))
    new = record(lambda case, mode: (2, 4), plain((16, 512)), "2026-12-01T00:00:00+00:00")
    other = record(
        lambda case, mode: (1, 4), plain((16, 512), backend="cuda"), "2026-10-01T00:00:00+00:00"
    )
    use(table_of(new, old, other))
    assert dispatch.recorded(call_of(16, 512)) == ("cuda", "triton")  # the faster first
    assert dispatch.recorded(call_of(64, 512)) == ()


def test_runs_that_show_nothing_are_refused(record) -> None:
    run = json.loads(record(lambda case, mode: (2, 4), plain()).read_text())
    versions = run["machine"]["versions"]
    for change, reason in (
        (dict(dry=True), "dry"),
        (dict(lost="an error"), "lost"),
        (dict(machine={**run["machine"], "versions": {**versions, "commit": "0123+"}}), "commit"),
    ):
        with pytest.raises(ValueError, match=rf"gpu\.json: .*{reason}"):
            make_dispatch.table({"gpu.json": run | change})


@pytest.mark.parametrize("step", ["tests", "cuda"])
@pytest.mark.parametrize("how", ["failed", "cut", "skipped"])
def test_a_kernel_whose_tests_have_not_passed_is_not_admitted(
    record, use, step: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """However fast it is; and it is said why."""
    cases = plain((16, 512), backend="cuda")
    path = record(lambda case, mode: (1, 4), cases, **{step: how})
    out = tmp_path / "dispatch.json"
    monkeypatch.setattr(sys, "argv", ["make_dispatch.py", str(path), "--out", str(out)])
    assert make_dispatch.main() == 0
    assert json.loads(out.read_text())["records"] == []
    assert f"nothing is recorded of cuda: {step} {how}" in capsys.readouterr().out
    use(table_of(record(lambda case, mode: (1, 4), cases)))
    assert dispatch.recorded(call_of(16, 512)) == ("cuda",)


def test_a_kernel_that_was_named_says_nothing_about_the_rule(record) -> None:
    cases = plain((16, 512), backend="cuda", kernel="cluster")
    assert table_of(record(lambda case, mode: (1, 4), cases))["records"] == []


def test_auto_takes_what_is_recorded(record, use, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, **more: Any) -> backends.Backend:
        return backends.Backend(name, None, more.pop("backward", print), lambda: None, **more)

    refuses = dict(unsupported=lambda call: "not this one" if call.need_cells else None)
    table = [entry("aten", backward=None, unsupported=backends._TABLE["aten"].unsupported),
             entry("triton", automatic=False, **refuses), entry("reference")]  # fmt: skip
    monkeypatch.setattr(backends, "_TABLE", {each.name: each for each in table})
    monkeypatch.setattr(backends, "_AUTOMATIC", [each for each in table if each.automatic])
    eager = dict(need_reserve=False, train=True)

    def picked(call: backends.Call) -> str:
        return backends.pick("auto", call).name

    use({"format": 1, "records": []})
    assert picked(call_of(16, 512, **eager)) == "aten"
    assert picked(call_of(16, 512)) == "reference"  # inside an operator, as before
    use(table_of(record(lambda case, mode: (2, 4), plain((16, 512)))))
    assert picked(call_of(16, 512, **eager)) == picked(call_of(16, 512)) == "triton"
    assert picked(call_of(16, 1024, **eager)) == "aten"
    assert picked(call_of(16, 512)._replace(need_cells=True)) == "reference"
    lonely = call_of(16, 512)
    lonely.x.is_cuda = False
    assert picked(lonely) == "reference"
    monkeypatch.delitem(backends._TABLE, "triton")
    with pytest.raises(RuntimeError, match=r"dispatch\.json: got backend 'triton', expected one"):
        picked(call_of(16, 512))


def entry_of(**changes: Any) -> dict[str, Any]:
    return {
        **dict(device=DEVICE, backend="triton", mode="train", precision="bf16", variant="plain"),
        **dict(batch=[1, 2], hidden=[64, 64], steps=512, fill=1.0, ratio=2, run="gpu.json"),
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "no table of format 1"),
        ('{"format": 2, "records": []}', "no table of format 1"),
        ('{"format": 1}', "records: got none"),
        ('{"format": 1, "records": [1]}', r"records\[0\]: expected exactly device, backend"),
        *(
            (json.dumps(dict(format=1, records=[entry_of(), entry_of(**changes)])), message)
            for changes, message in (
                (dict(steps=0), r"records\[1\]\.steps: got 0, expected a positive integer"),
                (dict(batch=[2, 1]), r"records\[1\]\.batch: got \[2, 1\], expected two"),
                (dict(ratio="2"), r"records\[1\]\.ratio: got '2', expected a positive number"),
                (dict(backend=None), r"records\[1\]\.backend: got None, expected a string"),
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_table_is_an_error(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dispatch.json"
    path.write_text(text)
    monkeypatch.setattr(dispatch, "PATH", path)
    monkeypatch.setattr(dispatch, "_name", lambda device: DEVICE)
    dispatch._records.cache_clear()
    dispatch._lookup.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=rf"dispatch\.json: .*{message}"):
            backends.pick("auto", call_of(16, 512))
    finally:
        dispatch._records.cache_clear()
        dispatch._lookup.cache_clear()


def test_the_table_in_the_package_is_what_the_recorded_runs_show() -> None:
    paths = sorted((ROOT / "benches" / "results").glob("gpu-*.json"))
    assert json.loads(dispatch.PATH.read_text()) == table_of(*paths)
