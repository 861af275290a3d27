"""Markdown and a plot from a run of measure.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastlstm.cli.table import means, table

COLUMNS = (
    *("mode", "T, B, H", "precision", "variant", "backend", "× rival (quartiles)"),
    *("µs per step: ours / rival", "peak MiB: ours / rival", "kernels of the rival"),
)
MODES = {"train": "forward + backward", "infer": "forward"}


def header(result: dict[str, Any]) -> list[str]:
    """The hardware, the versions, and how to read the table."""
    versions = result["machine"]["versions"]
    driver = result["machine"].get("driver", {}).get("driver_version", "unknown")
    lines = [
        f"**{result['machine']['device']['name']}**, {result['date'][:10]}, driver {driver}: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "I = H. Paired and interleaved in one process, same weights, same inputs."
        " Ratios are medians over the pairs, with quartiles; above 1, fastlstm is faster. Memory is"
        " beyond inputs, outputs and gradients. The rival is nn.LSTM; of resets, which it has not,"
        " fastlstm without them.",
    ]
    if result["dry"]:
        lines.insert(0, "A dry run in Triton's interpreter: the figures mean nothing.")
    if result.get("not_reached"):
        lines.append(f"Cut short: {len(result['not_reached'])} cases were not reached.")
    return lines


def pair(row: dict[str, Any], name: str, scale: float = 1.0) -> str:
    """``ours / theirs`` in three digits."""
    values = []
    for who in ("ours", "theirs"):
        value = row[name][who]
        value = value["median"] if isinstance(value, dict) else value
        values.append("" if value is None else f"{value * scale:.3g}")
    return " / ".join(values)


def backend_of(row: dict[str, Any]) -> str:
    """And its kernel, where it was not left to choose."""
    return row["backend"] + f" ({row['kernel']})" * (row["kernel"] != "best")


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, for COLUMNS."""
    lead = [MODES[row["mode"]], f"{row['steps']}, {row['batch']}, {row['hidden']}"]
    lead += [row["precision"], row["variant"], backend_of(row)]
    if "error" in row:
        error = row["error"].replace("\n", " ").replace("|", "/")
        return [*lead, f"not timed: {error}", "", "", ""]
    ratio = row["ratio"]
    return [
        *lead,
        f"**{ratio['median']:.2f}** ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
        pair(row, "microseconds_per_step"),
        pair(row, "peak_bytes", 2.0**-20),
        "; ".join(name.replace("|", "/")[:60] for name in row["their_kernels"][:2]),
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric mean and minimum of the ratio, by all but the sizes of batch and layer."""
    lines = []
    names = ("mode", "precision", "variant", "steps", "backend", "kernel")
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    for key in keys:
        group = [row for row in rows if tuple(row[name] for name in names) == key]
        lines.append([MODES[key[0]], *map(str, key[1:4]), backend_of(group[0]), *means(group)])
    columns = ("mode", "precision", "variant", "T", "backend", "geometric mean", "minimum", "rows")
    return table(lines, columns)


def write_report(path: Path, result: dict[str, Any]) -> None:
    """The whole report, beside the recorded run."""
    rows = result["rows"]
    parts = (
        [*header(result), f"Recorded as `{path.name}`."],
        summary(rows),
        table([cells(row) for row in rows], COLUMNS),
    )
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def plot(path: Path, result: dict[str, Any]) -> None:
    """The ratios as bars, beside the recorded run, where matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    rows = [row for row in result["rows"] if "error" not in row]
    if not rows:
        print("no plot: nothing was timed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(14, 2 + 0.13 * len(rows)), sharex=True, layout="constrained"
    )
    for axis, mode in zip(axes, MODES, strict=True):
        bars = [row for row in rows if row["mode"] == mode][::-1]
        names = ("precision", "variant", "steps", "batch", "hidden")
        labels = [", ".join([*(str(row[n]) for n in names), backend_of(row)]) for row in bars]
        ratios = [row["ratio"]["median"] for row in bars]
        axis.barh(labels, ratios, color=["C0" if ratio >= 1 else "C3" for ratio in ratios])
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set(title=MODES[mode], xlabel="time of the rival / time of fastlstm")
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{result['machine']['device']['name']}, {result['date'][:10]}")
    figure.savefig(path.with_suffix(".png"), dpi=120)
