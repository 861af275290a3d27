"""Writes fastlstm/dispatch.json from recorded runs: where ``backend="auto"`` leaves aten.

    python benches/make_dispatch.py [RUN.json ...]

By default from all of benches/results/gpu-*.json. Of each device and backend the newest run counts,
if its tests and its stress of that backend have passed before.
A run shows something about the shapes that it timed. About others it does where the time of a step
only grows with the batch and the hidden size, for both sides: between a recorded shape and a
larger one the backend takes no more than at the larger, and torch's LSTM no less than at the
smaller. So a span of shapes is recorded where

    time of torch's LSTM at its lower corner  >=  MARGIN x time of the backend at its upper corner

and no shape inside of it lost. Lower corners are sizes for which cuDNN has its best algorithms, or
it could be faster inside. Fewer steps than were timed, or emptier batches, are not covered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recording import ROOT, write_json

from fastlstm.dispatch import FORMAT, PATH, parse

RESULTS = ROOT / "benches" / "results"
# Beyond noise, and beyond what another day, driver or version may change.
MARGIN = 1.05
VARIANTS = ("plain", "packed", "bidirectional", "resets")  # two layers are two calls
# Steps of a run without which its figures say nothing about a backend.
PASSED = {"triton": ("tests", "stress"), "cuda": ("tests", "cuda")}


class Timed(NamedTuple):
    """A row of a run: microseconds per step, the slow end of ours and the fast end of theirs."""

    batch: int
    hidden: int
    steps: int
    fill: float
    ours: float  # infinite where the row failed its check
    theirs: float

    def ratio(self, upper: Timed) -> float:
        """Of what torch's LSTM takes here to what the backend takes at ``upper``."""
        return self.theirs / upper.ours


def refusal(run: dict[str, Any]) -> str | None:
    """Why nothing may be concluded from a run, or None."""
    if run.get("dry"):
        return "it is a dry run"
    if run.get("lost"):
        return "the device was lost"
    commit = run["machine"]["versions"].get("commit")
    if commit is None or commit.endswith("+"):
        return f"no commit has the code that was measured, {commit}"
    return None


def untested(run: dict[str, Any], backend: str) -> str | None:
    """Why a run admits nothing for a backend, fast as it may be, or None."""
    ended = {step: run["steps"].get(step, "not run") for step in PASSED[backend]}
    bad = [f"{step} {how}" for step, how in ended.items() if how != "ok"]
    return f"{backend}: {', '.join(bad)}" if bad else None


def timed(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Timed:
    """nn.LSTM has no resets: a loop is what serves them otherwise, which takes longer than nn.LSTM
    without them, and that is what such a row is compared with."""
    names = ("batch", "hidden", "steps")
    rival = row
    if row["variant"] == "resets":
        same = (*names, "precision", "mode", "backend")
        plain = (r for r in rows if r["variant"] == "plain" and all(r[n] == row[n] for n in same))
        rival = next(plain, {"error": "nn.LSTM was not timed"})
    sizes = [row[name] for name in names]
    if "error" in row or "error" in rival:
        return Timed(*sizes, 0.0, float("inf"), 0.0)
    ours, theirs = row["microseconds_per_step"]["ours"], rival["microseconds_per_step"]["theirs"]
    return Timed(*sizes, row["fill"], ours["q3"], theirs["q1"])


def spans(rows: Sequence[Timed]) -> Iterator[tuple[Timed, Timed]]:
    """(lower, upper) corners between which the backend is faster, for rows of one kind."""
    for lower, upper in itertools.product(rows, repeat=2):
        ordered = lower.batch <= upper.batch and lower.hidden <= upper.hidden
        same = lower.steps == upper.steps
        regular = lower is upper or (lower.batch % 8 == 0 and lower.hidden % 128 == 0)
        inside = (
            row
            for row in rows
            if row.steps >= lower.steps
            and lower.batch <= row.batch <= upper.batch
            and lower.hidden <= row.hidden <= upper.hidden
        )
        if (
            ordered
            and same
            and regular
            and lower.ratio(upper) >= MARGIN
            and all(row.ratio(row) >= MARGIN for row in inside)
        ):
            yield lower, upper


def records(run: dict[str, Any], name: str, backend: str) -> list[dict[str, Any]]:
    """What a run shows about a backend, as dispatch.json has it."""
    # "auto" leaves the kernel to the backend.
    rows = [r for r in run["rows"] if r["backend"] == backend and r["kernel"] == "best"]
    kinds = dict.fromkeys(
        (row["mode"], row["precision"], row["variant"])
        for row in rows
        if row["variant"] in VARIANTS
    )
    found = []
    for kind in kinds:
        same = [r for r in rows if (r["mode"], r["precision"], r["variant"]) == kind]
        for lower, upper in spans([timed(row, rows) for row in same]):
            entry = dict(zip(("mode", "precision", "variant"), kind, strict=True))
            entry |= dict(device=run["machine"]["device"]["name"], backend=backend, run=name)
            entry |= dict(batch=[lower.batch, upper.batch], hidden=[lower.hidden, upper.hidden])
            entry |= dict(steps=lower.steps, fill=round(min(lower.fill, upper.fill), 3))
            found.append(entry | dict(ratio=round(lower.ratio(upper), 3)))
    return [entry for entry in found if not any(is_part(entry, other) for other in found)]


def is_part(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Does another record say all that this one says?"""
    same = all(entry[name] == other[name] for name in ("mode", "precision", "variant"))
    return (
        entry is not other
        and same
        and all(
            other[name][0] <= entry[name][0] and entry[name][1] <= other[name][1]
            for name in ("batch", "hidden")
        )
        and other["steps"] <= entry["steps"]
        and other["fill"] <= entry["fill"]
        and other["ratio"] >= entry["ratio"]
    )


def table(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """dispatch.json, from runs by their files' names.

    Raises:
        ValueError: nothing may be concluded from a run; the message says which, and why.
    """
    for name, run in runs.items():
        if (reason := refusal(run)) is not None:
            raise ValueError(f"{name}: {reason}")
    newest: dict[tuple[str, str], str] = {}
    for name in sorted(runs, key=lambda name: runs[name]["date"]):
        device = runs[name]["machine"]["device"]["name"]
        newest |= {(device, row["backend"]): name for row in runs[name]["rows"]}
    entries = [
        entry
        for (_, backend), name in sorted(newest.items())
        if untested(runs[name], backend) is None
        for entry in records(runs[name], name, backend)
    ]
    written = {"format": FORMAT, "records": entries}
    parse(written)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, default=PATH, metavar="FILE")
    args = parser.parse_args()
    paths = args.runs or sorted(RESULTS.glob("gpu-*.json"))
    try:
        runs = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        written = table(runs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, run in runs.items():
        for backend in dict.fromkeys(row["backend"] for row in run["rows"]):
            if (reason := untested(run, backend)) is not None:
                print(f"{name}: nothing is recorded of {reason}")
    write_json(args.out, written)
    print(f"{len(written['records'])} records from {len(runs)} runs in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
