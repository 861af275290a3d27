"""The ``cpu`` backend: the fused C++ kernels of csrc/cpu under the layer contract.

The kernels walk through the sequence; the sums over all rows that follow a backward
walk (eq. 9) are plain matrix products and go to torch's BLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .contract import Gradients, OutputGradients, Outputs, Requested, Reserve, Weights
from .products import input_gradients

if TYPE_CHECKING:
    from .backends import Call

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

missing = native.missing


def unsupported(call: Call) -> str | None:
    """Only the device and the dtype matter to these kernels."""
    if call.x.device.type != "cpu":
        return f"it runs on cpu tensors, got one on {call.x.device}"
    if call.x.dtype not in _DTYPES:
        return f"it takes {', '.join(map(str, _DTYPES))}, got {call.x.dtype}"
    return None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _present(tensor: Tensor) -> Tensor | None:
    """The library returns what was not asked for as an empty vector."""
    return None if tensor.dim() == 1 else tensor


def layer_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
) -> Outputs:
    """One layer; shapes as in ``contract.Outputs``."""
    y, c_all, h_n, c_n, gates, m = torch.ops.fastlstm_C.cpu_forward(
        x.contiguous(),
        batch_sizes.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        [w.w_ih.contiguous() for w in weights],
        [w.w_hh.contiguous() for w in weights],
        [w.bias.contiguous() for w in weights if w.bias is not None],
        [w.w_hr.contiguous() for w in weights if w.w_hr is not None],
        _contiguous(reset),
        need_reserve,
        need_cells,
    )
    return Outputs(y, _present(c_all), h_n, c_n, _present(gates), _present(m))


def layer_backward(
    grads: OutputGradients,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    need: Requested,
) -> Gradients:
    """Gradients of the inputs asked for."""
    da, dh_all, dbias, dh0, dc0 = torch.ops.fastlstm_C.cpu_backward(
        *map(_contiguous, grads),
        batch_sizes.contiguous(),
        c0.contiguous(),
        [w.w_hh.contiguous() for w in weights],
        [w.w_hr.contiguous() for w in weights if w.w_hr is not None],
        _contiguous(reset),
        saved.c_all,
        saved.gates,
        need.w_hr,
        need.bias,
        need.h0,
        need.c0,
    )
    return input_gradients(
        da, _present(dh_all), _present(dbias), _present(dh0), _present(dc0),
        x, batch_sizes, h0, weights, reset, saved, need,
    )  # fmt: skip
