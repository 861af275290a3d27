"""A character-level language model, trained twice: with nn.LSTM and with fastlstm.

The model reads a text one character at a time and learns to guess the next one.  Two copies
start from the same weights and see the same batches, in alternation; in the second copy one line,
``fastlstm.replace_lstm_(model)``, has swapped the LSTM.  Same losses; the times are printed:

    python examples/char_rnn.py             # CPython's help topics, a minute or two
    python examples/char_rnn.py --text book.txt --hidden 512 --save book.pt
    python examples/char_rnn.py --text book.txt --load book.pt --iterations 0 --prime "It was "

It prints what was measured and writes ``losses.png`` and ``sample.txt`` to ``--out``.

Letters for shapes: T time steps in a window, B streams side by side (the batch), S steps in a
whole stream, E embedding size, H hidden size, L layers, V characters in the vocabulary.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import re
import statistics
import struct
import sys
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import NoReturn

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastlstm

Shape = dict[str, int]  # the sizes in DEFAULT_SHAPE
State = tuple[Tensor, Tensor]  # h and c, each (L, B, H)
Streams = tuple[Tensor, Tensor]  # inputs and targets, each (S, B)
Window = tuple[Tensor, Tensor, bool]  # inputs and targets, each (T, B); whether streams start here

# The sizes that fix the shapes of the weights; a checkpoint carries its own.
DEFAULT_SHAPE = {"embedding": 64, "hidden": 256, "layers": 1}


class UserError(Exception):
    """Something the user can put right; shown as one line, with exit status 2."""


# %% The text
def python_topics() -> str:
    """CPython's own help texts: English prose about Python, in sorted order of topic.

    Underlines (rows of one repeated sign) are dropped, since guessing them is too easy, and so
    are spaces at line ends and all but one of several blank lines.
    """
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    text = re.sub(r"^\s*([*=~^-])\1{2,}\s*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def read_text(path: Path | None) -> str:
    """The training text: a UTF-8 file, or the text that ships with Python."""
    if path is None:
        return python_topics()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text:
        raise UserError(f"{path} is empty")
    return text


def encode(text: str, vocabulary: str, what: str | Path) -> Tensor:
    """Characters to their places in the vocabulary: (len(text),) int64."""
    places = {character: place for place, character in enumerate(vocabulary)}
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        raise UserError(f"{what} has characters outside the vocabulary: {''.join(unknown[:10])!r}")
    return torch.tensor([places[character] for character in text], dtype=torch.int64)


def cut_into_streams(ids: Tensor, batch: int) -> Streams:
    """Lay the text out as ``batch`` streams side by side; inputs and targets, each (S, B).

    The text is cut into B long pieces, and each piece becomes one *column*.  With B = 3 and
    windows of T = 2 steps, "abcdefghijklm" becomes

        inputs    a e i  \\ window 0      targets   b f j
                  b f j  /                          c g k
                  c g k  \\ window 1                d h l
                  d h l  /                          e i m

    Down any column the text simply reads on: window 1 continues where window 0 stopped, in every
    column.  So the LSTM's state after one window is the right state to start the next one with.
    The targets are the same text one character later.  At most B - 1 characters are left over.
    """
    length = (len(ids) - 1) // batch  # S; one character is kept back for the last target
    used = length * batch
    inputs = ids[:used].view(batch, length).t().contiguous()  # (S, B) int64
    targets = ids[1 : used + 1].view(batch, length).t().contiguous()  # (S, B) int64
    return inputs, targets


def windows(inputs: Tensor, targets: Tensor, steps: int) -> Iterator[Window]:
    """Whole windows, each (T, B), from top to bottom, again and again.

    The flag says that a window is the first one: there the streams start over, so the state must.
    """
    while True:
        for start in range(0, len(inputs) - steps + 1, steps):
            yield inputs[start : start + steps], targets[start : start + steps], start == 0


# %% The model and how it learns
class CharModel(nn.Module):
    """Embedding, LSTM, and a linear layer that scores every character as the next one."""

    def __init__(self, vocabulary_size: int, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        embedding, hidden, layers = (shape[name] for name in DEFAULT_SHAPE)
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        between_layers = dropout if layers > 1 else 0.0  # nn.LSTM warns if there is no "between"
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=between_layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores (T, B, V) for the character after each of ``ids`` (T, B), and the state there."""
        rows = self.dropout(self.embedding(ids))  # (T, B, E)
        rows, state = self.lstm(rows, state)  # (T, B, H)
        return self.head(self.dropout(rows)), state


