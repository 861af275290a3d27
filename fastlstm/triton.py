"""The ``triton`` backend: the kernels of kernels/ under the layer contract.

Kernels walk through the sequence. What is no part of the walk is a matrix product of torch's:
the input's share of the gates before it, and what is summed over all rows (eq. 9) after it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contract import (
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Weights,
)
from .products import walked_gradients
from .walks import Walk, aligned, copied, stacked, walk_of, with_inputs

if TYPE_CHECKING:
    from .backends import Call

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What inference may take for the input's share of the gates: about this much at a time.
_GATES_BYTES = 64 << 20


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def missing() -> str | None:
    """Why this backend is not there, or None."""
    if not _installed():
        return "triton is not installed"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def unsupported(call: Call) -> str | None:
    """The device and the dtype matter to these kernels."""
    device = call.x.device
    if device.type != ("cpu" if _interpreted() else "cuda"):
        return f"it runs on {'cpu' if _interpreted() else 'cuda'} tensors, got one on {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if call.x.dtype not in _DTYPES:
        return f"it takes {', '.join(map(str, _DTYPES))}, got {call.x.dtype}"
    return None


def check(device: torch.device) -> None:
    """Raise RuntimeError if a kernel on ``device`` has reported a fault; does not wait for it."""
    from .kernels import launch

    launch.check(torch.empty(0, device=device).device)  # with its index


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's own products are."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _product(dtype: torch.dtype) -> str:
    """The same, as tiles are chosen by it."""
    return _precision(dtype) if dtype == torch.float32 else "half"


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
    """One layer; shapes as in ``contract.Outputs``.

    Raises:
        RuntimeError: an earlier launch on the same device has failed since; see ``check``.
    """
    check(x.device)
    (directions, _, output), hidden, rows = h0.shape, c0.size(-1), x.size(0)
    keep_cells, projected = need_reserve or need_cells, weights[0].w_hr is not None
    y = x.new_empty(rows, directions * output)
    c_all = x.new_empty(rows, directions * hidden, dtype=torch.float32) if keep_cells else None
    gates = x.new_empty(rows, directions, 4 * hidden) if need_reserve else None
    m = x.new_empty(rows, directions * hidden) if need_reserve and projected else None
    h_n = h0.clone(memory_format=torch.contiguous_format)
    c_carry = c0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if rows > 0:
        with torch.cuda.device_of(x):
            _walk_forward(x, batch_sizes, h0, weights, reset, y, c_all, gates, m, h_n, c_carry)
    return Outputs(y, c_all, h_n, c_carry.to(x.dtype), gates, m)


def _walk_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    y: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    m: Tensor | None,
    h_n: Tensor,
    c_carry: Tensor,
) -> None:
    """Fill the outputs; ``c_carry`` (D, B, H) float32 goes from c0 to c_n."""
    from .kernels import barrier, config, forward, launch

    (directions, batch, output), hidden = h0.shape, c_carry.size(-1)
    walk = walk_of(batch_sizes, x.device)
    reserve = gates is not None
    chosen = config.choose(
        config.FORWARD, hidden, output, _product(x.dtype), directions,
        walk.rows_per_step, launch.limits(x.device),
    )  # fmt: skip
    teams = directions * -(-walk.rows_per_step // chosen.batch_tile)
    step_bytes = walk.rows_per_step * directions * 4 * hidden * x.itemsize
    positions = walk.steps if reserve else max(1, _GATES_BYTES // step_bytes)
    if gates is None:
        gates = x.new_empty(min(walk.steps, positions) * walk.rows_per_step, directions, 4 * hidden)
    if m is None and weights[0].w_hr is not None:
        m = x.new_empty(batch, directions * hidden)
    arguments: dict[str, Any] = dict(
        gates=gates, y=y, c_all=c_all, m=m, h_n=h_n, c_carry=c_carry, h0=aligned(h0),
        w_hh=stacked([w.w_hh for w in weights]), w_hr=stacked([w.w_hr for w in weights]),
        reset=aligned(reset), starts=walk.device_starts,
        counters=x.new_zeros(teams * barrier.COUNTER_STRIDE.value, dtype=torch.int64),
        steps=walk.steps, batch=batch, rows_per_step=walk.rows_per_step,
        D=directions, H=hidden, P=output, RESERVE=reserve, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    exchanges = 1 if arguments["w_hr"] is None else 2
    for part in with_inputs(x, walk, weights, gates, positions):
        arguments.update(origin_forward=part.origins[0], origin_reverse=part.origins[1])
        launch.run(
            forward.lstm_forward, arguments, chosen, part.begin * exchanges,
            part.end * exchanges, teams,
            chosen.tiles(hidden, output), x.device,
        )  # fmt: skip


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
    """Gradients of the inputs asked for.

    da is kept and multiplied in storage dtype, as tensor cores want it.

    Raises:
        RuntimeError: an earlier launch on the same device has failed since; see ``check``.
    """
    check(x.device)
    (directions, _, output), hidden, rows = h0.shape, c0.size(-1), x.size(0)
    da = x.new_empty(rows, directions, 4 * hidden)
    projected = weights[0].w_hr is not None
    dh_all = x.new_empty(rows, directions * output) if projected else None
    dh0 = copied(grads.h_n, h0, x.dtype) if need.h0 else None
    dc_carry = copied(grads.c_n, c0, torch.float32)
    with torch.cuda.device_of(x):
        if rows > 0:
            walk = walk_of(batch_sizes, x.device)
            positions = walk.steps + (need.h0 or need.c0)
            _walk_backward(
                grads, walk, positions, c0, weights, reset, saved, da, dh_all, dh0, dc_carry
            )
        dc0 = dc_carry.to(x.dtype) if need.c0 else None
        return walked_gradients(
            da, dh_all, dh0, dc0, x, batch_sizes, h0, weights, reset, saved, need
        )


def _walk_backward(
    grads: OutputGradients,
    walk: Walk,
    positions: int,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    da: Tensor,
    dh_all: Tensor | None,
    dh0: Tensor | None,
    dc_carry: Tensor,
) -> None:
    """Fill da, dh_all and dh0; ``dc_carry`` (D, B, H) float32 goes from dc_n to dc0."""
    from .kernels import backward, barrier, config, launch

    (directions, batch, hidden), output = c0.shape, weights[0].w_hh.size(1)
    chosen = config.choose(
        config.BACKWARD, hidden, output, _product(da.dtype), directions,
        walk.rows_per_step, launch.limits(da.device),
    )  # fmt: skip
    teams = directions * -(-walk.rows_per_step // chosen.batch_tile)
    arguments: dict[str, Any] = dict(
        da=da, dh_all=dh_all, dh0=dh0, dc_carry=dc_carry,
        dy=aligned(grads.y), dc_all=aligned(grads.c_all), dh_n=aligned(grads.h_n),
        gates=aligned(saved.gates), c_all=aligned(saved.c_all), c0=aligned(c0),
        w_hh=stacked([w.w_hh for w in weights]), w_hr=stacked([w.w_hr for w in weights]),
        reset=aligned(reset), starts=walk.device_starts,
        counters=da.new_zeros(teams * barrier.COUNTER_STRIDE.value, dtype=torch.int64),
        steps=walk.steps, batch=batch, rows_per_step=walk.rows_per_step,
        D=directions, H=hidden, P=output, PRECISION=_precision(da.dtype),
    )  # fmt: skip
    exchanges = 1 if arguments["w_hr"] is None else 2
    launch.run(
        backward.lstm_backward, arguments, chosen, 0, positions * exchanges, teams,
        chosen.tiles(hidden, output), da.device,
    )  # fmt: skip
