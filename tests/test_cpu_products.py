"""The products of eq. 9 against torch's, on every instruction set."""

from __future__ import annotations

import pytest
import torch

import settings
from cases import DTYPES

_C = torch.ops.fastlstm_C
pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")

PRODUCTS = [(200, 64, 48), (512, 131, 70), (1100, 320, 96), (36, 200, 150), (33, 40, 300),
            (17, 2, 3), (530, 9, 2), (48, 90, 35), (9, 301, 67), (2, 3, 140),
            (5, 11, 70), (700, 90, 260), (100, 210, 170), (150, 110, 70)]  # fmt: skip
# Of a value, and of a whole matrix beside what torch's own product makes of it, by state dtype.
# (In float64 torch's product is what counts as exact.)
EXACTNESS = {torch.float32: (1e-5, 6e-8), torch.float64: (1e-13, 1e-14)}
# How many times torch's error. Vectors sum up to 512 products in one go, BLAS fewer; small and
# narrow products are vectors' work with AMX too.
ERRORS = {"unit": 1.5, "vectors": 2.5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "rows", "columns"), PRODUCTS)
def test_products_are_about_as_exact_as_torch(
    depth: int, rows: int, columns: int, dtype: torch.dtype, vector_set: str
) -> None:
    """Of dgates and inputs (transposed) and of dgates and weights, added to what is there.

    Where bfloat16 is multiplied as such, dgates are rounded to it before.
    """
    state = torch.promote_types(dtype, torch.float32)
    rtol, slack = EXACTNESS[state]
    for transposed in (True, False):
        wide = rows >= 96 if transposed else rows * columns >= 48 * (rows + columns)
        by_unit = vector_set == "amx" and wide and depth * rows * columns >= 1 << 20
        times = ERRORS["unit" if by_unit else "vectors"]
        takes_bf16 = by_unit or (vector_set == "avx512_bf16" and depth >= 32)
        shape = (depth, 2, rows) if transposed else (rows, 2, depth)
        left = torch.randn(shape, dtype=state)[:, 1]
        op = left.bfloat16().to(state) if takes_bf16 and dtype == torch.bfloat16 else left
        right = torch.randn(depth, 2, columns)[:, 0].to(dtype)
        op = op.T if transposed else op
        wide = torch.randn(rows, columns + 5, dtype=state)
        if not transposed and depth < 16 and rows > 64:  # torch's product is the faster one
            assert not _C.cpu_product(left, right, wide[:, 2:-3], transposed, True, True)
            continue
        out, start = wide[:, 2:-3], wide.clone()
        exact = start[:, 2:-3].double() + op.double() @ right.double()
        assert _C.cpu_product(left, right, out, transposed, True, True)
        error = (start[:, 2:-3] + op @ right.to(state) - exact).norm()
        assert (out - exact).norm() < times * error + slack * exact.norm()
        assert torch.equal(wide[:, :2], start[:, :2]) and torch.equal(wide[:, -3:], start[:, -3:])
        assert _C.cpu_product(left, right, out, transposed, False, True)
        exact = op.double() @ right.double()
        torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=rtol * depth**0.5)


# Few rows, few columns, rows enough for a copy of B each, a B that is too large for that, more
# columns than rows, and a depth for A^T B to come out upright.
@pytest.mark.parametrize(("rows", "columns", "depth"), [(50, 200, 150), (200, 48, 300),
                         (530, 130, 600), (600, 1300, 70), (1100, 70, 50),
                         (150, 400, 300), (610, 200, 140)])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_a_product(
    rows: int, columns: int, depth: int, dtype: torch.dtype, vector_set: str
) -> None:
    """As one thread computes it, and nothing beside it."""
    state = torch.promote_types(dtype, torch.float32)
    rtol, _ = EXACTNESS[state]
    for transposed in (True, False):
        left = torch.randn((depth, rows) if transposed else (rows, depth), dtype=state)
        right, wide = torch.randn(depth, columns).to(dtype), torch.randn(rows, columns + 5)
        results = []
        for threads in (1, 2, 3, 8):
            out = wide.to(state, copy=True)
            with settings.threads(threads):
                assert _C.cpu_product(left, right, out[:, 2:-3], transposed, True, True)
            results.append(out)
        for out in results[1:]:
            torch.testing.assert_close(out, results[0], rtol=rtol, atol=rtol * depth**0.5)
            assert torch.equal(out[:, :2], results[0][:, :2])
            assert torch.equal(out[:, -3:], results[0][:, -3:])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("huge", [float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_take_any_value(
    transposed: bool, huge: float, dtype: torch.dtype, vector_set: str
) -> None:
    """Too large for the matrix unit, on either side: as torch has it, infinities and all."""
    for in_left in (True, False):
        left, right = torch.randn(40, 50), torch.randn(40, 60)
        if not transposed:
            left = left.T.contiguous()
        (left if in_left else right)[7, 3] = huge
        left, right = left.to(dtype).float(), right.to(dtype)  # exact, whoever rounds left
        out = torch.empty(50, 60)
        assert _C.cpu_product(left, right, out, transposed, False, not in_left)
        want = (left.T if transposed else left) @ right.float()
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("in_left", [False, True])
def test_every_thread_looks_for_values_too_large(
    in_left: bool, last: bool, threads: int, vector_set: str
) -> None:
    """In a product that the matrix unit would take, of which each thread looks at some rows."""
    left, right = torch.randn(900, 200), torch.randn(900, 150)
    (left if in_left else right)[-1 if last else 0, 3] = float("inf")
    out = torch.empty(200, 150)
    with settings.threads(threads):
        assert _C.cpu_product(left, right, out, True, False, not in_left)
    torch.testing.assert_close(out, left.T @ right, rtol=1e-5, atol=1e-5 * 900**0.5)


def test_without_vectors_there_is_none() -> None:
    """It says so: the product is torch's then."""
    fine = torch.ones(50, 50)
    with settings.instructions("baseline"):
        assert not _C.cpu_product(fine, fine, fine.clone(), True, True, True)


def test_product_refuses_bad_arguments() -> None:
    good = dict(left=torch.ones(4, 3), right=torch.ones(4, 2), out=torch.ones(3, 2))
    changes = [
        dict(left=torch.ones(5, 3)), dict(left=torch.ones(4, 3).double()),
        dict(out=torch.ones(3, 3)), dict(out=torch.ones(2, 3).T), dict(right=torch.ones(4)),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RuntimeError, match=r"left|right|out"):
            _C.cpu_product(*{**good, **change}.values(), True, False, True)