@dataclass
class Learner:
    """A model in training: its optimizer, the state it carries, and what was recorded."""

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)  # nats per character, one per step
    seconds: list[float] = field(default_factory=list)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of one window; the state moves on to the window's end."""
        logits, state = self.model(x, self.state)  # (T, B, V)
        # Truncated backpropagation through time: the next window starts from these numbers, but
        # no gradient flows back through them, or the graph would grow to the whole text.
        self.state = (state[0].detach(), state[1].detach())
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def step(self, x: Tensor, y: Tensor, first: bool, clip: float) -> None:
        """Learn from one window; this, and nothing else, is timed."""
        start = time.perf_counter()
        if first:
            self.state = None  # nn.LSTM takes zeros
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)  # LSTM gradients can explode
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def make_learners(stock: CharModel, window: Window, args: Namespace) -> tuple[Learner, Learner]:
    """The stock model and its replaced copy, warmed up on one window."""
    ours = copy.deepcopy(stock)
    print(fastlstm.replace_lstm_(ours, backend=args.backend))  # the one-line swap
    learners = (
        Learner("nn.LSTM", stock, torch.optim.Adam(stock.parameters(), args.lr)),
        Learner("fastlstm", ours, torch.optim.Adam(ours.parameters(), args.lr)),
    )
    for learner in learners:  # untimed: libraries load, and a backend that cannot serve says so
        learner.loss(*window[:2]).backward()
    return learners


def train(stock: Learner, ours: Learner, batches: Iterator[Window], args: Namespace) -> None:
    """Train both on the same batches, a step each in turn, so that both meet the same machine."""
    bar = tqdm(range(args.iterations), desc="training", unit="step")
    for iteration, (x, y, first) in zip(bar, batches, strict=False):  # batches never end
        for learner in (stock, ours) if iteration % 2 == 0 else (ours, stock):  # a fair start
            torch.manual_seed(args.seed + iteration)  # the same dropout masks for both
            learner.step(x, y, first, args.clip)
        if not math.isfinite(stock.losses[-1] + ours.losses[-1]):
            bar.close()
            raise UserError(f"the loss is no longer finite at step {iteration}: try a smaller --lr")
        bar.set_postfix_str(f"loss {stock.losses[-1]:.3f} / {ours.losses[-1]:.3f}", refresh=False)


@torch.no_grad()
def bits_per_character(model: CharModel, streams: Streams, steps: int) -> float:
    """How many bits the model needs for one character of the text; lower is better."""
    model.eval()
    state, nats = None, 0.0
    for x, y in zip(*(part.split(steps) for part in streams), strict=True):  # (T, B); last: less
        logits, state = model(x, state)  # (T, B, V)
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return nats / streams[0].numel() / math.log(2)


# %% Writing text
def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One character's place, drawn from scores (V,).  Below 1 is cautious, above 1 is bold."""
    scores = (logits - logits.max()).double() / temperature  # best is 0: nothing overflows
    return torch.multinomial(scores.softmax(0), 1, generator=generator)  # (1,) int64


@torch.no_grad()
def generate(model: CharModel, vocabulary: str, prime: str, args: Namespace) -> str:
    """Read ``prime``, then write on, one character at a time."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    logits, state = model(encode(prime, vocabulary, "--prime")[:, None])  # (len(prime), 1, V)
    written = []
    for _ in range(args.sample_length):
        choice = draw(logits[-1, 0], args.temperature, generator)
        written.append(vocabulary[int(choice)])
        # T = 1: what was read and written so far is all in the state, so nothing is read twice.
        logits, state = model(choice[:, None], state)  # (1, 1, V)
    return prime + "".join(written)


# %% Checkpoints
# What unpickling a damaged file, or reading another program's, has been seen to raise.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, LookupError, RuntimeError),
    *(TypeError, ValueError, AttributeError, AssertionError, OverflowError, MemoryError),
)


def save_checkpoint(path: Path, model: CharModel, vocabulary: str, shape: Shape) -> None:
    """Write what either model can be rebuilt from; never half a file in a good one's place."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        content = {"vocabulary": vocabulary, "shape": shape, "weights": model.state_dict()}
        torch.save(content, file)
    part.replace(path)


