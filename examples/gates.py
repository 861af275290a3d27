"""Why plain recurrent networks forget, why the LSTM need not, and what its gates do.

Two character models, one around ``nn.RNN`` and one around ``fastlstm.LSTM``, learn the same text
in the same way; then both are looked into.  The guide's first chapter (docs/guide.md) explains:

    python examples/gates.py                                   # a minute or less
    python examples/gates.py --sentence 'It is (almost) "over".' --iterations 4000

It prints what was measured and writes ``memory.png``, ``gates.png`` and ``cells.png`` to ``--out``.

Letters for shapes: T time steps, B texts side by side, E embedding size, H hidden size, V
characters in the vocabulary, N characters of one text.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from char_rnn import Streams, cut_into_streams, encode, windows
from common import Parser, UserError, number
from matplotlib.figure import Figure
from texts import read_text
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastlstm

# From the last tenth of CPython's help topics, which no model is trained on.
SENTENCE = (
    'There are two flavors: built-in methods (such as "append()" on lists)\n'
    "and class instance methods."
)
FILES = ("memory.png", "gates.png", "cells.png")


# %% Two models that differ in one line
class CharNet(nn.Module):
    """Embedding, a recurrent layer, and scores for the next character."""

    def __init__(self, recurrent: nn.Module, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, recurrent.input_size)
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, vocabulary_size)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Scores (T, B, V) for the character after each of ``ids`` (T, B), and the state there."""
        rows, state = self.recurrent(self.embedding(ids), state)  # (T, B, H)
        return self.head(rows), state


