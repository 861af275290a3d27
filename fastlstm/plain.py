"""The short way of plain calls: padded input on the CPU, and nobody watching.

Most calls are such, and of a small one Python takes longer than the arithmetic.  Here one operator
does all that a call needs.  Whatever is not plain goes the long way of ``functional.py``, which has
the same results, and the errors; a step of an ``LSTMCell`` the one of its own (``cell.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, backward, functional, gradients, modes, per_sample
from .contract import Reserve, Weights, state_dtype

_PLAIN = frozenset((Tensor, nn.Parameter))  # a subclass of them has its own way with operators
_DENSE = frozenset((torch.strided,))
_requires_grad, _layout, _dtype = map(attrgetter, ("requires_grad", "layout", "dtype"))


class _MisfitError(Exception):
    """The library found arguments that do not fit; the long way names them."""


class PlainCall(NamedTuple):
    """What a plain call of one layer or several consists of besides tensors."""

    backend: backends.Backend
    directions: int
    biased: bool
    hidden_size: int
    output_size: int
    changeable: bool = False  # may y be changed before the backward pass?

    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        reset: Tensor | None,
        need_reserve: bool,
    ) -> list[Tensor]:
        """``cpu.plain_forward``'s results, which are some."""
        assert self.backend.plain_forward is not None
        results = self.backend.plain_forward(x, h0, c0, weights, reset, *self[1:], need_reserve)
        if not results:
            raise _MisfitError
        return results


def run(
    module: Any, input: Any, hx: Any, reset: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """What a module returns for its arguments, or None where that goes the long way."""
    if torch.compiler.is_compiling() or not _is_plain(input) or modes.is_any_on_cpu():
        return None
    if input.dim() not in (2, 3) or input.size(-1) != module.input_size:
        return None
    if module._forward_hooks and per_sample.hooks_of_opacus(module) is not None:
        return None
    hx = _plain_states(hx)
    held: dict[str, Any] = module._parameters  # not so what is parametrized or pruned
    weights: list[Any] = [held.get(name) for names in module._all_weights for name in names]
    backend = backends.plain_backend(module.backend)
    if hx is None or backend is None or not _are_weights(weights, input):
        return None
    hidden_size = module.hidden_size
    output_size = module.proj_size or hidden_size
    directions = 2 if module.bidirectional else 1
    call = PlainCall(backend, directions, module.bias, hidden_size, output_size)
    batched = input.dim() == 3
    batch_first = module.batch_first and batched
    if reset is not None:
        if not _is_plain_reset(reset, input):
            return None
        reset = (reset.t() if batch_first else reset).flatten().view(torch.uint8)
    if not batched:  # one sequence is a batch of one
        if any(state.dim() != 2 for state in hx):
            return None
        input, hx = input.unsqueeze(1), tuple(state.unsqueeze(1) for state in hx)
    rows = input.transpose(0, 1) if batch_first else input
    layers = module.num_layers
    dropout = module.dropout if module.training and layers > 1 else 0.0
    graph = torch.is_grad_enabled() and any(map(_requires_grad, (input, *hx, *weights)))
    if graph and module.checkpoint:
        return None
    projected = module.proj_size > 0
    if graph and functional.has_changeable_output(input.dtype, directions, projected):
        call = call._replace(changeable=True)
    try:
        if graph or dropout:
            # What is saved is then nobody else's to change, and no more than is needed.
            y, h_n, c_n = _by_layers(call, rows.contiguous(), hx, weights, reset, layers, dropout)
        else:
            h0, c0 = hx or (None, None)
            y, h_n, c_n = call.forward(rows, h0, c0, weights, reset, need_reserve=False)
    except _MisfitError:
        return None
    if not batched:
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
    return y.transpose(0, 1) if batch_first else y, (h_n, c_n)


def step(module: Any, names: Sequence[str], input: Any, hx: Any) -> tuple[Tensor, Tensor] | None:
    """What an LSTMCell, whose weights have these ``names``, returns; or None, as ``run``."""
    if torch.compiler.is_compiling() or not _is_plain(input) or modes.is_any_on_cpu():
        return None
    if input.dim() != 2 or input.size(1) != module.input_size or type(hx) is list:
        return None  # nn.LSTMCell takes no list
    hidden_size, graph = module.hidden_size, torch.is_grad_enabled()
    if module.backend == "auto" and backends.is_torchs_own_step(input, hidden_size, graph):
        return None
    hx = _plain_states(hx)
    held: dict[str, Any] = module._parameters
    weights: list[Any] = [held.get(name) for name in names]
    backend = backends.plain_backend(module.backend)
    if hx is None or backend is None or not _are_weights(weights, input):
        return None
    h0, c0 = hx or (None, None)
    call = PlainCall(backend, 1, module.bias, hidden_size, hidden_size)
    try:
        if graph and any(map(_requires_grad, (input, *hx, *weights))):
            _, h_n, c_n = PlainLayer.apply(call, None, input.contiguous(), h0, c0, *weights)
        else:
            _, h_n, c_n = call.forward(input, h0, c0, weights, None, need_reserve=False)
    except _MisfitError:
        return None
    return h_n, c_n


def _is_plain(tensor: Any) -> bool:
    """Dense floats on the CPU, without a way of their own with operators?"""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dtype.is_floating_point
        and not tensor.is_nested
    )


