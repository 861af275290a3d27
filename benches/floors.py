"""What a call must do at least, and how long the machine's limits make that (docs/performance.md).

Work is recorded with each row; the limits are of the same run.  Nothing here measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Products of bfloat16 terms that a product takes on the matrix unit (docs/design.md).
TERM_PRODUCTS = {"float32": 6, "float16": 3, "bfloat16": 1}
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Work(NamedTuple):
    """Flops, and bytes of weights that are read, of one call.

    Dense products take all steps at once, and read their weights once; those of the steps wait for
    the step before, and read their weights, ``held`` bytes, at every step.
    """

    dense_flops: int
    dense_bytes: int
    step_flops: int
    step_bytes: int
    held: int

    def flops(self) -> int:
        return self.dense_flops + self.step_flops


def lstm_work(
    rows: int,
    steps: int,
    inputs: int,
    hidden: int,
    mode: str,
    *,
    dtype: str = "float32",
    projection: int = 0,
    layers: int = 1,
    directions: int = 1,
) -> Work:
    """Of an LSTM over ``rows`` = sum(batch_sizes); in training with a gradient of its input.

    A backward pass walks through the steps once more and then has the products of eq. 9.
    """
    output, size = projection or hidden, ITEMSIZE[dtype]
    walks = 2 if mode == "train" else 1
    around = 4 * hidden * output + projection * hidden  # weights of a step
    dense = 4 * hidden * (inputs + (layers - 1) * directions * output)  # weights of all inputs
    sides = layers * directions
    gradients = dense + layers * around if mode == "train" else 0  # of the weights
    return Work(
        dense_flops=2 * rows * directions * (walks * dense + gradients),
        dense_bytes=size * directions * walks * dense,
        step_flops=2 * rows * sides * walks * around,
        step_bytes=size * sides * walks * steps * around,
        held=size * directions * around,
    )


def cell_work(steps: int, batch: int, inputs: int, hidden: int, mode: str) -> Work:
    """Of LSTMCell: each step is a call, so that the input's weights are read at every step too."""
    whole = lstm_work(steps * batch, steps, inputs, hidden, mode)
    held = whole.held + whole.held * inputs // hidden
    return Work(0, 0, whole.flops(), whole.step_bytes + steps * whole.dense_bytes, held)


def penalty_work(steps: int, batch: int, inputs: int, hidden: int, mode: str) -> Work:
    """Of a gradient penalty (docs/design.md, eq. 10 to 12): a training step that makes the gradient
    of the input alone; a walk of tangents, one for what eq. 11 adds, and the products around them,
    of which those of weights have twice the rows."""
    assert mode == "train"
    rows, size = steps * batch, ITEMSIZE["float32"]
    dense, around = 4 * hidden * inputs, 4 * hidden * hidden
    return Work(
        dense_flops=2 * rows * (6 * dense + 3 * around),
        dense_bytes=size * (4 * dense + around),
        step_flops=2 * rows * 4 * around,
        step_bytes=size * 4 * steps * around,
        held=size * around,
    )


class Floor(NamedTuple):
    """The least a call can take, and what bounds it."""

    seconds: float
    bound: str


def peak(limits: dict[str, Any], dtype: str) -> tuple[float, str]:
    """GF/s of products of this storage at best, and by what: half precision is computed in float32,
    or on the matrix unit from as many products of bfloat16 as it takes.
    """
    unit = limits["matrix_unit_gflops"] / TERM_PRODUCTS.get(dtype, 1) if dtype != "float64" else 0
    vectors = fma_peak(limits, dtype)
    if unit <= vectors:
        return vectors, "FMA"
    products = TERM_PRODUCTS[dtype]
    return unit, "matrix unit" if products == 1 else f"matrix unit / {products}"


def fma_peak(limits: dict[str, Any], dtype: str) -> float:
    """GF/s of multiply-adds on vectors of what this storage is computed in."""
    return limits["fma_gflops"]["float64" if dtype == "float64" else "float32"]


def level_of(share: float, caches: dict[str, int], limits: dict[str, Any]) -> str:
    """The first level of cache with room for a thread's share of the weights and a bit more, among
    those whose reads were measured."""
    measured = limits["read_gbytes"]
    held = (name for name in measured if share <= 0.75 * caches.get(name, 0))
    return next(held, [*measured][-1])


def floor(
    work: Work, dtype: str, threads: int, caches: dict[str, int], limits: dict[str, Any]
) -> Floor:
    """By the arithmetic or by the reads of weights, for the dense products and for the steps.

    ``limits`` are of all ``threads`` together; each thread reads its share of the weights of one
    step, from the level of cache that holds it.
    """
    best, by = peak(limits, dtype)
    level = level_of(work.held / threads, caches, limits)
    rate = limits["read_gbytes"][level] * 1e9
    computing = work.dense_flops / best / 1e9, work.step_flops / best / 1e9
    reading = work.dense_bytes / rate, work.step_bytes / rate
    seconds = sum(max(pair) for pair in zip(computing, reading, strict=True))
    return Floor(seconds, f"{level} reads" if sum(reading) > sum(computing) else by)
