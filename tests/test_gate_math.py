"""The statements of the equations, held together over one lattice of values.

``csrc/gate_math.h`` (every instruction set) and ``reference.py`` against float64, in their
own dtype; and the bounds on sigmoid and tanh in units in the last place.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlstm import native, reference

assert native.missing() is None, native.missing()
_C = torch.ops.fastlstm_C
ROOT = Path(__file__).parents[1]

_MAGNITUDES = (0.0, 1e-38, 1e-20, 1e-6, 1e-3, 0.1, 0.17, 0.35, 0.625, 1.0, 4.0, 9.0, 17.0, 45.0)
_MAGNITUDES += (87.0, 88.5, 90.0, 103.0, 105.0, 700.0, 745.0, 1e5, float("inf"))
LATTICE = [sign * m for m in _MAGNITUDES for sign in (1.0, -1.0)] + [float("nan")]


@pytest.fixture(params=_C.cpu_instruction_sets().split())
def instruction_set(request):
    before = _C.cpu_use_instruction_set(request.param)
    yield request.param
    _C.cpu_use_instruction_set(before)


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


def assert_near(got: Tensor, want: Tensor, ulp: float, what: str) -> None:
    """Both NaN, or equal, or within ``ulp`` units in the last place of ``got``'s dtype."""
    want = want.to(got.dtype)
    unit = torch.nextafter(want.abs(), torch.full_like(want, float("inf"))) - want.abs()
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= ulp * unit)
    worst = ((got - want).abs() / unit)[~same]
    assert same.all(), f"{what}: {worst.max()} ulp, got {got[~same][:4]}, want {want[~same][:4]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equations_agree_over_the_lattice(dtype: torch.dtype, instruction_set: str) -> None:
    args = lattice(dtype)
    got = _C.cpu_gate_math(*args)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_and_tanh_within_four_ulp(dtype: torch.dtype, instruction_set: str) -> None:
    """Over the whole range, subnormal results included."""
    span = 110.0 if dtype == torch.float32 else 750.0
    tiny = torch.finfo(dtype).tiny
    values = torch.cat((
        torch.linspace(-span, span, 200_001, dtype=dtype),
        torch.linspace(-1.0, 1.0, 100_001, dtype=dtype),
        torch.logspace(-37, 0, 20_000, dtype=dtype),
        -torch.logspace(-37, 0, 20_000, dtype=dtype),
        torch.tensor([0.0, -0.0, tiny, -tiny, float("inf"), -float("inf"), 1e5, -1e5], dtype=dtype),
    ))  # fmt: skip
    a = torch.stack((values, values, values, values))
    zeros = torch.zeros_like(values)
    gates = _C.cpu_gate_math(a, zeros, zeros, zeros)[0]
    if dtype == torch.float32:
        sigmoid, tanh = values.double().sigmoid(), values.double().tanh()
    else:  # one exponential of a negative number each, which torch has right to an ulp
        e = (-values.abs()).exp()
        sigmoid = torch.where(values < 0, e, torch.ones_like(e)) / (1 + e)
        tanh = values.tanh()
    assert_near(gates[0], sigmoid, 4, "sigmoid (input gate)")
    assert_near(gates[1], sigmoid, 4, "sigmoid (forget gate)")
    assert_near(gates[2], tanh, 4, "tanh (cell gate)")
    assert_near(gates[3], sigmoid, 4, "sigmoid (output gate)")


def test_signed_zeros(instruction_set: str) -> None:
    zeros = torch.tensor([0.0, -0.0])
    gates = _C.cpu_gate_math(torch.stack([zeros] * 4), *torch.zeros(3, 2))[0]
    assert gates[2].signbit().tolist() == [False, True]  # tanh(-0) is -0


def test_the_same_equations_are_cited() -> None:
    """Each statement cites equations 2 to 7, and docs/design.md has every number cited."""

    def cited(*paths: str) -> set[int]:
        text = " ".join((ROOT / path).read_text() for path in paths)
        groups = re.findall(r"\(eq\. ([\d, ]+)\)", text)
        return {int(n) for group in groups for n in group.split(",")}

    cell = {2, 3, 4, 5, 6, 7}
    assert cell <= cited("csrc/gate_math.h")
    assert cell <= cited("fastlstm/reference.py")
    sources = [*ROOT.glob("fastlstm/*.py"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp")]
    everywhere = cited(*(str(path.relative_to(ROOT)) for path in sources))
    assert everywhere <= cited("docs/design.md") == set(range(1, 10))
