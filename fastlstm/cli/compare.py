"""When two results agree: the one tolerance table of the project.

It is what rounding alone may do to layers of the tests' sizes, against the same mathematics in
the same storage dtype.  It is never loosened to make a test pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 4e-3},
    torch.bfloat16: {"rtol": 5e-2, "atol": 3e-2},
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """``rtol`` and ``atol`` for ``torch.testing.assert_close``."""
    return dict(_TOLERANCES[dtype])


def difference(
    ours: Tensor | None, theirs: Tensor | None, allowed: dict[str, float] | None = None
) -> str | None:
    """How two results differ beyond what is allowed, the tolerance of their dtype; or None."""
    if ours is None or theirs is None:
        return "is missing"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return "has another shape or dtype"
    if ours.numel() == 0:
        return None
    # Sums over many rows grow; compare them on their own scale, as the tests do.
    scale = max(1.0, float(theirs.detach().abs().max()))
    a, b = ours.detach().double() / scale, theirs.detach().double() / scale
    allowed = allowed or tolerance(theirs.dtype)
    if torch.allclose(a, b, rtol=allowed["rtol"], atol=allowed["atol"]):
        return None
    return f"differs by up to {float((a - b).abs().max()) * scale:.2g}"
