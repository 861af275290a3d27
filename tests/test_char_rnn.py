"""examples/char_rnn.py: what a run leaves behind, checkpoints in both models, every bad input.

Bad inputs are given to ``main`` in this process (a new one costs seconds of imports), except for
one which shows that the script itself ends the same way.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import char_rnn
import checkpoints
import losses
import pytest
import texts
import torch

import fastlstm

SCRIPT = Path(__file__).parents[1] / "examples" / "char_rnn.py"
SMALL_MODEL = ["--embedding", "8", "--hidden", "16"]
SMALL_RUN = ["--batch", "4", "--steps", "10", "--sample-length", "30", "--threads", "1"]
NUMBER = r"(-?[\d.,]+(?:e[+-]\d+)?)"
LINES = {
    "gap": rf"largest loss difference: {NUMBER} \(first 50 steps: {NUMBER}\)",
    "rate": rf"training characters/s:   nn.LSTM {NUMBER}, fastlstm {NUMBER}",
    "ratio": rf"speed ratio:             {NUMBER} \(median of .*, quartiles {NUMBER} to {NUMBER}\)",
    "bits": rf"validation bits/char:    nn.LSTM {NUMBER}, fastlstm {NUMBER}",
}


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    """The script sets torch's thread count for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory with the outputs of one small run, started as users start it; its stdout."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--iterations", "12", "--prime", "The ", "--out", "out", "--save", "new/model.pt"]
    done = run_script(*SMALL_MODEL, *SMALL_RUN, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def run_script(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=60)


def figures(stdout: str) -> dict[str, tuple[float, float]]:
    """The printed figures, by the names in LINES."""
    found = {name: re.search(pattern, stdout) for name, pattern in LINES.items()}
    assert all(found.values()), stdout
    return {k: tuple(float(x.replace(",", "")) for x in m.groups()) for k, m in found.items()}


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds = 8, []
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunk = data[place + 4 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(chunk)
        kinds.append(chunk[:4])
        place += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    assert b"IDAT" in kinds
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def test_a_run_prints_its_figures_and_writes_its_files(trained):
    folder, stdout = trained
    found = figures(stdout)
    assert 0 <= found["gap"][1] <= found["gap"][0] < 1e-3
    assert abs(found["bits"][0] - found["bits"][1]) < 1e-3
    assert 1 < found["bits"][0] < 7  # better than guessing among 103 characters
    assert min(found["rate"] + found["ratio"]) > 0
    assert found["ratio"][1] <= found["ratio"][0] <= found["ratio"][2]
    assert min(png_size((folder / "out" / "losses.png").read_bytes())) >= 400
    sample = (folder / "out" / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("The ")
    assert len(sample) == len("The ") + 30 + 1
    assert f"written after reading 'The ':\n{sample[4:].rstrip()}" in stdout
    assert sorted(p.name for p in (folder / "new").iterdir()) == ["model.pt"]


def test_a_step_that_waited_does_not_count(capsys):
    """Nine steps of 2 s and 1 s; in a tenth both wait, nn.LSTM longer."""
    seconds = {"nn.LSTM": [2.0] * 9 + [500.0], "fastlstm": [1.0] * 9 + [5.0]}
    stock, ours = (char_rnn.Learner(k, torch.nn.Linear(1, 1), None) for k in seconds)
    for learner in (stock, ours):
        learner.losses, learner.seconds = [1.0] * 10, seconds[learner.name]
    losses.report(stock, ours, characters=100)
    found = figures(capsys.readouterr().out + "validation bits/char:    nn.LSTM 1, fastlstm 1")
    assert found["rate"] == (50, 100)
    assert found["ratio"] == (2, 2, 2)


def test_the_default_prime_is_whole_words():
    text = "ight of an old abbey, in spring, when the river was high"
    assert char_rnn.beginning_of(text) == "of an old abbey, in spring, when the river"
    for whole in ("x" * 30, "word ", "two words"):
        assert char_rnn.beginning_of(whole) == whole


def test_a_checkpoint_loads_into_either_model(trained):
    folder, _ = trained
    content = torch.load(folder / "new" / "model.pt", weights_only=True)
    assert content["shape"] == {"embedding": 8, "hidden": 16, "layers": 1}
    stock, ours = (char_rnn.CharModel(len(content["vocabulary"]), content["shape"]) for _ in "ab")
    fastlstm.replace_lstm_(ours)
    ids = char_rnn.encode("The quick brown fox", content["vocabulary"], "test")[:, None]
    scores = []
    for model in (stock, ours):
        model.load_state_dict(content["weights"])
        with torch.no_grad():
            scores.append(model(ids)[0])
    torch.testing.assert_close(scores[0], scores[1])


def test_a_loaded_model_is_the_saved_one_and_trains_on(trained, tmp_path, capfd):
    folder, stdout = trained
    text = tmp_path / "small.txt"
    text.write_text("The model goes on with what it knows.\r\n" * 30, encoding="utf-8-sig")
    load = ["--load", str(folder / "new" / "model.pt"), "--out", str(tmp_path / "out")]
    char_rnn.main([*SMALL_RUN, *load, "--iterations", "0"])
    printed = capfd.readouterr().out
    assert re.findall(LINES["bits"], printed) == re.findall(LINES["bits"], stdout)
    assert not (tmp_path / "out" / "losses.png").exists()  # there was no training to draw
    save = ["--save", load[1], "--text", str(text), "--hidden", "16", "--dropout", "0.2"]
    char_rnn.main([*SMALL_RUN, *load, *save, "--iterations", "3"])
    assert figures(capfd.readouterr().out)["gap"][0] < 1e-3
    assert (tmp_path / "out" / "losses.png").exists()


def test_dropout_and_layers_keep_the_curves_together(tmp_path, capfd):
    options = ["--iterations", "5", "--layers", "2", "--dropout", "0.3", "--out", str(tmp_path)]
    char_rnn.main([*SMALL_MODEL, *SMALL_RUN, *options])
    assert figures(capfd.readouterr().out)["gap"][0] < 1e-3


def test_streams_read_on_from_window_to_window():
    text = "abcdefghijklm"
    inputs, targets = char_rnn.cut_into_streams(torch.arange(len(text)), 3)
    columns = ["".join(text[i] for i in column) for column in inputs.t()]
    assert columns == ["abcd", "efgh", "ijkl"]
    assert torch.equal(targets, inputs + 1)
    stream = char_rnn.windows(inputs, targets, 2)
    first, second, again = (next(stream) for _ in range(3))
    assert torch.equal(torch.cat([first[0], second[0]]), inputs)
    assert [w[2] for w in (first, second, again)] == [True, False, True]
    assert torch.equal(first[1], again[1])


def test_carried_state_makes_windows_equal_to_one_long_pass():
    torch.manual_seed(0)
    model = char_rnn.CharModel(5, {"embedding": 3, "hidden": 4, "layers": 1})
    streams = char_rnn.cut_into_streams(torch.randint(5, (61,)), 3)
    whole = char_rnn.bits_per_character(model, streams, 20)
    assert char_rnn.bits_per_character(model, streams, 6) == pytest.approx(whole, abs=1e-5)
    logits, _ = model(streams[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), streams[1].flatten())
    assert whole == pytest.approx(loss.item() / math.log(2), abs=1e-5)


def test_low_temperature_draws_the_best_and_none_overflows():
    logits = torch.tensor([1e4, -1e4, 2e4, 0.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-3, 1.0, 1e3):
        assert char_rnn.draw(logits, temperature, 0, generator).item() in range(4)
    assert char_rnn.draw(logits, 1e-3, 0, generator).item() == 2


def test_top_k_draws_nothing_but_the_best():
    logits, generator = torch.arange(8.0), torch.Generator().manual_seed(0)
    drawn = {char_rnn.draw(logits, 10.0, 3, generator).item() for _ in range(200)}
    assert drawn == {5, 6, 7}
    assert {char_rnn.draw(logits, 10.0, 0, generator).item() for _ in range(400)} == set(range(8))
    assert char_rnn.draw(logits, 10.0, 100, generator).item() in range(8)


# ---- Going on, and several processes --------------------------------------------------------


def curve(folder: Path) -> dict[int, tuple[float, float]]:
    """Losses of nn.LSTM and fastlstm by step, as a run left them."""
    with (folder / "losses.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "nn.LSTM", "fastlstm"]
    return {int(step): (float(stock), float(ours)) for step, stock, ours in rows[1:]}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """The losses of ten steps of one process."""
    folder = tmp_path_factory.mktemp("straight")
    char_rnn.main([*SMALL_MODEL, *SMALL_RUN, "--iterations", "10", "--out", str(folder)])
    return curve(folder)


def assert_goes_along(found: dict[int, tuple[float, float]], straight, steps: range) -> None:
    assert list(found) == list(steps)
    for step in steps:
        assert found[step] == pytest.approx(straight[step], abs=1e-4)


def test_a_resumed_training_goes_on_as_if_never_stopped(straight, tmp_path, capfd):
    model, out = tmp_path / "model.pt", ["--out", str(tmp_path)]
    save = ["--save", str(model), "--save-every", "4", "--iterations", "7"]
    char_rnn.main([*SMALL_MODEL, *SMALL_RUN, *out, *save])
    load = ["--load", str(model), "--resume"]
    char_rnn.main([*SMALL_RUN, *out, *load, "--iterations", "10"])
    assert_goes_along(curve(tmp_path), straight, range(7, 10))
    # Without --resume the streams start over, the optimizer too: it is not the same training.
    char_rnn.main([*SMALL_RUN, *out, *load[:2], "--iterations", "3"])
    assert curve(tmp_path)[2] != pytest.approx(straight[9], abs=1e-3)
    for bad, says in (("--batch 8", "trained with --batch 4"), ("--steps 9", "with --steps 10")):
        with pytest.raises(SystemExit) as stop:
            char_rnn.main([*SMALL_RUN, *out, *load, *bad.split()])
        check_error(stop.value.code, capfd.readouterr().err.splitlines(True)[-1], says)


def test_what_is_saved_on_the_way_is_as_good_as_the_last(straight, tmp_path, monkeypatch):
    """A run that is killed leaves its last --save-every behind."""

    def killed(*_):
        raise KeyboardInterrupt

    model, out = tmp_path / "model.pt", ["--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(char_rnn, "finish", killed)
        save = ["--save", str(model), "--save-every", "3", "--iterations", "8"]
        with pytest.raises(KeyboardInterrupt):
            char_rnn.main([*SMALL_MODEL, *SMALL_RUN, *out, *save])
    char_rnn.main([*SMALL_RUN, *out, "--load", str(model), "--resume", "--iterations", "10"])
    assert_goes_along(curve(tmp_path), straight, range(6, 10))


def run_two_processes(
    *args: str, cwd: Path, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), "--ddp", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=120)


def test_two_processes_have_the_losses_of_one_and_resume(straight, tmp_path):
    model = ["--save", "new/model.pt", "--save-every", "2", "--out", "out"]
    done = run_two_processes(*SMALL_MODEL, *SMALL_RUN, *model, "--iterations", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_goes_along(curve(tmp_path / "out"), straight, range(6))
    assert done.stdout.count("training characters/s") == 1  # one process speaks
    figures(done.stdout)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.pt"]
    # Half the batch is half the state; the file has all of it, and serves one process as well.
    load = ["--load", "new/model.pt", "--resume", "--iterations", "10", "--out"]
    done = run_two_processes(*SMALL_RUN, *load, "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_goes_along(curve(tmp_path / "two"), straight, range(6, 10))
    load[1] = str(tmp_path / "new" / "model.pt")
    char_rnn.main([*SMALL_RUN, *load, str(tmp_path / "one")])
    assert_goes_along(curve(tmp_path / "one"), straight, range(6, 10))


def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that still held a tensor when Python ended would abort the process."""
    script = tmp_path / "count_threads.py"
    script.write_text(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import char_rnn
char_rnn.main()
names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert names and not any("gloo" in name for name in names), names
"""
    )
    options = [*SMALL_MODEL, *SMALL_RUN, "--iterations", "2", "--out", "out"]
    done = run_two_processes(*options, cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr


def test_processes_that_cannot_share_the_batch_say_so_once(tmp_path):
    done = run_two_processes(*SMALL_RUN, "--batch", "3", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: --ddp: 2 processes cannot share --batch 3 equally") == 1


def test_the_default_text_is_clean_english():
    text = texts.python_topics()
    assert len(text) > 200_000
    assert text.count(" the ") > 1000
    assert not re.search(r"\n\n\n| \n|^\*+$", text, flags=re.MULTILINE)


# ---- Bad input: one line on stderr, exit status 2 ---------------------------------------------


def check_error(code: object, stderr: str, says: str) -> None:
    assert code == 2
    assert "Traceback" not in stderr
    assert re.fullmatch(r"[^\n]+\n", stderr), stderr
    assert re.search(says, stderr), stderr


def test_the_script_itself_ends_in_one_line(tmp_path):
    done = run_script("--text", "none.txt", cwd=tmp_path)
    assert done.stdout == ""
    check_error(done.returncode, done.stderr, r"error: .*No such file.*none\.txt")


BAD_OPTIONS = {
    "--text missing.txt": "No such file.*missing.txt",
    "--text .": "directory",
    "--text empty.txt": "empty.txt is empty",
    "--text short.txt": "40 characters.* too few for one batch .*--batch 4 times --steps 10",
    "--text latin1.txt": "latin1.txt is not UTF-8 text.* byte 3",
    "--text good.txt --steps 1000000": "too few for one batch",
    "--text good.txt --batch 1000000": "too few for one batch",
    "--load missing.pt": "No such file.*missing.pt",
    "--load .": "directory",
    "--load empty.pt": "empty.pt is damaged or of another program",
    "--load good.txt": "good.txt is damaged or of another program",
    "--load half.pt": "half.pt is damaged or of another program",
    "--load list.pt": "list.pt is damaged or of another program",
    "--load code.pt": "code.pt is damaged or of another program",
    "--load smaller.pt": "smaller.pt: its weights, shape and vocabulary do not fit",
    "--load good.pt --hidden 17": "good.pt was made with --hidden 16, not 17",
    "--load good.pt --layers 2": "--layers 1, not 2",
    "--load good.pt --text greek.txt": "greek.txt has characters outside the vocabulary",
    "--text greek.txt --prime x": "--prime has characters outside the vocabulary: 'x'",
    "--prime=": "--prime needs at least one",
    "--out good.txt": "good.txt",
    "--save .": "is a directory",
    "--save good.txt/model.pt": "good.txt",
    "--backend nonsense": "nonsense",
    "--hidden 0": "--hidden: must be from 1",
    "--hidden x": "--hidden: invalid int value: 'x'",
    "--layers -1": "--layers: must be",
    "--embedding 1.5": "--embedding: invalid int",
    "--batch 0": "--batch: must be",
    "--steps -3": "--steps: must be",
    "--iterations -1": "--iterations: must be",
    "--lr 0": "--lr: must be",
    "--lr nan": "--lr: must be",
    "--clip -1": "--clip: must be",
    "--clip inf": "--clip: must be",
    "--dropout 1": "--dropout: must be",
    "--threads 0": "--threads: must be",
    "--seed -1": "--seed: must be",
    "--temperature 0": "--temperature: must be",
    "--temperature -1": "--temperature: must be",
    "--sample-length 0": "--sample-length: must be",
    "--top-k -1": "--top-k: must be",
    "--resume": "--resume needs --load",
    "--save-every 5": "--save-every needs --save",
    "--load old.pt --resume": "old.pt does not say how far its training was",
    "--load good.pt --text good.txt --resume": "good.pt was trained with another text",
    "--load moments.pt": "moments.pt: its weights, shape and vocabulary do not fit",
    "--load state.pt": "state.pt: its weights, shape and vocabulary do not fit",
    "--load training.pt": "training.pt is damaged or of another program",
    "--ddp": "--ddp: start it with torchrun",
    "--nonsense": "--nonsense",
}


@pytest.fixture(scope="module")
def files(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that BAD_OPTIONS names."""
    folder = tmp_path_factory.mktemp("files")
    good = (trained[0] / "new" / "model.pt").read_bytes()
    contents = {
        "empty.txt": b"",
        "short.txt": b"a short text " * 3 + b"\n",
        "latin1.txt": b"caf\xe9 " * 1000,
        "good.txt": b"plain text. " * 1000,
        "greek.txt": "αβγδ ".encode() * 1000,
        "empty.pt": b"",
        "good.pt": good,
        "half.pt": good[: len(good) // 2],
        "code.pt": b"cposix\nsystem\n(S'exit 3'\ntR.",  # a pickle that would run a command
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save([1, 2, 3], folder / "list.pt")
    content = torch.load(folder / "good.pt", weights_only=True)
    content["shape"]["hidden"] = 15
    torch.save(content, folder / "smaller.pt")
    content = torch.load(folder / "good.pt", weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "training"}, folder / "old.pt")
    content["training"]["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)
    torch.save(content, folder / "moments.pt")
    content = torch.load(folder / "good.pt", weights_only=True)
    content["training"]["state"] = (torch.zeros(1, 4, 15),) * 2
    torch.save(content, folder / "state.pt")
    torch.save({**content, "training": {"step": 3}}, folder / "training.pt")
    return folder


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_input_is_one_line_and_status_2(options, files, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(files)
    model = [] if "--load" in options else SMALL_MODEL
    few = ["--iterations", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        char_rnn.main([*model, *SMALL_RUN, *few, *options.split()])
    check_error(stop.value.code, capfd.readouterr().err, BAD_OPTIONS[options])


def test_a_diverged_training_ends_in_one_line(tmp_path, capfd):
    options = ["--iterations", "40", "--lr", "1000", "--clip", "1e9", "--out", str(tmp_path)]
    content = {"vocabulary": "ab", "shape": {"embedding": 2, "hidden": 2, "layers": 1}}
    model = char_rnn.CharModel(2, content["shape"])
    model.head.bias.data.fill_(math.inf)
    torch.save({**content, "weights": model.state_dict()}, tmp_path / "inf.pt")
    (tmp_path / "ab.txt").write_text("ab" * 1000)
    files = ["--load", str(tmp_path / "inf.pt"), "--text", str(tmp_path / "ab.txt")]
    for extra in ([], ["--iterations", "0"]):
        with pytest.raises(SystemExit) as stop:
            char_rnn.main([*SMALL_RUN, *options, *files, *extra])
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert "no longer finite" in lines[-1]  # after the progress bar's line


def test_no_damaged_checkpoint_gets_a_traceback(files, tmp_path):
    """Bytes changed or cut off at random: it is loaded, or refused as what it is."""
    good, path = (files / "good.pt").read_bytes(), tmp_path / "damaged.pt"
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        data = bytearray(good)
        for place in torch.randint(len(data), (8,), generator=generator).tolist():
            data[place] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(data[: int(torch.randint(1, len(data), (1,), generator=generator))])
        with pytest.raises(char_rnn.UserError, match=r"\.pt is damaged or of another program"):
            checkpoints.load(path, char_rnn.CharModel)
        start = int(torch.randint(600, (1,), generator=generator))  # inside the pickled part
        path.write_bytes(good[:start] + bytes(data[start : start + 4]) + good[start + 4 :])
        with contextlib.suppress(char_rnn.UserError):
            checkpoints.load(path, char_rnn.CharModel)
