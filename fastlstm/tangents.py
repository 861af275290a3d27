"""Tangents of a layer (eq. 10), and what differentiates its backward pass again (eq. 11, 12).

A backend has the walks of both; what is here are the products over all rows around them.  Write J
for the derivative of a layer's results with respect to its inputs, u for gradients of the results,
v for a direction of the inputs.  A backward pass makes J^T u.  The gradient of <v, J^T u> with
respect to u is J v, the tangents; with respect to the inputs it is that of <u, J v>.  All in state
dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend
from .contract import OutputGradients, Requested, Reserve, Tangents, Weights, state_dtype
from .gradients import packed_rows, shaped, unflatten
from .steps import apart, entered, last_rows, left


class Layer(NamedTuple):
    """A layer that has been run, in state dtype and packed rows."""

    backend: Backend
    x: Tensor
    batch_sizes: Tensor
    h0: Tensor
    c0: Tensor
    weights: list[Weights]
    reset: Tensor | None
    saved: Reserve

    @classmethod
    def of(
        cls,
        backend: Backend,
        saved: Reserve,
        batch_sizes: Tensor,
        reset: Tensor | None,
        inputs: Sequence[Any],
    ) -> Layer:
        """From (x, h0, c0, *flat weights)."""
        x, h0, c0, *flat = in_state(inputs, inputs[0].dtype)
        y, c_all, gates, m = in_state(saved, inputs[0].dtype)
        kept = Reserve(packed_rows(y), packed_rows(c_all), gates, m)
        return cls(backend, packed_rows(x), batch_sizes, h0, c0, unflatten(flat), reset, kept)

    @property
    def projected(self) -> bool:
        return self.weights[0].w_hr is not None

    def parts(self, values: Tensor) -> tuple[Tensor, ...]:
        """(N, D*size) by direction."""
        return values.chunk(len(self.weights), 1)

    def entered(self, d: int, values: Tensor, initial: Tensor) -> Tensor:
        return entered(d, values, initial, self.batch_sizes, self.reset)

    def left(self, d: int, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return left(d, gradients, self.h0.size(1), self.batch_sizes, self.reset)


class Direction(NamedTuple):
    """Tangents of a layer's inputs, None where zero."""

    x: Tensor | None
    h0: Tensor
    c0: Tensor
    weights: list[Weights]  # by direction, any field None; of each sample (steps.apart) if 3-D

    @classmethod
    def of(cls, layer: Layer, tangents: Sequence[Tensor | None], dtype: torch.dtype) -> Direction:
        """From those of (x, h0, c0, *flat weights)."""
        x, h0, c0, *flat = in_state(tangents, dtype)
        return cls(
            None if x is None else packed_rows(x),
            torch.zeros_like(layer.h0) if h0 is None else h0,
            torch.zeros_like(layer.c0) if c0 is None else c0,
            unflatten(flat),
        )


