"""A pytest plugin for tests of the C++ kernels: every instruction set, and poisoned memory."""

import pytest
import torch

from fastlstm import native

assert native.missing() is None, native.missing()
_C = torch.ops.fastlstm_C


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request):
    before = _C.cpu_use_instruction_set(request.param)
    yield request.param
    _C.cpu_use_instruction_set(before)


@pytest.fixture
def poison():
    """Scratch memory and outputs start as NaNs: what is not written shows.  And the matrix unit,
    where it is in use, takes passes of any size."""
    _C.poison(True)
    native.spare_matrix_unit(False)
    yield
    _C.poison(False)
    native.spare_matrix_unit(True)
