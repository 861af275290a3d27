"""`make gpu` in its dry mode, and what its driver does with steps that fail or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from itertools import product
from pathlib import Path

import pytest
import torch

import emulated
import fastlstm
from fastlstm import build

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benches"))

import recording  # noqa: E402

from gpu import build as build_step  # noqa: E402
from gpu import cuda, describe, micro, run  # noqa: E402
from gpu.common import KERNELS  # noqa: E402

WALKS = ("forward", "backward")


def read(path: Path) -> object:
    return json.loads(path.read_text())


def test_the_whole_chain_in_a_dry_run(tmp_path: Path) -> None:
    env = os.environ | {
        "FASTLSTM_LIBRARY": str(build.library_path()),
        "FASTLSTM_CUDA_LIBRARY": str(emulated.library()),
    }
    words = ["make", "gpu", f"OUT={tmp_path}", "ARGS=--device cpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    files = sorted(path.name.split(".")[-1] for path in tmp_path.iterdir())
    assert files == ["gz", "json", "json", "json", "md", "png"]  # some hand back no more than eight
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    tmp_path /= "all"
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = {row["step"]: row["result"] for row in read(tmp_path / "steps.json")}
    assert list(results) == [step.name for step in run.steps("cpu", tmp_path)]
    skipped = {name for name, result in results.items() if result != "ok"}
    assert skipped == {"build", "compile"}

    assert read(tmp_path / "machine.json")["versions"]["torch"] == torch.__version__
    for name in ("tests", "others"):
        assert all(row["failures"] == 0 < row["tests"] for row in read(tmp_path / f"{name}.json"))
    stress = {row["case"]: row["result"] for row in read(tmp_path / "stress.json")}
    assert {name for name, result in stress.items() if result == "ok"} == {
        *("repeated", "near_stock", "given_up", "every_exchange"),
    }
    assert "failed" not in stress.values()
    barrier, walk, clusters, *of_cuda = read(tmp_path / "micro.json")
    assert barrier["microseconds"]["median"] > 0 and walk["host_microseconds"]["median"] > 0
    assert "9.0" in clusters["missing"]
    assert {(row["kernel"], row["walk"]) for row in of_cuda} == set(product(KERNELS, WALKS))
    assert all(row["plan"].startswith(row["kernel"]) for row in of_cuda)
    assert all(row["microseconds_per_step"]["median"] > 0 for row in of_cuda)
    stress = {(row["kernel"], row["case"]): row for row in read(tmp_path / "cuda.json")}
    assert {name for name, row in stress.items() if row["result"] == "ok"} == set(
        product(KERNELS, ("repeated", "near_stock", "given_up"))
    )
    assert "failed" not in {row["result"] for row in stress.values()}
    assert {("cluster", "graph"), ("grid", "graph")} < set(stress)
    assert {("best", "memcheck"), ("best", "racecheck")} < set(stress)
    for kernel in KERNELS:
        name = "_cluster" if kernel == "cluster" else ""
        assert f"lstm_forward{name} on" in stress[kernel, "given_up"]["message"]
    (path,) = tmp_path.glob("gpu-*.json")
    check_measured(read(path))
    text = path.with_suffix(".md").read_text()
    assert "A dry run" in text and text.count("| forward + backward |") == 24
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_sanitizer_watches(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, on such kernels."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(cuda, "LAYERS", ((3, 9, 24),))
    monkeypatch.setattr(cuda, "WIDE", {kernel: lambda dtype: (2, 1, 64 // dtype.itemsize)})
    with emulated.emulator():
        try:
            text = cuda.sanitized(torch.device("cpu"), kernel)
        finally:
            torch.set_float32_matmul_precision(before)
    assert text == f"6 layers of {kernel} kernels"


def check_measured(result: dict) -> None:
    rows = result["rows"]
    assert result["dry"] and result["not_reached"] == [] and len(rows) == 24
    assert result["steps"]["cuda"] == result["steps"]["tests"] == "ok"
    plans = {row["kernel"]: row["plans"] for row in rows if row["backend"] == "cuda"}
    for kernel in KERNELS:
        assert all(plans[kernel][walk].startswith(kernel) for walk in WALKS)
    for row in rows:
        assert "error" not in row
        assert row["microseconds_per_step"]["ours"]["median"] > 0
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
        assert row["their_kernels"]


def python(name: str, code: str, limit: int = 20) -> run.Step:
    return run.Step(name, limit, [sys.executable, "-S", "-c", code])


def test_a_step_that_fails_leaves_the_others(tmp_path: Path, capfd) -> None:
    todo = [
        python("first", "print('one')"),
        python("second", "raise SystemExit('two is broken')"),
        python("third", f"raise SystemExit({run.SKIPPED})"),
        python("fourth", "import os; os.abort()"),
        python("fifth", "print('five')"),
    ]
    assert run.run_all(todo, tmp_path, "cpu") == 1
    results = [row["result"] for row in read(tmp_path / "steps.json")]
    assert results == ["ok", "failed", "skipped", "failed", "ok"]
    assert (tmp_path / "fifth.log").read_text() == "five\n"
    assert "two is broken" in capfd.readouterr().out
    assert run.run_all(todo[::2], tmp_path, "cpu") == 0


def test_a_limit_cuts_a_step_and_its_children(tmp_path: Path) -> None:
    child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    todo = [python("hangs", parent, limit=1), python("goes on", "print('on')")]
    assert run.run_all(todo, tmp_path, "cpu") == 1
    hung, after = read(tmp_path / "steps.json")
    assert hung["result"] == "cut" and hung["seconds"] < 10
    assert after["result"] == "ok"
    pid, *_, last = (tmp_path / "hangs.log").read_text().splitlines()
    assert last.startswith("cut after")
    assert gone(int(pid))


def gone(pid: int) -> bool:
    """No such process, or one that is dead and waits to be buried."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def test_the_budget_ends_a_chain(tmp_path: Path) -> None:
    todo = [python(name, "import time; time.sleep(60)") for name in ("one", "two")]
    assert run.run_all(todo, tmp_path, "cpu", budget=1) == 1
    assert [row["result"] for row in read(tmp_path / "steps.json")] == ["cut", "cut"]


