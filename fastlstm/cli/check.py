"""Test every backend that is there against the reference on this machine.

Outputs and gradients of small modules in every dtype and with every feature are compared within
the tolerances of fastlstm/cli/compare.py, and two calls bit by bit; the CPU's kernels once for
each instruction set.  The exit status is 1 if anything differs, or nothing was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, native
from ..contract import Weights
from ..module import LSTM
from .arguments import DTYPES, backend_of, cpu_count, seconds_of
from .compare import difference

ORACLE = "reference"


class Case(NamedTuple):
    """A module and what it is called with."""

    name: str
    shape: tuple[int, int, int, int]  # T, B, I, H
    config: dict[str, Any] = {}
    lengths: list[int] | None = None
    reset: float = 0.0  # the share of steps that begin a segment
    cells: bool = False
    threads: int = 1  # more spin for each other where the machine is busy
    forced: bool = True  # onto the matrix unit and the like, for which these layers are small


_BOTH = {"num_layers": 2, "bidirectional": True}
CASES = (
    Case("one layer", (5, 3, 17, 33)),
    Case("one sequence", (40, 1, 9, 20)),
    Case("a few steps, as programs have them", (2, 3, 18, 33), forced=False),
    Case("two layers, both directions", (6, 4, 10, 16), _BOTH),
    Case("projection", (4, 5, 7, 19), {"proj_size": 5, **_BOTH}),
    Case("lengths", (7, 5, 6, 10), _BOTH, lengths=[3, 7, 1, 0, 7]),
    Case("resets and cells", (9, 7, 10, 40), _BOTH, reset=0.3, cells=True),
    Case("several threads", (8, 40, 64, 96), {"bias": False}, threads=min(4, cpu_count())),
)


class Place(NamedTuple):
    """What runs where; ``instructions`` are one of the compiled library's sets."""

    backend: backends.Backend
    device: torch.device
    instructions: str | None = None

    def __str__(self) -> str:
        return f"{self.backend.name} {self.instructions or self.device}"


@dataclass
class Outcome:
    """How a backend did in one place."""

    checked: int = 0
    left: int = 0  # not reached in time
    refused: Counter[str] = field(default_factory=Counter)  # reasons, as the backend gave them
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.checked - len(self.failures)} of {self.checked} ok"]
        parts += [f"{times} refused: {reason}" for reason, times in self.refused.items()]
        parts += [f"{self.left} not reached in time"] * bool(self.left)
        return "; ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m fastlstm check`` takes."""
    add = parser.add_argument
    add("--backend", type=backend_of, default="auto", help="only this one; it must be there")
    add("--seconds", type=seconds_of, default=25.0, help="to come to an end in (default 25)")


def run(args: argparse.Namespace) -> int:
    """The exit status; a line for each place is printed, and one for each failure."""
    places = list(_places(args.backend))  # may build the library, which takes its time
    deadline = monotonic() + args.seconds
    checked = failed = 0
    with _exact_products(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections")  # torch's, of its own
        for k, place in enumerate(places):
            begin = monotonic()
            share = begin + max(0.0, deadline - begin) / (len(places) - k)
            outcome = _check(place, share)
            print(f"{place!s:<20} {outcome} ({monotonic() - begin:.1f} s)")
            for failure in outcome.failures:
                print(f"  FAILED {failure}")
            checked += outcome.checked
            failed += len(outcome.failures)
    print(f"{failed} of {checked} failed" if failed or not checked else "no differences")
    return int(failed > 0 or checked == 0)


def _places(only: str) -> Iterator[Place]:
    """What is to be checked; what cannot be is said."""
    devices = [torch.device("cpu"), torch.accelerator.current_accelerator(check_available=True)]
    for name, missing in backends.available_backends().items():
        if only not in ("auto", name):
            continue
        if missing is not None:
            print(f"{name:<20} not here: {missing}")
        elif name == ORACLE:
            print(f"{name:<20} what the others are checked against")
        else:
            for device in filter(None, devices):
                yield from _places_on(device, name)


def _places_on(device: torch.device, name: str) -> Iterator[Place]:
    """None where the backend does not serve that device."""
    x, sizes = torch.zeros(1, 1, device=device), torch.ones(1, dtype=torch.int64)
    w = x.expand(4, 1)
    weights = Weights(w, w, bias=None, w_hr=None)
    call = backends.Call(x, sizes, x[None], weights, None, need_cells=False, need_reserve=False)
    try:
        backend = backends.pick(name, call)
    except RuntimeError:
        return
    if backend.compiled:
        yield from (Place(backend, device, which) for which in native.instruction_sets())
    else:
        yield Place(backend, device)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """cuDNN takes TF32 for float32 unless it is told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def _instructions(name: str | None, forced: bool) -> Iterator[None]:
    if name is None:
        yield
        return
    before = native.use_instruction_set(name)
    native.spare_matrix_unit(not forced)
    try:
        yield
    finally:
        native.spare_matrix_unit(True)
        native.use_instruction_set(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and the library with it, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(place: Place, deadline: float) -> Outcome:
    """Every case in every dtype, as far as time allows."""
    outcome = Outcome()
    todo = [(case, getattr(torch, dtype)) for case in CASES for dtype in DTYPES]
    for k, (case, dtype) in enumerate(todo):
        if monotonic() > deadline:
            outcome.left = len(todo) - k
            break
        try:
            with _instructions(place.instructions, case.forced), threads(case.threads):
                problem = _problem(place, case, dtype)
        except backends.Refusal as refusal:
            outcome.refused[refusal.reason] += 1
            continue
        except Exception as error:  # whatever it is belongs to this case, and the others go on
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        outcome.checked += 1
        if problem is not None:
            outcome.failures.append(f"{case.name}, {str(dtype).removeprefix('torch.')}: {problem}")
    return outcome


def _problem(place: Place, case: Case, dtype: torch.dtype) -> str | None:
    """How the backend's results differ from the reference's, or from its own; or None."""
    first = _results(place.backend.name, place.device, case, dtype)
    expected = _results(ORACLE, place.device, case, dtype)
    for name, tensor in expected.items():
        if text := difference(first[name], tensor):
            return f"{name} {text}"
    if place.backend.layer_backward is None:  # torch promises no order of its sums
        return None
    again = _results(place.backend.name, place.device, case, dtype)
    return next(
        (f"{name} is another in the second call" for name, t in again.items()
         if not torch.equal(t, first[name])), None,
    )  # fmt: skip


def _results(
    backend: str, device: torch.device, case: Case, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every output and every gradient, from the same numbers for all."""
    generator = torch.Generator().manual_seed(0)
    steps, batch, inputs, hidden = case.shape

    def values(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.requires_grad_()

    module = LSTM(inputs, hidden, **case.config, backend=backend, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(values(*parameter.shape) * hidden**-0.5)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    x = values(steps, batch, inputs)
    h0, c0 = values(layers, batch, module.proj_size or hidden), values(layers, batch, hidden)
    reset = torch.rand(steps, batch, generator=generator).to(device) < case.reset
    output, (h_n, c_n), *cells = module(
        x,
        (h0, c0),
        lengths=case.lengths,
        reset=reset if case.reset else None,
        return_cells=case.cells,
    )
    outputs = [output, h_n, c_n, *cells]
    torch.autograd.backward(outputs, [values(*t.shape).detach() for t in outputs])
    found = dict(zip(("output", "h_n", "c_n", "cells"), outputs, strict=False))
    leaves = {"input": x, "h_0": h0, "c_0": c0, **dict(module.named_parameters())}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach() for name, tensor in found.items()}
