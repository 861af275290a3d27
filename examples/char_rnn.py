"""A character-level language model, trained twice: with nn.LSTM and with fastlstm.

The model reads a text one character at a time and learns to guess the next one.  Two copies
start from the same weights and see the same batches, in alternation; in the second copy one line,
``fastlstm.replace_lstm_(model)``, has swapped the LSTM.  Same losses; the times are printed:

    python examples/char_rnn.py             # CPython's help topics, a minute or two
    python examples/char_rnn.py --text book.txt --hidden 512 --save book.pt --save-every 500
    python examples/char_rnn.py --text book.txt --hidden 512 --load book.pt --resume
    python examples/char_rnn.py --text book.txt --load book.pt --iterations 0 --prime "It was "
    torchrun --nproc-per-node 2 examples/char_rnn.py --ddp       # each process, half the batch

It prints what was measured and writes ``losses.png``, ``losses.csv`` and ``sample.txt`` to
``--out``.

Letters for shapes: T time steps in a window, B streams side by side (the batch), S steps in a
whole stream, E embedding size, H hidden size, L layers, V characters in the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import common
import losses
import texts
import torch
from common import Parser, UserError, number
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fastlstm

Shape = dict[str, int]  # the sizes in DEFAULT_SHAPE
State = tuple[Tensor, Tensor]  # h and c, each (L, B, H)
Streams = tuple[Tensor, Tensor]  # inputs and targets, each (S, B)
Window = tuple[Tensor, Tensor, bool]  # inputs and targets, each (T, B); whether streams start here
Save = Callable[[int], None]  # writes a checkpoint after so many steps

# The sizes that fix the shapes of the weights; a checkpoint carries its own.
DEFAULT_SHAPE = {"embedding": 64, "hidden": 256, "layers": 1}


# %% The text
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

    def __post_init__(self) -> None:
        # Its backward pass leaves the mean of all processes' gradients in the parameters, so
        # every process takes the same step and the models stay equal.
        several = common.processes() > 1
        self.forward = DistributedDataParallel(self.model) if several else self.model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of one window; the state moves on to the window's end."""
        logits, state = self.forward(x, self.state)  # (T, B, V)
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
        self.losses.append(common.mean_of_processes(loss).item())
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
        learner.state = None
    return learners


def train(
    stock: Learner, ours: Learner, batches: Iterator[Window], save: Save, args: Namespace
) -> None:
    """Train both on the same batches, a step each in turn, so that both meet the same machine."""
    steps = range(args.first_step, args.iterations)
    bar = tqdm(steps, desc="training", unit="step", disable=common.rank() > 0)
    # The batches never end.
    for iteration, (x, y, first) in zip(bar, batches, strict=False):
        for learner in (stock, ours) if iteration % 2 == 0 else (ours, stock):  # a fair start
            torch.manual_seed(args.seed + iteration)  # the same dropout masks for both
            learner.step(x, y, first, args.clip)
        if not math.isfinite(stock.losses[-1] + ours.losses[-1]):
            bar.close()
            raise UserError(f"the loss is no longer finite at step {iteration}: try a smaller --lr")
        bar.set_postfix_str(f"loss {stock.losses[-1]:.3f} / {ours.losses[-1]:.3f}", refresh=False)
        if args.save_every and (iteration + 1) % args.save_every == 0:
            save(iteration + 1)


@torch.no_grad()
def bits_per_character(model: CharModel, streams: Streams, steps: int) -> float:
    """How many bits the model needs for one character of the text; lower is better."""
    model.eval()
    state: State | None = None
    nats = 0.0
    for x, y in zip(*(part.split(steps) for part in streams), strict=True):  # (T, B); last: less
        logits, state = model(x, state)  # (T, B, V)
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return nats / streams[0].numel() / math.log(2)