def load_checkpoint(path: Path) -> tuple[str, Shape, dict[str, Tensor]]:
    """Vocabulary, shape and weights, checked against each other."""
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch finds odd in damaged files
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        vocabulary, shape, weights = (content[key] for key in ("vocabulary", "shape", "weights"))
        with torch.device("meta"):  # shapes only, no memory
            expected = CharModel(len(vocabulary), shape).state_dict()
        fits = {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}
    except DAMAGED as error:  # torch's own advice, to load it unsafely, is not passed on
        reason = type(error).__name__
        raise UserError(f"{path} is damaged or of another program ({reason})") from None
    if not (fits and isinstance(vocabulary, str) and len(set(vocabulary)) == len(vocabulary)):
        raise UserError(f"{path}: its weights, shape and vocabulary do not fit together")
    return vocabulary, shape, weights


# %% What is reported
def report(stock: Learner, ours: Learner, characters: int) -> None:
    """Print the figures of a training run whose steps read ``characters`` each."""
    gaps = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    slow, fast = (characters * len(x.seconds) / sum(x.seconds) for x in (stock, ours))
    paired = statistics.median(a / b for a, b in zip(stock.seconds, ours.seconds, strict=True))
    # Rounding differs between two correct programs, and training amplifies it step by step: the
    # early figure shows that both compute the same thing, the late one how far they drift.
    print(f"largest loss difference: {max(gaps):.3g} (first 50 steps: {max(gaps[:50]):.3g})")
    print(f"training characters/s:   {stock.name} {slow:,.0f}, {ours.name} {fast:,.0f}")
    print(f"speed ratio:             {fast / slow:.3f} (median of paired steps: {paired:.3f})")


def plot_losses(stock: Learner, ours: Learner, path: Path) -> None:
    """Both curves, and how far apart they are."""
    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: saves through Agg
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for learner, style in ((stock, "-"), (ours, "--")):
        label = f"{learner.name}, {sum(learner.seconds):.1f} s"
        curves.plot([loss / math.log(2) for loss in learner.losses], style, label=label)
    curves.set_ylabel("training loss (bits per character)")
    curves.legend()
    pairs = zip(stock.losses, ours.losses, strict=True)
    apart = [abs(a - b) / math.log(2) or math.nan for a, b in pairs]  # no place for 0 on a log axis
    gap.semilogy(apart, ".", markersize=3)
    gap.set(xlabel="step", ylabel="difference")
    figure.savefig(path, format="png")


