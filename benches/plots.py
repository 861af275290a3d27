"""Plots of a recorded run, PNG files beside it: ratios, roofline, scaling, memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floors import Work, peak
from summary import Result, title

from fastlstm.cli.contest import MODES, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDES = {"ours": "fastlstm", "theirs": "nn.LSTM"}


def write(path: Path, result: Result) -> None:
    """All plots that the run has rows for, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    from matplotlib.figure import Figure  # no pyplot: saves through Agg, and needs no display

    for ending, (needs, draw) in PLOTS.items():
        rows = [r for r in result["rows"] if r["part"] in needs and "error" not in r]
        if rows:
            figure = Figure(figsize=(9, 6), layout="constrained")
            draw(figure, rows, result)
            model, date = result["hardware"]["cpu"], result["date"][:10]
            figure.suptitle(f"{model}, {date}", fontsize="small")
            figure.savefig(path.with_name(f"{path.stem}{ending}.png"), dpi=110)


def ratios(figure: Figure, rows: Sequence[Row], result: Result) -> None:
    """A bar for each shape, mode and number of threads, with its quartiles."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    counts = sorted({row["threads"] for row in rows})
    width = 0.8 / len(counts)
    figure.set_size_inches(9, 1.5 + 0.45 * len(shapes))
    axes = figure.subplots(1, len(MODES), sharey=True, squeeze=False)[0]
    for axis, mode in zip(axes, MODES, strict=True):
        for place, threads in enumerate(counts):
            of = {tuple(r["shape"]): r["ratio"] for r in rows if of_group(r, mode, threads)}
            known = [shape for shape in shapes if shape in of]
            axis.barh(
                [shapes.index(shape) + place * width for shape in known],
                [of[shape]["median"] for shape in known],
                width,
                xerr=[
                    [abs(of[shape][end] - of[shape]["median"]) for shape in known]
                    for end in ("q1", "q3")
                ],
                label=f"{threads} thread{'s' * (threads > 1)}",
            )
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set(title=MODES[mode], xlabel="time of nn.LSTM / time of fastlstm")
    middles = [k + width * (len(counts) - 1) / 2 for k in range(len(shapes))]
    axes[0].set_yticks(middles, [",".join(map(str, shape)) for shape in shapes])
    axes[0].set_ylabel("T,B,I,H")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)


def of_group(row: Row, mode: str, threads: int) -> bool:
    return row["mode"] == mode and row["threads"] == threads


def roofline(figure: Figure, rows: Sequence[Row], result: Result) -> None:
    """Rate against flops for each byte of weights that the steps read; one thread and all."""
    counts = sorted({row["threads"] for row in rows})
    for axis, threads in zip(
        figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True
    ):
        points = [r for r in rows if r["threads"] == threads and "work" in r]
        intensities = [intensity(row) for row in points]
        reach = (min(intensities) / 2, max(intensities) * 2)
        limits = result["limits"][str(threads)]
        for mode, mark in zip(MODES, "os", strict=True):
            for who, colour in zip(SIDES, ("C0", "C1"), strict=True):
                chosen = [r for r in points if r["mode"] == mode]
                x, y = [intensity(r) for r in chosen], [r["gflops"][who] for r in chosen]
                axis.plot(x, y, mark, color=colour, label=f"{SIDES[who]}, {MODES[mode]}")
        roofs = {"FMA": limits["fma_gflops"]["float32"]}
        unit, name = peak(limits, "float32")
        for text, rate in (roofs | {name: unit}).items():
            axis.axhline(rate, color="black", linewidth=1)
            axis.annotate(text, (reach[1], rate), ha="right", va="bottom", fontsize="small")
        for level, rate in limits["read_gbytes"].items():
            ends = [reach[0], max(unit, roofs["FMA"]) / rate]
            axis.plot(ends, [x * rate for x in ends], "--", color="grey", linewidth=1)
            axis.annotate(f"{level} {rate:.0f} GB/s", (ends[0], ends[0] * rate), fontsize="small")
        axis.set(xscale="log", yscale="log", xlim=reach, ylabel="GF/s")
        axis.set(xlabel="flops / bytes of weights read", title=f"threads: {threads}")
        axis.legend(fontsize="small", loc="lower right")


def intensity(row: Row) -> float:
    work = Work(**row["work"])
    return work.flops() / (work.dense_bytes + work.step_bytes)


def scaling(figure: Figure, rows: Sequence[Row], result: Result) -> None:
    """Rates over T, B and H, and what threads give."""
    axes = figure.subplots(2, 2).flat
    for place, letter in ((0, "T"), (1, "B"), (3, "H")):
        axis = next(axes)
        scaled = [row for row in rows if row["part"] == "scaling"]
        for row_group in along(scaled, place):
            for who, colour in zip(SIDES, ("C0", "C1"), strict=True):
                for mode, line in zip(MODES, ("-", "--"), strict=True):
                    chosen = [r for r in row_group if r["mode"] == mode]
                    x, y = [r["shape"][place] for r in chosen], [r["gflops"][who] for r in chosen]
                    axis.plot(
                        x,
                        y,
                        f"o{line}",
                        markersize=4,
                        color=colour,
                        label=f"{SIDES[who]}, {MODES[mode]}",
                    )
        axis.set(xlabel=letter, ylabel="GF/s, 1 thread")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize="small")
    speedups(next(axes), [row for row in rows if row["part"] == "threads"])


def along(rows: Sequence[Row], place: int) -> list[list[Row]]:
    """The rows that differ in one letter only (H and I together), in its order."""
    fixed = (1, 2, 3) if place == 0 else (0, 2, 3) if place == 1 else (0, 1)
    sets: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        sets.setdefault(tuple(row["shape"][k] for k in fixed), []).append(row)
    longest = max(sets.values(), key=len, default=[])
    return [sorted(longest, key=lambda row: row["shape"][place])]


def speedups(axis: Axes, rows: Sequence[Row]) -> None:
    """Times as fast as one thread."""
    for shape, mode in dict.fromkeys((tuple(row["shape"]), row["mode"]) for row in rows):
        chosen = [r for r in rows if (tuple(r["shape"]), r["mode"]) == (shape, mode)]
        label = f"{','.join(map(str, shape))} {MODES[mode]}"
        counts, gains = [1, *(r["threads"] for r in chosen)], [1.0, *map(gain, chosen)]
        axis.plot(counts, gains, ".-", label=label)
    most = max((row["threads"] for row in rows), default=1)
    axis.plot([1, most], [1, most], color="grey", linewidth=1)
    axis.set(xlabel="threads", ylabel="times as fast as 1 thread", xticks=range(1, most + 1))
    axis.legend(fontsize="x-small")


def gain(row: Row) -> float:
    return float(row["ratio"]["median"])


def memory(figure: Figure, rows: Sequence[Row], result: Result) -> None:
    """Peak bytes of both, beyond inputs, outputs and gradients."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for axis, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        labels = [",".join(map(str, row["shape"])) for row in chosen]
        for place, who in enumerate(SIDES):
            sizes = [max(row["peak_bytes"][who], 0) / 2**20 for row in chosen]
            axis.barh([k + 0.4 * place for k in range(len(chosen))], sizes, 0.4, label=SIDES[who])
        axis.set_yticks([k + 0.2 for k in range(len(chosen))], labels)
        axis.invert_yaxis()
        axis.set(title=MODES[mode], xlabel="MiB", xscale="log")
        axis.legend(fontsize="small")


def features(figure: Figure, rows: Sequence[Row], result: Result) -> None:
    """Ratios of what else the module does."""
    figure.set_size_inches(9, 1.5 + 0.2 * len(rows))
    axis = figure.subplots()
    labels = [f"{title(r)}, {MODES[r['mode']]}, {r['threads']} / {r['rival']}" for r in rows]
    places = range(len(rows))
    axis.barh(places, [row["ratio"]["median"] for row in rows])
    axis.set_yticks(places, labels, fontsize="small")
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time of the rival / time of fastlstm")


Draw = Callable[["Figure", Sequence[Row], dict[str, Any]], None]
# The ending of the file's name, the parts it is drawn from, and who draws it.
PLOTS: dict[str, tuple[tuple[str, ...], Draw]] = {
    "": (("speed",), ratios),
    "-features": (("features", "model"), features),
    "-roofline": (("speed",), roofline),
    "-scaling": (("scaling", "threads"), scaling),
    "-memory": (("memory",), memory),
}
