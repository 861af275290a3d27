"""benches/: what is measured, checked at tiny sizes, and what is made of a recorded run."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import settings
from fastlstm import native
from fastlstm.cli.contest import flops

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benches"))

import compare  # noqa: E402
import floors  # noqa: E402
import limits  # noqa: E402
import parts  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402

QUARTILES = ("q1", "median", "q3")
LIMITS = {
    "fma_gflops": {"float32": 200.0, "float64": 100.0},
    "matrix_unit_gflops": 0.0,
    "read_gbytes": {"L1": 400.0, "L2": 100.0, "L3": 25.0},
    "copy_gbytes": 20.0,
    "matmul_gflops": 180.0,
}
CACHES = {"L1": 2**15, "L2": 2**20, "L3": 2**25}


def timed_row(part: str, shape: tuple, mode: str, threads: int, ratio: float = 1.5, **more) -> dict:
    row = parts.row_of(part, shape, mode, threads, **more)
    row |= {who: dict.fromkeys(QUARTILES, 0.01) for who in ("ours", "theirs")}
    row["ratio"] = dict(zip(QUARTILES, (ratio - 0.1, ratio, ratio + 0.1), strict=True))
    row["work"] = parts.plain_work(shape, "float32", mode)._asdict()
    return row | {"gflops": {"ours": 30.0, "theirs": 20.0}}


@pytest.fixture
def result() -> dict:
    """As run.py writes it, with made-up figures."""
    shapes = [(10, 1, 64, 128), (10, 16, 256, 256), (20, 16, 256, 256)]
    rows = [
        timed_row(part, shape, mode, threads)
        for part in ("speed", "scaling", "threads", "random")
        for threads in (1, 2)
        for shape in shapes
        for mode in ("train", "infer")
    ]
    rows += [timed_row("features", shapes[0], "train", 1, variant=v) for v in ("packed", "cell")]
    model = timed_row("model", shapes[0], "train", 1, variant="character model")
    del model["work"], model["gflops"]
    peer = parts.row_of("peers", shapes[0], "infer", 1, rival="ONNX Runtime")
    rows += [model, peer | {"error": "output differs by up to 3"}]
    memory = parts.row_of("memory", shapes[0], "train", 1)
    rows.append(memory | {"peak_bytes": {"ours": 2**20, "theirs": 2**21}})
    return {
        "date": "2026-11-25T10:00:00+00:00",
        "hardware": {"cpu": "A processor", "cpus": 2, "machine": "x86_64", "caches": CACHES},
        "versions": dict(fastlstm="0", commit="abc", torch="2", python="3", compiler="g++ 1"),
        "instruction_sets": {"fastlstm": "avx2", "available": ["avx2"], "torch": "AVX2"},
        "environment": {},
        "peers": {"haste": "not installed: haste_pytorch"},
        "limits": {"1": LIMITS, "2": LIMITS},
        "rows": rows,
    }


@pytest.fixture
def files(result: dict, tmp_path: Path):
    """Writes the old and a new run; gives compare's exit status."""

    def compared(new: dict, *options: str) -> int:
        paths = [tmp_path / name for name in ("old.json", "new.json")]
        for path, content in zip(paths, (result, new), strict=True):
            path.write_text(json.dumps(content))
        return compare.main([*map(str, paths), *options])

    return compared


def test_equal_runs_are_equal(result: dict, files, capsys) -> None:
    assert files(result) == 0
    timed = sum("error" not in row for row in result["rows"])
    assert capsys.readouterr().out == f"{timed} rows in both: 0 slower, 0 faster\n"


@pytest.mark.parametrize(
    ("ratio", "spread", "status", "says"),
    [
        (1.2, 0.1, 1, "1 slower, 0 faster"),
        (1.2, 0.3, 0, "0 slower, 0 faster"),  # within what it scatters by
        (1.45, 0.01, 0, "0 slower, 0 faster"),  # too little to be certain
        (1.9, 0.1, 0, "0 slower, 1 faster"),
    ],
)
def test_a_change_beyond_the_noise_is_found(
    result: dict, files, capsys, ratio: float, spread: float, status: int, says: str
) -> None:
    new = copy.deepcopy(result)
    new["rows"][3]["ratio"] = {"q1": ratio - spread, "median": ratio, "q3": ratio + spread}
    assert files(new) == status
    said = capsys.readouterr().out
    assert says in said
    assert ("10,16,256,256" in said) == ("1 " in says)


