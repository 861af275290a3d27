"""What a call may be under besides eager execution: tracing, modes, transforms, autocast.

What the package asks of torch's private names, which may change between its versions, is here, but
for torch._VF, where torch's own LSTM is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._compile import _disable_dynamo
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def is_traced(*tensors: Tensor | None) -> bool:
    """Is somebody watching the operators: torch.compile, a mode, or a tensor subclass?"""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def is_transformed() -> bool:
    """Is a torch.func transform or forward-mode differentiation under way?"""
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_transform_compiled() -> bool:
    """Does torch.compile trace such a transform around this call?  Then the call is to run
    ``uncompiled``: of what it traces the operators would have no gradients, without a word."""
    return torch.compiler.is_dynamo_compiling() and is_transformed()


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: torch.compile leaves the function as it is, and all that it calls."""
    disabled = _disable_dynamo(function)

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        return disabled(*args, **options) if _is_dynamo_there() else function(*args, **options)

    return run


def _is_dynamo_there() -> bool:
    """If nobody has imported it, nobody compiles, and to import it takes seconds."""
    return "torch._dynamo" in sys.modules


_is_dynamo_there._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated() -> bool:
    """Are torch.func's ``grad`` and ``vjp`` all the transforms under way, if there are any?"""
    return _are_transforms(functorch.TransformType.Grad)


def have_functions() -> bool:
    """Are all the transforms under way such as autograd Functions have rules for?  They are
    ``grad``, ``vjp``, ``vmap``, and ``jvp`` or forward-mode differentiation."""
    kinds = functorch.TransformType
    return _are_transforms(kinds.Grad, kinds.Vmap, kinds.Jvp)


def is_mapped() -> bool:
    """Is torch.func's ``vmap`` among the transforms under way?"""
    return _count(functorch.TransformType.Vmap) > 0


def is_forward_mode() -> bool:
    """Is its ``jvp``, or forward-mode differentiation of eager code?"""
    return forward_ad._current_level >= 0 or _count(functorch.TransformType.Jvp) > 0


def is_forward_mode_nested() -> bool:
    """Is ``jvp`` there more than once?"""
    return _count(functorch.TransformType.Jvp) > 1


# Dynamo is to ask these while it traces, and to keep the answers: it guards the transforms.
for _question in (
    is_transformed,
    is_differentiated,
    have_functions,
    is_mapped,
    is_forward_mode,
    is_forward_mode_nested,
):
    _question._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _are_transforms(*kinds: functorch.TransformType) -> bool:
    found = {each.key() for each in functorch.get_interpreter_stack() or ()}
    jvp = functorch.TransformType.Jvp
    # (jvp has such a level too. One of eager code's goes with no transform: torch refuses views.)
    dual = forward_ad._current_level >= 0 and jvp not in found
    if dual and (found or jvp not in kinds):
        return False
    return found <= set(kinds)


def _count(kind: functorch.TransformType) -> int:
    return sum(each.key() == kind for each in functorch.get_interpreter_stack() or ())


def samples_of(tensor: Tensor | None) -> tuple[int, ...]:
    """How many of it torch.func's ``vmap`` has, at each of its levels; () where it has one."""
    counts, wrapped = [], tensor
    while wrapped is not None and functorch.is_functorch_wrapped_tensor(wrapped):
        inner = functorch.get_unwrapped(wrapped)
        if functorch.is_batchedtensor(wrapped):
            counts.append(inner.size(functorch.maybe_get_bdim(wrapped)))
        wrapped = inner
    return tuple(counts)


def unwrapped(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The tensors without the wrappers of transforms that have ended."""
    return unwrap_dead_wrappers(tensors)


def wants(ctx: Any, number: int) -> bool:
    """Does anybody want gradients of the arguments from this ``number`` on?  They may require them,
    but who calls torch.autograd.grad may have asked for others: that is known while it runs."""
    flags = ctx.needs_input_grad
    if not any(flags[number:]):
        return False
    if not isinstance(ctx, BackwardCFunction) or torch._C._current_graph_task_id() < 0:
        return True  # it is not autograd's engine that runs
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    return any(map(_is_executed, nodes[sum(flags[:number]) :]))


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "leaf node" in str(error):  # its answer for one that torch.autograd.grad was given
            return True
        raise


def is_batched(grad: Tensor | None) -> bool:
    """Is this one of several gradients at once, as ``is_grads_batched=True`` makes them?"""
    return grad is not None and functorch.is_legacy_batchedtensor(grad)


def batching_level(grads: Sequence[Tensor | None]) -> int:
    """The innermost of such calls, which may be nested, that gave several of these; 0 if none."""
    torch._C._vmapmode_increment_nesting()
    level: int = torch._C._vmapmode_decrement_nesting()
    while level > 0 and all(unbatched(grad, level) is None for grad in grads):
        level -= 1
    return level


def unbatched(grad: Tensor | None, level: int) -> Tensor | None:
    """Those that the call of this level gave, along dimension 0; None if it gave only one."""
    if grad is None or not functorch.is_legacy_batchedtensor(grad):
        return None
    several: Tensor = torch._remove_batch_dim(grad, level, 0, 0)  # 0 where it gave one: they say so
    return several if several.size(0) > 0 else None


def batched(several: Tensor, level: int) -> Tensor:
    """The inverse."""
    return torch._add_batch_dim(several, 0, level)


def is_jit() -> bool:
    """Is torch.jit.trace, or the ONNX exporter that is built on it, recording?"""
    return torch._C._get_tracing_state() is not None


def is_any_on_cpu() -> bool:
    """Does torch want to see more of a call than an operator's results, or other dtypes?"""
    # All in one function: small calls ask before each of them.
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


def has_autocast(device_type: str) -> bool:
    """Does autocast know this type of device?"""
    return torch.amp.is_autocast_available(device_type)


# Dynamo of torch 2.10 can't trace torch's function, so it is to ask this one and keep the answer.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on ``device``, or None where it is off."""
    if not has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A layer's dtypes are settled when it is called: autocast must not change its products."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Calls of operators that autograd has seen already."""
    return torch._C._AutoDispatchBelowAutograd()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd at work inside an operator too, where torch leaves it out."""
    with (
        torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
        torch.enable_grad(),
    ):
        yield