def test_a_run_that_is_ended_hands_on_what_there_is(tmp_path: Path) -> None:
    """Of a step that is not done too."""
    row = (
        "import sys, time\n"
        "for path in sys.argv[1:3]:\n"
        "    open(path, 'w').write('[]')\n"
        "time.sleep(60)"
    )
    out, written = tmp_path / "out", tmp_path / "written"
    program = (
        "import signal, sys\n"
        "from gpu import run\n"
        "def steps(device, out):\n"
        f"    words = [sys.executable, '-S', '-c', {row!r}, str(out / 'gpu-row.json')]\n"
        f"    words.append({str(written)!r})\n"
        "    return [run.Step('measure', 60, words)]\n"
        "run.steps = steps\n"
        "sys.exit(run.main())\n"
    )
    words = [sys.executable, "-c", program, "--device", "cpu", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "benches")}
    process = subprocess.Popen(words, env=env)
    deadline = time.monotonic() + 60
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 143
    assert read(out / "gpu-row.json") == []
    with tarfile.open(out / "all.tar.gz") as archive:
        assert {"all/gpu-row.json", "all/measure.log"} <= set(archive.getnames())


def test_what_cannot_be_handed_on_ends_no_run(tmp_path: Path) -> None:
    def after() -> None:
        raise OSError("no room")

    todo = [python("first", ""), python("second", "")]
    assert run.run_all(todo, tmp_path, "cpu", after=after) == 0
    assert [row["result"] for row in read(tmp_path / "steps.json")] == ["ok", "ok"]


def test_the_split_fits_the_budget() -> None:
    assert sum(step.limit for step in run.steps("cuda", Path())) <= run.BUDGET <= 560


def test_kernels_come_from_this_checkout() -> None:
    """Also where another checkout is installed."""
    code = "import fastlstm.kernels.launch as m, os; print(os.path.realpath(m.__file__))"
    with run.checkout_path() as path:
        env = run.environment(path, "cpu", "tests")
        words = [sys.executable, "-P", "-c", code]
        found = subprocess.check_output(words, env=env, cwd=ROOT, text=True)
    assert found.strip() == str(ROOT / "kernels" / "launch.py")


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch) -> None:
    """Or nothing could be concluded from its run."""
    monkeypatch.setattr(recording, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert recording.commit() is None
    monkeypatch.setenv("FASTLSTM_COMMIT", "0123456789ab")
    assert recording.commit() == "0123456789ab"


def test_the_machine_is_known_before_a_library_is(tmp_path: Path, monkeypatch) -> None:
    """Which may have to be built, and is cut: without a commit nothing could be concluded."""
    monkeypatch.setattr(fastlstm, "available_backends", lambda: sys.exit("cut"))
    words = ["describe.py", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="cut"):
        describe.main()
    assert read(tmp_path / "machine.json")["versions"]["commit"] == recording.commit()


def test_a_library_that_came_along_is_not_built_again() -> None:
    module = build_step.load_build()
    assert build_step.is_there(module, module.LIBRARY, module.sources_digest())
    assert not build_step.is_there(module, module.LIBRARY, "of other sources")
    assert not build_step.is_there(module, "_missing.so", module.sources_digest())


def test_make_asks_where_to() -> None:
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "OUT=FOLDER" in done.stderr


def test_the_cluster_benchmark_compiles(tmp_path: Path) -> None:
    """And says what is wrong where it cannot run."""
    nvcc = micro.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    program = tmp_path / "clusters"
    assert micro.build_clusters(nvcc, (9, 0), str(program)) is None
    done = subprocess.run([program], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and any("error" in row for row in rows) == (done.returncode != 0)
    problem = micro.build_clusters(nvcc, (1, 0), str(program))
    assert "unsupported gpu architecture" in problem.lower()
