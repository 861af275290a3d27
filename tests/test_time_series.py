"""examples/time_series.py at a small size: what it beats, its intervals, and every bad input."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import time_series
import torch
from test_char_rnn import check_error, png_size, same_threads_afterwards  # noqa: F401
from torch import nn

import fastlstm

SMALL = ["--threads", "1", "--members", "2", "--hidden", "16", "--epochs", "60"]


def rows(stdout: str) -> dict[str, tuple[float, float]]:
    """RMSE of the next value and of all, by the names in the table."""
    found = re.findall(r"^(\S.*?)  +([\d.e+]+) +([\d.e+]+)(?: +[\d.]+ s)?$", stdout, re.MULTILINE)
    return {name: (float(first), float(every)) for name, first, every in found}


def test_the_sunspots_are_forecast_better_than_by_persistence(tmp_path, capfd):
    time_series.main([*SMALL, "--out", str(tmp_path)])
    stdout = capfd.readouterr().out
    assert "309 values, season 11;" in stdout
    found = rows(stdout)
    learned = ["nn.RNN", "nn.LSTM", "fastlstm.LSTM"]
    assert list(found) == ["persistence", "seasonal (11)", *learned]
    for name in learned:
        assert found[name][0] < 0.85 * found["persistence"][0]
        assert found[name][0] < 0.85 * found["seasonal (11)"][0]
        assert found[name][1] < 0.85 * found["persistence"][1]
    assert found["nn.LSTM"] == pytest.approx(found["fastlstm.LSTM"], rel=0.05)
    held = int(re.search(r"80% intervals held (\d+)% of", stdout)[1])
    assert 40 <= held <= 97
    data = (tmp_path / "forecast.png").read_bytes()
    assert min(png_size(data)) >= 400
    assert len(data) < 150_000


def wave(count: int, season: int) -> torch.Tensor:
    """A season and some noise."""
    steps = torch.arange(count, dtype=torch.float64)
    return (2 * math.pi * steps / season).sin() + 0.1 * torch.randn(count).double()


def test_a_series_of_the_users_own(tmp_path, capfd):
    values = [f"{value:.4f}" for value in wave(200, 7).tolist()]
    lines = ["day,units", *(f"{k},{value}" for k, value in enumerate(values))]
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    options = ["--csv", str(tmp_path / "own.csv"), "--column", "units", "--horizon", "5"]
    time_series.main([*SMALL, *options, "--out", str(tmp_path)])
    stdout = capfd.readouterr().out
    assert "200 values, season 7; a window of 21 values, the next 5" in stdout
    found = rows(stdout)
    assert found["fastlstm.LSTM"][1] < found["persistence"][1] / 2
    assert found["seasonal (7)"][1] < 0.25  # two noises of 0.1


def test_windows_never_see_what_they_forecast():
    values = torch.arange(30.0)
    past, future = time_series.cut_windows(values, 10, 20, 4, 3)
    assert past.shape == (4, 8, 1)
    assert future.shape == (8, 3)
    assert torch.equal(past[-1, :, 0] + 1, future[:, 0])  # it goes on where the window ends
    assert future.min() == 10
    assert future.max() == 19
    past, future = time_series.cut_windows(values, 0, 10, 4, 3)
    assert past.min() == 0
    assert future.max() == 9


def test_the_split_is_in_time_and_the_scale_is_the_first_parts():
    series = wave(100, 10)
    series[60:] += 100
    parts = time_series.split(series, 10, 5, "none")
    assert (parts.validation, parts.tail) == (60, 80)
    assert parts.scaled[:60].mean().abs() < 1e-5
    assert parts.scaled[60:].min() > 50
    torch.testing.assert_close(parts.unscaled(parts.scaled).double(), series, atol=1e-3, rtol=1e-5)
    counts = series.abs() * 3
    rooted = time_series.split(counts, 10, 5)
    assert rooted.rooted
    torch.testing.assert_close(
        rooted.unscaled(rooted.scaled).double(), counts, atol=1e-2, rtol=1e-4
    )


def test_baselines_and_seasons():
    past = torch.arange(12.0).reshape(6, 2, 1)  # two windows: the even numbers and the odd ones
    found = time_series.baselines(past, 3, 5)
    assert found["persistence"].tolist() == [[10] * 5, [11] * 5]
    assert found["seasonal (3)"].tolist() == [[6, 8, 10, 6, 8], [7, 9, 11, 7, 9]]
    torch.manual_seed(0)
    assert time_series.find_season(wave(200, 9) + torch.arange(200) / 10) == 9
    for line in (torch.arange(50).double(), 0.3 * torch.arange(60).double() - 7, torch.zeros(50)):
        assert time_series.find_season(line.double()) == 1


def test_the_ensemble_at_once_is_its_models_one_by_one():
    torch.manual_seed(0)
    members = [time_series.Forecaster(fastlstm.LSTM(1, 6), 3) for _ in range(3)]
    past = torch.randn(8, 5, 1)
    expected = time_series.one_by_one(members, past)
    torch.testing.assert_close(time_series.all_at_once(members, past), expected)
    assert not torch.allclose(expected[0], expected[1])


def test_intervals_hold_what_they_say():
    torch.manual_seed(0)
    errors, forecasts = torch.randn(2000, 3), torch.zeros(4, 1, 3)
    low, high = time_series.interval(forecasts, errors, 0.8)
    assert low.shape == high.shape == (1, 3)
    torch.testing.assert_close(high, torch.full((1, 3), 1.2816), atol=0.1, rtol=0)
    fresh = torch.randn(5000, 3)
    assert ((fresh > low) & (fresh < high)).float().mean() == pytest.approx(0.8, abs=0.03)


def test_stopping_keeps_the_best_epoch():
    torch.manual_seed(0)
    args = time_series.make_parser().parse_args([*SMALL, "--patience", "3", "--lr", "0.02"])
    parts = time_series.split(wave(200, 7), 21, 7, "none")
    training = time_series.cut_windows(parts.scaled, 0, 120, 21, 7)
    validation = time_series.cut_windows(parts.scaled, 120, 160, 21, 7)
    model = time_series.Forecaster(fastlstm.LSTM(1, 16), 7)
    losses = []
    forward = model.forward

    def watched(past):
        found = forward(past)
        if not torch.is_grad_enabled():
            losses.append(nn.functional.mse_loss(found, validation[1]).item())
        return found

    model.forward = watched
    time_series.fit(model, training, validation, args)
    with torch.no_grad():
        kept = nn.functional.mse_loss(forward(validation[0]), validation[1]).item()
    assert kept == pytest.approx(min(losses))
    assert kept < losses[0] / 2


BAD = {
    "--csv missing.csv --column a": "No such file.*missing.csv",
    "--csv . --column a": "directory",
    "--csv good.csv": "--csv needs --column NAME: good.csv has 'day', 'units'",
    "--csv good.csv --column sales": "no column 'sales': good.csv has 'day', 'units'",
    "--csv twice.csv --column units": "twice.csv has 2 columns 'units'",
    "--csv wide.csv --column units": r"no column 'units': wide.csv has 'c0', .*'c9', \.\.\.$",
    "--csv binary.csv --column units": "binary.csv",
    "--csv empty.csv --column a": "empty.csv has no header",
    "--csv words.csv --column units": "words.csv line 4: column 'units' has 'many', not a number",
    "--csv gap.csv --column units": "gap.csv line 3: column 'units' has nothing, not a number",
    "--csv nan.csv --column units": "nan.csv line 3: column 'units' has 'nan', not a number",
    "--csv ragged.csv --column units": "ragged.csv line 3: column 'units' has nothing",
    "--csv short.csv --column units": "12 values are too few: 20",
    "--csv good.csv --column units --horizon 50": "200 values are too few for a window of",
    "--csv good.csv --column units --window 150": "too few for a window of 150",
    "--csv good.csv --column units --season 9 --window 8": "--window 8 holds less than a season",
    "--csv constant.csv --column units": "the first 120 values are all the same",
    "--csv negative.csv --column units --transform root": "goes down to -1",
    "--csv latin1.csv --column units": "latin1.csv is not UTF-8 text",
    "--lr 0": "--lr: must be",
    "--members 0": "--members: must be",
    "--share 1": "--share: must be",
    "--transform log": "--transform: invalid choice",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The files that BAD names."""
    folder = tmp_path_factory.mktemp("series")
    good = [f"{k},{k * k % 13}" for k in range(200)]
    contents = {
        "good": good,
        "words": [*good[:2], "3,many"],
        "gap": [good[0], "1,", *good],
        "nan": [good[0], "1,nan"],
        "ragged": [good[0], "1"],
        "short": good[:12],
        "constant": [f"{k},5" for k in range(200)],
        "negative": [f"{k},{-(k % 2)}" for k in range(200)],
    }
    for name, lines in contents.items():
        (folder / f"{name}.csv").write_text("\n".join(["day,units", *lines]))
    (folder / "twice.csv").write_text("units,units\n1,2\n")
    (folder / "wide.csv").write_text(",".join(f"c{k}" for k in range(500)) + "\n")
    (folder / "binary.csv").write_bytes(bytes(range(128)) * 10)
    (folder / "empty.csv").write_text("")
    (folder / "latin1.csv").write_bytes(b"day,units\n1,\xe9\n")
    return folder


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_status_2(options, files, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stop:
        time_series.main([*SMALL, "--out", str(tmp_path), *options.split()])
    check_error(stop.value.code, capfd.readouterr().err, BAD[options])
