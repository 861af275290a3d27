"""What leaves Python: the module as torch.jit.trace, ONNX export and torch.fx record it.

torch.compile and torch.export see the operators of ``ops.py`` and need nothing of this.  The
others would record this package's Python or its library, which whoever runs the result does
not have:

- ``torch.jit.trace`` records ``aten::lstm``, torch's own, as it does of ``nn.LSTM``;
- ``torch.onnx.export`` gets one ONNX ``LSTM`` node a layer.  This is decided here and not by a
  translation of ``layer_forward``, because packed rows don't tell padded input from ragged;
- ``torch.fx`` gets the module as a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .contract import Weights
from .functional import Result, Stack

# Of the ONNX operator set whose LSTM is emitted; exporters convert it to newer ones.
_OPSET = 14
# Gate order: torch's i f g o is ONNX's i o f c.
_ONNX_GATES = (0, 3, 1, 2)


def refuse_script() -> NoReturn:
    """What torch.jit.script is told: it compiles Python, and cannot compile this one's."""
    raise RuntimeError(
        "torch.jit.script does not take fastlstm.LSTM: fastlstm.restore_lstm_(model) turns it into "
        "an nn.LSTM with the same parameters, which can be scripted; or use torch.export, or "
        "torch.jit.trace"
    )


def given(**options: Any) -> dict[str, Any]:
    """Those that differ from their defaults; a tracer's placeholder has no truth of its own."""
    return {name: v for name, v in options.items() if v is not None and v is not False}


def is_fx(input: object) -> bool:
    """Is torch.fx.symbolic_trace (or a tracer like it) feeding us its placeholders?"""
    return isinstance(input, torch.fx.Proxy)


def fx_leaf(module: nn.Module, input: Any, hx: Any, options: dict[str, Any]) -> Any:
    """The call of ``module`` as one node, which is what torch.fx makes of modules of torch.nn."""
    tracer = input.tracer
    if module is tracer.root:
        raise RuntimeError(
            "torch.fx: a fastlstm.LSTM is recorded as a leaf of the model it is part of; by itself "
            "it has nothing to trace"
        )
    name = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", name, (input, hx), options)


def jit_lstm(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, ...] | None,
    options: dict[str, Any],
    backend: str,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The module as ``aten::lstm``; arguments and results as ``nn.LSTM``'s."""
    for name in options:
        raise RuntimeError(
            f"{name}: torch.jit.trace records torch's own LSTM, which does not have it; "
            "torch.export records fastlstm's"
        )
    if backend not in ("auto", "aten"):
        raise RuntimeError(
            f"torch.jit.trace records torch's own LSTM, which backend {backend!r} is not: use "
            "backend='auto', or torch.export"
        )
    flat = [getattr(module, name) for names in module._all_weights for name in names]
    config = module.bias, module.num_layers, module.dropout, module.training, module.bidirectional
    if isinstance(input, PackedSequence):
        rows, sizes, order, unsort = input
        if hx is None:
            hx = _zeros(module, rows, sizes[0])
        elif order is not None:
            hx = tuple(state.index_select(1, order) for state in hx)
        rows, *states = torch._VF.lstm(rows, sizes, hx, flat, *config)
        if unsort is not None:
            states = [state.index_select(1, unsort) for state in states]
        return PackedSequence(rows, sizes, order, unsort), (states[0], states[1])
    if input.dim() == 2:  # one sequence is a batch of one
        hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
        hx = _zeros(module, input, 1) if hx is None else hx
        results = torch._VF.lstm(input.unsqueeze(1), hx, flat, *config, False)
        output, h_n, c_n = (t.squeeze(1) for t in results)
        return output, (h_n, c_n)
    if hx is None:
        hx = _zeros(module, input, input.size(0 if module.batch_first else 1))
    output, h_n, c_n = torch._VF.lstm(input, hx, flat, *config, module.batch_first)
    return output, (h_n, c_n)


def _zeros(module: nn.RNNBase, like: Tensor, batch: Any) -> tuple[Tensor, ...]:
    """The default state; ``batch`` may be a tensor, as tracing makes them."""
    layers, cell = len(module._all_weights), module.hidden_size
    return tuple(like.new_zeros(layers, batch, n) for n in (module.proj_size or cell, cell))


def is_onnx() -> bool:
    """Is ``torch.onnx.export`` recording a program that will be an ONNX model?"""
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# Dynamo, which strict export uses, holds torch's function for False; so it is to ask this one
# and keep the answer.  torch.compiler.assume_constant_result does the same, and imports dynamo.
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def onnx_lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    *,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
) -> Result:
    """A stack over padded input as ONNX ``LSTM`` nodes; arguments as in ``functional``.

    ``lengths`` become the nodes' ``sequence_lens``, so their values may change from run to run.
    """
    if reset is not None:
        _refuse_onnx("reset")
    if stack.need_cells:
        _refuse_onnx("return_cells")
    if stack.gates_of is not None:
        _refuse_onnx("fastlstm.gates")
    if stack.layers[0][0].w_hr is not None:
        _refuse_onnx("proj_size")
    x = input.transpose(0, 1) if batch_first else input
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=input.device).to(torch.int32)
    directions, last = len(stack.layers[0]), len(stack.layers) - 1
    h_out, c_out = [], []
    for k, weights in enumerate(stack.layers):
        here = slice(k * directions, (k + 1) * directions)
        x, h_n, c_n = _onnx_layer(x, h0[here], c0[here], weights, lengths)
        h_out.append(h_n)
        c_out.append(c_n)
        if stack.dropout and k < last:
            x = torch.nn.functional.dropout(x, stack.dropout)
    output = x.transpose(0, 1) if batch_first else x
    return Result(output, torch.cat(h_out), torch.cat(c_out), None)


def _onnx_layer(
    x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Weights], lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One node: (T, B, I) to (T, B, D*H), with states (D, B, H)."""
    steps, batch, _ = x.shape
    directions, _, hidden = c0.shape
    weights = [w.summed() for w in weights]
    w_ih = torch.stack([_onnx_order(w.w_ih) for w in weights])
    w_hh = torch.stack([_onnx_order(w.w_hh) for w in weights])
    bias = None
    if weights[0].bias is not None:  # ONNX wants two of them as well, side by side
        summed = torch.stack([_onnx_order(w.bias) for w in weights if w.bias is not None])
        bias = torch.cat((summed, torch.zeros_like(summed)), 1)
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, w_ih, w_hh, bias, lengths, h0, c0),
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=(x.dtype,) * 3,
        shapes=((steps, directions, batch, hidden), (directions, batch, hidden), tuple(c0.shape)),
        version=_OPSET,
    )
    if lengths is not None:  # who has no steps keeps its state; ONNX Runtime gives zeros
        some = (lengths > 0).unsqueeze(1)
        h_n, c_n = torch.where(some, h_n, h0), torch.where(some, c_n, c0)
    return y.transpose(1, 2).flatten(2), h_n, c_n  # y (T, D, B, H)


def _onnx_order(weight: Tensor) -> Tensor:
    hidden = weight.size(0) // 4  # slices, because exporters fold those and not chunks
    return torch.cat([weight[k * hidden : (k + 1) * hidden] for k in _ONNX_GATES])


def refuse_packed() -> NoReturn:
    """ONNX has no packed rows."""
    _refuse_onnx("a PackedSequence", ", but sequence lengths: pass padded input and lengths=")


def _refuse_onnx(what: str, instead: str = "; torch.export and AOTInductor take it") -> NoReturn:
    raise RuntimeError(f"{what}: ONNX's LSTM has none{instead}")
