"""Checks of what users hand to a module, with the errors of nn.LSTM and nn.LSTMCell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import modes


def kind(value: object) -> str:
    """``value``'s type for a message, with its first items' where it is a plain tuple or list."""
    if type(value) not in (tuple, list):
        return type(value).__name__
    names = [type(item).__name__ for item in value[:4]]  # type: ignore[index]
    rest = ", ..." if len(value) > 4 else ""  # type: ignore[arg-type]
    return f"{type(value).__name__} of ({', '.join(names)}{rest})"


def check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_padded(input: Tensor, input_size: int, weight: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or a PackedSequence, got {kind(input)}")
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    check_rows(input, input_size, weight, ValueError)


def check_packed(input: PackedSequence, input_size: int, weight: Tensor) -> None:
    if not isinstance(input.data, Tensor):
        raise TypeError(f"input.data: expected a Tensor, got {kind(input.data)}")
    if input.data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
    if input.batch_sizes.dim() != 1:
        raise RuntimeError(
            f"input.batch_sizes must have 1 dimension, got {input.batch_sizes.dim()}"
        )
    if input.batch_sizes.numel() == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: input has no batch_sizes"
        )
    if not torch.compiler.is_compiling():  # their values are data, which tracing can't see
        sizes = input.batch_sizes.tolist()
        if sizes != sorted(sizes, reverse=True) or sizes[-1] < 0 or sum(sizes) != len(input.data):
            raise RuntimeError(
                "input.batch_sizes must never increase and sum to the number of rows of "
                f"input.data. Got {sizes} for {len(input.data)} rows"
            )
        for name in ("sorted_indices", "unsorted_indices"):
            order = getattr(input, name)
            if order is not None and order.shape != (sizes[0],):
                raise RuntimeError(
                    f"input.{name} must have one index for each of {sizes[0]} sequences, "
                    f"got shape {tuple(order.shape)}"
                )
    check_rows(input.data, input_size, weight, RuntimeError)


def check_nested(input: Tensor, reset: object, input_size: int, weight: Tensor) -> None:
    if input.layout != torch.jagged:
        raise TypeError(f"input: expected a nested tensor of torch.jagged, got {input.layout}")
    if input.dim() != 3 or input.values().dim() != 2 or input._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "input: expected a nested tensor of shape (B, T*, I), ragged in its second dimension, "
            f"got {tuple(input.shape)}"
        )
    check_rows(input.values(), input_size, weight, ValueError)
    if reset is None:
        return
    if not isinstance(reset, Tensor) or not reset.is_nested or reset.layout != torch.jagged:
        raise TypeError(f"reset: expected a nested tensor, as input is one, got {kind(reset)}")
    check_reset(reset.values(), input.values())
    if not torch.equal(reset.offsets(), input.offsets()):  # type: ignore[attr-defined]
        raise ValueError("reset: expected sequences of the lengths that input has")


def check_rows(
    input: Tensor, input_size: int, weight: Tensor, dtype_error: type[Exception]
) -> None:
    """What every form of input must be; nn.LSTM has another error for a dtype in each."""
    check_dense(input, "input")
    if input.dtype != weight.dtype and modes.autocast_dtype(input.device) is None:
        raise dtype_error(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.size(-1) != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.size(-1)}"
        )
    if input.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {weight.device}"
        )


def check_like(state: Tensor, input: Tensor, name: str) -> None:
    check_dense(state, name)
    if state.device != input.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{input.device} and hidden tensor {name} at {state.device}"
        )
    if state.dtype != input.dtype and modes.autocast_dtype(input.device) is None:
        raise RuntimeError(f"{name}: expected the dtype of input, {input.dtype}, got {state.dtype}")


def check_reset(reset: Tensor, input: Tensor) -> None:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a Tensor, as input is one, got {kind(reset)}")
    check_dense(reset, "reset")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected dtype torch.bool, got {reset.dtype}")
    if reset.shape != input.shape[:-1]:
        raise ValueError(
            f"reset: expected the shape of input without its features, "
            f"{tuple(input.shape[:-1])}, got {tuple(reset.shape)}"
        )
    if reset.device != input.device:
        raise ValueError(f"reset: expected input's device, {input.device}, got {reset.device}")


def check_step(input: Tensor, input_size: int, weight: Tensor) -> bool:
    """Check the input of one step, (B, I) or (I,); returns whether it has B."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {kind(input)}")
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    check_rows(input, input_size, weight, RuntimeError)
    return input.dim() == 2


def check_step_state(
    hx: object, input: Tensor, batched: bool, hidden_size: int
) -> tuple[Tensor, Tensor]:
    """Check (h_0, c_0) beside ``input (B, I)``; returns both as (1, B, H)."""
    h0, c0 = check_pair(hx)
    for k, state in enumerate((h0, c0)):
        if state.dim() not in (1, 2):
            raise ValueError(
                f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead"
            )
        expected = (input.size(0), hidden_size) if batched else (hidden_size,)
        if state.shape != expected:
            raise RuntimeError(
                f"hx[{k}]: expected shape {expected} beside {'' if batched else 'un'}batched "
                f"input, got {tuple(state.shape)}"
            )
        check_like(state, input, f"hx[{k}]")
    return (h0[None], c0[None]) if batched else (h0[None, None], c0[None, None])


def check_pair(hx: object) -> tuple[Tensor, Tensor]:
    """``hx`` as the two tensors it must be."""
    if not isinstance(hx, (tuple, list)) or not all(isinstance(t, Tensor) for t in hx):
        raise TypeError(f"hx: expected a tuple of two Tensors (h_0, c_0), got {kind(hx)}")
    if len(hx) != 2:
        raise RuntimeError(f"hx: lstm expects two hidden states (h_0, c_0), got {len(hx)}")
    return hx[0], hx[1]