def in_state(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Tensors as a layer of this storage dtype computes with them."""
    state = state_dtype(dtype)
    return [None if t is None else t.to(state) for t in tensors]


def walked(layer: Layer, v: Direction) -> tuple[Tangents, Tensor]:
    """The layer's tangents, and those of the pre-activations (N, D, 4H)."""
    added = _added_by_projection(layer, v)
    rows, directions, columns = layer.saved.gates.shape
    pre = layer.x.new_empty(rows, directions, columns)
    for d, (w, own) in enumerate(zip(layer.weights, v.weights, strict=True)):
        terms: list[tuple[Tensor, Tensor]] = []
        if v.x is not None:
            terms.append((v.x, w.w_ih))
        if own.w_ih is not None:
            terms.append((layer.x, own.w_ih))
        if own.w_hh is not None:
            h_in = layer.entered(d, layer.parts(layer.saved.y)[d], layer.h0[d])
            terms.append((h_in, own.w_hh))
        if added is not None:  # the walk does not know of it
            terms.append((layer.entered(d, added[d], torch.zeros_like(layer.h0[d])), w.w_hh))
        biases = [b for b in (own.bias, own.b_hh) if b is not None]
        _sum_products(pre[:, d], terms, biases)
    assert layer.backend.layer_tangent is not None  # by_kernels was asked
    tangents = layer.backend.layer_tangent(
        pre, layer.batch_sizes, v.h0, v.c0, layer.weights, layer.reset, layer.c0, layer.saved
    )
    if added is not None:
        tangents.y.add_(_joined(added))
        for d, part in enumerate(layer.parts(tangents.y)):
            last = part.index_select(0, last_rows(d, layer.batch_sizes))
            tangents.h_n[d, : len(last)] = last
    return tangents, pre


def _added_by_projection(layer: Layer, v: Direction) -> list[Tensor] | None:
    """What tangents of the projection's weights add to those of every h, by direction."""
    if layer.saved.m is None or all(own.w_hr is None for own in v.weights):
        return None
    parts = zip(layer.parts(layer.saved.m), layer.parts(layer.saved.y), v.weights, strict=True)
    return [torch.zeros_like(y) if w.w_hr is None else _times(m, w.w_hr.mT) for m, y, w in parts]


def _sum_products(
    out: Tensor, terms: Sequence[tuple[Tensor, Tensor]], biases: Sequence[Tensor]
) -> None:
    """out = the sum of each left right^T, and of biases."""
    if not terms:
        out.zero_()
    for k, (one, other) in enumerate(terms):
        if k > 0:
            _add_product(out, one, other.mT)
        elif other.dim() == 2:
            torch.mm(one, other.T, out=out)
        else:
            out.copy_(_times(one, other.mT))
    for bias in biases:
        if bias.dim() == 1:
            out.add_(bias)
        else:
            apart(out, len(bias)).add_(bias.unsqueeze(1))


def _times(rows: Tensor, w: Tensor) -> Tensor:
    """``rows (N, K)`` times ``w (K, size)``, or each sample's with its own."""
    if w.dim() == 2:
        return rows @ w
    return torch.bmm(apart(rows, len(w)), w).transpose(0, 1).flatten(0, 1)


def _add_product(out: Tensor, rows: Tensor, w: Tensor) -> None:
    if w.dim() == 2:
        out.addmm_(rows, w)
    else:
        out.add_(_times(rows, w))


def layer_tangents(
    backend: Backend,
    saved: Reserve,
    batch_sizes: Tensor,
    reset: Tensor | None,
    tangents: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> tuple[Tensor, ...]:
    """J v: tangents of y, c_all, h_n and c_n from those of (x, h0, c0, *flat weights)."""
    layer = Layer.of(backend, saved, batch_sizes, reset, inputs)
    made, _ = walked(layer, Direction.of(layer, tangents, inputs[0].dtype))
    return _results(made, inputs[0])


def hessian_product(
    backend: Backend,
    asked: Sequence[bool],
    samples: int | None,
    saved: Reserve,
    batch_sizes: Tensor,
    reset: Tensor | None,
    tangents: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """The gradient of <u, J v> with respect to the ``inputs`` that are ``asked`` for, from the
    ``grads`` u of y, c_all, h_n and c_n and ``tangents`` v of the inputs; that of weights for each
    of so many samples (``steps.apart``), if these are not None."""
    layer = Layer.of(backend, saved, batch_sizes, reset, inputs)
    v = Direction.of(layer, tangents, inputs[0].dtype)
    u = _gradients(grads, inputs[0].dtype)
    return _of_inputs(layer, v, u, *walked(layer, v), asked, samples, inputs[0])


def second_order(
    backend: Backend,
    asked: Sequence[bool],
    saved: Reserve,
    batch_sizes: Tensor,
    reset: Tensor | None,
    tangents: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> list[Tensor | None]:
    """Both, of which the first is for the ``grads``, as ``asked`` for of these and the inputs."""
    layer = Layer.of(backend, saved, batch_sizes, reset, inputs)
    v = Direction.of(layer, tangents, inputs[0].dtype)
    made, pre = walked(layer, v)
    results = [t if a else None for t, a in zip(_results(made, inputs[0]), asked, strict=False)]
    if not any(asked[4:]):
        return results + [None] * len(inputs)
    u = _gradients(grads, inputs[0].dtype)
    return results + list(_of_inputs(layer, v, u, made, pre, asked[4:], None, inputs[0]))


def _results(made: Tangents, x: Tensor) -> tuple[Tensor, ...]:
    """Tangents of y, c_all, h_n and c_n in the form and the dtype of these."""
    y, h_n, c_n = (t.to(x.dtype) for t in (made.y, made.h_n, made.c_n))
    return shaped(y, x), shaped(made.c_all, x), h_n, c_n


def _gradients(grads: Sequence[Tensor | None], dtype: torch.dtype) -> OutputGradients:
    y, c_all, h_n, c_n = in_state(grads, dtype)
    y, c_all = (None if t is None else packed_rows(t) for t in (y, c_all))
    return OutputGradients(y, c_all, h_n, c_n)


def _of_inputs(
    layer: Layer,
    v: Direction,
    u: OutputGradients,
    made: Tangents,
    pre: Tensor,
    asked: Sequence[bool],
    samples: int | None,
    x: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradient of <u, J v> with respect to (x, h0, c0, *flat weights), in the form of x."""
    da, dh, dm = _first_order(layer, u)
    m = None
    if any(own.w_hr is not None for own in v.weights):
        m = torch.zeros_like(dm)
        for d, own in enumerate(v.weights):
            if own.w_hr is not None:
                _add_product(layer.parts(m)[d], layer.parts(dh)[d], own.w_hr)
    assert layer.backend.layer_curvature is not None  # by_kernels was asked
    curved = layer.backend.layer_curvature(
        u, dm, layer.batch_sizes, layer.c0, layer.reset, layer.saved, v.c0, pre, made.c_all, m
    )
    # (eq. 12) What enters each step is multiplied by W_hh and, in its tangents, by those of W_hh.
    dy, of_h0 = [], []
    for d, (w, own) in enumerate(zip(layer.weights, v.weights, strict=True)):
        of_h_in = curved.a[:, d] @ w.w_hh
        if own.w_hh is not None:
            _add_product(of_h_in, da[:, d], own.w_hh)
        of_h, of_initial = layer.left(d, of_h_in)
        dy.append(of_h)
        of_h0.append(of_initial)
    need = Requested(False, True, True, False, False, False, layer.projected)
    given = OutputGradients(_joined(dy), curved.c_all, None, None)
    total, dh_again, dh0, dc0 = _walk(layer, given, need)
    total.add_(curved.a)
    gradients: list[Tensor | None] = [None] * len(asked)
    if asked[0]:
        gradients[0] = shaped(_gradient_of_x(layer, v, total, da), x)
    if asked[1]:
        gradients[1] = dh0.add_(torch.stack(of_h0))
    if asked[2]:
        gradients[2] = dc0.add_(curved.c0)
    walks = _Walks(da, dh, total, dh_again)
    size = len(Weights._fields)
    for d in range(len(layer.weights)):
        fields = slice(3 + d * size, 3 + (d + 1) * size)
        gradients[fields] = _of_weights(layer, v, made, walks, d, asked[fields], samples)
    return tuple(None if t is None else t.to(x.dtype) for t in gradients)


class _Walks(NamedTuple):
    """Gradients of the pre-activations (N, D, 4H) and of every h (N, D*P): of the backward pass
    that is differentiated, and from what differentiates it."""

    da: Tensor
    dh: Tensor
    total: Tensor
    dh_again: Tensor | None  # with a projection only


def _of_weights(
    layer: Layer,
    v: Direction,
    made: Tangents,
    walks: _Walks,
    d: int,
    asked: Sequence[bool],
    samples: int | None,
) -> list[Tensor | None]:
    """(eq. 12) The gradients of a direction's weights, in the order of ``Weights``."""
    w_ih, w_hh, bias, w_hr, b_hh = asked
    total, da = walks.total[:, d], walks.da[:, d]
    found: list[Tensor | None] = [None] * len(asked)
    if w_ih:
        found[0] = _sums(total, layer.x, da, v.x, samples)
    if w_hh:
        h_in = layer.entered(d, layer.parts(layer.saved.y)[d], layer.h0[d])
        tangent_in = layer.entered(d, layer.parts(made.y)[d], v.h0[d])
        found[1] = _sums(total, h_in, da, tangent_in, samples)
    if bias or b_hh:
        sums = total.sum(0) if samples is None else apart(total, samples).sum(1)
        found[2] = sums if bias else None
        found[4] = (sums.clone() if bias else sums) if b_hh else None
    if w_hr:
        assert walks.dh_again is not None and layer.saved.m is not None and made.m is not None
        of_m = (walks.dh_again, layer.saved.m, walks.dh, made.m)
        again, m, first, tangent = (layer.parts(t)[d] for t in of_m)
        found[3] = _sums(again, m, first, tangent, samples)
    return found


def _first_order(layer: Layer, u: OutputGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations (N, D, 4H), of every h (N, D*P) and m (N, D*H), from u."""
    need = Requested(False, False, False, False, False, False, layer.projected)
    da, dh, _, _ = _walk(layer, u, need)
    if layer.projected:
        pairs = zip(layer.parts(dh), layer.weights, strict=True)
        return da, dh, _joined([own @ w.w_hr for own, w in pairs if w.w_hr is not None])
    # The walk does not keep them where there is no projection: they are what h is multiplied by.
    parts = [layer.left(d, da[:, d] @ w.w_hh)[0] for d, w in enumerate(layer.weights)]
    if u.h_n is not None:
        for d, part in enumerate(parts):
            last = last_rows(d, layer.batch_sizes)
            part.index_add_(0, last, u.h_n[d, : len(last)])
    dh = _joined(parts)
    if u.y is not None:
        dh.add_(u.y)
    return da, dh, dh


def _walk(layer: Layer, grads: OutputGradients, need: Requested) -> Any:
    assert layer.backend.layer_walk is not None  # by_kernels was asked
    rest = (layer.batch_sizes, layer.c0, layer.weights, layer.reset, layer.saved, need)
    return layer.backend.layer_walk(grads, *rest)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of each direction, (N, D*size)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _gradient_of_x(layer: Layer, v: Direction, total: Tensor, da: Tensor) -> Tensor:
    result = torch.zeros_like(layer.x)
    for d, (w, own) in enumerate(zip(layer.weights, v.weights, strict=True)):
        result.addmm_(total[:, d], w.w_ih)
        if own.w_ih is not None:
            _add_product(result, da[:, d], own.w_ih)
    return result


def _sums(
    left: Tensor, right: Tensor, other: Tensor, beside: Tensor | None, samples: int | None
) -> Tensor:
    """left^T right + other^T beside, or the first alone; of all rows, or of each sample's."""
    if samples is None:
        result = left.T @ right
        return result if beside is None else result.addmm_(other.T, beside)
    result = torch.bmm(apart(left, samples).mT, apart(right, samples))
    if beside is None:
        return result
    return result.baddbmm_(apart(other, samples).mT, apart(beside, samples))
