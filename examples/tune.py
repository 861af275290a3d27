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

import contextlib
import copy
import fcntl
import math
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import optuna
import sqlalchemy
import torch
from common import Parser, UserError, number
from optuna.trial import FrozenTrial, TrialState
from tasks import TASKS, Choice, Task
from torch import Tensor, nn
from tqdm import tqdm
from tune_plots import importances, plot_study, trials_of

import fastlstm

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


@contextlib.contextmanager
def one_at_a_time(args: Namespace) -> Iterator[None]:
    """Of several processes that start together the first makes the study, the others wait."""
    with open(f"{args.study}.lock", "w") as file:  # unlocked when it is closed, or by a kill
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_study(study: optuna.Study, task: Task, args: Namespace) -> dict[str, Any]:
    """The range test and the untuned model, done once and kept in the study."""
    if "prepared" not in study.user_attrs:
        curves = {name: range_test(task, name, args.seed) for name in OPTIMIZERS}
        untuned = train(task, UNTUNED, args.seed)
        prepared = {"curves": curves, "untuned": untuned._asdict(), "size": task.size}
        study.set_user_attr("prepared", prepared)
        # The first trial: the untuned model, but with a rate from the range test that decays.
        first = {name: value for name, value in UNTUNED.items() if name != "lr"}
        study.enqueue_trial({**first, "lr factor": 1.0, "schedule": "cosine"})
    prepared = study.user_attrs["prepared"]
    if prepared["size"] != task.size:  # its losses would be compared with others'
        raise UserError(f"--study {args.study} was made with --characters {prepared['size']}")
    return prepared


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended by themselves or were pruned."""
    return trials_of(study, TrialState.COMPLETE, TrialState.PRUNED)


def search(
    study: optuna.Study, task: Task, rates: dict[str, float], deadline: float, args: Namespace
) -> None:
    """Try until the time is over, or the study has ``--trials`` trials; ``rates`` are those that
    the range test suggests."""
    # No trial may take more than an eighth of the search, if it took all its epochs.
    longest = (deadline - time.monotonic()) / 8 / task.epochs
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
def seconds_of_a_trial(task: Task, choice: Choice, limit: float, seed: int) -> list[float]:
    """What all epochs of ``choice`` take with nn.LSTM and with fastlstm, measured for ``limit`` s.

    Both take steps on minibatches of the same size, in turns, so that both meet the same machine;
    the median time of a step times the steps of all epochs is that of a trial.
    """
    torch.manual_seed(seed)
    models = [task.model(choice)]
    models.append(copy.deepcopy(models[0]))
    fastlstm.replace_lstm_(models[1])
    optimizers = [OPTIMIZERS[choice["optimizer"]](m.parameters(), lr=1e-3) for m in models]
    batches = sum(1 for _ in task.losses(models[1], choice))

    def endless(model: nn.Module) -> Iterator[Tensor]:
        while True:
            yield from task.losses(model, choice)

    epochs = [endless(model) for model in models]
    seconds: list[list[float]] = [[], []]
    until = time.monotonic() + limit
    while time.monotonic() < until or len(seconds[0]) < 4:
        for which in (0, 1) if len(seconds[0]) % 2 else (1, 0):
            start = time.perf_counter()
            step(next(epochs[which]), models[which], optimizers[which])
            seconds[which].append(time.perf_counter() - start)
    # The first step is a warm-up.
    return [statistics.median(part[1:]) * batches * task.epochs for part in seconds]


# %% The program
def tune(task: Task, deadline: float, args: Namespace) -> None:
    """Search, compare with the untuned model and with nn.LSTM, report."""
    with one_at_a_time(args):
        study = open_study(task, args)
        before = len(finished(study))
        if before:
            print(f"{task.name}: going on with {before} trials of {args.study}")
        prepared = prepare_study(study, task, args)
    rates = {name: suggested_rate(*curve) for name, curve in prepared["curves"].items()}
    start = time.monotonic()
    left = deadline - start
    search(study, task, rates, start + 0.85 * left, args)
    seconds, done = time.monotonic() - start, finished(study)
    pruned = sum(trial.state == TrialState.PRUNED for trial in done)
    print(f"{task.name}: {len(done) - before} trials in {seconds:.0f} s; of all {len(done)}, "
          f"{pruned} were pruned")  # fmt: skip
    path = args.out / f"{task.name}.png"
    plot_study(study, prepared, rates, task.unit, path)
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
    print("  trials a minute that end neither early nor pruned, on one process:")
    for name, choice in zip(("untuned", "tuned"), choices, strict=False):
        took = seconds_of_a_trial(task, choice, min(0.05 * left, 8), args.seed)
        print(f"    {name:7}  nn.LSTM {60 / took[0]:.1f}, fastlstm {60 / took[1]:.1f}, "
              f"ratio {took[0] / took[1]:.2f}")  # fmt: skip
    print(f"  the picture is {path}, the study {args.study}")


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