def train(net: CharNet, streams: Streams, name: str, args: Namespace) -> None:
    """Truncated backpropagation through time, as in char_rnn.py."""
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    state = None
    bar = tqdm(range(args.iterations), desc=f"training {name}", unit="step")
    for _, (x, y, first) in zip(bar, windows(*streams, args.steps), strict=False):
        logits, state = net(x, None if first else state)
        state = state.detach() if name == "RNN" else tuple(part.detach() for part in state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


# %% How far back does the gradient reach, and how far back does the model look?
def gradient_by_distance(net: CharNet, streams: Streams, most: int) -> Tensor:
    """|d loss_t / d x_{t-k}| for k = 0 ... ``most``, over that for k = 0: (most + 1,) float64.

    The norm is over the E numbers that stand for the character read k steps before t, the mean
    over streams and over several t.  float64, since the plain network's gradients leave float32.
    """
    net = copy.deepcopy(net).double()
    inputs, targets = streams
    norms = torch.zeros(most + 1, dtype=torch.float64)
    for t in range(most, len(inputs), max(most, len(inputs) // 8)):
        x = net.embedding(inputs[t - most : t + 1]).detach().requires_grad_()  # (most + 1, B, E)
        rows, _ = net.recurrent(x)
        loss = F.cross_entropy(net.head(rows[-1]), targets[t], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        norms += gradient.norm(dim=-1).mean(1).flip(0)
    return norms / norms[0]


@torch.no_grad()
def bits_by_context(net: CharNet, streams: Streams, lengths: list[int], count: int) -> list[float]:
    """Bits per character for guesses made when only the last k characters are the true ones.

    Before them the model reads 200 characters of another stream, so that its state is an ordinary
    one, only of another text.
    """
    inputs, targets = streams
    starts = torch.linspace(max(lengths) + 200, len(inputs) - 1, count).long().unique()
    found = []
    for length in lengths:
        ids = torch.cat([inputs[t - length - 199 : t + 1] for t in starts], 1)  # (200 + k, B * n)
        ids[:200] = ids[:200].roll(1, 1)
        rows, _ = net.recurrent(net.embedding(ids))
        right = torch.cat([targets[t] for t in starts])
        found.append(F.cross_entropy(net.head(rows[-1]), right).item() / math.log(2))
    return found


# %% The four gates
class Inside(NamedTuple):
    """What an LSTM did at each of N characters, each (N, H); (eq. n) as in docs/design.md."""

    learn: Tensor  # i * g, what is added to the cell state (eq. 3)
    forget: Tensor  # f, the share of the old cell state that is kept (eq. 3)
    remember: Tensor  # c, the new cell state: what was kept and what was added (eq. 3)
    use: Tensor  # o, the share of tanh(c) that is shown to the next step and the head (eq. 4)


EQUATIONS = {
    "learn": "learn   $i_t\\, g_t$",
    "forget": "forget   $f_t$",
    "remember": "remember   $c_t = f_t c_{t-1} + i_t g_t$",
    "use": "use   $o_t$   (of $h_t = o_t \\tanh c_t$)",
}


@torch.no_grad()
def look_inside(net: CharNet, ids: Tensor) -> Inside:
    """Read ``ids`` (N,) as one text."""
    x = net.embedding(ids)  # (N, E): one sequence needs no batch dimension
    _, _, cells = net.recurrent(x, return_cells=True)  # (N, H)
    i, f, g, o = fastlstm.gates(net.recurrent, x)  # each (N, H)
    return Inside(i * g, f, cells, o)


def classes_of(text: str) -> dict[str, Tensor]:
    """Kinds of characters, and of places in the text: name to (N,) bool."""
    kinds = {
        "at a space": lambda c: c == " ",
        "at a line end": lambda c: c == "\n",
        "at a capital": str.isupper,
        "at a digit": str.isdigit,
        "at a quote": lambda c: c == '"',
        "at an opening bracket": lambda c: c in "([{",
        "at a closing bracket": lambda c: c in ")]}",
        "at a vowel": lambda c: c in "aeiou",
    }
    found = {
        name: torch.tensor([bool(is_kind(c)) for c in text]) for name, is_kind in kinds.items()
    }
    for name, opening, closing in (("between brackets", "(", ")"), ("between quotes", '"', '"')):
        inside, places = False, []
        for character in text:
            inside = character != closing if inside else character == opening
            inside = inside and character != "\n"  # a lone one does not count for long
            places.append(inside)
        found[name] = torch.tensor(places)
    return found


class Unit(NamedTuple):
    """A hidden unit one of whose gates tells a kind of place from all others."""

    gate: str
    place: int  # which of the H units
    kind: str
    there: float  # mean where the kind is
    elsewhere: float
    separation: float  # between the means, in standard deviations


def most_selective(gate: str, values: Tensor, kinds: dict[str, Tensor]) -> Unit:
    """The unit and the kind whose means over ``values`` (N, H) are furthest apart."""
    found = []
    for kind, mask in kinds.items():
        if not 20 <= mask.sum() <= len(mask) - 20:  # too few to say
            continue
        there, elsewhere = values[mask], values[~mask]
        spread = ((there.var(0) + elsewhere.var(0)) / 2).sqrt() + 1e-6
        separation = (there.mean(0) - elsewhere.mean(0)) / spread  # (H,)
        unit = int(separation.abs().argmax())
        means = (there[:, unit].mean().item(), elsewhere[:, unit].mean().item())
        found.append(Unit(gate, unit, kind, *means, separation[unit].item()))
    if not found:
        raise UserError("--sentence or the text has too few spaces, brackets, ... to compare")
    return max(found, key=lambda unit: abs(unit.separation))


# %% Pictures
def plot_memory(
    gradients: dict[str, Tensor], bits: dict[str, list[float]], lengths: list[int], path: Path
) -> None:
    """How far back gradients reach, and what a longer context is worth."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, norms in gradients.items():
        style = "--" if "untrained" in name else "-"
        left.semilogy(norms.tolist(), style, color="C1" if "RNN" in name else "C0", label=name)
    left.set(xlabel="distance k (characters)", ylabel="|∂ loss(t) / ∂ x(t-k)|, relative to k = 0")
    left.legend()
    for name, values in bits.items():
        right.plot(lengths, values, "o-", color="C1" if "RNN" in name else "C0", label=name)
    right.set(xlabel="true characters before the guess", ylabel="bits per character", xscale="log")
    right.set_xticks(lengths, [str(length) for length in lengths])
    right.minorticks_off()
    right.legend()
    figure.savefig(path, dpi=90)


def show_characters(axes: Any, sentence: str) -> None:
    """Write the sentence under an axis, a character a tick."""
    shown = ["⏎" if c == "\n" else "␣" if c == " " else c for c in sentence]
    axes.set_xticks(range(len(shown)), shown, fontsize=8, family="DejaVu Sans Mono")
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="x", length=0)


def plot_gates(inside: Inside, sentence: str, units: list[Unit], path: Path) -> None:
    """One unit for each gate, a character a column."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, unit in zip(figure.subplots(len(units), 1), units, strict=True):
        values = getattr(inside, unit.gate)[:, unit.place]
        kinds = classes_of(sentence)[unit.kind]
        colors = ["C3" if there else "C7" for there in kinds]
        axes.bar(range(len(sentence)), values.tolist(), color=colors)
        axes.axhline(0, color="black", linewidth=0.5)
        title = f"{EQUATIONS[unit.gate]},  unit {unit.place}: {unit.there:.2f} {unit.kind} (red), "
        axes.set_title(f"{title}{unit.elsewhere:.2f} elsewhere", loc="left", fontsize=10)
        show_characters(axes, sentence)
    figure.savefig(path, dpi=80)


def plot_cells(inside: Inside, sentence: str, path: Path) -> None:
    """Forget gates and cell states of the units that keep most, and of those that keep least."""
    order = inside.forget.mean(0).argsort(descending=True)
    chosen = torch.cat((order[:12], order[-12:]))
    figure = Figure(figsize=(12, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    kept = upper.imshow(
        inside.forget[:, chosen].T.numpy(), aspect="auto", cmap="gray", vmin=0, vmax=1
    )
    state = inside.remember[:, chosen].T
    state = state / state.abs().amax(1, keepdim=True).clamp_min(1e-6)
    cells = lower.imshow(state.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    for axes, image, title in (
        (upper, kept, "forget gate $f_t$: 1 (white) keeps the cell state, 0 (black) drops it"),
        (lower, cells, "cell state $c_t$, each unit over its largest value in the sentence"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(chosen)), chosen.tolist(), fontsize=6)
        axes.set_ylabel("unit")
        show_characters(axes, sentence)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=80)


# %% The program
def make_parser() -> Parser:
    """Every option and its default."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn (default: Python's topics)")
    add("--sentence", default=SENTENCE, help="what to show the gates on")
    add("--hidden", type=number(int, 1, 4096), default=128, help="units (default 128)")
    add("--batch", type=number(int, 1, 10**4), default=32, help="streams (default 32)")
    add("--steps", type=number(int, 1, 10**4), default=64, help="per window (default 64)")
    add("--iterations", type=number(int, 1, 10**6), default=1500, help="steps (default 1500)")
    add("--lr", type=number(float, 1e-9, 1e3), default=2e-3, help="for Adam (default 0.002)")
    add("--distance", type=number(int, 2, 1000), default=100, help="to look back (default 100)")
    common.add_common_options(parser, "out/gates")
    return parser


def read_streams(args: Namespace) -> tuple[str, str, Streams, Streams]:
    """Vocabulary, the held-out tenth, and the streams to train on and to measure with."""
    text = read_text(args.text)
    vocabulary = "".join(sorted(set(text)))
    held_out = text[len(text) * 9 // 10 :]
    ids = encode(text, vocabulary, "the text")
    training = cut_into_streams(ids[: len(text) - len(held_out)], args.batch)
    measured = cut_into_streams(ids[-len(held_out) :], args.batch)
    if len(training[0]) < args.steps or len(measured[0]) < 2 * args.distance + 250:
        need = f"--batch {args.batch}, --steps {args.steps} and --distance {args.distance}"
        raise UserError(f"{len(text)} characters of text are too few for {need}")
    if not len(encode(args.sentence, vocabulary, "--sentence")):
        raise UserError("--sentence needs at least one character")
    return vocabulary, held_out, training, measured


def run(args: Namespace) -> None:
    """Train both, measure their memory, look into the LSTM."""
    common.start(args)
    vocabulary, held_out, training, measured = read_streams(args)
    common.prepare(*(args.out / name for name in FILES))
    lengths = [k for k in (4, 8, 16, 32, 64, 128) if k <= 2 * args.distance]
    gradients, bits, nets = {}, {}, {}
    for name, kind in (("RNN", nn.RNN), ("LSTM", fastlstm.LSTM)):
        torch.manual_seed(args.seed)
        nets[name] = net = CharNet(kind(32, args.hidden), len(vocabulary))
        gradients[f"{name}, untrained"] = gradient_by_distance(net, measured, args.distance)
        train(net, training, name, args)
        gradients[name] = gradient_by_distance(net, measured, args.distance)
        bits[name] = bits_by_context(net, measured, lengths, count=48)
    print("gradient norm relative to distance 0, by distance:")
    places = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= args.distance]
    print(f"{'':16}" + "".join(f"{k:>9}" for k in places))
    for name, norms in gradients.items():
        print(f"{name:16}" + "".join(f"{norms[k]:9.1e}" for k in places))
    print("bits per character where only the last so many characters are the true ones:")
    print(f"{'':16}" + "".join(f"{k:>9}" for k in lengths))
    for name, values in bits.items():
        print(f"{name:16}" + "".join(f"{value:9.3f}" for value in values))
    plot_memory(gradients, bits, lengths, args.out / "memory.png")
    show_gates(nets["LSTM"], vocabulary, held_out, args)


def show_gates(net: CharNet, vocabulary: str, held_out: str, args: Namespace) -> None:
    """Choose a unit for each gate by the whole held-out text, show it on the sentence."""
    held_out = held_out[:20_000]
    seen = look_inside(net, encode(held_out, vocabulary, "the text"))
    shown = {kind: int(mask.sum()) for kind, mask in classes_of(args.sentence).items()}
    kinds = {kind: mask for kind, mask in classes_of(held_out).items() if shown[kind] > 1}
    units = []
    for gate in Inside._fields:
        units.append(most_selective(gate, getattr(seen, gate), kinds))
        if len(kinds) > 1:  # another kind for the next gate
            del kinds[units[-1].kind]
    print(f"means over {len(held_out)} characters that were not trained on:")
    for unit in units:
        means = f"{unit.there:6.2f} {unit.kind}, {unit.elsewhere:.2f} elsewhere"
        print(f"{unit.gate:10}unit {unit.place:<5}{means} ({abs(unit.separation):.1f} deviations)")
    # The sentence comes after what stands before it in the text, or after the text's beginning.
    before = held_out.partition(args.sentence)[0][-500:]
    whole = look_inside(net, encode(before + args.sentence, vocabulary, "--sentence"))
    inside = Inside(*(part[len(before) :] for part in whole))
    plot_gates(inside, args.sentence, units, args.out / "gates.png")
    plot_cells(inside, args.sentence, args.out / "cells.png")
    print(f"the pictures are in {args.out}: {', '.join(FILES)}")


def main(argv: list[str] | None = None) -> None:
    """The command line's program."""
    common.run_example(run, make_parser(), argv)


if __name__ == "__main__":
    main()
