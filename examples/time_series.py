"""Forecast a series of numbers, and say how sure the forecast is.

nn.RNN, nn.LSTM and fastlstm.LSTM learn the first part of a series; the last fifth, which nothing
is fitted or chosen on, is forecast.  They have to beat two forecasts that take no learning at all:
*persistence* (it stays as it is) and *seasonal* (as it was a season ago):

    python examples/time_series.py                        # sunspots since 1700, half a minute
    python examples/time_series.py --csv sales.csv --column units --season 12

It prints a table of errors and writes ``forecast.png`` to ``--out``.

Letters for shapes: N values in the series, T of them in a window (the past that a model sees), K
of them forecast (the horizon), B windows in a batch, M models in the ensemble, H hidden size.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import common
import torch
from common import Parser, UserError, number
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastlstm

Windows = tuple[Tensor, Tensor]  # the past (T, B, 1) and what came then (B, K)

FIRST_YEAR = 1700  # of the sunspots
KINDS = {"nn.RNN": nn.RNN, "nn.LSTM": nn.LSTM, "fastlstm.LSTM": fastlstm.LSTM}


# %% The series
def sunspots() -> Path:
    """Yearly sunspot numbers, 1700 to 2008, as statsmodels ships them."""
    found = importlib.util.find_spec("statsmodels")  # where it is; importing it takes seconds
    if found is None or found.origin is None:
        raise UserError("the sunspots come with statsmodels: pip install statsmodels, or use --csv")
    return Path(found.origin).parent / "datasets" / "sunspots" / "sunspots.csv"


def read_column(path: Path, column: str | None) -> Tensor:
    """One column of a CSV file with a header: (N,) float64."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or []
            if column not in names:
                asked = "--csv needs --column NAME" if column is None else f"no column {column!r}"
                shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
                raise UserError(f"{asked}: {path} has {shown or 'no header'}")
            if names.count(column) > 1:
                raise UserError(f"{path} has {names.count(column)} columns {column!r}")
            found = [(rows.line_num, row[column]) for row in rows]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    values = []
    for line, text in found:
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            what = f"{text!r}" if text else "nothing"
            raise UserError(f"{path} line {line}: column {column!r} has {what}, not a number")
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def find_season(series: Tensor) -> int:
    """The first lag where the autocorrelation has a peak as good as the highest; 1 without peaks.

    (Two seasons are a season too, and noise decides which is higher: within a tenth is as good.)
    """
    time_axis = torch.linspace(-1, 1, len(series), dtype=series.dtype)
    trend = torch.stack((torch.ones_like(time_axis), time_axis), 1)
    rest = series - trend @ torch.linalg.lstsq(trend, series[:, None]).solution[:, 0]
    if rest.abs().max() <= 1e-9 * series.abs().max():  # a straight line, but for rounding
        return 1
    most = max(len(series) // 8, 2)
    products = [(rest[lag:] * rest[: len(rest) - lag]).mean().item() for lag in range(most + 2)]
    peaks = [k for k in range(2, most + 1) if products[k - 1] < products[k] >= products[k + 1]]
    highest = max((products[k] for k in peaks), default=0.0)
    return next((k for k in peaks if products[k] >= 0.9 * highest > 0), 1)


class Parts(NamedTuple):
    """The series, scaled, and where it is cut."""

    scaled: Tensor  # (N,) float32, mean 0 and deviation 1 in the first part
    mean: float
    deviation: float
    rooted: bool  # counts vary more where they are larger; their square roots much less
    validation: int  # the first value that only stopping and the intervals' width are chosen on
    tail: int  # the first value that nothing is chosen on

    def unscaled(self, values: Tensor) -> Tensor:
        """Back to what the series is in."""
        values = values * self.deviation + self.mean
        return values.clamp_min(0).square() if self.rooted else values


def split(series: Tensor, window: int, horizon: int, transform: str = "auto") -> Parts:
    """Three fifths to learn from, one to stop by, one to be judged by."""
    count = len(series)
    validation, tail = count * 3 // 5, count * 4 // 5
    if validation < window + horizon + 10 or count - tail < horizon or tail - validation < horizon:
        raise UserError(
            f"{count} values are too few for a window of {window} and a horizon of {horizon}: "
            f"{max(math.ceil((window + horizon + 10) / 0.6), 5 * horizon) + 1} are enough"
        )
    negative = series.min().item() < 0
    if transform == "root" and negative:
        raise UserError(f"--transform root: the series goes down to {series.min().item():g}")
    rooted = transform == "root" or (transform == "auto" and not negative)
    series = series.sqrt() if rooted else series
    mean, deviation = series[:validation].mean().item(), series[:validation].std().item()
    if not 1e-9 * abs(mean) < deviation < math.inf:
        why = "are all the same" if deviation < math.inf else "are too large"
        raise UserError(f"the first {validation} values {why}")
    scaled = ((series - mean) / deviation).float()
    return Parts(scaled, mean, deviation, rooted, validation, tail)


def cut_windows(values: Tensor, first: int, end: int, window: int, horizon: int) -> Windows:
    """Every window whose forecast lies in ``first`` ... ``end`` - 1 of ``values`` (N,)."""
    origins = range(max(first, window), end - horizon + 1)  # of the first value to forecast
    past = torch.stack([values[k - window : k] for k in origins], 1)  # (T, B)
    future = torch.stack([values[k : k + horizon] for k in origins])  # (B, K)
    return past.unsqueeze(-1), future


# %% The model and how it learns
class Forecaster(nn.Module):
    """Reads a window, and says how much each of the next K values differs from the last one."""

    def __init__(self, recurrent: nn.Module, horizon: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(recurrent.hidden_size, horizon)

    def forward(self, past: Tensor) -> Tensor:
        """Forecasts (B, K) after windows (T, B, 1)."""
        rows, _ = self.recurrent(past)  # (T, B, H)
        return past[-1] + self.head(self.dropout(rows[-1]))


def fit(model: Forecaster, training: Windows, validation: Windows, args: Namespace) -> None:
    """Learn until the validation error has not become better for ``--patience`` epochs."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    best, since, kept = math.inf, 0, copy.deepcopy(model.state_dict())
    for _ in range(args.epochs):
        for places in torch.randperm(len(training[1])).split(args.batch):
            optimizer.zero_grad()
            forecast = model(training[0][:, places])
            nn.functional.mse_loss(forecast, training[1][places]).backward()
            optimizer.step()
        with torch.no_grad():
            error = nn.functional.mse_loss(model(validation[0]), validation[1]).item()
        if not math.isfinite(error):
            raise UserError("the error is no longer finite: try a smaller --lr")
        since += 1
        if error < best:
            best, since, kept = error, 0, copy.deepcopy(model.state_dict())
        if since > args.patience:
            break
    model.load_state_dict(kept)


# %% Forecasts, and how sure they are
@torch.no_grad()
def one_by_one(members: list[Forecaster], past: Tensor) -> Tensor:
    """Every model's forecasts: (M, B, K)."""
    return torch.stack([member(past) for member in members])


@torch.no_grad()
def all_at_once(members: list[Forecaster], past: Tensor) -> Tensor:
    """The same from one call: the models' weights, stacked, are a dimension to map over.

    ``nn.LSTM`` fails under ``torch.func.vmap``; ``fastlstm.LSTM`` does not.
    """
    parameters, buffers = torch.func.stack_module_state(members)

    def call(own_parameters: dict[str, Tensor], own_buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(members[0], (own_parameters, own_buffers), (past,))

    return torch.func.vmap(call)(parameters, buffers)


def interval(forecasts: Tensor, errors: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (B, K) that should hold ``share`` of what comes.

    The models of the ensemble (M, B, K) disagree about what they learned, and the series does not
    keep to what can be learned: to every forecast every error that the mean forecast made on the
    validation part (J, K) is added.  The bounds are quantiles of the M * J sums.
    """
    sums = (forecasts[:, None] + errors[None, :, None]).flatten(0, 1)  # (M * J, B, K)
    low, high = (1 - share) / 2, (1 + share) / 2
    return sums.quantile(low, 0), sums.quantile(high, 0)


def baselines(past: Tensor, season: int, horizon: int) -> dict[str, Tensor]:
    """Forecasts (B, K) that take no learning."""
    last = past[..., 0].T  # (B, T)
    places = torch.arange(horizon) % season - season  # the same place in the last season known
    return {
        "persistence": last[:, -1:].expand(-1, horizon),
        f"seasonal ({season})": last[:, places],
    }


def rmse(forecast: Tensor, future: Tensor) -> tuple[float, float]:
    """Root of the mean squared error of the next value, and of all K."""
    squares = (forecast - future).square()
    return squares[:, 0].mean().sqrt().item(), squares.mean().sqrt().item()


# %% The program
def train_ensemble(
    name: str, kind: type[nn.Module], training: Windows, validation: Windows, args: Namespace
) -> tuple[list[Forecaster], float]:
    """M models that differ in their first weights and the order of the batches; the seconds."""
    members, start = [], time.perf_counter()
    for k in tqdm(range(args.members), desc=name, unit="model"):
        torch.manual_seed(args.seed + k)
        members.append(Forecaster(kind(1, args.hidden), args.horizon))
        fit(members[-1], training, validation, args)
    return members, time.perf_counter() - start


def plot_forecast(
    parts: Parts, mean: Tensor, bounds: tuple[Tensor, Tensor], args: Namespace, path: Path
) -> None:
    """The tail, forecast K values at a time, each time from what was known before them."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    zero, unit = (FIRST_YEAR, "year") if args.csv is None else (0, "row of the file, from 0")
    values, mean, low, high = (parts.unscaled(t) for t in (parts.scaled, mean, *bounds))
    shown = max(0, parts.tail - 2 * (len(values) - parts.tail))
    known = range(zero + shown, zero + len(values))
    axes.plot(known, values[shown:], color="black", linewidth=1, label=args.column)
    for origin in range(0, len(mean), args.horizon):
        first = zero + parts.tail + origin
        places = range(first, first + args.horizon)
        last = {"label": "forecast"} if origin == 0 else {}
        band = {"label": f"{args.share:.0%} interval"} if origin == 0 else {}
        axes.plot(places, mean[origin], ".-", color="C0", **last)
        axes.fill_between(places, low[origin], high[origin], color="C0", alpha=0.25, **band)
        axes.axvline(first - 0.5, color="C7", linewidth=0.5, linestyle=":")
    axes.set(xlabel=unit, ylabel=args.column)
    axes.legend()
    figure.savefig(path, dpi=90)


def run(args: Namespace) -> None:
    """Read, train three ensembles, compare, draw."""
    common.start(args)
    if args.csv is None:
        args.column = args.column or "SUNACTIVITY"
    series = read_column(args.csv or sunspots(), args.column)
    if len(series) < 20:
        raise UserError(f"{len(series)} values are too few: 20 are the least")
    args.season = args.season or find_season(series[: len(series) * 3 // 5])
    args.horizon = args.horizon or max(args.season, 2)
    args.window = args.window or max(3 * args.season, 8)
    if args.season > args.window:
        raise UserError(f"--window {args.window} holds less than a season of {args.season}")
    parts = split(series, args.window, args.horizon, args.transform)
    common.prepare(args.out / "forecast.png")
    print(
        f"{len(series)} values, season {args.season}; a window of {args.window} values, the next "
        f"{args.horizon} are forecast; judged by the last {len(series) - parts.tail}"
    )
    cut = (args.window, args.horizon)
    training = cut_windows(parts.scaled, 0, parts.validation, *cut)
    validation = cut_windows(parts.scaled, parts.validation, parts.tail, *cut)
    past, future = cut_windows(parts.scaled, parts.tail, len(series), *cut)
    table = [(*found, "") for found in baselines(past, args.season, args.horizon).items()]
    for name, kind in KINDS.items():
        members, seconds = train_ensemble(name, kind, training, validation, args)
        table.append((name, one_by_one(members, past).mean(0), f"{seconds:10.1f} s"))
    forecasts = all_at_once(members, past)  # (M, B, K), of the last: fastlstm's
    errors = validation[1] - all_at_once(members, validation[0]).mean(0)
    low, high = interval(forecasts, errors, args.share)

    print(f"{'RMSE on the tail':20}{'next value':>12}{f'next {args.horizon}':>12}    training")
    for name, forecast, seconds in table:
        first, every = rmse(parts.unscaled(forecast), parts.unscaled(future))
        print(f"{name:20}{first:12.4g}{every:12.4g}  {seconds}".rstrip())
    held = ((future >= low) & (future <= high)).float().mean().item()
    print(f"{args.share:.0%} intervals held {held:.0%} of the tail's values")
    path = args.out / "forecast.png"
    plot_forecast(parts, forecasts.mean(0), (low, high), args, path)
    print(f"the picture is {path}")


def make_parser() -> Parser:
    """Every option and its default."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add, count = parser.add_argument, number(int, 1, 10**6)
    add("--csv", type=Path, metavar="FILE", help="with a header (default: yearly sunspots)")
    add("--column", metavar="NAME", help="the column of --csv to forecast")
    add("--season", type=count, help="its length (default: the autocorrelation's peak)")
    add(
        "--transform",
        choices=("auto", "root", "none"),
        default="auto",
        help="take square roots first (auto: if nothing is negative)",
    )
    add("--window", type=count, help="values that a model sees (default: three seasons)")
    add("--horizon", type=count, help="values to forecast (default: one season)")
    add("--hidden", type=number(int, 1, 4096), default=32, help="units (default 32)")
    add("--members", type=number(int, 1, 1000), default=5, help="of the ensemble (default 5)")
    add("--epochs", type=count, default=150, help="at the most (default 150)")
    add("--patience", type=count, default=20, help="epochs without a better error (default 20)")
    add("--batch", type=count, default=32, help="windows in a batch (default 32)")
    add("--lr", type=number(float, 1e-9, 1e3), default=3e-3, help="for Adam (default 0.003)")
    add("--share", type=number(float, 0.01, 0.99), default=0.8, help="of an interval (0.8)")
    common.add_common_options(parser, "out/time_series")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line's program."""
    common.run_example(run, make_parser(), argv)


if __name__ == "__main__":
    main()