def test_a_row_that_fails_now_is_a_regression(result: dict, files, capsys) -> None:
    new = copy.deepcopy(result)
    new["rows"][0] = {**parts.row_of("speed", (10, 1, 64, 128), "train", 1), "error": "it is wrong"}
    assert files(new) == 1
    assert "it is wrong" in capsys.readouterr().out


def test_more_memory_is_a_regression(result: dict, files, capsys) -> None:
    new = copy.deepcopy(result)
    new["rows"][-1]["peak_bytes"]["ours"] *= 2
    assert files(new) == 1
    assert "more memory" in capsys.readouterr().out


def test_another_machine_is_a_warning(result: dict, files, capsys) -> None:
    new = copy.deepcopy(result)
    new["versions"]["torch"], new["hardware"]["cpus"] = "3", 4
    assert files(new) == 0
    said = capsys.readouterr().out
    assert "warning: another torch: 2, then 3" in said and "another hardware" in said


def test_compare_refuses_what_is_no_run(result: dict, files, tmp_path: Path, capsys) -> None:
    for content in ({"rows": [{"shape": [1, 1, 1, 1]}]}, {**result, "rows": []}):
        with pytest.raises(SystemExit) as status:
            files(content)
        assert status.value.code == 2
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "none.json")] * 2)
    assert "No such file" in capsys.readouterr().err


def test_the_report_has_every_row_and_every_plot(result: dict, tmp_path: Path) -> None:
    path = tmp_path / "cpu-run.json"
    text = report.report(path, result)
    assert text == path.with_suffix(".md").read_text()
    plots = sorted(p.name for p in tmp_path.glob("*.png"))
    endings = ("", "-features", "-memory", "-roofline", "-scaling")
    assert plots == sorted(f"cpu-run{ending}.png" for ending in endings)
    assert all((tmp_path / name).stat().st_size > 5000 for name in plots)
    for words in (
        *("A processor", "2026-11-25", "torch 2", "haste not installed"),
        "| 10,1,64,128 | float32 | inference | 1 | ONNX Runtime | not timed: output differs",
        "| character model, end to end | training | 1 | nn.LSTM | **1.50** (1.40–1.60) | 10 / 10 |",
        "| 10,1,64,128 | training | 1.0 / 2.0 | 2.00 |",
        "| 15 / 10 |",  # percent of the FMA peak
        "(L2 reads) |",
        "(FMA) |",
    ):
        assert words in text, words
    assert text.count("| 20,16,256,256 |") == 4 * 4


def test_random_shapes_are_listed_the_worst_first(result: dict) -> None:
    rows = [row for row in result["rows"] if row["part"] == "random"]
    rows[5]["ratio"]["median"] = 0.5
    first = report.part("random", result)[2]
    assert first.startswith("| 20,16,256,256 | float32 | inference | 1 |") and "0.50" in first


def test_readme_is_what_its_recorded_runs_give() -> None:
    page = (ROOT / "README.md").read_text()
    stems = re.findall(r"\(benches/results/(cpu-[\w-]+)\.md\)", page)
    paths = [ROOT / readme.FOLDER / f"{stem}.json" for stem in stems]
    runs = [json.loads(path.read_text()) for path in paths]
    assert runs
    assert page == readme.replace_block(page, readme.block(zip(runs, stems, strict=True)))
    for path, recorded in zip(paths, runs, strict=True):
        assert not recorded["versions"]["commit"].endswith("+")
        assert path.with_suffix(".md").read_text() == report.markdown(recorded, path.name)
    for name in re.findall(r"\((benches/results/[^)]+)\)", page):
        assert (ROOT / name).is_file(), name


def test_readme_puts_machines_side_by_side(result: dict) -> None:
    """A column for each, whatever one of them lacks; on one thread / on two."""
    others = ("random", "threads")  # in which the rows above have the same rival
    result["rows"] = [row for row in result["rows"] if row["part"] not in others]
    other = copy.deepcopy(result)
    other["rows"] = [row for row in other["rows"] if row["variant"] != "cell"]
    other["instruction_sets"]["fastlstm"] = "amx"
    other["rows"][0]["ratio"]["median"] = 1.2
    text = readme.block([(result, "one"), (other, "two")])
    even, uneven = "1.50 (1.50) / 1.50 (1.50)", "1.39 (1.20) / 1.50 (1.50)"
    for line in (
        "| what | × faster than | 1: avx2 | 2: amx |",
        f"| float32, 3 shapes | nn.LSTM | {even} | {uneven} |",
        "| `LSTMCell`, a call for each step | nn.LSTM | 1.50 | – |",
        "| float32, 10,1,64,128 | ONNX Runtime | not timed | not timed |",
        "| peak memory | nn.LSTM | 2.00 | 2.00 |",
    ):
        assert text.count(f"\n{line}\n") == 1 + line.startswith("| what"), line
    assert "\n2. **A processor** (2 CPUs" in text and "(benches/results/two.md)." in text