# %% The command line
class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number within bounds (which no NaN is)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def make_parser() -> Parser:
    """Every option and its default."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add, count = parser.add_argument, number(int, 1, 10**6)
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn (default: Python's topics)")
    for name, most in (("embedding", 2**14), ("hidden", 2**14), ("layers", 64)):
        default = f"default {DEFAULT_SHAPE[name]}, or the checkpoint's"
        add(f"--{name}", type=number(int, 1, most), help=default)
    add("--batch", type=count, default=32, help="streams side by side (default 32)")
    add("--steps", type=count, default=64, help="characters per window (default 64)")
    add("--iterations", type=number(int, 0, 10**9), default=1200, help="steps (default 1200)")
    add("--lr", type=number(float, 1e-9, 1e3), default=3e-3, help="for Adam (default 0.003)")
    add("--clip", type=number(float, 1e-9, 1e9), default=1.0, help="gradient norm (default 1)")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="default 0")
    add("--threads", type=number(int, 1, os.cpu_count() or 1), help="default: torch's choice")
    add("--seed", type=number(int, 0, 2**32), default=0, help="default 0")
    add("--temperature", type=number(float, 1e-3, 1e3), default=0.7, help="below 1: cautious (0.7)")
    add("--sample-length", type=count, default=500, help="characters to write (default 500)")
    add("--prime", help="text to go on from (default: 20 characters of the validation text)")
    add("--out", type=Path, default=Path("out/char_rnn"), help="default out/char_rnn")
    add("--save", type=Path, metavar="FILE", help="write a checkpoint after training")
    add("--load", type=Path, metavar="FILE", help="start from a checkpoint")
    add("--backend", default="auto", help="fastlstm's backend (default auto)")
    return parser


def choose_shape(args: Namespace, text: str) -> tuple[str, Shape, dict[str, Tensor] | None]:
    """Vocabulary, shape and weights: the checkpoint's, or new ones (and no weights yet)."""
    given = {name: value for name in DEFAULT_SHAPE if (value := getattr(args, name)) is not None}
    if args.load is None:
        # The whole text's characters, so that the validation part has no unknown ones.
        return "".join(sorted(set(text))), DEFAULT_SHAPE | given, None
    vocabulary, shape, weights = load_checkpoint(args.load)
    for name, value in given.items():
        if value != shape[name]:
            raise UserError(f"{args.load} was made with --{name} {shape[name]}, not {value}")
    return vocabulary, shape, weights


def split_text(ids: Tensor, args: Namespace) -> tuple[Streams, Streams]:
    """The streams to train on, and those of the last tenth, which is only for validation."""
    split = len(ids) * 9 // 10
    training = cut_into_streams(ids[:split], args.batch)
    validation = cut_into_streams(ids[split:], args.batch)
    if len(training[0]) < args.steps or len(validation[0]) < 1:
        need = f"--batch {args.batch} times --steps {args.steps}"
        raise UserError(f"{len(ids)} characters of text are too few for one batch ({need})")
    return training, validation


def prepare_outputs(args: Namespace) -> None:
    """Make the directories now, so that no training is lost for want of a place to write to."""
    for path in (args.out / "sample.txt", args.out / "losses.png", args.save):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise UserError(f"{path} is a directory")


def run(args: Namespace) -> None:
    """Train, measure, write; what can be wrong is looked at before the training."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    text = read_text(args.text)
    vocabulary, shape, weights = choose_shape(args, text)
    training, validation = split_text(encode(text, vocabulary, args.text or "the text"), args)
    prime = text[-len(text) // 10 :][:20] if args.prime is None else args.prime
    if not len(encode(prime, vocabulary, "--prime")):
        raise UserError("--prime needs at least one character")
    prepare_outputs(args)
    print(f"text: {len(text)} characters, {len(vocabulary)} different ones; model: {shape}")
    try:
        model = CharModel(len(vocabulary), shape, args.dropout)
        if weights is not None:
            model.load_state_dict(weights)
        stock, ours = make_learners(model, next(windows(*training, args.steps)), args)
    except (ValueError, RuntimeError) as error:  # an unfit backend, or too little memory
        raise UserError(f"cannot train {shape} with --backend {args.backend}: {error}") from None

    if args.iterations:
        train(stock, ours, windows(*training, args.steps), args)
        report(stock, ours, args.batch * args.steps)
        plot_losses(stock, ours, args.out / "losses.png")
    bits = [bits_per_character(learner.model, validation, args.steps) for learner in (stock, ours)]
    print(f"validation bits/char:    {stock.name} {bits[0]:.4f}, {ours.name} {bits[1]:.4f}")
    if not math.isfinite(sum(bits)):
        raise UserError("the model's scores are no longer finite: try a smaller --lr")
    if args.save is not None:
        save_checkpoint(args.save, ours.model, vocabulary, shape)
    sample = generate(ours.model, vocabulary, prime, args)
    (args.out / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may not know every character
    print(f"\n{sample}".encode(encoding, "replace").decode(encoding))


def main(argv: list[str] | None = None) -> None:
    """Run; what the user can put right ends in one line and exit status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
