"""Rows of a measurement as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .contest import Row

# What ``measured`` gives for a row.
MEASURED = ("× nn.LSTM (quartiles)", "ms: ours / nn.LSTM", "GF/s: ours / nn.LSTM")


def measured(row: Row) -> list[str]:
    """The ratio, the times and the rates of a row, or why it was not timed."""
    if "error" in row:
        return [f"not timed: {row['error']}", "", ""]
    ratio, rate = row["ratio"], row["gflops"]
    return [
        f"**{ratio['median']:.2f}** ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
        f"{milliseconds(row['ours'])} / {milliseconds(row['theirs'])}",
        f"{rate['ours']:.3g} / {rate['theirs']:.3g}",
    ]


def milliseconds(quartiles: dict[str, float]) -> str:
    """The median, in three digits or all before the point."""
    value = quartiles["median"] * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def means(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and minimum of the ratios, and of how many rows."""
    ratios = [row["ratio"]["median"] for row in rows if "error" not in row]
    figures = (statistics.geometric_mean(ratios), min(ratios)) if ratios else ()
    return [*([f"{figure:.2f}" for figure in figures] or ["", ""]), f"{len(ratios)} of {len(rows)}"]


def table(lines: Sequence[Sequence[str]], columns: Sequence[str]) -> list[str]:
    """A Markdown table."""
    body = [columns, ["---"] * len(columns), *lines]
    return ["| " + " | ".join(line) + " |" for line in body]


def aligned(lines: Sequence[Sequence[str]], columns: Sequence[str]) -> list[str]:
    """The same for a terminal, without Markdown's marks."""
    body = [[cell.replace("**", "") for cell in line] for line in (columns, *lines)]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in body
    ]