def test_readme_needs_its_marks() -> None:
    with pytest.raises(ValueError, match="benchmark:begin"):
        readme.replace_block("no marks", "text")


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_work_of_the_plain_layer(mode: str) -> None:
    assert floors.lstm_work(5 * 3, 5, 7, 11, mode).flops() == flops((5, 3, 7, 11), mode)


def test_work_of_layers_directions_and_projections() -> None:
    rows, inputs, hidden, out = 15, 7, 11, 4
    layer = [
        2 * rows * 4 * hidden * (width + out) + 2 * rows * out * hidden for width in (inputs, 8)
    ]
    work = floors.lstm_work(
        rows, 5, inputs, hidden, "infer", projection=out, layers=2, directions=2
    )
    assert work.flops() == 2 * sum(layer)
    trained = floors.lstm_work(
        rows, 5, inputs, hidden, "train", projection=out, layers=2, directions=2
    )
    assert trained.flops() == 3 * work.flops()
    assert work.held == 2 * 4 * (4 * hidden * out + out * hidden)
    assert work.step_bytes == 2 * 5 * work.held


def test_a_floor_names_what_bounds_it() -> None:
    few, many = (floors.lstm_work(10 * b, 10, 256, 256, "infer") for b in (1, 64))
    bound = floors.floor(few, "float32", 1, CACHES, LIMITS)
    assert bound.bound == "L3 reads"  # a MiB does not fit into one with all else
    assert bound.seconds == pytest.approx((few.dense_bytes + few.step_bytes) / 25e9)
    assert floors.floor(few, "float32", 2, CACHES, LIMITS).bound == "L2 reads"
    bound = floors.floor(many, "float32", 1, CACHES, LIMITS)
    assert bound == (pytest.approx(many.flops() / 200e9), "FMA")
    unit = {**LIMITS, "matrix_unit_gflops": 3000.0}
    assert floors.peak(unit, "float32") == (500.0, "matrix unit / 6")
    assert floors.peak(unit, "bfloat16") == (3000.0, "matrix unit")
    assert floors.peak(unit, "float64") == (100.0, "FMA")


def test_random_shapes_come_again_and_have_every_kind() -> None:
    shapes = sweep.random_shapes(24, 3)
    assert shapes == sweep.random_shapes(24, 3) != sweep.random_shapes(24, 4)
    assert len(set(shapes)) == 24 and all(min(shape) >= 1 for shape in shapes)
    assert all(h % 2 for *_, h in shapes[1::6]) and all(h % 16 for *_, h in shapes[2::6])
    assert all(t <= 4 for t, *_ in shapes[3::6]) and all(b >= 512 for _, b, *_ in shapes[4::6])
    assert all(i == 16 * h for *_, i, h in shapes[5::6])


def test_limits_are_those_of_a_machine() -> None:
    machine = limits.compiled(native.instruction_sets()[-1])
    one, two = (machine.fma_flops_float(threads, 0.01) for threads in (1, 2))
    assert one > 1e9 and two > 0.5 * one
    assert machine.matrix_unit_flops(1, 0.01) == 0  # not of the baseline
    assert machine.read_bytes(2, 2**14, 0.01) > 1e8
    before = os.sched_getaffinity(0)
    assert 5 < limits.hop(machine) < 1e6
    assert os.sched_getaffinity(0) == before


def test_caches_are_read_and_may_be_unknown(tmp_path: Path) -> None:
    for k, (level, kind, size) in enumerate(
        ((1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "1024K"))
    ):
        (tmp_path / f"index{k}").mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{k}" / name).write_text(f"{value}\n")
    assert limits.caches(tmp_path) == {"L1": 2**15, "L2": 2**20}
    assert limits.caches(tmp_path / "nothing") == {}
    assert [*limits.read_sizes(CACHES)] == ["L1", "L2", "L3"]
    assert [*limits.read_sizes({})] == ["memory"]


