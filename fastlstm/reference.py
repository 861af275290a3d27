"""The mathematics, written as plainly as torch allows: the oracle of every test.

``layer_forward`` is differentiable to any order and runs on any device and dtype;
``layer_backward`` is its twin for the kernels' backward passes, written from the
equations and not by autograd, ``layer_tangent`` and ``layer_curvature`` those for
second order.  docs/design.md derives the equations; ``(eq. n)`` refers to it.  See
``contract.py`` for shapes and letters.

With float16 or bfloat16 storage, ``h_t`` and ``m_t`` are rounded to storage when
they are stored, and it is the stored value that the next step sees; ``c_t`` and
every accumulation stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .contract import (
    Curvature,
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Tangents,
    Weights,
    state_dtype,
)
from .steps import entered


def activate(a: Tensor) -> Tensor:
    """(eq. 2) ``a (..., 4, H)`` pre-activations to gates, order i f g o."""
    i, f, g, o = a.unbind(-2)
    return torch.stack((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), -2)


def cell_forward(gates: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor]:
    """(eq. 3, 4) ``gates (..., 4, H)`` and ``c_prev (..., H)`` to ``c_t, m_t``."""
    i, f, g, o = gates.unbind(-2)
    c = f * c_prev + i * g
    return c, o * c.tanh()


def cell_backward(
    gates: Tensor, c_prev: Tensor, c: Tensor, dm: Tensor, dc: Tensor
) -> tuple[Tensor, Tensor]:
    """(eq. 5, 6, 7) Gradients of the pre-activations ``(..., 4, H)`` and of ``c_prev``."""
    i, f, g, o = gates.unbind(-2)
    tanh_c = c.tanh()
    dc = dc + dm * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dm * tanh_c * o * (1 - o)
    return torch.stack((da_i, da_f, da_g, da_o), -2), dc * f


def cell_tangent(
    gates: Tensor, c_prev: Tensor, c: Tensor, pre: Tensor, c_prev_tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """(eq. 10) Tangents of ``c_t, m_t`` from those of the pre-activations ``(..., 4, H)`` and of
    ``c_prev``."""
    i, f, g, o = gates.unbind(-2)
    a_i, a_f, a_g, a_o = pre.unbind(-2)
    tanh_c = c.tanh()
    c_tangent = f * c_prev_tangent + g * i * (1 - i) * a_i + c_prev * f * (1 - f) * a_f
    c_tangent = c_tangent + i * (1 - g * g) * a_g
    return c_tangent, tanh_c * o * (1 - o) * a_o + o * (1 - tanh_c * tanh_c) * c_tangent


def cell_curvature(
    gates: Tensor,
    c_prev: Tensor,
    c: Tensor,
    pre: Tensor,
    c_prev_tangent: Tensor,
    c_tangent: Tensor,
    dm: Tensor,
    dc: Tensor,
    m: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(eq. 11) Gradients of ``dc * c' + dm * m'`` (eq. 10), whose tangents are ``pre (..., 4, H)``,
    ``c_prev_tangent`` and ``c_tangent``: with respect to the pre-activations, c_t and c_{t-1}.
    ``m`` is what reaches m_t besides, or None."""
    i, f, g, o = gates.unbind(-2)
    a_i, a_f, a_g, a_o = pre.unbind(-2)
    tanh_c = c.tanh()
    d_i, d_f, d_g, d_o = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)
    d_tanh = 1 - tanh_c * tanh_c
    dc = dc + dm * o * d_tanh  # (eq. 5)
    of_i = dc * d_i * ((1 - 2 * i) * g * a_i + d_g * a_g)
    of_f = dc * d_f * ((1 - 2 * f) * c_prev * a_f + c_prev_tangent)
    of_g = dc * d_g * (d_i * a_i - 2 * i * g * a_g)
    of_o = dm * d_o * ((1 - 2 * o) * tanh_c * a_o + d_tanh * c_tangent)
    of_c = dm * d_tanh * (d_o * a_o - 2 * o * tanh_c * c_tangent)
    if m is not None:  # as any gradient of m_t: (eq. 5, 6)
        of_o, of_c = of_o + m * tanh_c * d_o, of_c + m * o * d_tanh
    return torch.stack((of_i, of_f, of_g, of_o), -2), of_c, dc * d_f * a_f


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
    """One layer, all its directions.  Shapes as in ``contract.Outputs``."""
    per_direction = [
        _direction_forward(x, batch_sizes, h0[d], c0[d], w, reset, reverse=d == 1)
        for d, w in enumerate(weights)
    ]
    y, c_all, h_n, c_n, gates, m = zip(*per_direction, strict=True)
    projected = weights[0].w_hr is not None
    return Outputs(
        y=torch.cat(y, 1),
        c_all=torch.cat(c_all, 1) if need_reserve or need_cells else None,
        h_n=torch.stack(h_n),
        c_n=torch.stack(c_n).to(x.dtype),
        gates=torch.stack(gates, 1).flatten(2).to(x.dtype) if need_reserve else None,
        m=torch.cat(m, 1) if need_reserve and projected else None,
    )


