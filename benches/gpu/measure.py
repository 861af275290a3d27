"""A step of ``make gpu``: times fastlstm's GPU kernels against nn.LSTM (cuDNN) on a GPU.

Same weights, same inputs, paired and in turn. A row whose results differ from nn.LSTM's is not
timed. What is finished is on disk after every row; the most important rows come first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from recording import arguments, now, stem, write_json
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastlstm import cuda, triton
from gpu.cases import Case, DeviceContest, cases, dry_cases
from gpu.common import device_of, synchronize
from gpu.report import plot, write_report

MODES = ("train", "infer")
CHECKS = {"triton": triton.check, "cuda": cuda.check}  # have kernels reported a fault?
SECONDS = 0.4  # for each row, at least
KERNELS = 4  # of nn.LSTM, by their time


def peak_memory(contest: DeviceContest, module: nn.Module, mode: str) -> int | None:
    """Bytes that a call takes for a while, beyond its inputs, outputs and gradients."""
    if contest.device.type != "cuda":
        return None
    contest.clear()
    module.train(mode == "train")
    synchronize(contest.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = getattr(contest, mode)(module)
    synchronize(contest.device)
    leaves = (contest.x, *module.parameters())
    kept = [t.nbytes for t in (*results, *(leaf.grad for leaf in leaves)) if t is not None]
    peak = torch.cuda.max_memory_allocated() - before - sum(kept)
    contest.clear()
    return peak


def kernel_names(contest: DeviceContest, mode: str) -> list[str]:
    """What nn.LSTM spends its time in."""
    cuda = contest.device.type == "cuda"
    contest.theirs.train(mode == "train")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    try:
        with profile(activities=activities) as profiled:
            getattr(contest, mode)(contest.theirs)
            synchronize(contest.device)
    except RuntimeError as error:  # no reason to lose what was timed
        return [f"unknown: {error}"[:120]]
    contest.clear()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in profiled.key_averages() if e.device_type == wanted]
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    events.sort(key=lambda event: getattr(event, time), reverse=True)
    return [event.key[:120] for event in events[:KERNELS]]


def measure_mode(contest: DeviceContest, mode: str, seconds: float) -> dict[str, Any]:
    """A row: times, memory, and the rival's kernels."""
    row = contest.time(mode, seconds)
    scale = 1e6 / contest.case.steps
    step = {who: {k: v * scale for k, v in row.pop(who).items()} for who in ("ours", "theirs")}
    contest.clear()
    return {
        **row,
        "fill": contest.fill(),
        "microseconds_per_step": step,
        "peak_bytes": {
            who: peak_memory(contest, getattr(contest, who), mode) for who in ("ours", "theirs")
        },
        "their_kernels": kernel_names(contest, mode),
    }


def measure_case(case: Case, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each mode; an error is one too."""
    rows = [{**case._asdict(), "mode": mode} for mode in MODES]
    rival = "fastlstm without resets" if case.variant == "resets" else "nn.LSTM"
    for row in rows:
        row["rival"] = rival
    try:
        contest = DeviceContest(case, device)
        problem = contest.problem()
        synchronize(device)
        CHECKS[case.backend](device)
        plans = contest.plans()
        for row in rows:
            row["plans"] = plans
            row |= {"error": problem} if problem else measure_mode(contest, row["mode"], seconds)
        synchronize(device)
        CHECKS[case.backend](device)
    except Exception as error:  # whatever it is belongs to this row, and the others go on
        text = f"{type(error).__name__}: {error}"[:400]
        return [row if "error" in row else {**row, "error": text} for row in rows]
    return rows


def usable(device: torch.device) -> str | None:
    """Why nothing more can be measured, or None: some errors leave a GPU's context for dead."""
    try:
        synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        return str(error)[:400]
    return None


def machine(out: Path, device: torch.device) -> dict[str, Any]:
    """What the first step has found, or little where it was cut."""
    path = out / "machine.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": {"name": name}, "versions": {"torch": str(torch.__version__)}}


def earlier_steps(out: Path) -> dict[str, str]:
    """How the steps before this one have ended, by name."""
    path = out / "steps.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {row["step"]: row["result"] for row in found}


def new_result(out: Path, device: torch.device) -> dict[str, Any]:
    """What is recorded, without rows yet."""
    return {
        "machine": machine(out, device),
        "date": now(),
        "steps": earlier_steps(out),
        "rows": [],
        "dry": device.type == "cpu",
        "lost": None,
    }


def path_of(result: dict[str, Any], out: Path) -> Path:
    """Where it is recorded."""
    return out / f"{stem('gpu', result['date'], result['machine']['device']['name'])}.json"


def main() -> int:
    args = arguments(__doc__)
    device = device_of(args.device)
    result = new_result(args.out, device)
    path, dry = path_of(result, args.out), result["dry"]
    todo = dry_cases() if dry else cases()
    lost, slowest = None, 0.0
    for done, case in enumerate(todo):
        begin = monotonic()
        if begin + slowest > args.deadline:  # time for the plot, too
            print(f"no time was left for {len(todo) - done} of {len(todo)} cases")
            break
        result["rows"] += measure_case(case, device, 0.01 if dry else SECONDS)
        lost = usable(device)
        result["not_reached"] = [tuple(case) for case in todo[done + 1 :]]
        result["lost"] = lost
        write_json(path, result)
        write_report(path, result)
        slowest = max(slowest, monotonic() - begin)
        print(*case, result["rows"][-2].get("error", "ok"), flush=True)
        if lost:
            print(f"the device is lost: {lost}")
            break
    plot(path, result)
    failed = any("error" in row for row in result["rows"])
    return int(failed or lost is not None or not result["rows"])


if __name__ == "__main__":
    sys.exit(main())
