"""THE dispatch table: which backends there are, what each supports, which one to take.

A backend is a pair of functions with the signatures of ``reference.layer_forward`` and
``reference.layer_backward``, a reason why it is not there (or None), and a predicate that
says why it cannot serve a call (or None).  No other file names a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten, cpu, cuda, dispatch, native, reference, triton
from .contract import Curvature, Gradients, Outputs, Reserve, Tangents, Weights, state_dtype


class Call(NamedTuple):
    """What a backend is asked to serve, as far as its answer may depend on it."""

    x: Tensor  # (N, I), or (T, B, I)
    batch_sizes: Tensor  # (T,)
    h0: Tensor  # (D, B, P)
    weights: Weights  # of one direction
    reset: Tensor | None
    need_cells: bool
    need_reserve: bool  # will its layer_backward be called?
    train: bool = False  # will gradients be wanted, by layer_backward or by torch's own means?


def _always(_: Call) -> str | None:
    return None


class Refusal(RuntimeError):
    """The backend named cannot serve a call; the message says why."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend {backend!r} cannot serve this call: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Backend:
    """One way to run a layer."""

    name: str
    layer_forward: Callable[..., Outputs]
    # None: layer_forward is made of operators that torch differentiates by itself.
    layer_backward: Callable[..., Gradients] | None
    missing: Callable[[], str | None]  # why it is not there, or None
    unsupported: Callable[[Call], str | None] = _always  # why it can't serve, or None
    # The reserve of a forward direction whose y is known (see reference.layer_recompute); None:
    # its layer_forward makes it again.
    layer_recompute: Callable[..., Reserve] | None = None
    # The walk alone of a backward pass (see cpu.layer_walk); None: it is not to be had.
    layer_walk: Callable[..., Any] | None = None
    # The walk of tangents, and what differentiates the cells of a backward pass again (see
    # reference.layer_tangent, layer_curvature); None: torch does (see differentiable, below).
    layer_tangent: Callable[..., Tangents] | None = None
    layer_curvature: Callable[..., Curvature] | None = None
    # Of plain calls on the CPU: see plain.py, and cpu.py for what they take and return.
    plain_forward: Callable[..., list[Tensor]] | None = None
    plain_backward: Callable[..., list[Tensor]] | None = None
    automatic: bool = True  # may "auto" take it, without a record that says it is the fastest?
    compiled: bool = False  # is it the library of csrc/, with its instruction sets?
    padded: bool = False  # does it also take (T, B, ...) for packed rows?

    def refusal(self, call: Call) -> str | None:
        """Why this backend cannot serve ``call``, or None."""
        if call.need_reserve and self.layer_backward is None:
            return "torch differentiates it by itself, which it can't inside an operator"
        return self.missing() or self.unsupported(call)


# In the order of preference of backend="auto", where dispatch.json has no record.
_TABLE = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            cpu.layer_forward,
            cpu.layer_backward,
            cpu.missing,
            cpu.unsupported,
            compiled=True,
            padded=True,
            layer_recompute=cpu.layer_recompute,
            layer_walk=cpu.layer_walk,
            layer_tangent=cpu.layer_tangent,
            layer_curvature=cpu.layer_curvature,
            plain_forward=cpu.plain_forward,
            plain_backward=cpu.plain_backward,
        ),
        Backend("aten", aten.layer_forward, None, lambda: None, aten.unsupported),
        Backend(
            "triton",
            triton.layer_forward,
            triton.layer_backward,
            triton.missing,
            triton.unsupported,
            automatic=False,  # only where a recorded run has shown it to be faster than aten
        ),
        Backend(
            "cuda",
            cuda.layer_forward,
            cuda.layer_backward,
            cuda.missing,
            cuda.unsupported,
            automatic=False,  # no recorded run says where it is faster, nor that it is right
        ),
        Backend(
            "reference",
            reference.layer_forward,
            reference.layer_backward,
            lambda: None,
            layer_recompute=reference.layer_recompute,
        ),
    )
}
_AUTOMATIC = tuple(entry for entry in _TABLE.values() if entry.automatic)


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can be used, else the reason why it cannot."""
    return {name: backend.missing() for name, backend in _TABLE.items()}


def check_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is "auto" or the name of a backend."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in _TABLE):
        names = ", ".join(repr(name) for name in ("auto", *_TABLE))
        raise ValueError(f"backend: got {backend!r}, expected one of {names}")


def pick(backend: str, call: Call) -> Backend:
    """The backend to run a layer with: the one named; or the first that can, of those recorded as
    the fastest for such calls, and then of the table.

    Raises:
        ValueError: no backend has that name.
        Refusal: a RuntimeError; the backend named cannot serve the call.
        RuntimeError: the records are damaged.
    """
    check_name(backend)
    if backend == "auto":
        able = (*_recorded(call), *_AUTOMATIC) if call.x.is_cuda else _AUTOMATIC
        return next(entry for entry in able if entry.refusal(call) is None)  # reference always can
    reason = _TABLE[backend].refusal(call)
    if reason is not None:
        raise Refusal(backend, reason)
    return _TABLE[backend]


def differentiable(call: Call) -> Backend:
    """What to differentiate more than once where no kernels do it: torch's own LSTM on the CPU,
    where it serves ``call`` and keeps its states in full precision, else the reference.  (cuDNN's
    is differentiated once.)
    """
    aten, dtype = _TABLE["aten"], call.x.dtype
    exact = dtype.is_floating_point and state_dtype(dtype) is dtype
    if call.x.device.type == "cpu" and exact and aten.refusal(call) is None:
        return aten
    return _TABLE["reference"]


def plain_backend(backend: str) -> Backend | None:
    """What runs plain calls, if ``backend`` has such a way and it is there."""
    if backend == "auto":
        return next((e for e in _AUTOMATIC if e.plain_forward and not e.missing()), None)
    entry = _TABLE.get(backend)
    return None if entry is None or entry.plain_forward is None or entry.missing() else entry


def _recorded(call: Call) -> list[Backend]:
    """What recorded runs say is faster than torch's own LSTM for such a call, best first."""
    names = dispatch.recorded(call)
    unknown = [name for name in names if name not in _TABLE]
    if unknown:
        raise RuntimeError(
            f"{dispatch.PATH}: got backend {unknown[0]!r}, expected one of {', '.join(_TABLE)}"
        )
    return [_TABLE[name] for name in names]


def is_torchs_own_step(input: Tensor, hidden_size: int, graph: bool) -> bool:
    """Does ``backend="auto"`` leave a plain call of an LSTMCell, ``input (B, I)``, to torch's own?

    Our kernels are faster, except in bfloat16 with many weights, on a processor with bfloat16
    instructions, if a backward pass may follow (``graph``): see docs/performance.md.
    With a matrix unit they were not measured without one, so torch keeps large steps there.
    """
    if input.dtype is not torch.bfloat16 or not native.multiplies_bfloat16():
        return False
    rows, inputs = input.shape
    weights = (inputs + hidden_size) * 4 * hidden_size
    if graph:
        return weights > 1 << 18
    return native.has_matrix_unit() and rows > 4 and weights > 1 << 19


def lacks_backward(backend: str, x: Tensor, reset: Tensor | None, need_cells: bool) -> bool:
    """Will ``pick`` take a backend without a layer_backward?  From what is known while tracing."""
    if backend == "auto":
        return x.device.type != "cpu" and reset is None and not need_cells
    return keeps_nothing(backend)


def keeps_nothing(backend: str) -> bool:
    """Is this the name of a backend that has no reserve, since torch differentiates it?"""
    return backend in _TABLE and _TABLE[backend].layer_backward is None
