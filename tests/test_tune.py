"""examples/tune.py at a small size: it beats the untuned model, resumes after a kill, is shared."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
import tune
from common import UserError
from tasks import TASKS, CharTask, SeriesTask
from test_char_rnn import check_error, png_size, same_threads_afterwards  # noqa: F401

import fastlstm

SCRIPT = Path(tune.__file__)
SMALL = ["--task", "series", "--threads", "1"]
NUMBER = r"(-?\d[\d.]*)"


class TinyTask(SeriesTask):
    """The series with fewer epochs."""

    epochs, patience = 12, 4


def open_study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="series", storage=f"sqlite:///{folder / 'study.db'}")


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, str]:
    """The files and the printed lines of one small search."""
    folder = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(map(str, words))))
        patch.setitem(TASKS, "series", TinyTask)
        tune.main([*SMALL, "--trials", "15", "--minutes", "0.6", "--out", str(folder)])
    return folder, "\n".join(lines)


def test_the_tuned_model_beats_the_untuned_one(searched):
    folder, stdout = searched
    untuned, tuned = (
        re.search(rf"^ +{name} +{NUMBER}  {NUMBER}  optimizer", stdout, re.MULTILINE).groups()
        for name in ("untuned", "tuned")
    )
    assert float(tuned[0]) < float(untuned[0])
    study = open_study(folder)
    assert study.best_value == pytest.approx(float(tuned[0]), abs=1e-4)
    assert study.user_attrs["prepared"]["untuned"]["loss"] == pytest.approx(
        float(untuned[0]), abs=1e-4
    )
    # The same choice and seed give the same loss again: the table is not from luck.
    choice = study.best_trial.user_attrs["choice"]
    first = study.trials[0]  # untuned but for the learning rate
    assert {name: first.params[name] for name in ("optimizer", "hidden", "layers")} == {
        name: tune.UNTUNED[name] for name in ("optimizer", "hidden", "layers")
    }
    assert first.params["lr factor"] == 1.0
    again = tune.train(TinyTask(0), choice, 0)
    assert again.loss == pytest.approx(study.best_value, rel=1e-5)
    assert again.held_out == pytest.approx(float(tuned[1]), abs=1e-3)
    rates = re.findall(rf"nn.LSTM {NUMBER}, fastlstm {NUMBER}, ratio {NUMBER}", stdout)
    assert len(rates) == 2
    for stock, ours, ratio in rates:
        assert float(ratio) == pytest.approx(float(ours) / float(stock), rel=0.05)
    data = (folder / "series.png").read_bytes()
    assert min(png_size(data)) >= 400
    assert len(data) < 150_000


def test_trials_are_pruned_and_their_hyperparameters_vary(searched):
    trials = tune.finished(open_study(searched[0]))
    assert 8 <= len(trials) <= 15
    pruned = [t for t in trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    assert all(len(t.intermediate_values) <= TinyTask.epochs for t in trials)
    for name, least in (("optimizer", 3), ("schedule", 3), ("layers", 3), ("hidden", 5)):
        assert len({t.params[name] for t in trials}) >= least


def test_a_killed_search_goes_on_and_two_processes_share_it(tmp_path):
    """Two start at once without a study and are killed; two take it up; no trial is lost."""
    command = [sys.executable, str(SCRIPT), *SMALL, "--out", str(tmp_path), "--minutes", "2"]

    def start(*options: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe, text=True)

    def count() -> int:
        try:
            with sqlite3.connect(tmp_path / "study.db", timeout=30) as database:
                states = "('COMPLETE', 'PRUNED')"
                rows = database.execute(f"select count(*) from trials where state in {states}")
                return int(rows.fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not made yet
            return 0

    def finished_or_ended(*processes: subprocess.Popen[str]) -> bool:
        return count() >= 2 or any(process.poll() is not None for process in processes)

    with start() as one, start("--seed", "1") as other:
        until = time.monotonic() + 90
        while not finished_or_ended(one, other) and time.monotonic() < until:
            time.sleep(0.2)
        ended = [process.poll() for process in (one, other)]
        for process in (one, other):
            os.kill(process.pid, signal.SIGKILL)
        said = [process.communicate()[1] for process in (one, other)]
    assert ended == [None, None], said
    before = count()
    assert before >= 2
    total = str(before + 3)
    with start("--trials", total, "--seed", "1") as one, start("--trials", total) as other:
        outputs = [process.communicate(timeout=120) for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], outputs
    for stdout, _ in outputs:
        assert re.search(r"series: going on with \d+ trials of", stdout)
    assert before + 3 <= count() <= before + 5  # whoever was at it finishes its trial
    study = open_study(tmp_path)
    assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
    firsts = [t for t in study.trials if "fixed_params" in t.system_attrs]
    assert len(firsts) == 1  # prepared once, by one of them


def test_both_modules_are_timed(monkeypatch):
    """Each step of nn.LSTM's side runs nn.LSTM, and each of the other fastlstm."""
    seen = []
    for kind in (torch.nn.LSTM, fastlstm.LSTM):
        forward = kind.forward

        def run(self, *args, forward=forward, kind=kind, **kwargs):
            seen.append(kind)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", run)
    took = tune.seconds_of_a_trial(TinyTask(0), tune.UNTUNED, 0.0, seed=0)
    assert len(took) == 2 and min(took) > 0
    assert seen.count(torch.nn.LSTM) >= 4 <= seen.count(fastlstm.LSTM)


