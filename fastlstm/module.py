"""The LSTM module: nn.LSTM's parameters, arguments and errors, and three arguments more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backends, checks, functional, modes, per_sample, plain, tracers
from .contract import Weights

State = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    """A drop-in for ``torch.nn.LSTM``: same equations, parameters, arguments and errors.

    It derives from ``nn.RNNBase`` because torch.compile refuses every ``nn.LSTM``;
    ``fastlstm.compat.LSTM`` is the same module for programs that ask
    ``isinstance(m, nn.LSTM)``.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the cell state, H.
        num_layers: layers stacked on each other.
        bias: False leaves out ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...); states are not.
        dropout: probability of dropout after every layer but the last, in training.
        bidirectional: run each layer in both directions.
        proj_size: if not zero, project ``h_t`` to this size, P; otherwise P is H.
        device, dtype: of the parameters.
        backend: "auto" takes the fastest for the device, dtype and shape; a backend of
            ``fastlstm.available_backends()`` is used always, and refuses what it can't serve.
        checkpoint: for long sequences.  Training keeps the inputs and outputs of each layer and
            the cell states at a few steps; the backward pass makes the rest again, in chunks.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
        TypeError: ``checkpoint`` is not a bool.
        Otherwise as ``nn.LSTM``.
    """

    # Modules pickled or swapped in without the attributes have the defaults.
    backend: str = "auto"
    checkpoint: bool = False

    # RNNBase's methods of these names are for one state; nn.LSTM's own are for (h, c).
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        checkpoint: bool = False,
    ) -> None:
        backends.check_name(backend)
        if not isinstance(checkpoint, bool):
            raise TypeError(f"checkpoint should be of type bool, got: {type(checkpoint).__name__}")
        # By name and not by super(): in compat.LSTM the next class is nn.LSTM, whose
        # constructor takes no mode.
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend = backend
        self.checkpoint = checkpoint

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for this before anything else."""
        tracers.refuse_script()

    def extra_repr(self) -> str:
        suffix = "" if self.backend == "auto" else f", backend={self.backend!r}"
        suffix += ", checkpoint=True" if self.checkpoint else ""
        return super().extra_repr() + suffix

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run the sequences; L layers, D directions.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``; (T, I) for one sequence;
                or a PackedSequence; or a nested tensor of layout torch.jagged, (B, T*, I)
                whatever ``batch_first`` is.
            hx: (h_0, c_0) of shapes (L*D, B, P) and (L*D, B, H), without B for one
                sequence; zeros by default.
            lengths: (B,) integers, a tensor on any device or a list, for padded input:
                each sequence's number of steps, in any order, zero allowed.  Padding is
                not read; it is zero in the output, and a sequence of length zero gets
                its initial state back.
            reset: bool, shaped like ``input`` without its features, on the same device;
                for a PackedSequence, a PackedSequence of bool packed alike, and for a nested
                tensor a nested one.  True marks
                the first step of a new segment: segments are independent sequences with
                zero initial state, in every layer and both directions.  (The forward
                direction's h_0 serves the first segment unless that begins with a mark;
                the reverse direction's serves the last.)
            return_cells: also return every c_t of the last layer.

        Returns:
            ``output, (h_n, c_n)``, or with ``return_cells`` ``output, (h_n, c_n), cells``:
            output like ``input`` with D*P features, states shaped like ``hx``, cells like
            output with D*H features and in its dtype.

        Raises:
            TypeError, ValueError, RuntimeError: an argument doesn't fit.  The message
                names it, what it got and what was expected; where ``nn.LSTM`` raises on
                purpose, the type is its.
        """
        if lengths is None and return_cells is False:
            short = plain.run(self, input, hx, reset)
            if short is not None:
                return short
        if tracers.is_fx(input) or modes.is_jit():
            options = tracers.given(lengths=lengths, reset=reset, return_cells=return_cells)
            if tracers.is_fx(input):
                return tracers.fx_leaf(self, input, hx, options)
            return tracers.jit_lstm(self, input, hx, options, self.backend)
        watcher = per_sample.hooks_of_opacus(self) if self._forward_hooks else None
        if watcher is not None:
            options = tracers.given(lengths=lengths, reset=reset, return_cells=return_cells)
            per_sample.check_call(watcher, self, input, hx, options)
        result = self._run(input, hx, lengths, reset, self._stack(return_cells))
        if watcher is not None:
            guarded = {name: per_sample.guard(getattr(result, name)) for name in ("h_n", "c_n")}
            result = result._replace(**guarded)
        if return_cells:
            return result.output, (result.h_n, result.c_n), result.cells
        return result.output, (result.h_n, result.c_n)

    @modes.uncompiled
    def _run_uncompiled(self, *args: Any) -> functional.Result:
        return self._run(*args)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | PackedSequence | None,
        stack: functional.Stack,
    ) -> functional.Result:
        if modes.is_transform_compiled():
            return self._run_uncompiled(input, hx, lengths, reset, stack)
        if isinstance(input, PackedSequence):
            run = self._run_packed
        elif isinstance(input, Tensor) and input.is_nested:
            run = self._run_nested  # type: ignore[assignment]
        else:
            run = self._run_padded  # type: ignore[assignment]
        return run(input, hx, lengths, reset, stack)  # type: ignore[arg-type]

    def _run_padded(
        self,
        input: Tensor,
        hx: State | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        stack: functional.Stack,
    ) -> functional.Result:
        checks.check_padded(input, self.input_size, stack.layers[0][0].w_ih)
        if reset is not None:
            checks.check_reset(reset, input)
        batched = input.dim() == 3
        batch_first = self.batch_first and batched
        time_dim = 1 if batch_first else 0
        if input.size(time_dim) == 0:
            raise RuntimeError(
                "Expected sequence length to be larger than 0 in RNN: "
                f"input has shape {tuple(input.shape)}"
            )
        if not batched:  # one sequence is a batch of one
            if lengths is not None:
                raise ValueError("lengths: expected 3-D input beside it, got 2-D (unbatched) input")
            input = input.unsqueeze(1)
            reset = None if reset is None else reset.unsqueeze(1)
        h0, c0 = self._state(hx, input, input.size(1 - time_dim), batched)
        if tracers.is_onnx():
            result = tracers.onnx_lstm(
                input, h0, c0, stack, batch_first=batch_first, lengths=lengths, reset=reset
            )
        elif lengths is None:
            result = functional.lstm_padded(
                input, h0, c0, stack, batch_first=batch_first, reset=reset
            )
        else:
            result = functional.lstm_lengths(
                input, lengths, h0, c0, stack, batch_first=batch_first, reset=reset
            )
        if batched:
            return result
        return functional.Result(*(None if t is None else t.squeeze(1) for t in result))  # type: ignore[arg-type, union-attr]

    def _run_packed(
        self,
        input: PackedSequence,
        hx: State | None,
        lengths: Tensor | Sequence[int] | None,
        reset: PackedSequence | None,
        stack: functional.Stack,
    ) -> functional.Result:
        checks.check_packed(input, self.input_size, stack.layers[0][0].w_ih)
        if tracers.is_onnx():
            tracers.refuse_packed()
        if lengths is not None:
            raise ValueError("lengths: expected padded input beside it, got a PackedSequence")
        if reset is not None:
            if not isinstance(reset, PackedSequence):
                raise TypeError(
                    f"reset: expected a PackedSequence, as input is one, got {type(reset).__name__}"
                )
            checks.check_reset(reset.data, input.data)
        h0, c0 = self._state(hx, input.data, int(input.batch_sizes[0]), batched=True)
        return functional.lstm_packed(input, h0, c0, stack, reset=reset)

    def _run_nested(
        self,
        input: Tensor,
        hx: State | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        stack: functional.Stack,
    ) -> functional.Result:
        checks.check_nested(input, reset, self.input_size, stack.layers[0][0].w_ih)
        if lengths is not None:
            raise ValueError("lengths: expected padded input beside it, got a nested tensor")
        values, offsets, own_lengths = input.values(), input.offsets(), input.lengths()  # type: ignore[attr-defined]
        h0, c0 = self._state(hx, values, input.size(0), batched=True)
        result = functional.lstm_jagged(
            values,
            offsets,
            own_lengths,
            h0,
            c0,
            stack,
            reset=None if reset is None else reset.values(),
        )

        def nested(rows: Any) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(rows, offsets, own_lengths)

        return result._replace(
            output=nested(result.output),
            cells=None if result.cells is None else nested(result.cells),
        )

    def _stack(self, need_cells: bool) -> functional.Stack:
        """The weights as they are now: parametrizations, pruning and functional_call replace
        attributes behind ``_flat_weights``."""
        directions = [weights_of(self, names) for names in self._all_weights]
        step = 2 if self.bidirectional else 1
        return functional.Stack(
            [directions[k : k + step] for k in range(0, len(directions), step)],
            self.dropout if self.training else 0.0,
            need_cells,
            self.backend,
            self.checkpoint,
        )

    def _state(self, hx: State | None, like: Tensor, batch: int, batched: bool) -> State:
        """The initial state, (L*D, B, P) and (L*D, B, H), beside input ``like``."""
        layers = len(self._all_weights)
        h_size = (layers, batch, self.proj_size or self.hidden_size)
        c_size = (layers, batch, self.hidden_size)
        if hx is None:
            return like.new_zeros(h_size), like.new_zeros(c_size)
        h0, c0 = checks.check_pair(hx)
        expected = 3 if batched else 2
        if h0.dim() != expected or c0.dim() != expected:
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
                f"also be {expected}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
        if not batched:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        self.check_hidden_size(h0, h_size, "hx[0]: Expected hidden[0] size {}, got {}")
        self.check_hidden_size(c0, c_size, "hx[1]: Expected hidden[1] size {}, got {}")
        checks.check_like(h0, like, "hx[0]")
        checks.check_like(c0, like, "hx[1]")
        return h0, c0


def weights_of(module: nn.RNNBase | nn.RNNCellBase, names: Sequence[str]) -> Weights:
    """One direction's weights as they are now, by their names in nn.LSTM's order."""
    # nn.Module's own __getattr__ takes longer than all of a small step's arithmetic.
    held: dict[str, Any] = module._parameters
    tensors = [held[n] if n in held else getattr(module, n) for n in names]
    return Weights.of_module(tensors, module.bias)
