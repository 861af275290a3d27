"""The statements of the equations, held together over one lattice of values.

``csrc/gate_math.h`` (every instruction set), ``kernels/gate_math.py`` and ``reference.py`` against
float64, in their own dtype; and the bounds on sigmoid and tanh in units in the last place.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import settings
from fastlstm import native
from fastlstm.kernels import gate_math
from lattice import assert_agreement, lattice

assert native.missing() is None, native.missing()
_C = torch.ops.fastlstm_C
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=_C.cpu_instruction_sets().split())
def instruction_set(request):
    with settings.instructions(request.param):
        yield request.param


@triton.jit
def probe_kernel(a, c_prev, dm, dc, gates, c, m, da, dc_prev, size, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < size
    i, f, g, o = gate_math.activate(
        tl.load(a + n, mask=inside, other=0.0),
        tl.load(a + size + n, mask=inside, other=0.0),
        tl.load(a + 2 * size + n, mask=inside, other=0.0),
        tl.load(a + 3 * size + n, mask=inside, other=0.0),
    )
    entered = tl.load(c_prev + n, mask=inside, other=0.0)
    c_t, m_t = gate_math.cell_forward(i, f, g, o, entered)
    da_i, da_f, da_g, da_o, left = gate_math.cell_backward(
        i, f, g, o, entered, c_t,
        tl.load(dm + n, mask=inside, other=0.0),
        tl.load(dc + n, mask=inside, other=0.0),
    )  # fmt: skip
    tl.store(gates + n, i, mask=inside)
    tl.store(gates + size + n, f, mask=inside)
    tl.store(gates + 2 * size + n, g, mask=inside)
    tl.store(gates + 3 * size + n, o, mask=inside)
    tl.store(da + n, da_i, mask=inside)
    tl.store(da + size + n, da_f, mask=inside)
    tl.store(da + 2 * size + n, da_g, mask=inside)
    tl.store(da + 3 * size + n, da_o, mask=inside)
    tl.store(c + n, c_t, mask=inside)
    tl.store(m + n, m_t, mask=inside)
    tl.store(dc_prev + n, left, mask=inside)


def probe_triton(a: Tensor, c_prev: Tensor, dm: Tensor, dc: Tensor) -> tuple[Tensor, ...]:
    """kernels/gate_math.py with the signature of the library's probe."""
    given = [t.contiguous().to(DEVICE) for t in (a, c_prev, dm, dc)]
    made = [torch.empty_like(given[i]) for i in (0, 1, 1, 0, 1)]  # gates, c, m, da, dc_prev
    size, block = a.size(1), 1 << 16 if DEVICE == "cpu" else 1024
    probe_kernel[(-(-size // block),)](*given, *made, size, BLOCK=block)
    return tuple(t.cpu() for t in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equations_agree_over_the_lattice(dtype: torch.dtype, instruction_set: str) -> None:
    args = lattice(dtype)
    assert_agreement(_C.cpu_gate_math(*args), args, dtype)


def test_triton_equations_agree_over_the_lattice() -> None:
    args = lattice(torch.float32)
    assert_agreement(probe_triton(*args), args, torch.float32)


def assert_near(got: Tensor, want: Tensor, ulp: float, what: str) -> None:
    """Both NaN, or equal, or within ``ulp`` units in the last place of ``got``'s dtype."""
    want = want.to(got.dtype)
    unit = torch.nextafter(want.abs(), torch.full_like(want, float("inf"))) - want.abs()
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= ulp * unit)
    worst = ((got - want).abs() / unit)[~same]
    assert same.all(), f"{what}: {worst.max()} ulp, got {got[~same][:4]}, want {want[~same][:4]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_and_tanh_within_four_ulp(dtype: torch.dtype, instruction_set: str) -> None:
    """Over the whole range, subnormal results included."""
    values = whole_range(dtype)
    a = torch.stack((values, values, values, values))
    zeros = torch.zeros_like(values)
    assert_gates_near(_C.cpu_gate_math(a, zeros, zeros, zeros)[0], values, 4)


def test_triton_sigmoid_and_tanh() -> None:
    """On a GPU exponential and division are approximations, each of about two units.

    exp(x) is 2 to the power of x log2(e), whose rounding to float32 costs up to 7e-8 |x|: what is
    near 1e-38 has five digits left. Below that is zero.
    """
    values = whole_range(torch.float32)
    a = torch.stack((values, values, values, values))
    zeros = torch.zeros_like(values)
    gates = probe_triton(a, zeros, zeros, zeros)[0]
    if DEVICE == "cpu":
        assert_gates_near(gates, values, 4)
    else:
        exact = torch.stack([values.double().sigmoid()] * 4)
        exact[2] = values.double().tanh()
        finite = values.double().nan_to_num(posinf=0.0, neginf=0.0).abs()
        error = (gates.double() - exact).abs()
        allowed = (1e-6 + 7e-8 * finite) * exact.abs() + 1e-37
        within = error <= allowed  # and no NaN
        assert within.all(), values[~within.all(0)]


def whole_range(dtype: torch.dtype) -> Tensor:
    span = 110.0 if dtype == torch.float32 else 750.0
    tiny = torch.finfo(dtype).tiny
    return torch.cat((
        torch.linspace(-span, span, 200_001, dtype=dtype),
        torch.linspace(-1.0, 1.0, 100_001, dtype=dtype),
        torch.logspace(-37, 0, 20_000, dtype=dtype),
        -torch.logspace(-37, 0, 20_000, dtype=dtype),
        torch.tensor([0.0, -0.0, tiny, -tiny, float("inf"), -float("inf"), 1e5, -1e5], dtype=dtype),
    ))  # fmt: skip


def assert_gates_near(gates: Tensor, values: Tensor, ulp: float) -> None:
    if values.dtype == torch.float32:
        sigmoid, tanh = values.double().sigmoid(), values.double().tanh()
    else:  # one exponential of a negative number each, which torch has right to an ulp
        e = (-values.abs()).exp()
        sigmoid = torch.where(values < 0, e, torch.ones_like(e)) / (1 + e)
        tanh = values.tanh()
    assert_near(gates[0], sigmoid, ulp, "sigmoid (input gate)")
    assert_near(gates[1], sigmoid, ulp, "sigmoid (forget gate)")
    assert_near(gates[2], tanh, ulp, "tanh (cell gate)")
    assert_near(gates[3], sigmoid, ulp, "sigmoid (output gate)")


def test_signed_zeros(instruction_set: str) -> None:
    zeros = torch.tensor([0.0, -0.0])
    gates = _C.cpu_gate_math(torch.stack([zeros] * 4), *torch.zeros(3, 2))[0]
    assert gates[2].signbit().tolist() == [False, True]  # tanh(-0) is -0


def test_triton_signed_zeros() -> None:
    zeros = torch.tensor([0.0, -0.0])
    gates = probe_triton(torch.stack([zeros] * 4), *torch.zeros(3, 2))[0]
    assert gates[2].signbit().tolist() == [False, True]


def test_the_same_equations_are_cited() -> None:
    """Each statement cites equations 2 to 7, some those of second order too, and docs/design.md has
    every number cited."""

    def cited(*paths: str) -> set[int]:
        text = " ".join((ROOT / path).read_text() for path in paths)
        groups = re.findall(r"\(eq\. ([\d, ]+)\)", text)
        return {int(n) for group in groups for n in group.split(",")}

    cell = {2, 3, 4, 5, 6, 7}
    twice = cell | {10, 11}
    assert twice <= cited("csrc/gate_math.h")
    assert cell <= cited("kernels/gate_math.py")
    assert twice <= cited("fastlstm/reference.py")
    sources = [
        *ROOT.glob("fastlstm/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("csrc/**/*.h"),
        *ROOT.glob("csrc/**/*.cpp"),
        *ROOT.glob("csrc/**/*.cu"),
    ]
    everywhere = cited(*(str(path.relative_to(ROOT)) for path in sources))
    assert everywhere <= cited("docs/design.md") == set(range(1, 13))
