"""A pytest plugin for tests of the C++ kernels: every instruction set, and poisoned memory."""

import pytest
import torch

import settings
from fastlstm import native

assert native.missing() is None, native.missing()
_C = torch.ops.fastlstm_C


SETS = native.instruction_sets()


@pytest.fixture(params=SETS)
def instruction_set(request):
    with settings.instructions(request.param):
        yield request.param


@pytest.fixture(params=[name for name in SETS if name != "baseline"])
def vector_set(request):
    """Those with kernels of their own for the products of eq. 9."""
    with settings.instructions(request.param):
        yield request.param


@pytest.fixture
def poison():
    """Scratch memory and outputs start as NaNs: what is not written shows.  And the matrix unit,
    where it is in use, takes passes of any size."""
    _C.poison(True)
    native.spare_matrix_unit(False)
    yield
    _C.poison(False)
    native.spare_matrix_unit(True)