def _plain_states(hx: Any) -> tuple[Tensor, ...] | None:
    """``hx`` as h0 and c0, or none of them; None if they are not plain."""
    if hx is None:
        return ()
    if type(hx) not in (tuple, list) or len(hx) != 2 or not all(map(_is_plain, hx)):
        return None
    return tuple(hx)


def _is_plain_reset(reset: Any, input: Tensor) -> bool:
    return (
        type(reset) is Tensor
        and reset.is_cpu
        and reset.layout is torch.strided
        and reset.dtype is torch.bool
        and reset.shape == input.shape[:-1]
    )


def _are_weights(weights: Sequence[Any], input: Tensor) -> bool:
    """Dense tensors of input's type?  (The operator looks at their shapes.)"""
    return (
        _PLAIN.issuperset(map(type, weights))
        and _DENSE.issuperset(map(_layout, weights))
        and {input.dtype}.issuperset(map(_dtype, weights))
    )


def _by_layers(
    call: PlainCall,
    rows: Tensor,
    hx: tuple[Tensor, ...],
    weights: list[Any],
    reset: Tensor | None,
    layers: int,
    dropout: float,
) -> Sequence[Tensor]:
    """y (T, B, D*P), h_n (L*D, B, P) and c_n (L*D, B, H), differentiably where that is wanted."""
    if layers == 1:
        return PlainLayer.apply(call, reset, rows, *(hx or (None, None)), *weights)
    if any(state.dim() != 3 or state.size(0) != layers * call.directions for state in hx):
        raise _MisfitError
    h_in, c_in = (state.split(call.directions) for state in hx) if hx else ([None] * layers,) * 2
    each = len(weights) // layers
    h_out, c_out = [], []
    graph = torch.is_grad_enabled()
    for k in range(layers):
        if dropout and k > 0:
            rows = nn.functional.dropout(rows, dropout)
        h0, c0, here = h_in[k], c_in[k], weights[k * each : (k + 1) * each]
        # A layer leaves its input as it is.
        own = call if k + 1 == layers else call._replace(changeable=False)
        if graph and any(t is not None and t.requires_grad for t in (rows, h0, c0, *here)):
            rows, h_n, c_n = PlainLayer.apply(own, reset, rows, h0, c0, *here)
        else:  # the first layers may be frozen
            rows, h_n, c_n = own.forward(rows, h0, c0, here, reset, need_reserve=False)
        h_out.append(h_n)
        c_out.append(c_n)
    return rows, torch.cat(h_out), torch.cat(c_out)


