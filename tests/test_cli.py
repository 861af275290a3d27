"""``python -m fastlstm``: info, check and bench."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlstm
from fastlstm import backends, cpu, native
from fastlstm.cli import check, main
from fastlstm.cli.arguments import DTYPES

ROOT = Path(__file__).resolve().parent.parent


def python_m(*words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "fastlstm", *words)
    # Without a GPU conftest.py has Triton's kernels interpreted, which users' processes don't.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def test_info_says_what_a_bug_report_needs() -> None:
    done = python_m("info")
    assert done.returncode == 0, done.stderr
    for text in (torch.__version__, fastlstm.__version__, "-O3", *native.instruction_sets()):
        assert text in done.stdout
    section = done.stdout.partition("backends:\n")[2]
    for name, missing in fastlstm.available_backends().items():
        if name != "triton":  # this process may interpret its kernels
            state = "available" if missing is None else f"not here: {missing}"
            assert f"  {name:<16} {state}\n" in section


def test_info_without_the_library_says_why(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    entry = backends._TABLE["cpu"]
    broken = dataclasses.replace(entry, missing=lambda: "no C++ compiler")
    monkeypatch.setitem(backends._TABLE, "cpu", broken)
    monkeypatch.setattr(native, "missing", broken.missing)
    assert main(["info"]) == 0
    assert "not here: no C++ compiler" in capsys.readouterr().out


def test_check_passes_in_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python_m("check", "--seconds", "100")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    # In time of the processor: what else this machine does must not fail a test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert done.stdout.endswith("no differences\n")
    every = len(check.CASES) * len(DTYPES)
    for name in native.instruction_sets():
        (line,) = (row for row in done.stdout.splitlines() if row.startswith(f"cpu {name} "))
        assert f"{every} of {every} ok" in line
    (aten,) = (row for row in done.stdout.splitlines() if row.startswith("aten cpu"))
    assert "refused: torch's own LSTM has no resets" in aten


def wrong_gradient(*args):
    """The reference's, but for one number."""
    gradients = backends._TABLE["reference"].layer_backward(*args)
    if gradients.w_hh is not None:
        gradients.w_hh[0][0, 0] += 0.5
    return gradients


def wrong_output(*args):
    out = backends._TABLE["reference"].layer_forward(*args)
    out.y.view(-1)[-1:].add_(0.1)
    return out


def broken_output(*args):
    raise IndexError("list index out of range")


def wrong_plain_output(*args):
    y, *rest = cpu.plain_forward(*args)
    y.view(-1)[-1:].add_(0.1)
    return [y, *rest]


def wrong_plain_gradient(*args):
    dx, *rest = cpu.plain_backward(*args)
    dx.view(-1)[-1:].add_(0.5)
    return [dx, *rest]


# A backend that has the long way alone: what is wrong is the reference, which takes packed rows.
LONG: dict[str, Any] = {"padded": False, "plain_forward": None, "plain_backward": None}


