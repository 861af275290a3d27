"""The picture of a search: its course, and what mattered."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

# What is on the axes of the small panels, by the name of the hyperparameter.
LABELS = {
    "lr": "learning rate",
    "optimizer": "optimizer",
    "schedule": "decay schedule",
    "batch": "minibatch size",
    "hidden": "hidden units",
    "layers": "layers",
    "dropout": "dropout",
}
COLORS = {"SGD": "C0", "Adagrad": "C1", "Adam": "C2", "AdamW": "C3"}  # in every panel


def trials_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The study's trials in these states, oldest first."""
    return study.get_trials(deepcopy=False, states=states)


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of each hyperparameter in what tells good trials from the others; {} if too few.

    PED-ANOVA compares where the best quarter's values lie with where all do.
    """
    if len(trials_of(study, TrialState.COMPLETE)) < 8:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def plot_range_test(
    axes: Axes, curves: dict[str, tuple[list[float], ...]], suggested: dict[str, float]
) -> None:
    """A curve for each optimizer, and the rate that the search starts from."""
    for name, (rates, losses) in curves.items():
        axes.semilogx(rates, losses, color=COLORS[name], label=name)
        axes.axvline(suggested[name], color=COLORS[name], linestyle=":")
    axes.set(title="range test (dotted: suggested)", xlabel="learning rate", ylabel="training loss")
    axes.legend(fontsize=8)


def plot_course(axes: Axes, study: optuna.Study, unit: str) -> None:
    """Every trial in turn, and the best so far."""
    complete = trials_of(study, TrialState.COMPLETE)
    pruned = [t for t in trials_of(study, TrialState.PRUNED) if t.intermediate_values]
    last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
    numbers = [t.number for t in complete]
    best = list(itertools.accumulate((t.value for t in complete), min))
    axes.plot([t.number for t in pruned], last, "x", color="C7", label="pruned")
    axes.scatter(numbers, [t.value for t in complete], s=16, color=colors_of(complete))
    axes.step(numbers, best, where="post", color="black", linewidth=1, label="best so far")
    axes.set(title="search (dot: finished trial)", xlabel="trial")
    axes.set_ylabel(f"validation loss\n({unit})")


def colors_of(trials: list[FrozenTrial]) -> list[str]:
    """By optimizer."""
    return [COLORS[trial.params["optimizer"]] for trial in trials]


def plot_choices(axes: Axes, trials: list[FrozenTrial], name: str) -> None:
    """The loss of every finished trial over what was chosen for ``name``; the best is a star."""
    chosen = [trial.user_attrs["choice"][name] for trial in trials]
    values = [trial.value for trial in trials]
    if name in ("optimizer", "schedule", "batch", "layers"):  # few values: side by side, each
        # trial a little to the right of the one before, or they would hide each other
        kinds = sorted(set(chosen), key=list(COLORS).index if name == "optimizer" else None)
        axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        chosen = [kinds.index(c) - 0.3 + 0.6 * k / len(trials) for k, c in enumerate(chosen)]
    elif name == "lr":
        axes.set_xscale("log")
    axes.scatter(chosen, values, s=16, color=colors_of(trials))
    best = values.index(min(values))
    axes.plot(chosen[best], values[best], "*", color="black", markersize=10)
    axes.set_title(LABELS[name])


def plot_study(
    study: optuna.Study,
    prepared: dict[str, Any],
    suggested: dict[str, float],
    unit: str,
    path: Path,
) -> None:
    """The range test, the search, what was important, and a panel for each hyperparameter."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    panels = list(figure.subplots(2, 5).flat)
    plot_range_test(panels[0], prepared["curves"], suggested)
    plot_course(panels[1], study, unit)

    found = importances(study)
    panels[2].barh(list(found)[::-1], list(found.values())[::-1], color="C7")
    panels[2].set(title="importance (PED-ANOVA)" if found else "importance: too few trials")

    untuned, trials = prepared["untuned"]["loss"], trials_of(study, TrialState.COMPLETE)
    values = sorted(trial.value for trial in trials) or [untuned]
    low, most = values[0], values[len(values) * 3 // 4]
    for axes, name in zip(panels[3:], LABELS, strict=True):
        if trials:
            plot_choices(axes, trials, name)
    for axes in (panels[1], *panels[3:]):
        top = max(untuned, most) if axes is panels[1] else most  # the worst quarter is left out
        axes.axhline(untuned, color="black", linestyle="--", linewidth=1, label="untuned")
        axes.set_ylim(low - 0.1 * (top - low) - 1e-3, top + 0.15 * (top - low) + 1e-3)
    panels[1].legend(fontsize=8)
    for axes in (panels[3], panels[5]):
        axes.set_ylabel("validation loss")
    figure.savefig(path, dpi=70)
