"""What the tests of torch.func share: modules, calls, and plain autograd beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cases import tolerance

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both directions, two layers": dict(bidirectional=True, num_layers=2),
    "projection": dict(proj_size=2),
    "no bias": dict(bias=False),
    "checkpoint": dict(checkpoint=True),
    "reference": dict(backend="reference"),
    "aten": dict(backend="aten"),
}
CALLS: dict[str, dict[str, Any]] = {
    "padded": {},
    "lengths": dict(lengths=torch.tensor([2, 3])),
    "resets": dict(reset=torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.bool)),
    "cells": dict(return_cells=True),
}
CASES = [
    (module, call)
    for module in MODULES
    for call in CALLS
    if module != "aten" or call in ("padded", "lengths")
]


def eager(function: Callable[..., Tensor], wanted: tuple[int, ...]) -> Callable[..., Any]:
    """Gradients of some arguments, by plain autograd."""

    def run(*given: Any) -> Any:
        own = [
            tree_map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, tree)
            for tree in given
        ]
        leaves = tree_leaves([own[k] for k in wanted])
        return torch.autograd.grad(function(*own), leaves)

    return run


def assert_same(found: Any, wanted: Any) -> None:
    pairs = zip(
        tree_leaves(found),
        tree_leaves(wanted),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, **tolerance(torch.float64))
