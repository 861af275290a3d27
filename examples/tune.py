"""Tune the character model and the sunspot forecaster: every hyperparameter that matters.

For each task: a learning rate range test, then a search over optimizer, learning rate, decay
schedule, minibatch size, hidden units, layers and dropout, with the epochs chosen by early
stopping.  The search is Optuna's: bad trials are pruned, the study is an SQLite file that a
killed search goes on with and that several processes may share:

    python examples/tune.py                                    # both tasks, under 5 minutes
    python examples/tune.py --task series --minutes 2 &        # two processes, one study
    python examples/tune.py --task series --minutes 2 --seed 1

The untuned model has the same budget, a number of epochs, and the same early stopping.  It prints
what was found, how it does on data that no choice was made on, and how many trials a minute
nn.LSTM and fastlstm do; ``char.png`` and ``series.png`` in ``--out`` show what mattered.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import char_rnn
import common
import optuna
import sqlalchemy
import time_series
import torch
from common import Parser, UserError, number
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastlstm

Choice = dict[str, Any]  # a value for each hyperparameter

# What one would write down without thinking: Adam at its default rate, nothing else.
UNTUNED = {
    "optimizer": "Adam",
    "lr": 1e-3,
    "schedule": "none",
    "batch": 32,
    "hidden": 64,
    "layers": 1,
    "dropout": 0.0,
}
OPTIMIZERS = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
SCHEDULES = ("none", "step", "cosine", "plateau")


# %% What is tuned
class Task(Protocol):
    """Something to learn, and the budget that every trial has for it."""

    name: str
    unit: str  # of the validation loss
    epochs: int  # the most
    patience: int  # epochs without a better validation loss before a trial stops

    def model(self, choice: Choice) -> nn.Module:
        """A new model around nn.LSTM."""

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        """One epoch: the loss of each minibatch in turn."""

    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        """The loss on the part that choices are made on, or on the one that none is made on."""


class CharTask:
    """The character model on a part of CPython's help topics; loss in bits per character."""

    name, unit, epochs, patience, steps = "char", "bits per character", 6, 2, 64

    def __init__(self, size: int) -> None:
        text = char_rnn.python_topics()[:size]
        self.vocabulary = "".join(sorted(set(text)))
        ids = char_rnn.encode(text, self.vocabulary, "the text")
        self.training = ids[: size * 8 // 10]
        parts = (ids[size * 8 // 10 : size * 9 // 10], ids[size * 9 // 10 :])
        self.judged = [char_rnn.cut_into_streams(part, 16) for part in parts]

    def model(self, choice: Choice) -> nn.Module:
        shape = {"embedding": 32, "hidden": choice["hidden"], "layers": choice["layers"]}
        return char_rnn.CharModel(len(self.vocabulary), shape, choice["dropout"])

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        streams, state = char_rnn.cut_into_streams(self.training, choice["batch"]), None
        batches = char_rnn.windows(*streams, self.steps)
        for _, (x, y, _) in zip(range(len(streams[0]) // self.steps), batches, strict=False):
            logits, state = model(x, state)
            state = (state[0].detach(), state[1].detach())
            yield F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        return char_rnn.bits_per_character(model, self.judged[held_out], 128)


class SeriesTask:
    """The forecaster on the yearly sunspots; loss in squared deviations of the series."""

    name, unit, epochs, patience = "series", "mean squared error, scaled", 80, 15

    def __init__(self, _: int) -> None:
        series = time_series.read_column(time_series.sunspots(), "SUNACTIVITY")
        self.horizon, cut = 11, (33, 11)
        parts = time_series.split(series, *cut)
        self.training = time_series.cut_windows(parts.scaled, 0, parts.validation, *cut)
        self.judged = [
            time_series.cut_windows(parts.scaled, first, end, *cut)
            for first, end in ((parts.validation, parts.tail), (parts.tail, len(series)))
        ]

    def model(self, choice: Choice) -> nn.Module:
        between_layers = choice["dropout"] if choice["layers"] > 1 else 0.0
        lstm = nn.LSTM(1, choice["hidden"], choice["layers"], dropout=between_layers)
        return time_series.Forecaster(lstm, self.horizon, choice["dropout"])

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        past, future = self.training
        for places in torch.randperm(len(future)).split(choice["batch"]):
            yield F.mse_loss(model(past[:, places]), future[places])

    @torch.no_grad()
    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        past, future = self.judged[held_out]
        model.eval()
        loss = F.mse_loss(model(past), future).item()
        model.train()
        return loss


TASKS = {"char": CharTask, "series": SeriesTask}


# %% One trial
class Outcome(NamedTuple):
    """What came of one training."""

    loss: float  # the best validation loss
    held_out: float  # of the same weights
    epochs: int  # until then
    seconds: float  # of an epoch


def schedule_of(choice: Choice, optimizer: torch.optim.Optimizer, epochs: int) -> Any:
    """What changes the learning rate after each epoch."""
    schedulers = torch.optim.lr_scheduler
    return {
        "none": lambda: schedulers.ConstantLR(optimizer, 1.0),
        "step": lambda: schedulers.StepLR(optimizer, max(1, epochs // 3), gamma=0.3),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, epochs),
        "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer, factor=0.3, patience=1),
    }[choice["schedule"]]()


def step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Learn from one minibatch."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(
    task: Task,
    choice: Choice,
    seed: int,
    after_epoch: Callable[[int, float, float], None] = lambda *_: None,
    deadline: float = math.inf,
) -> Outcome:
    """Train with fastlstm until the epochs are over or nothing gets better.

    ``after_epoch(epoch, validation loss, seconds an epoch)`` may raise to end it; beyond
    ``deadline``, in ``time.monotonic()``'s seconds, it is pruned.
    """
    torch.manual_seed(seed)
    model = task.model(choice)
    fastlstm.replace_lstm_(model)
    optimizer = OPTIMIZERS[choice["optimizer"]](model.parameters(), lr=choice["lr"])
    schedule = schedule_of(choice, optimizer, task.epochs)
    best, best_epoch, kept, start = math.inf, 0, model.state_dict(), time.monotonic()
    for epoch in range(1, task.epochs + 1):
        for loss in task.losses(model, choice):
            step(loss, model, optimizer)
            if time.monotonic() > deadline:
                raise optuna.TrialPruned("out of time")
        found = task.judge(model)
        if not math.isfinite(found):
            raise optuna.TrialPruned("diverged")
        if found < best:
            best, best_epoch, kept = found, epoch, copy.deepcopy(model.state_dict())
        after_epoch(epoch, found, (time.monotonic() - start) / epoch)
        schedule.step(*([found] if choice["schedule"] == "plateau" else []))
        if epoch - best_epoch >= task.patience:
            break
    seconds = (time.monotonic() - start) / epoch
    model.load_state_dict(kept)
    return Outcome(best, task.judge(model, held_out=True), best_epoch, seconds)


# %% The learning rate range test
def range_test(task: Task, name: str, seed: int, steps: int = 60) -> tuple[list[float], ...]:
    """Train while the learning rate grows from 1e-5 to 10: rates, and smoothed losses."""
    torch.manual_seed(seed)
    model = task.model(UNTUNED)
    fastlstm.replace_lstm_(model)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-5)
    rates, losses = [], []

    def minibatches() -> Iterator[Tensor]:
        while True:
            yield from task.losses(model, UNTUNED)

    for k, loss in zip(range(steps), minibatches(), strict=False):
        smoothed = 0.7 * losses[-1] + 0.3 * loss.item() if losses else loss.item()
        if not smoothed < 2 * min(losses, default=math.inf):  # it has diverged
            break
        for group in optimizer.param_groups:
            group["lr"] = 10 ** (-5 + 6 * k / (steps - 1))
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(smoothed)
        step(loss, model, optimizer)
    return rates, losses


def suggested_rate(rates: list[float], losses: list[float]) -> float:
    """A tenth of the rate at which the loss was lowest: beyond that it no longer fell."""
    return rates[losses.index(min(losses))] / 10


# %% The search
def choose(trial: optuna.Trial, rates: dict[str, float]) -> Choice:
    """Values for a trial; the learning rate is relative to what the range test suggests."""
    optimizer = trial.suggest_categorical("optimizer", list(OPTIMIZERS))
    return {
        "optimizer": optimizer,
        "lr": rates[optimizer] * trial.suggest_float("lr factor", 0.03, 3.0, log=True),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
        "batch": trial.suggest_categorical("batch", [8, 16, 32, 64]),
        "hidden": trial.suggest_int("hidden", 16, 128, log=True),
        "layers": trial.suggest_int("layers", 1, 4),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }


def open_study(task: Task, args: Namespace) -> optuna.Study:
    """The study of this name in the file, which may be there and in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A process that is killed stops its heartbeat; the next one then writes its trial off.
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{args.study}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=5,
            grace_period=15,
        )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=task.epochs // 6)
    study = optuna.create_study(
        storage=storage, pruner=pruner, study_name=task.name, load_if_exists=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=8,
            multivariate=True,  # hyperparameters depend on each other
            constant_liar=True,  # other processes' unfinished trials count as bad ones
            seed=args.seed + len(study.trials),  # a resumed search does not repeat itself
        )
    return study


def prepare_study(study: optuna.Study, task: Task, args: Namespace) -> dict[str, Any]:
    """The range test and the untuned model, done once and kept in the study."""
    if "prepared" not in study.user_attrs:
        curves = {name: range_test(task, name, args.seed) for name in OPTIMIZERS}
        untuned = train(task, UNTUNED, args.seed)
        prepared = {"curves": curves, "untuned": untuned._asdict()}
        study.set_user_attr("prepared", prepared)
    return study.user_attrs["prepared"]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended by themselves or were pruned."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def search(
    study: optuna.Study, task: Task, prepared: dict[str, Any], deadline: float, args: Namespace
) -> None:
    """Try until the time is over, or the study has ``--trials`` trials."""
    rates = {name: suggested_rate(*curve) for name, curve in prepared["curves"].items()}
    # No trial may take more than an eighth of the search, if it took all its epochs.
    longest = (deadline - time.monotonic()) / 8 / task.epochs
    if not study.trials:  # first the untuned model, but with a rate from the range test that decays
        first = {name: value for name, value in UNTUNED.items() if name != "lr"}
        study.enqueue_trial({**first, "lr factor": 1.0, "schedule": "cosine"})
    bar = tqdm(desc=f"tuning {task.name}", unit="trial", initial=len(finished(study)))

    def objective(trial: optuna.Trial) -> float:
        choice = choose(trial, rates)

        def after_epoch(epoch: int, loss: float, seconds: float) -> None:
            trial.report(loss, epoch)
            if seconds > longest or trial.should_prune():
                raise optuna.TrialPruned

        outcome = train(task, choice, args.seed, after_epoch, deadline)
        trial.set_user_attr("choice", choice)
        trial.set_user_attr("outcome", outcome._asdict())
        return outcome.loss

    def after_trial(study: optuna.Study, _: FrozenTrial) -> None:
        bar.update(len(finished(study)) - bar.n)
        if time.monotonic() > deadline or (args.trials and bar.n >= args.trials):
            study.stop()

    if not (args.trials and bar.n >= args.trials):
        study.optimize(objective, callbacks=[after_trial])
    bar.close()


# %% nn.LSTM against fastlstm
def trials_per_minute(task: Task, choices: list[Choice], seconds: float, seed: int) -> list[float]:
    """How many full trainings a minute has room for, with nn.LSTM and with fastlstm.

    For each choice both take steps on minibatches of the same size, in turns, so that both meet
    the same machine; the time of a step times the steps of all epochs is that of a training.
    """
    needed = [0.0, 0.0]
    for choice in choices:
        torch.manual_seed(seed)
        models = [task.model(choice)]
        models.append(copy.deepcopy(models[0]))
        fastlstm.replace_lstm_(models[1])
        optimizers = [OPTIMIZERS[choice["optimizer"]](m.parameters(), lr=1e-3) for m in models]
        batches = sum(1 for _ in task.losses(models[1], choice))
        epochs = [itertools.chain.from_iterable(task.losses(model, choice)
                  for _ in itertools.count()) for model in models]  # fmt: skip
        until, count, spent = time.monotonic() + seconds / len(choices), 0, [0.0, 0.0]
        while time.monotonic() < until or count < 4:
            for which in (0, 1) if count % 2 else (1, 0):
                start = time.perf_counter()
                step(next(epochs[which]), models[which], optimizers[which])
                if count:  # the first is a warm-up
                    spent[which] += time.perf_counter() - start
            count += 1
        for which in (0, 1):
            needed[which] += spent[which] / (count - 1) * batches * task.epochs
    return [60 * len(choices) / total for total in needed]


# %% What mattered
def importances(study: optuna.Study) -> dict[str, float]:
    """The share of each hyperparameter in what tells good trials from the others; {} if too few.

    PED-ANOVA compares where the best trials' values lie with where all do.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 8:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def plot_study(study: optuna.Study, task: Task, prepared: dict[str, Any], path: Path) -> None:
    """Six views of the search."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    rate, history, shares, lr, size, batch = figure.subplots(2, 3).flat
    colors = dict(zip(OPTIMIZERS, ("C0", "C1", "C2", "C3"), strict=True))
    for name, (rates, losses) in prepared["curves"].items():
        rate.semilogx(rates, losses, color=colors[name], label=name)
        rate.axvline(suggested_rate(rates, losses), color=colors[name], linestyle=":")
    rate.set(title="range test (dotted: suggested)", xlabel="learning rate", ylabel="training loss")
    rate.legend(fontsize=8)

    untuned = prepared["untuned"]["loss"]
    done = finished(study)
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    pruned = [t for t in done if t.state == TrialState.PRUNED and t.intermediate_values]
    last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
    history.plot([t.number for t in pruned], last, "x", color="C7", label="pruned")
    history.plot([t.number for t in complete], [t.value for t in complete], "o", label="trial")
    best = list(itertools.accumulate((t.value for t in complete), min))
    history.step([t.number for t in complete], best, where="post", color="C3", label="best so far")
    history.set(title="search", xlabel="trial", ylabel=f"validation loss\n({task.unit})")

    found = importances(study)
    shares.barh(list(found)[::-1], list(found.values())[::-1])
    shares.set(title="importance (PED-ANOVA)" if found else "importance: too few finished trials")

    params = [trial.params for trial in complete]
    values = [trial.value for trial in complete]
    point_colors = [colors[p["optimizer"]] for p in params]
    lr.scatter([t.user_attrs["choice"]["lr"] for t in complete], values, color=point_colors)
    lr.set(title="learning rate (color: optimizer)", xscale="log")
    size.scatter([p["hidden"] for p in params], values, c=[f"C{p['layers'] - 1}" for p in params])
    size.set(title="hidden units (color: layers, blue 1 to red 4)")
    for kind, shift in zip(SCHEDULES, (0.85, 0.95, 1.05, 1.15), strict=True):
        chosen = [t for t in complete if t.params["schedule"] == kind]
        places = [t.params["batch"] * shift for t in chosen]
        batch.plot(places, [t.value for t in chosen], "o", label=kind)
    batch.set(title="minibatch size", xscale="log", xticks=[8, 16, 32, 64])
    batch.set_xticklabels(["8", "16", "32", "64"])
    batch.minorticks_off()
    batch.legend(fontsize=8, title="schedule")
    top = max([untuned, *sorted(values)[: max(1, len(values) * 3 // 4)]])
    low = min([untuned, *values])
    for axes in (history, lr, size, batch):
        axes.axhline(untuned, color="black", linestyle="--", label="untuned")
        axes.set_ylim(low - 0.1 * (top - low) - 1e-3, top + 0.3 * (top - low) + 1e-3)
    history.legend(fontsize=8)
    figure.savefig(path, dpi=70)


# %% The program
def tune(task: Task, deadline: float, args: Namespace) -> None:
    """Search, compare with the untuned model and with nn.LSTM, report."""
    study = open_study(task, args)
    before = len(finished(study))
    if before:
        print(f"{task.name}: going on with {before} trials of {args.study}")
    prepared = prepare_study(study, task, args)
    left = deadline - time.monotonic()
    start = time.monotonic()
    search(study, task, prepared, start + 0.85 * left, args)
    seconds, done = time.monotonic() - start, finished(study)
    pruned = sum(trial.state == TrialState.PRUNED for trial in done)
    print(f"{task.name}: {len(done) - before} trials in {seconds:.0f} s; of all {len(done)}, "
          f"{pruned} were pruned")  # fmt: skip
    plot_study(study, task, prepared, args.out / f"{task.name}.png")
    untuned, choices = prepared["untuned"], [UNTUNED]
    print(f"  validation loss ({task.unit}), and that on data held out from every choice:")
    print(f"    untuned  {untuned['loss']:.4f}  {untuned['held_out']:.4f}  {words(UNTUNED)}")
    if len(done) > pruned:
        choice, best = (study.best_trial.user_attrs[name] for name in ("choice", "outcome"))
        choices.append(choice)
        print(f"    tuned    {best['loss']:.4f}  {best['held_out']:.4f}  {words(choice)}, "
              f"{best['epochs']} epochs")  # fmt: skip
    shares = ", ".join(f"{name} {share:.0%}" for name, share in importances(study).items())
    print(f"  what mattered: {shares or 'too few trials to say'}")
    rates = trials_per_minute(task, choices, min(0.1 * left, 15), args.seed)
    print(f"  full trainings a minute (untuned and best, in turns): nn.LSTM {rates[0]:.1f}, "
          f"fastlstm {rates[1]:.1f}, ratio {rates[1] / rates[0]:.2f}")  # fmt: skip


def words(choice: Choice) -> str:
    """A choice in one line."""
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in choice.items())  # fmt: skip


def run(args: Namespace) -> None:
    """Each task with its share of the time."""
    end = time.monotonic() + 60 * args.minutes
    common.start(args)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.study = args.study or args.out / "study.db"
    names = list(TASKS) if args.task == "both" else [args.task]
    common.prepare(args.study, *(args.out / f"{name}.png" for name in names))
    try:
        for count, name in enumerate(names):
            now = time.monotonic()
            tune(TASKS[name](args.characters), now + (end - now) / (len(names) - count), args)
    except sqlalchemy.exc.DatabaseError as error:
        raise UserError(f"--study {args.study}: {error.orig}") from None


def make_parser() -> Parser:
    """Every option and its default."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--task", choices=(*TASKS, "both"), default="both", help="what to tune (default both)")
    add("--minutes", type=number(float, 0.01, 1e5), default=4.0, help="in all (default 4)")
    add("--trials", type=number(int, 0, 10**6), default=0, help="end at so many (0: by time alone)")
    add("--study", type=Path, metavar="FILE", help="SQLite file (default: study.db in --out)")
    size = number(int, 20_000, 10**6)
    add("--characters", type=size, default=100_000, help="of text (default 100000)")
    # Small models gain little by a second thread; another process does.
    common.add_common_options(parser, "out/tune", threads=1)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line's program."""
    common.run_example(run, make_parser(), argv)


if __name__ == "__main__":
    main()
