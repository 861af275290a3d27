"""examples/gates.py at a small size: its claims, measured again, and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import gates
import pytest
import torch
from test_char_rnn import check_error, png_size, same_threads_afterwards  # noqa: F401
from torch import nn

import fastlstm

SMALL = ["--threads", "1", "--hidden", "48", "--iterations", "260", "--distance", "40"]


def table(stdout: str, title: str) -> dict[str, list[float]]:
    """The rows that are printed after ``title``, without the head."""
    lines = stdout.partition(title)[2].splitlines()[2:]
    rows = {}
    for line in lines:
        match = re.fullmatch(r"((?:RNN|LSTM)(?:, untrained)?) +([-+.e\d ]+)", line)
        if match is None:
            break
        rows[match[1]] = [float(value) for value in match[2].split()]
    return rows


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[Path, str]:
    """The files and the printed lines of one small run."""
    folder = tmp_path_factory.mktemp("gates")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(map(str, words))))
        gates.main([*SMALL, "--out", str(folder)])
    return folder, "\n".join(lines)


def test_the_lstm_learns_to_remember_and_the_plain_network_does_not(outcome):
    norms = table(outcome[1], "gradient norm relative to distance 0, by distance:")
    assert list(norms) == ["RNN, untrained", "RNN", "LSTM, untrained", "LSTM"]
    for values in norms.values():
        assert len(values) == 5  # 1, 2, 5, 10, 20
        assert values == sorted(values, reverse=True)
    assert norms["LSTM"][-1] > 10 * norms["RNN"][-1]  # at distance 20
    assert norms["LSTM"][-1] > 10 * norms["LSTM, untrained"][-1]
    bits = table(outcome[1], "the last so many characters are the true ones:")
    for values in bits.values():
        assert 2 < values[-1] < values[0] < 7


def test_each_gate_has_a_unit_that_tells_places_apart(outcome):
    found = re.findall(
        r"^(\w+) +unit (\d+) +(-?[\d.]+) (\D+), (-?[\d.]+) elsewhere \(([\d.]+) deviations\)",
        outcome[1],
        flags=re.MULTILINE,
    )
    assert [line[0] for line in found] == ["learn", "forget", "remember", "use"]
    assert len({line[3] for line in found}) == 4  # four kinds of places
    for gate, _, there, _, elsewhere, deviations in found:
        assert float(deviations) > 0.7
        assert there != elsewhere
        if gate in ("forget", "use"):
            assert 0 <= float(there) <= 1
    for name in gates.FILES:
        data = (outcome[0] / name).read_bytes()
        assert min(png_size(data)) > 300
        assert len(data) < 150_000


def test_a_gradient_by_distance_is_that_of_finite_differences():
    torch.manual_seed(0)
    net = gates.CharNet(nn.RNN(3, 4), 5)
    streams = (torch.randint(5, (9, 2)), torch.randint(5, (9, 2)))
    found = gates.gradient_by_distance(net, streams, 8)
    net = net.double()
    x = net.embedding(streams[0]).detach()

    def losses(x):
        rows, _ = net.recurrent(x)
        return nn.functional.cross_entropy(net.head(rows[-1]), streams[1][8], reduction="none")

    slopes = torch.zeros(9, 2, 3, dtype=torch.float64)
    for place in range(9):
        for k in range(3):
            step = torch.zeros_like(x)
            step[place, :, k] = 1e-6
            slopes[place, :, k] = (losses(x + step) - losses(x - step)) / 2e-6
    expected = slopes.norm(dim=-1).mean(1).flip(0)
    torch.testing.assert_close(found, expected / expected[0], rtol=1e-5, atol=1e-9)


def test_what_is_shown_fulfils_the_equations():
    torch.manual_seed(0)
    net = gates.CharNet(fastlstm.LSTM(3, 4), 5)
    inside = gates.look_inside(net, torch.randint(5, (30,)))
    before = torch.cat((torch.zeros(1, 4), inside.remember[:-1]))
    torch.testing.assert_close(inside.remember, inside.forget * before + inside.learn)
    rows, _ = net.recurrent(net.embedding(torch.zeros(1, dtype=torch.int64)))
    assert rows.shape == (1, 4)


def test_the_most_selective_unit_is_found():
    torch.manual_seed(0)
    text = "ab " * 50
    kinds = {kind: mask for kind, mask in gates.classes_of(text).items() if mask.any()}
    values = torch.randn(len(text), 6) * 0.1
    values[kinds["at a space"], 4] -= 2
    unit = gates.most_selective("forget", values, kinds)
    assert (unit.gate, unit.place, unit.kind) == ("forget", 4, "at a space")
    assert unit.there == pytest.approx(-2, abs=0.1)
    assert unit.elsewhere == pytest.approx(0, abs=0.1)
    assert unit.separation == pytest.approx(-20, rel=0.3)


def test_kinds_of_places():
    kinds = gates.classes_of('a (b "c" d)\n"e')
    marks = {name: "".join("x" if m else "." for m in mask) for name, mask in kinds.items()}
    assert marks["between brackets"] == "..xxxxxxxx...."
    assert marks["between quotes"] == ".....xx.....xx"
    assert marks["at a space"] == ".x..x...x....."


@pytest.mark.parametrize(
    ("options", "says"),
    {
        "--sentence=": "--sentence needs at least one",
        "--sentence \u03b1": "--sentence has characters outside the vocabulary",
        "--sentence xyzzy": "too few spaces, brackets",
        "--text missing.txt": "No such file",
        "--text short.txt": "400 characters of text are too few for --batch 32",
        "--iterations 0": "--iterations: must be",
    }.items(),
)
def test_bad_input_is_one_line_and_status_2(options, says, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a b " * 100)
    few = ["--threads", "1", "--hidden", "4", "--iterations", "1", "--distance", "2"]
    with pytest.raises(SystemExit) as stop:
        gates.main([*few, *options.split()])
    check_error(stop.value.code, capfd.readouterr().err.splitlines(True)[-1], says)
