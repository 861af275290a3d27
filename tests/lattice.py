"""One lattice of values over which every statement of the equations is held to the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlstm import reference

_MAGNITUDES = (0.0, 1e-38, 1e-20, 1e-6, 1e-3, 0.1, 0.17, 0.35, 0.625, 1.0, 4.0, 9.0, 17.0, 45.0)
_MAGNITUDES += (87.0, 88.5, 90.0, 103.0, 105.0, 700.0, 745.0, 1e5, float("inf"))
LATTICE = [sign * m for m in _MAGNITUDES for sign in (1.0, -1.0)] + [float("nan")]


def probe(a: Tensor, c_prev: Tensor, dm: Tensor, dc: Tensor) -> tuple[Tensor, ...]:
    """reference.py's functions with the signature of the library's probe."""
    gates = reference.activate(a.T.unsqueeze(-1)).squeeze(-1)  # (n, 4)
    c, m = reference.cell_forward(gates.unsqueeze(-1), c_prev.unsqueeze(-1))
    da, dc_prev = reference.cell_backward(
        gates.unsqueeze(-1), c_prev.unsqueeze(-1), c, dm.unsqueeze(-1), dc.unsqueeze(-1)
    )
    return gates.T, c[:, 0], m[:, 0], da.squeeze(-1).T, dc_prev[:, 0]


def lattice(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations: the lattice in one gate at a time, then random mixtures of it."""
    values = torch.tensor(LATTICE, dtype=dtype)
    single = torch.zeros(4, 4 * len(values), dtype=dtype)
    for gate in range(4):
        single[gate, gate * len(values) : (gate + 1) * len(values)] = values
    mixed = values[torch.randint(len(values), (4, 400))]
    a = torch.cat((single, mixed), 1)
    c_prev, dm, dc = torch.randn(3, a.size(1), dtype=dtype)
    return a, c_prev, dm, dc


def assert_agreement(got: tuple[Tensor, ...], args: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """A statement's results on ``args`` against the reference's, in ``dtype`` and in float64."""
    same_dtype = probe(*args)
    exact = probe(*(t.double() for t in args))
    eps = torch.finfo(dtype).eps
    for name, a, b, c in zip(
        ("gates", "c", "m", "da", "dc_prev"), got, same_dtype, exact, strict=True
    ):
        for other, what in ((b, "reference"), (c.to(dtype), "float64")):
            # Sums and products of the gates: a few roundings, on the scale of their terms.
            torch.testing.assert_close(
                a, other, rtol=32 * eps, atol=32 * eps, equal_nan=True,
                msg=lambda text, n=name, w=what: f"{n} against {w}: {text}",
            )  # fmt: skip
