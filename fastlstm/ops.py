"""The operators of a layer: schemas, fakes, and every shape and dtype error.

``torch.ops.fastlstm.layer_forward`` and ``layer_backward`` are what torch.compile and
torch.export see, or ``checkpoint_forward`` and ``checkpoint_backward``: opaque, functional, none
of their outputs aliasing another.  An output
that was not asked for is an empty tensor of shape (0,).  The functions of the same name
in this file speak the contract's types (None for what is absent) and check what they
are given; shapes and letters are explained in ``contract.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checkpoint, modes
from .contract import (
    Borders,
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Weights,
    by_kind,
    state_dtype,
)

library = torch.library.Library("fastlstm", "DEF")
library.define(
    "layer_forward(Tensor x, Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih,"
    " Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor? reset, bool need_reserve,"
    " bool need_cells, str backend)"
    " -> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n, Tensor gates, Tensor m)"
)
library.define(
    "layer_backward(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, Tensor x,"
    " Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias,"
    " Tensor[] w_hr, Tensor? reset, Tensor y, Tensor c_all, Tensor gates, Tensor m, bool[] need,"
    " str backend) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw_ih, Tensor[] dw_hh,"
    " Tensor[] dbias, Tensor[] dw_hr)"
)
library.define(
    "checkpoint_forward(Tensor x, Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih,"
    " Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor? reset, bool need_cells, str backend)"
    " -> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n, Tensor borders)"
)
library.define(
    "checkpoint_backward(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, Tensor x,"
    " Tensor batch_sizes, Tensor h0, Tensor c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias,"
    " Tensor[] w_hr, Tensor? reset, Tensor y, Tensor borders, bool[] need, str backend)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw_ih, Tensor[] dw_hh, Tensor[] dbias,"
    " Tensor[] dw_hr)"
)


def layer_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
    backend: str,
) -> Outputs:
    """Run one layer through the operator; see ``reference.layer_forward``.

    The arguments must have passed ``check_layer``.

    Raises:
        RuntimeError: the backend named cannot serve this call; the message says why.
    """
    if not modes.is_traced(x, h0, *weights[0]):  # the dispatcher would only cost time
        call = backends.Call(x, batch_sizes, h0, weights[0], reset, need_cells, need_reserve)
        return backends.pick(backend, call).layer_forward(
            x, batch_sizes, h0, c0, weights, reset, need_reserve, need_cells
        )
    results = torch.ops.fastlstm.layer_forward(
        x, batch_sizes, h0, c0, *by_kind(weights), reset, need_reserve, need_cells, backend
    )
    projected = weights[0].w_hr is not None
    return Outputs(
        y=results[0],
        c_all=results[1] if need_reserve or need_cells else None,
        h_n=results[2],
        c_n=results[3],
        gates=results[4] if need_reserve else None,
        m=results[5] if need_reserve and projected else None,
    )


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
    backend: str,
    chosen: backends.Backend | None = None,
) -> Gradients:
    """Run one layer's backward pass; see ``reference.layer_backward``.

    ``chosen`` is what ``backend`` came to in the forward pass, where that is known.
    """
    if not modes.is_traced(x, h0, *weights[0]):
        if chosen is not None and chosen.layer_backward is not None:
            run = chosen.layer_backward
        else:
            need_cells = grads.c_all is not None
            run = _pick_backward(backend, x, batch_sizes, h0, weights[0], reset, need_cells)
        return run(grads, x, batch_sizes, h0, c0, weights, reset, saved, need)
    results = torch.ops.fastlstm.layer_backward(
        *grads,
        x,
        batch_sizes,
        h0,
        c0,
        *by_kind(weights),
        reset,
        saved.y,
        saved.c_all,
        saved.gates,
        x.new_empty(0) if saved.m is None else saved.m,
        list(need),
        backend,
    )
    return _requested(results, need)


def checkpoint_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_cells: bool,
    backend: str,
) -> tuple[Outputs, Borders]:
    """Run one layer and keep little of it; see ``checkpoint.layer_forward``."""
    if not modes.is_traced(x, h0, *weights[0]):
        return checkpoint.layer_forward(x, batch_sizes, h0, c0, weights, reset, need_cells, backend)
    y, c_all, h_n, c_n, borders = torch.ops.fastlstm.checkpoint_forward(
        x, batch_sizes, h0, c0, *by_kind(weights), reset, need_cells, backend
    )
    return Outputs(y, c_all if need_cells else None, h_n, c_n), Borders(y, borders)


def checkpoint_backward(
    grads: OutputGradients,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Borders,
    need: Requested,
    backend: str,
) -> Gradients:
    """The backward pass of ``checkpoint_forward``; see ``checkpoint.layer_backward``."""
    if not modes.is_traced(x, h0, *weights[0]):
        return checkpoint.layer_backward(
            grads, x, batch_sizes, h0, c0, weights, reset, saved, need, backend
        )
    results = torch.ops.fastlstm.checkpoint_backward(
        *grads, x, batch_sizes, h0, c0, *by_kind(weights), reset, *saved, list(need), backend
    )
    return _requested(results, need)


def _requested(results: Sequence[Any], need: Requested) -> Gradients:
    """What a backward operator returned, without what was not asked for."""
    dx, dh0, dc0, *dw = results
    return Gradients(
        x=dx if need.x else None,
        h0=dh0 if need.h0 else None,
        c0=dc0 if need.c0 else None,
        w_ih=dw[0] if need.w_ih else None,
        w_hh=dw[1] if need.w_hh else None,
        bias=dw[2] if need.bias else None,
        w_hr=dw[3] if need.w_hr else None,
    )


def _weights(
    w_ih: list[Tensor], w_hh: list[Tensor], bias: list[Tensor], w_hr: list[Tensor]
) -> list[Weights]:
    """The inverse of ``by_kind``."""
    return [
        Weights(w_ih[d], w_hh[d], bias[d] if bias else None, w_hr[d] if w_hr else None)
        for d in range(len(w_ih))
    ]


def _pick_backward(
    backend: str,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    weights: Weights,
    reset: Tensor | None,
    need_cells: bool,
) -> Callable[..., Gradients]:
    call = backends.Call(x, batch_sizes, h0, weights, reset, need_cells, need_reserve=True)
    chosen = backends.pick(backend, call).layer_backward
    assert chosen is not None  # pick takes no backend without one where a reserve is needed
    return chosen


# What the dispatcher calls. Arguments are the schemas', results tuples of tensors.


def _forward_impl(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: list[Tensor],
    w_hh: list[Tensor],
    bias: list[Tensor],
    w_hr: list[Tensor],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    weights = _weights(w_ih, w_hh, bias, w_hr)
    call = backends.Call(x, batch_sizes, h0, weights[0], reset, need_cells, need_reserve)
    out = backends.pick(backend, call).layer_forward(
        x, batch_sizes, h0, c0, weights, reset, need_reserve, need_cells
    )
    return tuple(_none(x) if t is None else t for t in out)


def _forward_fake(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: list[Tensor],
    w_hh: list[Tensor],
    bias: list[Tensor],
    w_hr: list[Tensor],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    directions, batch, hidden = c0.shape
    rows, output = x.size(0), h0.size(2)
    cells = need_reserve or need_cells
    return (
        x.new_empty(rows, directions * output),
        x.new_empty(rows, directions * hidden, dtype=state_dtype(x.dtype)) if cells else _none(x),
        x.new_empty(directions, batch, output),
        x.new_empty(directions, batch, hidden),
        x.new_empty(rows, directions, 4 * hidden) if need_reserve else _none(x),
        x.new_empty(rows, directions * hidden) if need_reserve and w_hr else _none(x),
    )


def _backward_impl(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    grads, (x, batch_sizes, h0, c0), weights = OutputGradients(*args[:4]), args[4:8], args[8:12]
    reset, y, c_all, gates, m, asked, backend = args[12:]
    need = _possible(asked, weights)
    saved = Reserve(y, c_all, gates, m if weights[3] else None)
    layer = _weights(*weights)
    g = _pick_backward(backend, x, batch_sizes, h0, layer[0], reset, grads.c_all is not None)(
        grads, x, batch_sizes, h0, c0, layer, reset, saved, need
    )
    return _results(x, g)


def _possible(asked: list[bool], weights: Sequence[list[Tensor]]) -> Requested:
    """A layer without biases or projections has no gradients of them, asked for or not."""
    need = Requested(*asked)
    return need._replace(bias=need.bias and bool(weights[2]), w_hr=need.w_hr and bool(weights[3]))


def _results(x: Tensor, g: Gradients) -> tuple[Tensor | list[Tensor], ...]:
    tensors = (_none(x) if t is None else t for t in (g.x, g.h0, g.c0))
    return *tensors, *(t or [] for t in (g.w_ih, g.w_hh, g.bias, g.w_hr))


def _backward_fake(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    x, _, h0, c0, *weights = args[4:12]
    need = Requested(*args[-2])
    tensors = [
        torch.empty_like(t) if asked else _none(x)
        for asked, t in zip(need[:3], (x, h0, c0), strict=True)
    ]
    lists = [
        [torch.empty_like(t) for t in kind] if asked else []
        for asked, kind in zip(need[3:], weights, strict=True)
    ]
    return *tensors, *lists


def _checkpoint_forward_impl(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: list[Tensor],
    w_hh: list[Tensor],
    bias: list[Tensor],
    w_hr: list[Tensor],
    reset: Tensor | None,
    need_cells: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    weights = _weights(w_ih, w_hh, bias, w_hr)
    out, saved = checkpoint.layer_forward(
        x, batch_sizes, h0, c0, weights, reset, need_cells, backend
    )
    return *(_none(x) if t is None else t for t in out[:4]), saved.c


def _checkpoint_forward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, batch_sizes, _, c0 = args[:4]
    y, c_all, h_n, c_n, *_ = _forward_fake(*(*args[:9], False, *args[9:]))
    borders = x.new_empty(checkpoint.border_shape(batch_sizes, x, c0))
    return y, c_all, h_n, c_n, borders


def _checkpoint_backward_impl(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    grads, (x, batch_sizes, h0, c0), weights = OutputGradients(*args[:4]), args[4:8], args[8:12]
    reset, y, borders, asked, backend = args[12:]
    g = checkpoint.layer_backward(
        grads,
        x,
        batch_sizes,
        h0,
        c0,
        _weights(*weights),
        reset,
        Borders(y, borders),
        _possible(asked, weights),
        backend,
    )
    return _results(x, g)


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0)


library.impl("layer_forward", _forward_impl, "CompositeExplicitAutograd")
library.impl("layer_backward", _backward_impl, "CompositeExplicitAutograd")
library.impl("checkpoint_forward", _checkpoint_forward_impl, "CompositeExplicitAutograd")
library.impl("checkpoint_backward", _checkpoint_backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fastlstm::layer_forward", _forward_fake, lib=library)
torch.library.register_fake("fastlstm::layer_backward", _backward_fake, lib=library)
torch.library.register_fake("fastlstm::checkpoint_forward", _checkpoint_forward_fake, lib=library)
torch.library.register_fake("fastlstm::checkpoint_backward", _backward_fake, lib=library)


def check_layer(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, for shapes, dtypes and devices that don't fit.

    The values of batch_sizes are left to whoever reads them: looking at them here would
    break tracing.
    """
    directions = len(weights)
    if directions not in (1, 2):
        raise ValueError(f"weights: got {directions} directions, expected 1 or 2")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, I) or (T, B, I)")
    if weights[0].w_hh.dim() != 2:
        raise ValueError(f"w_hh[0]: got shape {tuple(weights[0].w_hh.shape)}, expected (4H, P)")
    batch = h0.size(1) if h0.dim() == 3 else -1
    gates, output = weights[0].w_hh.shape
    hidden = gates // 4
    dtype, device = x.dtype, x.device

    def fit(tensor: Tensor, shape: tuple[int, ...], name: str, d: int | None = None) -> None:
        if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
            return
        name = name if d is None else f"{name}[{d}]"
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected x's {dtype}")
        raise ValueError(f"{name}: got device {tensor.device}, expected x's {device}")

    fit(h0, (directions, batch, output), "h0")
    fit(c0, (directions, batch, hidden), "c0")
    for d, (w_ih, w_hh, bias, w_hr, b_hh) in enumerate(weights):
        fit(w_ih, (4 * hidden, x.size(-1)), "w_ih", d)
        fit(w_hh, (4 * hidden, output), "w_hh", d)
        if bias is not None:
            fit(bias, (4 * hidden,), "bias", d)
        if b_hh is not None:
            fit(b_hh, (4 * hidden,), "b_hh", d)
        if w_hr is not None:
            fit(w_hr, (output, hidden), "w_hr", d)
        elif output != hidden:
            raise ValueError(f"w_hr[{d}]: got None, expected ({output}, {hidden})")
    if (
        batch_sizes.dim() != 1
        or batch_sizes.dtype != torch.int64
        or batch_sizes.device.type != "cpu"
    ):
        raise ValueError(
            f"batch_sizes: got {batch_sizes.dtype} {tuple(batch_sizes.shape)} on "
            f"{batch_sizes.device}, expected an int64 vector on cpu"
        )
    rows = x.size(0) if x.dim() == 2 else x.size(0) * x.size(1)
    if reset is not None and (
        (reset.shape, reset.dtype, reset.device) != ((rows,), torch.uint8, device)
    ):
        raise ValueError(
            f"reset: got {reset.dtype} {tuple(reset.shape)} on {reset.device}, "
            f"expected torch.uint8 ({rows},) on {device}"
        )
