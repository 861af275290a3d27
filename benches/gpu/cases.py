"""The rows that ``make gpu`` measures, and the contest of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from variants import VariantContest

from fastlstm import cuda
from fastlstm.cli.compare import tolerance
from gpu.common import KERNELS

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
# Where a cluster and a grid of blocks could serve, so that the rule between them can be checked.
BY_KERNEL = ((16, 512), (64, 512), (16, 256), (1, 256))


class Case(NamedTuple):
    """What is measured, in both modes."""

    batch: int
    hidden: int
    precision: str
    variant: str = "plain"
    steps: int = STEPS
    backend: str = "triton"
    kernel: str = "best"  # of the cuda backend; "grid" and "cluster" overrule it


def cases() -> list[Case]:
    """All, in the order of importance."""
    first, others = SHAPES[:2], SHAPES[2:-1]

    def plain(shapes: tuple, *precisions: str) -> Iterator[Case]:
        return (Case(*shape, precision) for shape in shapes for precision in precisions)

    return [
        *plain(first, "bf16", "tf32"),
        *(case._replace(steps=SHORT) for case in plain(first, "bf16", "tf32")),
        *_cuda(plain(first, "bf16", "fp16", "tf32")),
        *_by_kernel(),
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


def _by_kernel() -> Iterator[Case]:
    """Both kinds of CUDA kernels, for those shapes that this device can give to the kind."""
    these = (Case(*shape, "bf16", kernel=kernel) for shape in BY_KERNEL for kernel in KERNELS)
    for case in _cuda(these):
        sizes = (case.hidden, 1, case.batch, case.kernel)
        if reason := torch.ops.fastlstm_cuda.refusal("bfloat16", *sizes):
            print("not measured:", *case, reason)
        else:
            yield case


def dry_cases() -> list[Case]:
    """Of a dry run: every variant and kernel, tiny."""
    variants = ("plain", *VARIANTS)
    tiny = [Case(2, 4, "fp32", variant, 2) for variant in variants]
    of_cuda = [Case(2, 8, "bf16", variant, 2) for variant in variants]
    return [*tiny, *_cuda([*of_cuda, *(of_cuda[0]._replace(kernel=name) for name in KERNELS)])]


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


class DeviceContest(VariantContest):
    """The contest of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        shape = (case.steps, case.batch, case.hidden, case.hidden)
        dtype = set_precision(case.precision)
        cuda.KERNEL = case.kernel
        super().__init__(shape, dtype, case.variant, device, case.backend)

    def plans(self) -> dict[str, str]:
        """Of the cuda backend: the kernels that serve both walks, and in how many teams."""
        if self.case.backend != "cuda":
            return {}
        name, sides = str(self.x.dtype).removeprefix("torch."), 1 + self.theirs.bidirectional
        sizes = (name, self.case.hidden, sides, self.case.batch, self.case.kernel)
        walks = {"forward": False, "backward": True}
        return {walk: torch.ops.fastlstm_cuda.plan(back, *sizes) for walk, back in walks.items()}

    def fill(self) -> float:
        """The share of (steps, batch) that has rows."""
        return self.rows() / (self.case.steps * self.case.batch)

    def allowed(self) -> dict[str, float]:
        """A product in TF32 has the mantissa of float16, and is rounded as the library likes."""
        return tolerance(torch.float16 if self.case.precision == "tf32" else self.x.dtype)

    def remark(self, name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
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