def test_a_range_test_finds_the_rates_that_learn():
    task = TinyTask(0)
    for name in tune.OPTIMIZERS:
        rates, losses = tune.range_test(task, name, seed=0)
        assert rates == sorted(rates)
        assert 1e-4 < tune.suggested_rate(rates, losses) < 10
        assert min(losses) < 0.9 * losses[0]


def test_schedules_decay_as_they_say():
    task, found = TinyTask(0), {}
    for name in tune.SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = tune.schedule_of({"schedule": name}, optimizer, task.epochs)
        found[name] = []
        for _ in range(task.epochs):
            found[name].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
    assert set(found["none"]) == {1.0}
    assert found["step"] == pytest.approx([1.0] * 4 + [0.3] * 4 + [0.09] * 4)
    assert found["cosine"] == sorted(found["cosine"], reverse=True)
    assert found["cosine"][-1] < 0.05
    assert found["plateau"][-1] < 0.1  # the loss never got better


def test_early_stopping_and_the_character_task():
    task = CharTask(20_000)
    choice = {**tune.UNTUNED, "lr": 1e-2, "hidden": 16}
    seen = []
    outcome = tune.train(task, choice, 0, lambda epoch, loss, _: seen.append(loss))
    assert outcome.loss == min(seen) < seen[0] - 0.3
    assert outcome.epochs == seen.index(min(seen)) + 1
    assert len(seen) <= task.epochs
    assert 2 < outcome.held_out < 6
    json.dumps(outcome._asdict())  # what a study keeps
    with pytest.raises(optuna.TrialPruned, match="out of time"):
        tune.train(task, choice, 0, deadline=time.monotonic())
    stopped = []

    class Stubborn(TinyTask):
        def judge(self, model, held_out=False):
            return 1.0 if held_out else 5.0 + len(stopped)

    tune.train(Stubborn(0), choice, 0, lambda *_: stopped.append(1))
    assert len(stopped) == 1 + Stubborn.patience


BAD = {
    "--task words": "--task: invalid choice",
    "--minutes 0": "--minutes: must be",
    "--minutes x": "--minutes: invalid float",
    "--trials -1": "--trials: must be",
    "--characters 5": "--characters: must be",
    "--study words.txt": "--study words.txt: file is not a database",
    "--study .": "is a directory",
    "--out words.txt": "words.txt",
}


def test_a_study_of_another_text_is_refused():
    study = optuna.create_study()
    study.set_user_attr("prepared", {"size": 20_000})
    args = tune.make_parser().parse_args(["--study", "study.db"])
    with pytest.raises(UserError, match=r"--study study\.db was made with --characters 20000"):
        tune.prepare_study(study, CharTask(30_000), args)


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_status_2(options, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("no database, but a good deal of words " * 100)
    with pytest.raises(SystemExit) as stop:
        tune.main([*SMALL, *options.split()])
    check_error(stop.value.code, capfd.readouterr().err, BAD[options])
