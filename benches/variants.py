"""Contests beyond the plain layer: packed rows, layers, directions, projections, resets, cells."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm.cli.arguments import Shape
from fastlstm.cli.compare import difference
from fastlstm.cli.contest import Contest
from fastlstm.cli.timing import cuda_seconds_per_call, seconds_per_call

FULL = 0.6  # of a batch whose sequences have different lengths
RESETS = 0.01  # of the rows
VARIANTS = (
    *("plain", "packed", "lengths", "projection", "bidirectional", "two layers"),
    *("two layers, both directions", "resets", "cell"),
)


def config(variant: str, hidden: int) -> dict[str, Any]:
    """What both modules are made with."""
    return dict(
        num_layers=2 if variant.startswith("two layers") else 1,
        bidirectional=variant in ("bidirectional", "two layers, both directions"),
        proj_size=hidden // 2 if variant == "projection" else 0,
    )


def unsorted_lengths(steps: int, batch: int) -> Tensor:
    """(batch,) int64: as long on average as FULL says, the longest ``steps``, in no order."""
    shortest = 2 * FULL - 1  # as a share of the longest
    return torch.linspace(1, shortest, batch).mul(steps).ceil().long()[torch.randperm(batch)]


class VariantContest(Contest):
    """As Contest, of a variant.

    ``packed``: both are given the same packed sequences.  ``lengths``: padded ones go in and come
    out, for which nn.LSTM has them packed and padded again.  nn.LSTM has no resets: their rival is
    fastlstm without them, and what they compute is checked against the reference backend.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        variant: str = "plain",
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        steps, batch, inputs, hidden = shape
        self.shape, self.variant, self.device = shape, variant, torch.device(device)
        torch.manual_seed(0)  # first the lengths, which are then the same for every dtype
        several = variant in ("packed", "lengths")
        self.lengths = unsorted_lengths(steps, batch) if several else None
        made: dict[str, Any] = dict(device=self.device, dtype=dtype)
        options = config(variant, hidden)
        sides = options["num_layers"] * (1 + options["bidirectional"])
        self.make = partial(fastlstm.LSTM, inputs, hidden, **options, **made)
        ours = partial(self.make, backend=backend)
        self.theirs = ours() if variant == "resets" else nn.LSTM(inputs, hidden, **options, **made)
        self.ours = ours()
        self.ours.load_state_dict(self.theirs.state_dict())
        output = options["proj_size"] or hidden
        self.hx = tuple(torch.randn(sides, batch, size, **made) for size in (output, hidden))
        self.x = torch.randn(steps, batch, inputs, **made)
        self.packed, self.reset = None, None
        if variant == "packed":
            self.packed = pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
            self.x = self.packed.data
        elif variant == "resets":
            self.reset = torch.rand(steps, batch, device=self.device) < RESETS
        self.x.requires_grad_()
        width = output * (1 + options["bidirectional"])
        self.dy = torch.randn(*self.x.shape[:-1], width, **made)
        self.clock = cuda_seconds_per_call if self.device.type == "cuda" else seconds_per_call

    def rows(self) -> int:
        """Of all steps and sequences, without padding."""
        steps, batch, _, _ = self.shape
        return steps * batch if self.lengths is None else int(self.lengths.sum())

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        if self.packed is not None:
            output, (h_n, c_n) = module(PackedSequence(self.x, *self.packed[1:]), self.hx)
            return output.data, h_n, c_n
        if self.lengths is not None and module is not self.ours:
            packed = pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
            output, (h_n, c_n) = module(packed, self.hx)
            return pad_packed_sequence(output, total_length=len(self.x))[0], h_n, c_n
        options = {} if self.lengths is None else dict(lengths=self.lengths)
        if self.reset is not None and module is not self.theirs:
            options["reset"] = self.reset
        output, (h_n, c_n) = module(self.x, self.hx, **options)
        return output, h_n, c_n

    def oracle(self) -> nn.Module:
        """What ours is checked against."""
        if self.reset is None:
            return self.theirs
        module = self.make(backend="reference")
        module.load_state_dict(self.ours.state_dict())
        return module

    def allowed(self) -> dict[str, float] | None:
        """The tolerance, where it is not that of the dtype."""
        return None

    def problem(self) -> str | None:
        """How our results differ from the oracle's, or None."""
        ours, theirs = self.results(self.ours), self.results(self.oracle())
        self.clear()
        for name, want in theirs.items():
            if text := difference(ours[name], want, self.allowed()):
                return f"{name} {text}{self.remark(name, ours[name], want)}"
        return None

    def remark(self, name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
        """More about a problem."""
        return ""


class CellContest(Contest):
    """LSTMCell, called once a step."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        _, _, inputs, hidden = shape
        super().__init__(shape, dtype)
        self.theirs = nn.LSTMCell(inputs, hidden, dtype=dtype)
        self.ours = fastlstm.LSTMCell(inputs, hidden, dtype=dtype)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.hx = tuple(state[0] for state in self.hx)

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        state, outputs = self.hx, []
        for row in self.x:
            state = module(row, state)
            outputs.append(state[0])
        return torch.stack(outputs), *state


class PenaltyContest(Contest):
    """A loss of the gradient of another one with respect to the input, as WGAN-GP has it."""

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        found = self.run(module)
        (slope,) = torch.autograd.grad(found[0], self.x, self.dy, create_graph=True)
        slope.square().sum().backward()
        return found


class StepContest(Contest):
    """The layer, called once a step, as a decoder calls it."""

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        state, outputs = self.hx, []
        for row in self.x:
            output, state = module(row[None], state)
            outputs.append(output)
        return torch.cat(outputs), *state
