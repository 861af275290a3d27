"""The ``cuda`` backend: the CUDA C++ kernels of csrc/cuda under the layer contract.

Kernels walk through the sequence. What is no part of the walk is a matrix product of torch's:
the input's share of the gates before it, and what is summed over all rows (eq. 9) after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .contract import Gradients, OutputGradients, Outputs, Requested, Reserve, Weights
from .products import walked_gradients
from .walks import Walk, aligned, copied, stacked, walk_of, with_inputs

if TYPE_CHECKING:
    from .backends import Call

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# What inference may take for the input's share of the gates: about this much at a time.
_GATES_BYTES = 64 << 20
# What a block reads of an exchanged row at once: so many units are a piece of 16 bytes or two.
_UNITS = 8
# Sequences of the smallest slice that a team of blocks takes, and hidden units of a block.
_SLICE, _TILE = 8, 16

# Looks at a flag before a block gives up: seconds, where a step takes microseconds.
POLLS = 1 << 23
# A stress test may ask for up to so many looks more than needed, at every wait.
JITTER = 0
# Tests and benchmarks may ask for "grid" or "cluster"; "best" leaves it to csrc/cuda/dispatch.cpp.
KERNEL = "best"

# The lowest bits of a fault word.
_KINDS = {
    1: "lstm_forward",
    2: "lstm_backward",
    3: "lstm_forward_cluster",
    4: "lstm_backward_cluster",
}


@functools.cache
def _device_type() -> str:
    """Where the library runs: "cuda"; "cpu" if tests have put an emulator in its place."""
    return torch.ops.fastlstm_cuda.device_type()


def missing() -> str | None:
    """Why this backend is not there, or None."""
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    reason = native.missing_cuda()
    if reason is not None:
        return reason
    if _device_type() == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def unsupported(call: Call) -> str | None:
    """Device, dtype and sizes matter to these kernels."""
    device, dtype = call.x.device, call.x.dtype
    if device.type != _device_type():
        return f"it runs on {_device_type()} tensors, got one on {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if dtype not in _DTYPES:
        return f"it takes {', '.join(map(str, _DTYPES))}, got {dtype}"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return (
            "it multiplies float32 in TF32 only, which "
            "torch.set_float32_matmul_precision('high') allows"
        )
    if call.weights.w_hr is not None:
        return "it has no projections; the backend 'triton' has"
    hidden = call.weights.w_hh.size(1)
    if hidden % _UNITS:
        return f"it takes a multiple of {_UNITS} hidden units, got {hidden}; 'triton' takes any"
    if call.batch_sizes.numel() == 0 or int(call.batch_sizes[0]) == 0:
        return None
    with torch.cuda.device_of(call.x):
        return _refusal(device, _DTYPES[dtype], hidden, call.h0.size(0), int(call.batch_sizes[0]))


def _refusal(
    device: torch.device, dtype: str, hidden: int, directions: int, sequences: int
) -> str | None:
    """Why the current device cannot hold the blocks of a walk at once, or None."""
    return torch.ops.fastlstm_cuda.refusal(dtype, hidden, directions, sequences, KERNEL) or None


@functools.cache
def _fault_word(device: torch.device) -> Tensor:
    """(1) int64 that kernels on ``device`` write to and the host reads without waiting."""
    with torch.inference_mode(False):  # or nobody could set it back, were the first call in one
        return torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")


def check(device: torch.device) -> None:
    """Raise if a block of an earlier launch on ``device`` gave up waiting.

    Looks at what has been reported so far, and does not wait for the device.

    Raises:
        RuntimeError: it names the kernel, the step and the team. Raised once.
    """
    device = torch.empty(0, device=device).device  # with its index
    word = _fault_word(device)
    place = int(word)
    if place == 0:
        return
    word.zero_()
    raise RuntimeError(
        f"{_KINDS[place & 15]} on {device}: a block gave up waiting for the others of team "
        f"{place >> 4 & 0xFFFFF} at step {place >> 24} of the walk; the results of that call "
        "are worthless"
    )


def _launch(walk: Walk, directions: int, hidden: int, device: torch.device) -> dict[str, Any]:
    """What both kernels are told, but for the range of positions."""
    slices, tiles = -(-walk.rows_per_step // _SLICE), -(-hidden // _TILE)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return dict(
        starts=walk.device_starts,
        flags=torch.zeros(directions * slices, tiles, dtype=torch.int32, device=device),
        fault=_fault_word(device),
        steps=walk.steps,
        rows_per_step=walk.rows_per_step,
        polls=POLLS,
        jitter=JITTER,
        kernel=KERNEL,
        stream=stream,
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
) -> Outputs:
    """One layer without a projection; shapes as in ``contract.Outputs``.

    Raises:
        RuntimeError: an earlier launch on the same device has failed since; see ``check``.
    """
    check(x.device)
    (directions, _, hidden), rows = h0.shape, x.size(0)
    keep_cells = need_reserve or need_cells
    y = x.new_empty(rows, directions * hidden)
    c_all = x.new_empty(rows, directions * hidden, dtype=torch.float32) if keep_cells else None
    gates = x.new_empty(rows, directions, 4 * hidden) if need_reserve else None
    h_n = h0.clone(memory_format=torch.contiguous_format)
    c_carry = c0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if rows > 0:
        with torch.cuda.device_of(x):
            walk = walk_of(batch_sizes, x.device)
            step_bytes = walk.rows_per_step * directions * 4 * hidden * x.itemsize
            positions = walk.steps if need_reserve else max(1, _GATES_BYTES // step_bytes)
            given = dict(
                _launch(walk, directions, hidden, x.device),
                gates=gates if need_reserve else x.new_empty(
                    min(walk.steps, positions) * walk.rows_per_step, directions, 4 * hidden
                ),
                y=y, c_all=c_all, h_n=h_n, c_carry=c_carry, h0=aligned(h0),
                w_hh=stacked([w.w_hh for w in weights]), reset=aligned(reset),
                reserve=need_reserve,
            )  # fmt: skip
            for part in with_inputs(x, walk, weights, given["gates"], positions):
                torch.ops.fastlstm_cuda.forward(
                    **given,
                    begin=part.begin,
                    end=part.end,
                    origin_forward=part.origins[0],
                    origin_reverse=part.origins[1],
                )
    return Outputs(y, c_all, h_n, c_carry.to(x.dtype), gates, None)


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
    (directions, _, hidden), rows = h0.shape, x.size(0)
    da = x.new_empty(rows, directions, 4 * hidden)
    dh0 = copied(grads.h_n, h0, x.dtype) if need.h0 else None
    dc_carry = copied(grads.c_n, c0, torch.float32)
    with torch.cuda.device_of(x):
        if rows > 0:
            walk = walk_of(batch_sizes, x.device)
            torch.ops.fastlstm_cuda.backward(
                **_launch(walk, directions, hidden, x.device),
                da=da, dh0=dh0, dc_carry=dc_carry,
                dy=aligned(grads.y), dc_all=aligned(grads.c_all), dh_n=aligned(grads.h_n),
                gates=aligned(saved.gates), c_all=aligned(saved.c_all), c0=aligned(c0),
                w_hh=stacked([w.w_hh for w in weights]), reset=aligned(reset),
                begin=0, end=walk.steps + (need.h0 or need.c0),
            )  # fmt: skip
        dc0 = dc_carry.to(x.dtype) if need.c0 else None
        return walked_gradients(da, None, dh0, dc0, x, batch_sizes, h0, weights, reset, saved, need)
