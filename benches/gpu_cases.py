"""The rows that ``make gpu`` measures, and the contest of one: both modules and their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm import cuda
from fastlstm.cli.compare import difference, tolerance
from fastlstm.cli.contest import Contest
from fastlstm.cli.timing import cuda_seconds_per_call, seconds_per_call

STEPS, SHORT = 512, 32  # short: what a call costs beyond its steps counts
# The most important first: a run that is cut short has those.
SHAPES = ((16, 512), (64, 1024), (64, 512), (16, 256), (128, 1024), (1, 256), (256, 2048))
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
}
VARIANTS = ("packed", "bidirectional", "two layers", "resets")
FULL = 0.6  # of a packed batch
RESETS = 0.01  # of the rows


class Case(NamedTuple):
    """What is measured, in both modes."""

    batch: int
    hidden: int
    precision: str
    variant: str = "plain"
    steps: int = STEPS
    backend: str = "triton"


def cases() -> list[Case]:
    """All, in the order of importance."""
    first, others = SHAPES[:2], SHAPES[2:-1]

    def plain(shapes: tuple, *precisions: str) -> Iterator[Case]:
        return (Case(*shape, precision) for shape in shapes for precision in precisions)

    return [
        *plain(first, "bf16", "tf32"),
        *(case._replace(steps=SHORT) for case in plain(first, "bf16", "tf32")),
        *_cuda(plain(first, "bf16", "fp16", "tf32")),
        *_cuda(Case(*s, "bf16", v) for v in VARIANTS for s in first),
        *(Case(*s, p, v) for v in VARIANTS for s in first for p in ("bf16", "tf32")),
        *plain(others, "bf16", "tf32"),
        *plain(first, "fp16", "fp32"),
        *plain(others, "fp16", "fp32"),
        *_cuda(plain(others, "bf16", "tf32")),
        *plain(SHAPES[-1:], *PRECISIONS),
    ]


def _cuda(these: Iterable[Case]) -> Iterator[Case]:
    """The same for the cuda backend, where it is there."""
    for case in these if cuda.missing() is None else ():
        yield case._replace(backend="cuda")


def dry_cases() -> list[Case]:
    """Of a dry run: every variant, tiny."""
    tiny = [Case(2, 4, "fp32", variant, 2) for variant in ("plain", *VARIANTS)]
    return [*tiny, *_cuda(Case(2, 8, "bf16", variant, 2) for variant in ("plain", *VARIANTS))]


def set_precision(name: str) -> torch.dtype:
    """Have both sides multiply so; the dtype."""
    dtype, products = PRECISIONS[name]
    # The switches that keep torch's older and newer ones in agreement.
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    found = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    if [each == "tf32" for each in found] != [products == "tf32"] * 2:
        raise RuntimeError(f"precision {name}: torch says {found}")
    return dtype


class DeviceContest(Contest):
    """As Contest, on a device and with packed rows, layers, directions and resets.

    nn.LSTM has no resets: that row's rival is fastlstm without them, and what it computes is
    checked against the reference backend.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        made = dict(device=device, dtype=set_precision(case.precision))
        shape = (case.steps, case.batch, case.hidden)
        config = dict(
            num_layers=1 + (case.variant == "two layers"),
            bidirectional=case.variant == "bidirectional",
        )
        directions = 1 + config["bidirectional"]
        fast = partial(fastlstm.LSTM, backend=case.backend)
        kind: Callable[..., nn.Module] = fast if case.variant == "resets" else nn.LSTM
        self.theirs = kind(case.hidden, case.hidden, **config, **made)
        self.ours = fast(case.hidden, case.hidden, **config, **made)
        self.ours.load_state_dict(self.theirs.state_dict())
        states = (2, config["num_layers"] * directions, case.batch, case.hidden)
        self.hx = torch.randn(states, **made).unbind()
        self.x = torch.randn(shape, **made)
        self.reset = None
        self.batch_sizes = None
        if case.variant == "packed":
            shortest = 2 * FULL - 1  # as a share of the longest
            lengths = torch.linspace(1, shortest, case.batch).mul(case.steps).ceil().long()
            packed = pack_padded_sequence(self.x, lengths)
            self.x, self.batch_sizes = packed.data, packed.batch_sizes
        elif case.variant == "resets":
            self.reset = torch.rand(shape[:2], device=device) < RESETS
        self.x.requires_grad_()
        self.dy = torch.randn(*self.x.shape[:-1], directions * case.hidden, **made)
        self.clock = cuda_seconds_per_call if device.type == "cuda" else seconds_per_call

    def fill(self) -> float:
        """The share of (steps, batch) that has rows."""
        return self.dy.numel() / self.dy.size(-1) / (self.case.steps * self.case.batch)

    def _run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        if self.batch_sizes is not None:
            output, (h_n, c_n) = module(PackedSequence(self.x, self.batch_sizes), self.hx)
            return output.data, h_n, c_n
        takes_reset = self.reset is not None and module is not self.theirs
        reset = dict(reset=self.reset) if takes_reset else {}
        output, (h_n, c_n) = module(self.x, self.hx, **reset)
        return output, h_n, c_n

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        found = self._run(module)
        found[0].backward(self.dy)
        return found

    @torch.no_grad()
    def infer(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        return self._run(module)

    def problem(self) -> str | None:
        """How our results differ from the oracle's, or None."""
        oracle = self.theirs
        if self.reset is not None:
            made = dict(device=self.device, dtype=self.x.dtype)
            oracle = fastlstm.LSTM(self.case.hidden, self.case.hidden, backend="reference", **made)
            oracle.load_state_dict(self.ours.state_dict())
        ours, theirs = self.results(self.ours), self.results(oracle)
        # A product in TF32 has the mantissa of float16, and is rounded as the library likes.
        allowed = tolerance(torch.float16 if self.case.precision == "tf32" else self.x.dtype)
        differences = ((name, difference(ours[name], theirs[name], allowed)) for name in theirs)
        self.clear()
        found = next(((name, text) for name, text in differences if text), None)
        if found is None:
            return None
        name, text = found
        return f"{name} {text}{self._distances(name, ours[name], theirs[name])}"

    def _distances(self, name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
        """How far both are from nn.LSTM in float32, for who looks into a problem."""
        known = self.reset is None and ours is not None and theirs is not None
        if not known or self.case.precision == "fp32":
            return ""
        exact = DeviceContest(self.case._replace(precision="fp32"), self.device)
        wide = {k: v.float() for k, v in self.theirs.state_dict().items()}
        exact.theirs.load_state_dict(wide)
        for leaf in ("x", "dy"):
            setattr(exact, leaf, getattr(self, leaf).detach().float())
        exact.hx = tuple(state.float() for state in self.hx)
        exact.x.requires_grad_()
        want = exact.results(exact.theirs)[name]
        far = [float((t.detach().float() - want.detach()).abs().max()) for t in (ours, theirs)]
        return f"; from float32: ours by {far[0]:.2g}, nn.LSTM by {far[1]:.2g}"
