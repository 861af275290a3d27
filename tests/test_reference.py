"""The reference, every other test's oracle, against torch's automatic differentiation."""

from __future__ import annotations

import pytest
import torch

from cases import LAYERS, Layer, make_layer, tolerance
from fastlstm import reference
from kernel_checks import need_of, random_gradients


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_backward_equations_equal_autograd(case: Layer) -> None:
    """Its own backward pass, against torch differentiating its forward pass."""
    layer = make_layer(case, torch.float64, requires_grad=True)
    out = reference.layer_forward(*layer, True, True)
    grads = random_gradients(out)
    x, batch_sizes, h0, c0, weights, reset = layer
    inputs = [x, h0, c0, *(t for w in weights for t in w if t is not None)]
    # Without steps there are outputs that depend on nothing.
    pairs = [(o, g) for o, g in zip(out[:4], grads, strict=True) if o.requires_grad]
    want = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True
    )
    with torch.no_grad():
        got = reference.layer_backward(
            grads, x, batch_sizes, h0, c0, weights, reset, out.reserve(), need_of(case)
        )
    by_direction = zip(
        *(kind for kind in (got.w_ih, got.w_hh, got.bias, got.w_hr) if kind is not None),
        strict=True,
    )
    flat = [got.x, got.h0, got.c0, *(t for direction in by_direction for t in direction)]
    for a, b in zip(flat, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float64))