@pytest.fixture
def tiny(monkeypatch) -> Namespace:
    """Every part at sizes that take no time."""
    shape = (3, 4, 5, 6)
    monkeypatch.setattr(parts, "FEATURE", shape)
    monkeypatch.setattr(parts, "MODEL", shape)
    for name in ("SPEED", "BUSY"):
        monkeypatch.setattr(parts, name, (shape, shape))
    for name in ("STEPS", "BATCHES", "WIDTHS"):
        monkeypatch.setattr(parts, name, (2, 5))
    monkeypatch.setattr(parts, "BASE", (3, 2, 4, 4))
    monkeypatch.setattr(parts, "random_shapes", lambda count, seed: [shape] * (count == 2))
    monkeypatch.setattr(parts, "PEERS", parts.PEERS[:2])  # torch.compile takes its time
    everything = dict(shapes=[shape], modes=("train", "infer"), random=2, seed=0)
    return Namespace(threads=[1, 2], dtype="float32", seconds=1e-9, **everything)


@pytest.mark.parametrize("name", parts.PARTS)
def test_every_part_gives_rows(name: str, tiny: Namespace) -> None:
    rows = []
    for job in list(parts.PARTS[name](tiny))[: 1 if name == "memory" else None]:
        with settings.threads(job.threads):
            rows += job.rows()
    assert rows
    assert [row for row in rows if "error" in row] == []
    assert all(compare.key(row) and ("ratio" in row or "peak_bytes" in row) for row in rows)
    names = [compare.key(row) for row in rows]
    if name not in ("peers", "threads"):  # two equal shapes here
        assert len({*names}) == len(names)


def test_what_is_wrong_is_not_timed(tiny: Namespace, monkeypatch) -> None:
    monkeypatch.setattr(parts.Contest, "problem", lambda contest: "output differs by up to 1")
    rows = [row for job in parts.speed(tiny) for row in job.rows()]
    assert len(rows) == 4 and all(row["error"].startswith("output differs") for row in rows)


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch) -> None:
    peer = parts.PEERS[0]
    contest = parts.PeerContest((3, 2, 4, 5), peer, 1)
    assert contest.problem() is None
    contest.theirs.forward = lambda x, hx: (torch.zeros(3, 2, 5), hx)
    assert contest.problem().startswith(f"{peer.name}: output differs")


def test_a_run_and_an_addition_to_it(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benches/run.py"), "--seconds", "0.001", *words]
        out = ("--threads", "1", "--out", str(tmp_path))
        return subprocess.run([*command, *out], capture_output=True, text=True)

    done = run("--shapes", "2,2,3,4")
    assert done.returncode == 0, done.stderr
    assert "speed" in done.stderr and "100%" in done.stderr  # the bar
    (path,) = tmp_path.glob("cpu-*.json")
    first = json.loads(path.read_text())
    assert [row["part"] for row in first["rows"]] == ["speed", "speed"]
    done = run("--shapes", "2,2,3,5", "--add", str(path), "--modes", "infer")
    assert done.returncode == 0, done.stderr
    second = json.loads(path.read_text())
    assert second["limits"] == first["limits"]
    assert [row["shape"] for row in second["rows"]] == [[2, 2, 3, 5]]
    path.write_text(json.dumps(second | {"environment": {"CXX": "another"}}))
    done = run("--shapes", "2,2,3,5", "--add", str(path))
    assert done.returncode == 2 and "another environment" in done.stderr


def versions(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benches/versions.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_version_against_itself() -> None:
    done = versions(
        ".", "--shapes", "2,2,3,4", "--variants", "packed", "cell", "--modes", "train",
        "--threads", "1", "--rounds", "2", "--seconds", "0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert "old / new" in head and len(lines) == 2
    for line, variant in zip(lines, ("packed", "cell"), strict=True):
        found = re.fullmatch(
            rf"2,2,3,4 +{variant} +training +1 +([\d.]+) \(([\d.]+)-([\d.]+)\) +[\d.]+ +[\d.]+",
            line,
        )
        assert found, line
        middle, least, greatest = map(float, found.groups())
        assert 0.3 < least <= middle <= greatest < 3  # the same code, beside other tests


def test_a_version_that_is_none() -> None:
    done = versions("no-such-commit")
    assert done.returncode == 2 and "no-such-commit: not a commit" in done.stderr