@pytest.mark.parametrize(
    ("function", "wrong", "says"),
    [
        ("layer_backward", wrong_gradient, "gradient of weight_hh_l0"),
        ("layer_forward", wrong_output, "output differs by up to 0.1"),
        ("layer_forward", broken_output, "IndexError: list index out of range"),
        ("plain_forward", wrong_plain_output, "output differs by up to 0.1"),
        ("plain_backward", wrong_plain_gradient, "gradient of input"),
    ],
)
def test_check_finds_a_backend_that_is_wrong(
    function, wrong, says, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    ways = {} if function.startswith("plain") else LONG
    entry = dataclasses.replace(backends._TABLE["cpu"], **{**ways, function: wrong})
    monkeypatch.setitem(backends._TABLE, "cpu", entry)
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    before = native.use_instruction_set(native.instruction_sets()[-1])
    assert main(["check", "--backend", "cpu"]) == 1
    assert native.use_instruction_set(before) == native.instruction_sets()[-1]
    said = capsys.readouterr().out
    assert f"  FAILED one layer, float32: {says}" in said
    assert f"{len(DTYPES) * len(native.instruction_sets())} of " in said


def test_check_finds_results_that_change(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    entry = backends._TABLE["cpu"]

    def unsteady(*args):
        out = cpu.layer_forward(*args)
        out.h_n.add_(torch.rand(()) * 1e-6)
        return out

    monkeypatch.setitem(
        backends._TABLE,
        "cpu",
        dataclasses.replace(entry, layer_forward=unsteady, plain_forward=None),
    )
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    assert main(["check", "--backend", "cpu"]) == 1
    assert "float32: h_n is another in the second call" in capsys.readouterr().out


def test_check_says_what_it_did_not_reach(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--seconds", "1e-9", "--backend", "aten"]) == 1
    assert "not reached in time" in (said := capsys.readouterr().out)
    assert said.endswith("0 of 0 failed\n")


def test_bench_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    shapes = ("3,2,4,5", "4,1,6,8")
    files = tmp_path / "run.json", tmp_path / "run.png"
    options = ("--seconds", "0.01", "--json", str(files[0]), "--plot", str(files[1]))
    # Once or several times: all shapes count.
    given = [word for shape in shapes for word in ("--shape", shape)]
    done = python_m("bench", *given, *options, "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[2:6]] == [
        [shape, mode] for shape in shapes for mode in ("training", "inference")
    ]
    result = json.loads(files[0].read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        assert row["pairs"] >= 5
        assert 0 < row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "2/2" in done.stderr or "shape/s" in done.stderr  # the bar


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_bench_does_one_mode(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "2,1,3,4", "--dtype", "float64", "--backend", "aten")
    assert main(["bench", *shape, f"--{mode}", "--seconds", "0.001"]) == 0
    said = capsys.readouterr().out
    assert ("training" in said, "inference" in said) == (mode == "train", mode == "infer")
    assert "float64 on cpu, backend aten" in said


def test_bench_does_not_time_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    entry = dataclasses.replace(backends._TABLE["cpu"], **LONG, layer_forward=wrong_output)
    monkeypatch.setitem(backends._TABLE, "cpu", entry)
    assert main(["bench", "--shape", "2,1,3,4", "--backend", "cpu"]) == 1
    assert capsys.readouterr().out.count("not timed: output differs by up to 0.1") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("nonesuch",), "argument COMMAND: invalid choice: 'nonesuch'"),
        (("info", "more"), "unrecognized arguments: more"),
        (("check", "--backend", "nonesuch"), "--backend: got 'nonesuch', expected one of 'auto'"),
        (("check", "--seconds", "-1"), "--seconds: got '-1', expected a positive number"),
        (("bench", "--shape", "1,2,3"), "--shape: got '1,2,3', expected T,B,I,H"),
        (("bench", "--shape", "1,2,3,0"), "--shape: got '1,2,3,0', expected T,B,I,H"),
        (("bench", "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("bench", "--device", "nonesuch"), "--device: got 'nonesuch': "),
        (("bench", "--device", "meta"), "--device: got 'meta', expected a device that computes"),
        (("bench", "--threads", "0"), "--threads: got '0', expected 1 to "),
        (("bench", "--seconds", "inf"), "--seconds: got 'inf', expected a positive number"),
        (("bench", "--json", "/nonesuch/a.json"), "--json: /nonesuch/a.json: No such file"),
        (("bench", "--plot", "a.nonesuch"), "--plot: a.nonesuch: expected a name that ends in"),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert says in said.err


def test_a_backend_that_is_missing_is_a_bad_argument(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    gone = dataclasses.replace(backends._TABLE["cpu"], missing=lambda: "no C++ compiler")
    monkeypatch.setitem(backends._TABLE, "cpu", gone)
    for command in ("check", "bench"):
        with pytest.raises(SystemExit):
            main([command, "--backend", "cpu"])
        assert "--backend: cpu is not there: no C++ compiler" in capsys.readouterr().err
