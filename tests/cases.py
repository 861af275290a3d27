"""Shapes shared by the tests and the benchmarks; ``tolerance`` is fastlstm/cli/compare.py's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm.cli.compare import tolerance
from fastlstm.contract import Weights

__all__ = [
    "DTYPES",
    "LARGER",
    "LAYERS",
    "MODEL",
    "SPEED",
    "Layer",
    "LayerTensors",
    "make_layer",
    "tolerance",
]


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One layer's shape, and which of its features are in use."""

    batch_sizes: tuple[int, ...]
    inputs: int
    hidden: int
    projection: int = 0
    directions: int = 1
    bias: bool = True
    reset: float = 0.0  # the share of rows that start a segment
    batch: int | None = None  # more than batch_sizes[0]: sequences without steps

    def __str__(self) -> str:
        parts = [f"I{self.inputs}H{self.hidden}", "x".join(map(str, self.batch_sizes))[:24]]
        parts += [f"P{self.projection}"] * bool(self.projection)
        parts += ["bi"] * (self.directions == 2) + ["nobias"] * (not self.bias)
        parts += ["reset"] * bool(self.reset) + [f"B{self.batch}"] * (self.batch is not None)
        return "-".join(parts)


class LayerTensors(NamedTuple):
    """What ``layer_forward`` takes."""

    x: Tensor
    batch_sizes: Tensor
    h0: Tensor
    c0: Tensor
    weights: list[Weights]
    reset: Tensor | None


def make_layer(case: Layer, dtype: torch.dtype, requires_grad: bool = False) -> LayerTensors:
    """Random tensors for ``case``; weights of the size that nn.LSTM initialises them to."""
    rows, batch = sum(case.batch_sizes), case.batch
    if batch is None:
        batch = max(case.batch_sizes, default=0)
    hidden, output = case.hidden, case.projection or case.hidden

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_(requires_grad)

    scale = hidden**-0.5
    weights = [
        Weights(
            values(4 * hidden, case.inputs, scale=scale),
            values(4 * hidden, output, scale=scale),
            values(4 * hidden, scale=scale) if case.bias else None,
            values(output, hidden, scale=scale) if case.projection else None,
        )
        for _ in range(case.directions)
    ]
    return LayerTensors(
        values(rows, case.inputs),
        torch.tensor(case.batch_sizes, dtype=torch.int64),
        values(case.directions, batch, output),
        values(case.directions, batch, hidden),
        weights,
        (torch.rand(rows) < case.reset).to(torch.uint8) if case.reset else None,
    )


_PACKED = (7, 7, 5, 4, 4, 1)

# Every feature alone and together, and the sizes where loops have edges. Some tests take a few of
# them by their places: new ones go to the end.
LAYERS = (
    *(Layer((9, 9), size, size) for size in (1, 3, 17, 33, 65)),
    Layer((2,), 5, 4),  # one step, its weights multiplied unpacked
    Layer((7, 0), 20, 35, directions=2, reset=0.5, batch=9),
    Layer((5,), 18, 33, projection=19, directions=2, bias=False),
    Layer((1,) * 40, 9, 20),  # one row a step: the input part is computed ahead, in chunks
    Layer((4,) * 30 + (3, 1), 9, 20, directions=2, reset=0.2),
    Layer((13, 13), 18, 34),  # more rows than a tile has
    Layer((29, 27, 14, 13, 12, 2), 10, 40, directions=2, reset=0.3),
    Layer(_PACKED, 6, 10),
    Layer(_PACKED, 6, 10, directions=2),
    Layer(_PACKED, 6, 10, reset=0.3),
    Layer(_PACKED, 6, 10, directions=2, reset=0.3, bias=False),
    Layer(_PACKED, 6, 35, projection=5),
    Layer(_PACKED, 40, 19, projection=17, directions=2, reset=0.3),
    Layer((3, 3), 4, 5, projection=37),  # wider than the cell
    Layer((4, 2, 0, 0), 4, 5, batch=6, directions=2, reset=0.3),
    Layer((4, 2, 0), 4, 5, projection=3, batch=6, directions=2),
    Layer((7, 7, 6), 33, 49),  # rows enough for the matrix unit, blocks of it half full
    Layer((18, 18), 40, 31, projection=17),
    Layer((40, 39, 20, 6), 17, 33, projection=35, directions=2, reset=0.3),
    Layer((), 4, 5, batch=2),  # no steps at all
    Layer((0, 0), 4, 5, batch=0),  # no sequences
    Layer((2, 2), 0, 3),  # no inputs
    Layer((5,) * 4, 3, 2, directions=2),  # more rows than gates: h is multiplied where it lies
    *(Layer((rows,) * (16 // rows), 19, 33) for rows in (1, 2, 3, 5, 8)),  # a few steps unpacked
    Layer((1,) * 7, 40, 17, directions=2, reset=0.3),
    Layer((2,) * 5, 6, 35, projection=18, directions=2, bias=False),
    Layer((3, 3, 0), 9, 17, projection=20, reset=0.3, batch=5),
    Layer((12,) * 7, 1, 70),  # the unit's dW_ih and dW_hh: tiles of one row, and of many
    *(Layer((rows,), 21, 18, reset=0.3, directions=2) for rows in (6, 11, 16)),  # one step unpacked
)

# For the CPU's kernels alone (in Triton's interpreter they would take minutes). Steps whose weights
# are not packed, because they are many: one row a step, one step of many rows, and a few of some.
# Few rows that two panels of weights are multiplied by at once. And so few units left over, where a
# vector has 16 or 8, that their gates share vectors.
LARGER = (
    Layer((1,) * 18, 21, 150, directions=2, reset=0.2),
    Layer((1,) * 17, 300, 37, projection=143, bias=False),
    Layer((40,), 260, 333, directions=2, reset=0.3),
    Layer((20, 20), 330, 331, projection=300, directions=2, bias=False),
    Layer((1,) * 70, 190, 210, directions=2, reset=0.1),  # rows enough to pack the input part
    Layer((1,) * 100, 1800, 150),  # two chunks
    Layer((1,) * 5, 7, 331, directions=2, reset=0.3),  # rows of W_hh wider than the registers
    Layer((4, 3, 3, 1), 5, 70, directions=2, reset=0.3),  # three panels in each direction
    Layer((6,) * 3, 5, 150, projection=70),
    Layer((1,) * 127, 1100, 210),  # rows enough in the first chunk, too few in the second
    Layer((40,), 60, 131, directions=2),  # the gradient of h0 is a product
    Layer((30, 30, 17), 140, 38, directions=2, reset=0.2),  # six units left over, or two
    Layer((20, 20), 70, 50, projection=36),  # two units left over, and four outputs
    Layer((5,) * 30, 70, 24, directions=2, bias=False),  # eight of sixteen, and few rows
)

# What the benchmarks time: (T, B, I, H).
SPEED = (
    (100, 1, 64, 128),
    (100, 32, 64, 128),
    (100, 1, 256, 256),
    (128, 16, 256, 256),
    (100, 64, 512, 512),
    (64, 64, 1024, 1024),
    (50, 1, 1024, 1024),
    (512, 8, 128, 128),
)
MODEL = (64, 32, 64, 256)  # the character model of examples/char_rnn.py