# %% Writing text
def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One character's place, drawn from scores (V,).

    A temperature below 1 is cautious, above 1 is bold.  Only the ``top_k`` best can be drawn (0:
    all of them), which takes away the long tail of characters that are each all but impossible.
    """
    scores = (logits.cpu() - logits.max().cpu()).double() / temperature  # best is 0: no overflow
    if top_k:
        scores[scores < scores.topk(min(top_k, len(scores))).values[-1]] = -math.inf
    return torch.multinomial(scores.softmax(0), 1, generator=generator)  # (1,) int64


@torch.no_grad()
def generate(model: CharModel, vocabulary: str, prime: str, args: Namespace) -> str:
    """Read ``prime``, then write on, one character at a time."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(args.seed)
    ids = encode(prime, vocabulary, "--prime")[:, None]  # (len(prime), 1)
    logits, state = model(ids.to(device))  # (len(prime), 1, V)
    written = []
    for _ in range(args.sample_length):
        choice = draw(logits[-1, 0], args.temperature, args.top_k, generator)
        written.append(vocabulary[int(choice)])
        # T = 1: what was read and written so far is all in the state, so nothing is read twice.
        logits, state = model(choice[:, None].to(device), state)  # (1, 1, V)
    return prime + "".join(written)


def beginning_of(text: str) -> str:
    """Something to go on from: the whole words among the first 50 characters."""
    return " ".join(text[:50].split(" ")[1:-1]).strip() or text[:50]


# %% The command line
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
    add("--temperature", type=number(float, 1e-3, 1e3), default=0.7, help="below 1: cautious (0.7)")
    add("--top-k", type=number(int, 0, 10**6), default=0, help="best to draw from (0: all)")
    add("--sample-length", type=count, default=500, help="characters to write (default 500)")
    add("--prime", help="text to go on from (default: from the validation text)")
    add("--save", type=Path, metavar="FILE", help="write a checkpoint after training")
    add("--save-every", type=number(int, 0, 10**9), default=0, help="and each so many steps")
    add("--load", type=Path, metavar="FILE", help="start from a checkpoint")
    add("--resume", action="store_true", help="go on to --iterations where --load's file stopped")
    add("--backend", default="auto", help="fastlstm's backend (default auto)")
    add("--ddp", action="store_true", help="share the batch with the processes of torchrun")
    common.add_common_options(parser, "out/char_rnn")
    return parser


def choose_shape(args: Namespace, text: str) -> tuple[str, Shape, checkpoints.Checkpoint | None]:
    """Vocabulary and shape, and the checkpoint that they are of, if there is one."""
    given = {name: value for name in DEFAULT_SHAPE if (value := getattr(args, name)) is not None}
    args.first_step = 0
    args.digest = hashlib.sha256(text.encode()).hexdigest()
    if args.load is None:
        if args.resume:
            raise UserError("--resume needs --load FILE")
        # The whole text's characters, so that the validation part has no unknown ones.
        return "".join(sorted(set(text))), DEFAULT_SHAPE | given, None
    checkpoint = checkpoints.load(args.load, CharModel)
    for name, value in given.items():
        if value != checkpoint.shape[name]:
            shape = checkpoint.shape[name]
            raise UserError(f"{args.load} was made with --{name} {shape}, not {value}")
    if args.resume:
        args.first_step = checkpoints.step_to_resume(args.load, checkpoint, training_run(args))
    return checkpoint.vocabulary, checkpoint.shape, checkpoint


def training_run(args: Namespace) -> checkpoints.Run:
    """What has to be the same for a training to go on."""
    return {"text": args.digest, "batch": args.batch, "steps": args.steps}


def split_text(ids: Tensor, args: Namespace) -> tuple[Streams, Streams]:
    """The streams to train on, and those of the last tenth, which is only for validation."""
    split = len(ids) * 9 // 10
    training = cut_into_streams(ids[:split], args.batch)
    validation = cut_into_streams(ids[split:], args.batch)
    if len(training[0]) < args.steps or len(validation[0]) < 1:
        need = f"--batch {args.batch} times --steps {args.steps}"
        raise UserError(f"{len(ids)} characters of text are too few for one batch ({need})")
    return training, validation


