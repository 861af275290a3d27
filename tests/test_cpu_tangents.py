"""The C++ walk of tangents, and the kernel of eq. 11, against their twins in the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import settings
from cases import LARGER, LAYERS, Layer, make_layer
from fastlstm import cpu, reference
from fastlstm.contract import Curvature, OutputGradients, Tangents
from kernel_checks import Kernels, assert_same_bits, random_gradients

pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")
CPU = Kernels(cpu, torch.device("cpu"))
STATES = (torch.float32, torch.float64)


class Made(NamedTuple):
    """Tangents of results and of pre-activations."""

    y: Tensor
    c_all: Tensor
    h_n: Tensor
    c_n: Tensor
    m: Tensor | None
    pre: Tensor


class Walks:
    """What the two kernels are given for a case."""

    def __init__(self, case: Layer, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.layer = make_layer(case, dtype)
        self.out = reference.layer_forward(*self.layer, True, True)
        self.tangent_h0, self.tangent_c0 = map(torch.randn_like, self.layer[2:4])
        assert self.out.gates is not None
        self.pre = torch.randn_like(self.out.gates)
        self.grads = random_gradients(self.out)
        self.dm, self.m = (torch.randn_like(self.out.c_all) for _ in range(2))  # type: ignore[arg-type]

    def tangent(self, run: Callable[..., Tangents]) -> Made:
        _, batch_sizes, _, c0, weights, reset = self.layer
        pre = self.pre.clone()
        args = (pre, batch_sizes, self.tangent_h0, self.tangent_c0, weights, reset, c0)
        return Made(*run(*args, self.out.reserve()), pre)

    def curvature(
        self, run: Callable[..., Curvature], grads: OutputGradients, m: Tensor | None
    ) -> Curvature:
        _, batch_sizes, _, c0, _, reset = self.layer
        given = (grads, self.dm, batch_sizes, c0, reset, self.out.reserve())
        return run(*given, self.tangent_c0, self.pre, self.out.c_all.sin(), m)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", [*LAYERS, *LARGER], ids=str)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_tangents_equal_their_twin(case: Layer, dtype: torch.dtype, instruction_set: str) -> None:
    walks = Walks(case, dtype)
    CPU.assert_near(walks.tangent(cpu.layer_tangent), walks.tangent(reference.layer_tangent), dtype)


@pytest.mark.parametrize("case", [*LAYERS, *LARGER], ids=str)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_curvature_equals_its_twin(case: Layer, dtype: torch.dtype, instruction_set: str) -> None:
    walks = Walks(case, dtype)
    for grads, m in ((walks.grads, walks.m), (OutputGradients(None, None, None, None), None)):
        found, want = (walks.curvature(b.layer_curvature, grads, m) for b in (cpu, reference))
        CPU.assert_near(found, want, dtype)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    "case",
    [
        Layer((40, 40, 33, 20, 7), 3, 450, reset=0.1, batch=42),
        Layer((36, 36, 17), 3, 400, projection=130, directions=2),
        Layer((1,) * 40, 3, 320, directions=2, reset=0.1),
        Layer((64,) * 5, 3, 130, directions=2),
    ],
    ids=str,
)
def test_threads(case: Layer, threads: int, instruction_set: str) -> None:
    """They meet at every step, or walk by themselves; the same bits every time."""
    walks = Walks(case, torch.float32)

    def run() -> tuple[Any, Any]:
        with settings.threads(threads):
            made = walks.tangent(cpu.layer_tangent)
            return made, walks.curvature(cpu.layer_curvature, walks.grads, walks.m)

    (made, curved), again = run(), run()
    CPU.assert_near(made, walks.tangent(reference.layer_tangent), torch.float32)
    want = walks.curvature(reference.layer_curvature, walks.grads, walks.m)
    CPU.assert_near(curved, want, torch.float32)
    assert_same_bits(made, again[0])
    assert_same_bits(curved, again[1])