def _steps(batch_sizes: Tensor, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """Steps in the order a direction takes them: (t, first row, number of rows)."""
    sizes = batch_sizes.tolist()
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        yield t, starts[t], sizes[t]


def _direction_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h: Tensor,
    c: Tensor,
    w: Weights,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """y (N, P), c_all (N, H), h_n (B, P), c_n (B, H), gates (N, 4, H), m (N, H)."""
    storage, state = x.dtype, state_dtype(x.dtype)
    hidden_size = c.size(-1)
    c = c.to(state)
    w_ih, w_hh = w.w_ih.to(state), w.w_hh.to(state)
    saved: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _, start, rows in _steps(batch_sizes, reverse):
        if rows == 0:
            continue
        here = slice(start, start + rows)
        h_in, c_in = h[:rows], c[:rows]
        if reset is not None and not reverse:  # the state entering a first step is zero
            h_in, c_in = _cut(h_in, reset[here]), _cut(c_in, reset[here])
        a = x[here].to(state) @ w_ih.T + h_in.to(state) @ w_hh.T  # (eq. 1)
        if w.bias is not None:
            a = a + w.bias.to(state)
        gates = activate(a.unflatten(-1, (4, hidden_size)))
        c_t, m = cell_forward(gates, c_in)
        m = m.to(storage)
        # (eq. 4)
        h_t = m if w.w_hr is None else (m.to(state) @ w.w_hr.to(state).T).to(storage)
        saved.append((h_t, c_t, gates, m))
        h_out, c_out = h_t, c_t
        if reset is not None and reverse and start > 0:
            # The state leaving a first step towards the earlier segment is zero.
            h_out, c_out = _cut(h_t, reset[here]), _cut(c_t, reset[here])
        h = torch.cat((h_out, h[rows:]))
        c = torch.cat((c_out, c[rows:]))
    if not saved:
        empty_gates = c.new_zeros(0, 4, hidden_size)
        return h.new_zeros(0, h.size(-1)), c[:0], h, c, empty_gates, h.new_zeros(0, hidden_size)
    y, c_all, all_gates, all_m = (
        torch.cat(tuple(reversed(rows) if reverse else rows)) for rows in zip(*saved, strict=True)
    )
    return y, c_all, h, c, all_gates, all_m


def _cut(state: Tensor, first: Tensor) -> Tensor:
    """Zero the rows of ``state (rows, K)`` where ``first (rows,)`` starts a segment."""
    return torch.where(first.bool().unsqueeze(-1), torch.zeros_like(state), state)


def layer_recompute(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    y: Tensor,
) -> Reserve:
    """The reserve of one forward direction from its output ``y (N, P)``, without its products.

    Every h that enters a step is in y or h0, so (eq. 1) is one product over all rows, and only
    c (eq. 3) goes from step to step.
    """
    storage, state, hidden_size = x.dtype, state_dtype(x.dtype), c0.size(-1)
    (w,) = weights
    starts = [0, *batch_sizes.cumsum(0).tolist()]
    source = [  # of (h0, y)
        torch.arange(rows, device="cpu") + (h0.size(1) + starts[t - 1] if t > 0 else 0)
        for t, _, rows in _steps(batch_sizes, False)
    ]
    h_in = torch.cat((h0[0], y)).index_select(0, torch.cat(source).to(y.device))
    if reset is not None:
        h_in = _cut(h_in, reset)
    a = x.to(state) @ w.w_ih.to(state).T + h_in.to(state) @ w.w_hh.to(state).T
    if w.bias is not None:
        a = a + w.bias.to(state)
    gates = activate(a.unflatten(-1, (4, hidden_size)))
    c, cells, unprojected = c0[0].to(state), [a.new_empty(0, hidden_size)], []
    for _, start, rows in _steps(batch_sizes, False):
        here = slice(start, start + rows)
        c = c[:rows] if reset is None else _cut(c[:rows], reset[here])
        c, m = cell_forward(gates[here], c)
        cells.append(c)
        unprojected.append(m.to(storage))
    return Reserve(
        y,
        torch.cat(cells),
        gates.flatten(1).unsqueeze(1).to(storage),
        None if w.w_hr is None else torch.cat(unprojected),
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
) -> Gradients:
    """Gradients of the inputs asked for, by the equations, one step at a time.

    ``grads`` holds the gradients of y, c_all, h_n and c_n, each of which may be
    None; ``saved`` what ``layer_forward`` kept with ``need_reserve``.
    """
    state = state_dtype(x.dtype)
    results = [
        _direction_backward(d, grads, x, batch_sizes, h0, c0, w, reset, saved)
        for d, w in enumerate(weights)
    ]
    dx, dh0, dc0, dw = zip(*results, strict=True)

    def stored(asked: bool, gradient: Tensor) -> Tensor | None:
        return gradient.to(x.dtype) if asked else None

    def per_direction(asked: bool, name: str) -> list[Tensor] | None:
        return [getattr(w, name).to(x.dtype) for w in dw] if asked else None

    return Gradients(
        x=stored(need.x, sum(dx, torch.zeros_like(x, dtype=state))),
        h0=stored(need.h0, torch.stack(dh0)),
        c0=stored(need.c0, torch.stack(dc0)),
        w_ih=per_direction(need.w_ih, "w_ih"),
        w_hh=per_direction(need.w_hh, "w_hh"),
        bias=per_direction(need.bias, "bias"),
        w_hr=per_direction(need.w_hr, "w_hr"),
    )


def _direction_backward(
    d: int,
    grads: OutputGradients,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    w: Weights,
    reset: Tensor | None,
    saved: Reserve,
) -> tuple[Tensor, Tensor, Tensor, Weights]:
    """dx (N, I), dh0 (B, P), dc0 (B, H) and dW of direction ``d``, all in state dtype."""
    state = state_dtype(x.dtype)
    reverse = d == 1
    hidden_size, output_size = c0.size(-1), h0.size(-1)

    def part(tensor: Tensor, size: int) -> Tensor:  # (N, D*size) -> (N, size)
        return tensor[:, d * size : (d + 1) * size].to(state)

    y, c_all = part(saved.y, output_size), part(saved.c_all, hidden_size)
    gates = saved.gates[:, d].unflatten(-1, (4, hidden_size)).to(state)
    dy = None if grads.y is None else part(grads.y, output_size)
    dc_all = None if grads.c_all is None else part(grads.c_all, hidden_size)
    w_ih, w_hh = w.w_ih.to(state), w.w_hh.to(state)
    w_hr = None if w.w_hr is None else w.w_hr.to(state)

    # Carries: gradients of the state that leaves the step being undone, (B, P) and (B, H).
    dh = torch.zeros_like(h0[d], dtype=state) if grads.h_n is None else grads.h_n[d].to(state)
    dc = torch.zeros_like(c0[d], dtype=state) if grads.c_n is None else grads.c_n[d].to(state)
    dh, dc = dh.clone(), dc.clone()
    dx = torch.zeros_like(x, dtype=state)
    dw_ih, dw_hh = torch.zeros_like(w_ih), torch.zeros_like(w_hh)
    dbias = w_ih.new_zeros(w_ih.size(0))
    dw_hr = None
    if w_hr is not None:
        if saved.m is None:
            raise ValueError("saved.m: got None, expected the unprojected h of every row")
        m, dw_hr = part(saved.m, hidden_size), torch.zeros_like(w_hr)

    order = list(_steps(batch_sizes, reverse))
    for position in reversed(range(len(order))):
        _, start, rows = order[position]
        here = slice(start, start + rows)
        first = None if reset is None else reset[here]
        if first is not None and reverse and start > 0:
            dh[:rows], dc[:rows] = _cut(dh[:rows], first), _cut(dc[:rows], first)
        h_in, c_in = h0[d][:rows].to(state).clone(), c0[d][:rows].to(state).clone()
        if position > 0:  # the state entering this step is the one the step before left
            _, before, rows_before = order[position - 1]
            shared = min(rows, rows_before)
            h_in[:shared] = y[before : before + shared]
            c_in[:shared] = c_all[before : before + shared]
            if reset is not None and reverse:
                cut = reset[before : before + shared]
                h_in[:shared] = _cut(h_in[:shared], cut)
                c_in[:shared] = _cut(c_in[:shared], cut)
        if first is not None and not reverse:
            h_in, c_in = _cut(h_in, first), _cut(c_in, first)

        dh_t, dc_t = dh[:rows], dc[:rows]
        if dy is not None:
            dh_t = dh_t + dy[here]
        if dc_all is not None:
            dc_t = dc_t + dc_all[here]
        if w_hr is None or dw_hr is None:
            dm = dh_t
        else:
            dm = dh_t @ w_hr  # (eq. 8)
            dw_hr += dh_t.T @ m[here]
        da, dc_in = cell_backward(gates[here], c_in, c_all[here], dm, dc_t)
        da = da.flatten(-2)  # (rows, 4H)
        dh_in = da @ w_hh  # (eq. 8)
        dx[here] = da @ w_ih  # (eq. 9), and so are the sums
        dw_ih += da.T @ x[here].to(state)
        dw_hh += da.T @ h_in
        dbias += da.sum(0)
        if first is not None and not reverse:
            dh_in, dc_in = _cut(dh_in, first), _cut(dc_in, first)
        dh[:rows], dc[:rows] = dh_in, dc_in
    return dx, dh, dc, Weights(dw_ih, dw_hh, dbias, dw_hr)


def layer_tangent(
    pre: Tensor,
    batch_sizes: Tensor,
    h0_tangent: Tensor,
    c0_tangent: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    c0: Tensor,
    saved: Reserve,
) -> Tangents:
    """The walk of tangents, all in state dtype, one step at a time.

    Args:
        pre: (N, D, 4H) tangents of the pre-activations but for W_hh h', which is added to them.
        h0_tangent, c0_tangent: (D, B, P) and (D, B, H).
        weights: those of the layer; their own tangents are in ``pre``.
        c0: (D, B, H), the layer's.
        saved: what its forward pass kept.
    """
    parts = [
        _direction_tangent(d, pre[:, d], batch_sizes, h, c, w, reset, c0[d], saved)
        for d, (h, c, w) in enumerate(zip(h0_tangent, c0_tangent, weights, strict=True))
    ]
    y, c_all, h_n, c_n, m = zip(*parts, strict=True)
    projected = weights[0].w_hr is not None
    return Tangents(
        torch.cat(y, 1),
        torch.cat(c_all, 1),
        torch.stack(h_n),
        torch.stack(c_n),
        torch.cat(m, 1) if projected else None,
    )


def _direction_tangent(
    d: int,
    pre: Tensor,
    batch_sizes: Tensor,
    h: Tensor,
    c: Tensor,
    w: Weights,
    reset: Tensor | None,
    c0: Tensor,
    saved: Reserve,
) -> tuple[Tensor, ...]:
    """y (N, P), c_all (N, H), h_n (B, P), c_n (B, H) and m (N, H) of tangents."""
    hidden_size, reverse = c0.size(-1), d == 1
    gates = saved.gates[:, d].unflatten(-1, (4, hidden_size))
    cells = saved.c_all[:, d * hidden_size : (d + 1) * hidden_size]
    c_in = entered(d, cells, c0, batch_sizes, reset)
    y, c_all, m_all = pre.new_zeros(len(pre), h.size(1)), *cells.new_zeros(2, *cells.shape)
    h, c = h.clone(), c.clone()
    for _, start, rows in _steps(batch_sizes, reverse):
        here = slice(start, start + rows)
        if reset is not None and not reverse:
            h[:rows], c[:rows] = _cut(h[:rows], reset[here]), _cut(c[:rows], reset[here])
        pre[here] += h[:rows] @ w.w_hh.T
        of_step = pre[here].unflatten(-1, (4, hidden_size))
        c_all[here], m = cell_tangent(gates[here], c_in[here], cells[here], of_step, c[:rows])
        m_all[here] = m
        y[here] = m if w.w_hr is None else m @ w.w_hr.T
        h[:rows], c[:rows] = y[here], c_all[here]
        if reset is not None and reverse and start > 0:
            h[:rows], c[:rows] = _cut(h[:rows], reset[here]), _cut(c[:rows], reset[here])
    return y, c_all, h, c, m_all


def layer_curvature(
    grads: OutputGradients,
    dm: Tensor,
    batch_sizes: Tensor,
    c0: Tensor,
    reset: Tensor | None,
    saved: Reserve,
    c0_tangent: Tensor,
    pre: Tensor,
    c_tangents: Tensor,
    m: Tensor | None,
) -> Curvature:
    """What the second derivatives of cells add to a layer's gradients, all in state dtype.

    Args:
        grads: what the backward pass was given that is differentiated; y and h_n do not matter.
        dm: (N, D*H), the gradients of every m_t in it.
        c0: (D, B, H).
        saved: what the forward pass kept.
        c0_tangent, pre, c_tangents: (D, B, H), (N, D, 4H) and (N, D*H), tangents of c0, of the
            pre-activations and of the cell states.
        m: (N, D*H), what reaches m_t besides, with a projection; or None.
    """
    hidden_size = c0.size(-1)
    a, c_all, c_first = torch.zeros_like(pre), torch.zeros_like(c_tangents), torch.zeros_like(c0)
    for d in range(len(c0)):
        own = slice(d * hidden_size, (d + 1) * hidden_size)
        gates = saved.gates[:, d].unflatten(-1, (4, hidden_size))
        cells, tangents = saved.c_all[:, own], c_tangents[:, own]
        c_in = entered(d, cells, c0[d], batch_sizes, reset)
        tangents_in = entered(d, tangents, c0_tangent[d], batch_sizes, reset)
        # Carried from step to step: dc, and what is asked for.
        dc = torch.zeros_like(c0[d]) if grads.c_n is None else grads.c_n[d].clone()
        carried = c_first[d]
        for _, start, rows in reversed(list(_steps(batch_sizes, d == 1))):
            here = slice(start, start + rows)
            first = None if reset is None else reset[here]
            if first is not None and d == 1 and start > 0:
                dc[:rows], carried[:rows] = _cut(dc[:rows], first), _cut(carried[:rows], first)
            dc_t = dc[:rows] if grads.c_all is None else dc[:rows] + grads.c_all[here, own]
            of_a, of_c, of_c_in = cell_curvature(
                gates[here], c_in[here], cells[here], pre[here, d].unflatten(-1, (4, hidden_size)),
                tangents_in[here], tangents[here], dm[here, own], dc_t,
                None if m is None else m[here, own],
            )  # fmt: skip
            _, dc_in = cell_backward(gates[here], c_in[here], cells[here], dm[here, own], dc_t)
            a[here, d], c_all[here, own] = of_a.flatten(-2), of_c + carried[:rows]
            if first is not None and d == 0:
                dc_in, of_c_in = _cut(dc_in, first), _cut(of_c_in, first)
            dc[:rows], carried[:rows] = dc_in, of_c_in
    return Curvature(a, c_all, c_first)
