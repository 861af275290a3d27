"""Swap nn.LSTM and nn.LSTMCell for fastlstm's: in a model that exists, or in torch itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import backends
from .cell import LSTMCell
from .cell import Stock as StockCell
from .compat import LSTM as CompatLSTM
from .compat import Stock
from .module import LSTM

_STOCK = (Stock, StockCell)
_LEAVES = (LSTM, CompatLSTM, LSTMCell)


@dataclass(frozen=True)
class Report:
    """What was done to each LSTM of a model, by the name ``get_submodule`` takes."""

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name: reason

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [f"  replaced {_shown(name)}" for name in self.replaced]
        lines += [f"  skipped {_shown(name)}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(the model itself)"


def replace_lstm_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    compat: bool = False,
    backend: str = "auto",
) -> Report:
    """Turn every ``nn.LSTM`` and ``nn.LSTMCell`` in ``model``, itself included, into fastlstm's.

    This happens in place, and only the class of a module changes: the module, its parameters,
    its hooks and its state_dict stay the same objects, so optimizers, tied weights and DDP go
    on as before.  Modules with parametrizations are replaced too.  Left alone, and reported,
    are subclasses, scripted and quantized ones, and modules whose ``forward`` was replaced on
    the instance.

    Args:
        model: any module.
        filter_fn: called with (module, name) for each that could be replaced; False skips.
        compat: take ``fastlstm.compat.LSTM``, an ``isinstance`` of ``nn.LSTM`` that
            torch.compile refuses, rather than ``fastlstm.LSTM``.  (``fastlstm.LSTMCell`` is
            an ``isinstance`` of ``nn.LSTMCell`` in any case.)
        backend: as for ``fastlstm.LSTM``.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        TypeError: ``model`` is not a module, or ``filter_fn`` is not callable.
        ValueError: ``backend`` is not the name of a backend.
        What ``filter_fn`` raises; nothing is replaced then.
    """
    backends.check_name(backend)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a callable, got {type(filter_fn).__name__}")

    def refusal(m: nn.Module, name: str) -> str | None:
        if filter_fn is not None and not filter_fn(m, name):
            return "left out by filter_fn"
        return None

    targets: dict[type, type[nn.Module]] = {Stock: _leaf(compat), StockCell: LSTMCell}
    report = _swap_all(model, targets, refusal)
    for name in report.replaced:
        model.get_submodule(name).backend = backend  # type: ignore[assignment]
    return report


def restore_lstm_(model: nn.Module) -> Report:
    """The inverse of ``replace_lstm_``: turn every fastlstm module into torch's, in place."""
    targets: dict[type, type[nn.Module]] = {LSTM: Stock, CompatLSTM: Stock, LSTMCell: StockCell}
    report = _swap_all(model, targets, lambda m, name: None)
    for name in report.replaced:
        for own in ("backend", "checkpoint"):
            vars(model.get_submodule(name)).pop(own, None)
    return report


def _leaf(compat: bool) -> type[nn.RNNBase]:
    return CompatLSTM if compat else LSTM


def _swap_all(
    model: nn.Module,
    targets: dict[type, type[nn.Module]],
    refusal: Callable[[nn.Module, str], str | None],
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    # A module that is reachable by several names is met once, by its first.  All are looked at
    # before any is changed: a refusal that raises leaves the model as it was.
    found = {name: m for name, m in model.named_modules() if _is_lstm(m)}
    for name, m in found.items():
        reason = _unfit(m, targets) or refusal(m, name)
        if reason is None:
            report.replaced.append(name)
        else:
            report.skipped[name] = reason
    for name in report.replaced:
        _set_class(found[name], targets[_plain_class(found[name])])
    return report


def _is_lstm(m: nn.Module) -> bool:
    """An LSTM or a cell of any make, so that what is left alone can be reported."""
    names = {type(m).__name__, getattr(m, "original_name", None)}
    return isinstance(m, (*_STOCK, *_LEAVES)) or not names.isdisjoint(("LSTM", "LSTMCell"))


def _plain_class(m: nn.Module) -> type:
    """The class of ``m`` without the one that torch.nn.utils.parametrize puts on top."""
    cls = type(m)
    return cls.__bases__[0] if torch.nn.utils.parametrize.is_parametrized(m) else cls


def _unfit(m: nn.Module, targets: dict[type, type[nn.Module]]) -> str | None:
    cls = _plain_class(m)
    if cls in targets:
        return "its forward was replaced on the instance" if "forward" in vars(m) else None
    if isinstance(m, torch.jit.ScriptModule):
        return "scripted: its code is compiled"
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls in (*_STOCK, *_LEAVES):
        return f"it is {name} already"
    if issubclass(cls, (*_STOCK, *_LEAVES)):
        return f"{name} is a subclass and may do something else"
    return f"{name} is another class"


def _set_class(m: nn.Module, target: type[nn.Module]) -> None:
    if torch.nn.utils.parametrize.is_parametrized(m):
        # parametrize made a class for this one module, which holds the properties.
        top = type(m)
        members = {k: v for k, v in vars(top).items() if k not in ("__dict__", "__weakref__")}
        target = type(top.__name__, (target,), members)
    m.__class__ = target


# Where programs look nn.LSTM and nn.LSTMCell up.
_PLACES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
_patches: list[Patch] = []  # those in force, the last one wins
_unpatched: tuple[Any, ...] = ()  # what stood in _PLACES before the first


class Patch:
    """A patch in force; ``undo`` it, or leave its ``with`` block."""

    def __init__(self, leaf: type[nn.RNNBase]) -> None:
        self.leaf = leaf

    def undo(self) -> None:
        """Take this patch back; the others, in whatever order they were made, stay.
        Again is no error."""
        if self in _patches:
            _patches.remove(self)
            _bind()

    def __enter__(self) -> Patch:
        if self not in _patches:
            raise RuntimeError("this patch was undone: call fastlstm.patch() for another")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(*, compat: bool = False) -> Patch:
    """Let ``torch.nn.LSTM`` and ``LSTMCell`` be fastlstm's for all code that looks them up.

    Covers ``torch.nn``, ``torch.nn.modules`` and ``torch.nn.modules.rnn``, so also models
    unpickled from files.  A plain call holds until ``undo()``; as a context manager it ends
    with the block, and models built inside keep fastlstm's modules::

        with fastlstm.patch():
            model = build()

    Modules that exist already and names imported before (``from torch.nn import LSTM``)
    are not reached: see ``replace_lstm_``.  torch.compile refuses whatever is an instance
    of ``torch.nn.LSTM`` while it traces, so end the patch before a model is compiled.

    Args:
        compat: take ``fastlstm.compat.LSTM``, which is an instance of torch's own class
            too, for programs that hold a name imported before.

    Returns:
        The handle.
    """
    global _unpatched
    if not _patches:
        _unpatched = tuple((place.LSTM, place.LSTMCell) for place in _PLACES)
    handle = Patch(_leaf(compat))
    _patches.append(handle)
    _bind()
    return handle


def _bind() -> None:
    for place, before in zip(_PLACES, _unpatched, strict=True):
        place.LSTM, place.LSTMCell = (  # type: ignore[attr-defined]
            (_patches[-1].leaf, LSTMCell) if _patches else before
        )