class PlainLayer(torch.autograd.Function):
    """(call, reset, x, h0, c0, *weights as nn.LSTM holds them) -> y, h_n, c_n.

    reset (N,) uint8 and the states may be None.  A step of LSTMCell is x (B, I) with states (B, H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: PlainCall,
        reset: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, *reserve = call.forward(x, h0, c0, weights, reset, need_reserve=True)
        ctx.set_materialize_grads(False)
        ctx.call = call
        # Saved this way, a tensor that is changed in place before the backward pass is noticed.
        ctx.save_for_backward(reset, x, h0, c0, *weights, *reserve)
        return y, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call, (reset, *saved) = ctx.call, ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 2
        (x, h0, c0, *weights), reserve = saved[:count], saved[count:]
        asked = gradients.asked_for(ctx, 2, saved, (dy, dh_n, dc_n))
        watched = (
            torch.compiler.is_compiling()
            or modes.is_any_on_cpu()
            or any(map(modes.is_batched, (dy, dh_n, dc_n)))
        )
        graph, step = torch.is_grad_enabled(), x.dim() == 2
        if graph and step and not watched and state_dtype(x.dtype) is x.dtype:
            return None, None, *_step_gradients(asked, (dh_n, dc_n), x, h0, c0, weights)
        if graph or watched:
            grads = (dy, None, dh_n, dc_n)
            return (
                None,
                None,
                *_long_gradients(call, asked, reserve, grads, x, h0, c0, weights, reset),
            )
        assert call.backend.plain_backward is not None
        got = call.backend.plain_backward(
            (dy, dh_n, dc_n),
            x,
            h0,
            c0,
            weights,
            reset,
            reserve,
            *call[1:5],
            _needed(asked, call),
        )
        return None, None, *(grad if ask else None for grad, ask in zip(got, asked, strict=True))


def _needed(asked: tuple[bool, ...], call: PlainCall) -> list[bool]:
    """Of x, h0, c0 and the weights one by one, as ``Requested``."""
    weights = asked[3:]
    each = len(weights) // call.directions
    kinds = [any(weights[k::each]) for k in range(each)]
    bias = call.biased and (kinds[2] or kinds[3])
    projected = each > (4 if call.biased else 2)
    return [*asked[:3], kinds[0], kinds[1], bias, projected and kinds[-1]]


def _by_direction(call: PlainCall, values: Any) -> list[Weights]:
    """Weights as nn.LSTM holds them, or what else there is one of for each, as ``Weights``."""
    each = len(values) // call.directions
    return [
        Weights.of_module(values[k : k + each], call.biased) for k in range(0, len(values), each)
    ]


def _long_gradients(
    call: PlainCall,
    asked: tuple[bool, ...],
    reserve: Any,
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Any,
    reset: Tensor | None,
) -> list[Tensor | None]:
    """The gradients that ``PlainLayer.backward`` returns, with a graph, or batched."""
    single = x.dim() == 2  # a step of LSTMCell: rows as packed ones, states without a direction
    steps, batch = (1, x.size(0)) if single else x.shape[:2]
    batch_sizes = torch.full((steps,), batch, dtype=torch.int64, device="cpu")
    if single:
        dy, dc_all, *states = grads
        dh_n, dc_n, h0, c0 = (t if t is None else t.unsqueeze(0) for t in (*states, h0, c0))
        grads = (dy, dc_all, dh_n, dc_n)
    if h0 is None:
        h0 = x.new_zeros(call.directions, batch, call.output_size)
    if c0 is None:
        c0 = x.new_zeros(call.directions, batch, call.hidden_size)
    layer = _by_direction(call, weights)
    flags = _by_direction(call, asked[3:])
    run = gradients.Run(False, call.backend.name, checkpoint=False, chosen=call.backend)
    got = backward.gradients(
        run,
        (*asked[:3], *(bool(flag) for direction in flags for flag in direction)),
        Reserve(*reserve, *([None] * (4 - len(reserve)))),
        batch_sizes,
        reset,
        grads,
        (x, h0, c0, *(t for w in layer for t in w)),
    )
    by_direction = gradients.unflatten(got[3:])
    ordered: list[Tensor | None] = [
        t.squeeze(0) if single and k > 0 and t is not None else t for k, t in enumerate(got[:3])
    ]
    for grad, weight in zip(by_direction, layer, strict=True):
        ordered += (grad.w_ih, grad.w_hh)
        ordered += (grad.bias, grad.b_hh) if call.biased else ()
        ordered += (grad.w_hr,) if weight.w_hr is not None else ()
    return ordered


def _step_gradients(
    asked: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Any,
) -> list[Tensor | None]:
    """Of a step of LSTMCell, from ``grads`` of its h and c: by torch's own, whose gradients have a
    graph that is cheaper than a layer's."""
    inputs = gradients.aliases((x, h0, c0, *weights), asked, again=True)
    x, h0, c0, *weights = inputs
    zeros = x.new_zeros(len(x), weights[1].size(1))
    states = [zeros if state is None else state for state in (h0, c0)]
    results = torch._VF.lstm_cell(x, states, *weights)
    wanted = [t for t, ask in zip(inputs, asked, strict=True) if ask]
    found = iter(gradients.differentiate(results, wanted, grads, create_graph=True))
    return [next(found) if ask else None for ask in asked]
