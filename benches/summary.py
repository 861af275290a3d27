"""The short form of a recorded run: a line for each thing that was timed, over all its shapes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.table import table

Result = dict[str, Any]  # what run.py writes

TITLES = {
    "packed": "packed, 60 % full, unsorted",
    "lengths": "`lengths=`, 60 % full, unsorted",
    "projection": "projection to H / 2",
    "two layers, both directions": "two layers, both directions",
    "resets": "resets at 1 % of the steps",
    "penalty": "gradient penalty (second order)",
    "cell": "`LSTMCell`, a call for each step",
    "calls": "a call for each of 20 steps, 16 sequences, H = 512",
    "one step": "streaming: one step, one sequence, H = 128",
    "character model": "character model, end to end",
}
UNITED = ("speed", "threads", "peers", "random")  # parts of the plain layer over many shapes


def title(row: Row) -> str:
    """What a row times, without its shape."""
    text = TITLES.get(row["variant"], "")
    return text if row["dtype"] == "float32" and text else f"{text} {row['dtype']}".strip()


def header(result: Result) -> list[str]:
    """The hardware, the versions, the date, and the limits of the machine."""
    hardware, versions, sets = (result[k] for k in ("hardware", "versions", "instruction_sets"))
    caches = ", ".join(f"{k} {v / 2**10:.0f} KiB" for k, v in hardware["caches"].items())
    lines = [
        f"**{hardware['cpu']}** ({hardware['cpus']} CPUs{', ' * bool(caches)}{caches}),"
        f" {result['date'][:10]}: fastlstm {versions['fastlstm']}"
        f" (commit {versions['commit'] or 'unknown'}, {sets['fastlstm']}, {versions['compiler']}),"
        f" torch {versions['torch']} ({sets['torch']}), Python {versions['python']}."
    ]
    if result["environment"]:
        lines.append("Set: " + ", ".join(f"`{k}={v}`" for k, v in result["environment"].items()))
    return lines


def quotient(row: Row) -> float:
    """How many times the rival's time, or memory, ours is."""
    if "peak_bytes" in row:
        page = 4096  # less is nothing
        ours, theirs = (max(row["peak_bytes"][who], page) for who in ("ours", "theirs"))
        return theirs / ours
    return row["ratio"]["median"]


def mean_and_least(rows: Sequence[Row]) -> str:
    """``**geometric mean** (least, of several)``."""
    ratios = [quotient(row) for row in rows if "error" not in row]
    if not rows:
        return ""
    if not ratios:
        return "not timed"
    text = f"**{statistics.geometric_mean(ratios):.2f}**"
    text += f" (least {min(ratios):.2f})" * (len(ratios) > 1)
    return text + f", {len(ratios)} of {len(rows)}" * (len(ratios) < len(rows))


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by what was timed and against what; scaling rows have a plot instead."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["part"] == "scaling":
            continue
        what = title(row)
        if row["part"] in UNITED:
            same = [r for r in rows if all(r[k] == row[k] for k in ("part", "rival", "dtype"))]
            count = len({tuple(r["shape"]) for r in same})
            what += f", {count} shapes" if count > 1 else f", {','.join(map(str, row['shape']))}"
        elif row["part"] == "memory":
            what = "peak memory"
        found.setdefault((what, row["rival"]), []).append(row)
    return found


def compact(result: Result) -> list[str]:
    """A Markdown table of everything: how many times as fast as the rival."""
    counts = sorted({row["threads"] for row in result["rows"]})
    columns = [(mode, n) for mode in MODES for n in counts]
    lines = []
    for (what, rival), rows in groups(result["rows"]).items():
        picked = [[r for r in rows if (r["mode"], r["threads"]) == column] for column in columns]
        lines.append([what, rival, *map(mean_and_least, picked)])
    names = [f"{MODES[mode]}, {n} thread{'s' * (n > 1)}" for mode, n in columns]
    return table(lines, ("what", "× faster than", *names))
