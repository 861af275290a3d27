"""What the kernels of every backend are held to: one set of checks against the reference."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cases import Layer, LayerTensors, make_layer, tolerance
from fastlstm import reference
from fastlstm.contract import Gradients, OutputGradients, Outputs, Requested

ALL = Requested(*[True] * 7)
# Sizes that programs have, for which kernels are chosen that no small layer takes. (On a GPU:
# interpreted and emulated they would take hours.)
PROGRAMS = (
    Layer((64,) * 8, 256, 256),
    Layer((16,) * 8, 512, 512, directions=2),
    Layer((256,) * 8, 1024, 1024),
    Layer((1,) * 8, 2048, 2048),
    Layer((64,) * 8, 512, 2048),
)


class Backend(Protocol):
    """A backend's module."""

    _GATES_BYTES: int

    def layer_forward(self, *args: Any) -> Outputs: ...
    def layer_backward(self, *args: Any) -> Gradients: ...


class Kernels(NamedTuple):
    """A backend, where its kernels run, and what rounding may do to them."""

    backend: Backend
    device: torch.device
    tf32: bool = False  # is float32 multiplied in TF32, whose mantissa is float16's?

    def layer(self, case: Layer, dtype: torch.dtype) -> LayerTensors:
        return self.on_device(make_layer(case, dtype))

    def on_device(self, values: Any) -> Any:
        """The same tree of tensors there; batch_sizes, the only int64, stays where it is."""
        if isinstance(values, Tensor):
            return values if values.dtype == torch.int64 else values.to(self.device)
        if isinstance(values, tuple) and hasattr(values, "_fields"):
            return type(values)(*map(self.on_device, values))
        return list(map(self.on_device, values)) if isinstance(values, list) else values

    def tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        return tolerance(torch.float16 if self.tf32 and dtype == torch.float32 else dtype)

    def assert_near(self, got: Any, want: Any, dtype: torch.dtype) -> None:
        for (name, a), (_, b) in zip(flat(got), flat(want), strict=True):
            assert (a is None) == (b is None), name
            if a is None or b is None:
                continue
            assert a.dtype == b.dtype and a.is_contiguous(), name
            # Sums over many rows grow; compare them on their own scale.
            scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(
                a.double() / scale, b.double() / scale, **self.tolerance(dtype),
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip

    # --- checks ---

    def check_layer(self, case: Layer, dtype: torch.dtype) -> None:
        """Outputs, reserve and all gradients."""
        layer = self.layer(case, dtype)
        want = reference.layer_forward(*layer, True, True)
        self.assert_near(self.backend.layer_forward(*layer, True, True), want, dtype)
        grads = random_gradients(want)
        inputs = (*layer, want.reserve())
        self.assert_near(
            self.backend.layer_backward(grads, *inputs, need_of(case)),
            reference.layer_backward(grads, *inputs, need_of(case)),
            dtype,
        )

    def check_same_bits(self, case: Layer) -> None:
        """Two forward and two backward passes: sums have one order, nothing saved changes."""
        layer = self.layer(case, torch.bfloat16)
        first, second = (self.backend.layer_forward(*layer, True, True) for _ in range(2))
        assert_same_bits(first, second)
        grads = random_gradients(first)
        rest = (*layer, first.reserve(), need_of(case))
        assert_same_bits(*(self.backend.layer_backward(grads, *rest) for _ in range(2)))
        assert_same_bits(first, second)

    def check_requested(self, case: Layer, flag: str) -> None:
        """Only the gradient asked for comes back, and it is right."""
        layer = self.layer(case, torch.float32)
        saved = reference.layer_forward(*layer, True, True)
        inputs = (random_gradients(saved), *layer, saved.reserve())
        need = Requested(*(name == flag for name in Requested._fields))
        got = self.backend.layer_backward(*inputs, need)
        self.assert_near(got, reference.layer_backward(*inputs, need), torch.float32)
        assert [name for name in got._fields if getattr(got, name) is not None] == [flag]

    def check_absent(self, case: Layer, absent: int) -> None:
        """A gradient that is not given counts as zeros."""
        layer = self.layer(case, torch.float32)
        saved = reference.layer_forward(*layer, True, True)
        grads = list(random_gradients(saved))
        rest = (*layer, saved.reserve(), need_of(case))
        zeros = [torch.zeros_like(g) if i == absent else g for i, g in enumerate(grads)]
        grads[absent] = None
        assert_same_bits(
            self.backend.layer_backward(OutputGradients(*grads), *rest),
            self.backend.layer_backward(OutputGradients(*zeros), *rest),
        )

    def check_strides(self, hidden: int) -> None:
        """Expanded and strided gradients."""
        case = Layer((4, 4, 2), 3, hidden)
        layer = self.layer(case, torch.float32)
        saved = reference.layer_forward(*layer, True, True)
        rest = (*layer, saved.reserve(), need_of(case))
        ones = torch.ones((), device=self.device).expand(10, hidden)
        wide = torch.randn(1, 4, 2 * hidden, device=self.device)[..., ::2]
        given = OutputGradients(ones, None, wide, None)
        copied = OutputGradients(ones.clone(), None, wide.clone(), None)
        backward = self.backend.layer_backward
        assert_same_bits(backward(given, *rest), backward(copied, *rest))

    def check_inference(self, case: Layer, monkeypatch: Any) -> None:
        """It keeps nothing, and has the same results however few steps' gates there is room for."""
        dtype = torch.bfloat16
        layer = self.layer(case, dtype)
        want = self.backend.layer_forward(*layer, True, True)
        step = max(case.batch_sizes) * case.directions * 4 * case.hidden * 2
        for steps, cells in ((100, True), (2, False), (1, True)):
            monkeypatch.setattr(self.backend, "_GATES_BYTES", steps * step)
            got = self.backend.layer_forward(*layer, False, cells)
            assert got.gates is None and got.m is None
            kept = want._replace(gates=None, m=None, c_all=want.c_all if cells else None)
            if self.device.type == "cpu":
                assert_same_bits(got, kept)
            else:  # torch's products of other numbers of rows may sum in another order
                self.assert_near(got, kept, dtype)

    def check_special_value(self, value: float, hidden: int) -> None:
        """NaN and inf stay in their sequence."""
        layer = self.layer(Layer((5, 5, 5, 3), 4, hidden, directions=2), torch.float32)
        layer.x[7, 2] = value
        want = reference.layer_forward(*layer, True, True)
        got = self.backend.layer_forward(*layer, True, True)
        for a, b in zip(got[:4], want[:4], strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **self.tolerance(torch.float32))


def need_of(case: Layer) -> Requested:
    """All that ``case`` has."""
    return ALL._replace(bias=case.bias, w_hr=bool(case.projection))


def random_gradients(out: Outputs) -> OutputGradients:
    return OutputGradients(*(None if t is None else torch.randn_like(t) for t in out[:4]))


def flat(results: Any) -> list[tuple[str, Tensor | None]]:
    """(name, tensor) of every tensor in a named tuple."""
    pairs = []
    for name in results._fields:
        value = getattr(results, name)
        pairs += [(name, t) for t in (value if isinstance(value, list) else [value])]
    return pairs


def assert_same_bits(got: Any, want: Any) -> None:
    for (name, a), (_, b) in zip(flat(got), flat(want), strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name
