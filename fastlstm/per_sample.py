"""Gradients of each sequence apart, as differentially private training wants them.

Opacus takes them with hooks on every module that has parameters.  Its hooks see the input and
the gradient of the first output and nothing else, so what depends on anything else is refused
here rather than left out without a word.  Nothing in this file imports opacus; ``opacus.py``
registers it there.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


def hooks_of_opacus(module: nn.Module) -> Any | None:
    """The GradSampleHooks that watch ``module``, or None."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    named = (o for o in owners if type(o).__module__.partition(".")[0] == "opacus")
    return next(named, None)


def check_call(hooks: Any, module: nn.RNNBase, input: object, hx: object, options: object) -> None:
    """Raise for what the hooks would not see."""
    padded = isinstance(input, Tensor) and input.dim() == 3 and not input.is_nested
    if hx is not None or options or not padded:
        raise RuntimeError(
            "opacus sees a module's first argument alone: call fastlstm.LSTM with a padded batch, "
            "without hx, lengths, reset and return_cells; or use grad_sample_mode='no_op' and "
            "torch.func"
        )
    if hooks.batch_first != module.batch_first:
        raise RuntimeError(
            f"batch_first: got {module.batch_first}, expected {hooks.batch_first}, which opacus "
            "was told of the whole model"
        )
    if why := cannot(module):
        raise RuntimeError(why)


def cannot(module: nn.RNNBase) -> str | None:
    """Why there are no per-sample gradients of ``module``, or None."""
    if module.dropout and module.num_layers > 1:
        return "dropout: opacus runs a layer again for its gradients, which needs the same masks"
    return None


def guard(state: Tensor) -> Tensor:
    """A final state through which no gradient may come back: opacus would not see it."""
    if state.requires_grad:
        state.register_hook(_refuse_gradient)
    return state


def _refuse_gradient(gradient: Tensor | None) -> None:
    if gradient is None:  # the layer runs backward for its output alone
        return
    raise RuntimeError(
        "opacus sees the gradient of output alone, and this loss depends on h_n or c_n: take the "
        "last step of output instead"
    )


def gradients(module: nn.RNNBase, x: Tensor, dy: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter for each sequence, with a leading B.

    ``x (B, T, I)`` and ``dy (B, T, D*P)``, whatever ``batch_first`` says.  By torch.func, which
    runs them as one batch (``samples.py``).
    """
    bare = _without_hooks(module)
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(bare, values, (x,))
        return (output * dy).sum()

    values = {name: p.detach() for name, p in wanted.items()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x, dy)
    return {wanted[name]: gradient for name, gradient in found.items()}


def _without_hooks(module: nn.RNNBase) -> nn.RNNBase:
    """The same parameters in a module that nobody watches."""
    bare = type(module).__new__(type(module))
    vars(bare).update(vars(module))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(bare)[name] = OrderedDict()
    vars(bare)["_parameters"] = dict(module._parameters)
    return bare
