"""What two trainings side by side show: their losses and their speeds, printed and drawn."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure


class Trained(Protocol):
    """A model and what was recorded of its training, a number for each step."""

    name: str
    losses: list[float]  # nats per character
    seconds: list[float]


def report(stock: Trained, ours: Trained, characters: int) -> None:
    """Print the figures of a training run whose steps read ``characters`` each.

    Speeds are medians: a step that waited for another program would outweigh a hundred others.
    """
    gaps = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    slow, fast = (characters / statistics.median(x.seconds) for x in (stock, ours))
    ratios = sorted(a / b for a, b in zip(stock.seconds, ours.seconds, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]
    # Rounding differs between two correct programs, and training amplifies it step by step: the
    # early figure shows that both compute the same thing, the late one how far they drift.
    print(f"largest loss difference: {max(gaps):.3g} (first 50 steps: {max(gaps[:50]):.3g})")
    print(f"training characters/s:   {stock.name} {slow:,.0f}, {ours.name} {fast:,.0f}")
    print(f"speed ratio:             {statistics.median(ratios):.3f} "
          f"(median of paired steps, quartiles {low:.3f} to {high:.3f})")  # fmt: skip


def write_losses(stock: Trained, ours: Trained, first_step: int, path: Path) -> None:
    """Every step's losses, in nats per character."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("step", stock.name, ours.name))
        pairs = zip(stock.losses, ours.losses, strict=True)
        rows.writerows((first_step + k, *pair) for k, pair in enumerate(pairs))


def plot_losses(stock: Trained, ours: Trained, first_step: int, path: Path) -> None:
    """Both curves, and how far apart they are."""
    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: saves through Agg
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = range(first_step, first_step + len(stock.losses))
    for learner, style in ((stock, "-"), (ours, "--")):
        label = f"{learner.name}, {1000 * statistics.median(learner.seconds):.0f} ms a step"
        curves.plot(steps, [loss / math.log(2) for loss in learner.losses], style, label=label)
    curves.set_ylabel("training loss (bits per character)")
    curves.legend()
    pairs = zip(stock.losses, ours.losses, strict=True)
    apart = [abs(a - b) / math.log(2) or math.nan for a, b in pairs]  # no place for 0 on a log axis
    gap.semilogy(steps, apart, ".", markersize=3)
    gap.set(xlabel="step", ylabel="difference")
    figure.savefig(path, format="png")
