"""The LSTMCell module: one step at a time, with nn.LSTMCell's parameters, arguments and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, functional, modes, plain
from .module import State, weights_of

# fastlstm itself imports this file, so this is torch's own class and never patch()'s.
Stock = nn.LSTMCell


class LSTMCell(Stock):
    """A drop-in for ``torch.nn.LSTMCell``: same equations, parameters, arguments and errors.

    It is an ``isinstance`` of ``nn.LSTMCell``, which torch.compile does not mind.  Where all
    steps of the input are known at once, ``fastlstm.LSTM`` is much faster.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: False leaves out ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        backend: as for ``fastlstm.LSTM``; "aten" is torch's own cell.

    Raises:
        ValueError: ``backend`` is not the name of a backend; otherwise as ``nn.LSTMCell``.
    """

    # Modules pickled or swapped in without the attribute have the default.
    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def extra_repr(self) -> str:
        suffix = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + suffix

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one step.

        Args:
            input: (B, I), or (I,) for one sequence.
            hx: (h_0, c_0), each (B, H), or (H,) for one sequence; zeros by default.

        Returns:
            (h_1, c_1), shaped and typed like ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: an argument doesn't fit.  The message names it,
                what it got and what was expected; where ``nn.LSTMCell`` raises on purpose, the
                type is its.
        """
        names = _NAMES if self.bias else _NAMES[:2]
        result = plain.step(self, names, input, hx)
        if result is not None:
            return result
        # Of torch's own cell, which is not cast by autocast, torch.func.vmap knows nothing.
        mapped = not torch.compiler.is_compiling() and modes.is_mapped()
        if mapped and self.backend == "aten":
            raise backends.Refusal("aten", "torch.func.vmap does not know torch's own cell")
        if self.backend == "aten" or (self.backend == "auto" and not mapped):
            return self._torchs_own_step(input, hx)
        if self.backend == "auto":
            with modes.without_autocast(input.device):
                return self._run(input, hx, names)
        return self._run(input, hx, names)

    def _run(self, input: Tensor, hx: State | None, names: Sequence[str]) -> State:
        """By a backend of layers."""
        if modes.is_transform_compiled():
            return self._run_uncompiled(input, hx, names)
        weights = weights_of(self, names)
        batched = checks.check_step(input, self.input_size, weights.w_ih)
        if not batched:  # one sequence is a batch of one
            input = input.unsqueeze(0)
        batch = input.size(0)
        if hx is None:
            h0 = c0 = input.new_zeros(1, batch, self.hidden_size)
        else:
            h0, c0 = checks.check_step_state(hx, input, batched, self.hidden_size)
        _, h_n, c_n, *_ = functional.lstm(
            input,
            torch.full((1,), batch, dtype=torch.int64, device="cpu"),
            h0,
            c0,
            functional.Stack([[weights]], backend=self.backend),
        )
        return (h_n[0], c_n[0]) if batched else (h_n[0, 0], c_n[0, 0])

    @modes.uncompiled
    def _run_uncompiled(self, *args: Any) -> State:
        return self._run(*args)

    def _torchs_own_step(self, input: Tensor, hx: State | None) -> State:
        """nn.LSTMCell's, by a shorter way than nn.Module's __getattr__ for each weight: what it
        saves is what asking for the backend has cost."""
        held: dict[str, Any] = self._parameters
        if (
            torch.compiler.is_compiling()
            or not isinstance(hx, tuple)
            or len(hx) != 2
            or not held.keys() >= _ALL_NAMES
            or not input.dim() == hx[0].dim() == hx[1].dim() == 2
        ):
            return super().forward(input, hx)
        w_ih, w_hh, b_ih, b_hh = [held[name] for name in _NAMES]
        return torch._VF.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_ALL_NAMES = frozenset(_NAMES)