def check_options(args: Namespace) -> None:
    """What does not depend on the text; directories are made."""
    if args.save_every and args.save is None:
        raise UserError("--save-every needs --save FILE")
    if args.batch % common.processes():
        count = common.processes()
        raise UserError(f"--ddp: {count} processes cannot share --batch {args.batch} equally")
    outputs = ("sample.txt", "losses.png", "losses.csv")
    common.prepare(*(args.out / name for name in outputs), *([args.save] if args.save else []))


def run(args: Namespace) -> None:
    """In one process, or in one of several."""
    common.start(args)
    with common.process_group(args.ddp) as device:
        train_and_write(args, device)


def train_and_write(args: Namespace, device: torch.device) -> None:
    """Train, measure, write; what can be wrong is looked at before the training."""
    text = texts.read_text(args.text)
    vocabulary, shape, checkpoint = choose_shape(args, text)
    training, validation = split_text(encode(text, vocabulary, args.text or "the text"), args)
    prime = beginning_of(text[len(text) * 9 // 10 :]) if args.prime is None else args.prime
    if not len(encode(prime, vocabulary, "--prime")):
        raise UserError("--prime needs at least one character")
    check_options(args)
    # Every process walks down its own columns of the same windows.
    training = tuple(common.own_columns(part).contiguous().to(device) for part in training)
    validation = tuple(part.to(device) for part in validation)
    print(f"text: {len(text)} characters, {len(vocabulary)} different ones; model: {shape}")
    try:
        model = CharModel(len(vocabulary), shape, args.dropout)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.weights)
        window = next(windows(*training, args.steps))
        stock, ours = make_learners(model.to(device), window, args)
        if args.resume:
            for learner in (stock, ours):
                checkpoints.resume(learner, checkpoint.training, args.lr)
    except (ValueError, RuntimeError) as error:  # an unfit backend, or too little memory
        raise UserError(f"cannot train {shape} with --backend {args.backend}: {error}") from None

    def content(step: int) -> checkpoints.Checkpoint:  # every process calls it
        progress = checkpoints.progress(ours, step, training_run(args))
        return checkpoints.Checkpoint(vocabulary, shape, ours.model.state_dict(), progress)

    def save(step: int) -> None:
        checkpoints.write(args.save, content(step))

    batches = itertools.islice(windows(*training, args.steps), args.first_step, None)
    train(stock, ours, batches, save, args)
    last = content(max(args.first_step, args.iterations))
    if common.rank() == 0:  # the others have nothing to add
        finish(stock, ours, last, validation, prime, args)


def finish(
    stock: Learner,
    ours: Learner,
    last: checkpoints.Checkpoint,
    validation: Streams,
    prime: str,
    args: Namespace,
) -> None:
    """Report, plot, validate, save and write a sample."""
    if stock.losses:
        losses.report(stock, ours, args.batch * args.steps)
        losses.write_losses(stock, ours, args.first_step, args.out / "losses.csv")
        losses.plot_losses(stock, ours, args.first_step, args.out / "losses.png")
    bits = [bits_per_character(learner.model, validation, args.steps) for learner in (stock, ours)]
    print(f"validation bits/char:    {stock.name} {bits[0]:.4f}, {ours.name} {bits[1]:.4f}")
    if not math.isfinite(sum(bits)):
        raise UserError("the model's scores are no longer finite: try a smaller --lr")
    if args.save is not None:
        checkpoints.write(args.save, last)
    sample = generate(ours.model, last.vocabulary, prime, args)
    (args.out / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may not know every character
    said = f"\nwritten after reading {prime!r}:\n{sample[len(prime) :]}\n"
    print(said.encode(encoding, "replace").decode(encoding))
    print(f"the files are in {args.out}")


def main(argv: list[str] | None = None) -> None:
    """The command line's program."""
    common.run_example(run, make_parser(), argv)


if __name__ == "__main__":
    main()
