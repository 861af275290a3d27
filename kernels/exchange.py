"""What the forward and the backward kernel share: the rows of a step, and the exchanged product.

The product is ``rows @ slice``, where the rows (BATCH_TILE, depth) were written by the whole team
and the slice (depth, columns) of a weight matrix belongs to one program. It goes in chunks of the
depth, so that neither operand passes through registers whole. A *resident* slice is loaded once,
before the time loop, and its chunks stay in shared memory; any other is read again at every step.
"""

import triton
import triton.language as tl

# Triton 3.6's interpreter multiplies the bits of bfloat16 as if they were integers.
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def step_rows(starts, t, steps, rows_per_step):
    """First row and number of rows of step ``t``; no rows outside of [0, steps).

    Args:
        starts: (T + 1) int64, first row of each step; None where all have ``rows_per_step``.
    """
    inside = (t >= 0) & (t < steps)
    if starts is None:
        start = rows_per_step.to(tl.int64) * t
        count = tl.where(inside, rows_per_step, 0)
    else:
        start = tl.load(starts + t, mask=inside, other=0)
        count = (tl.load(starts + t + 1, mask=inside, other=0) - start).to(tl.int32)
    return start, count


@triton.jit
def _weight_chunk(
    columns, live, stride: tl.constexpr, depth: tl.constexpr, k0, CHUNK: tl.constexpr
):
    k = k0 + tl.arange(0, CHUNK)
    pointers = columns[None, :] + k[:, None] * stride
    return tl.load(pointers, mask=(k < depth)[:, None] & live[None, :], other=0.0)


@triton.jit
def _row_chunk(rows, live, depth: tl.constexpr, k0, CHUNK: tl.constexpr):
    k = k0 + tl.arange(0, CHUNK)
    # From L2: a line in L1 may be older than what another program has stored in it.
    return tl.load(
        rows[:, None] + k[None, :],
        mask=live[:, None] & (k < depth)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _multiply(part, weights, acc, PRECISION: tl.constexpr):
    if _WIDEN:
        part, weights = part.to(tl.float32), weights.to(tl.float32)
    return tl.dot(part, weights, acc, input_precision=PRECISION)


@triton.jit
def resident_slice(columns, live, stride: tl.constexpr, depth: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks (CHUNK, columns) of a slice; a column's element k is at ``columns + k*stride``."""
    chunks = ()
    for k0 in tl.static_range(0, depth, CHUNK):
        chunks = chunks + (_weight_chunk(columns, live, stride, depth, k0, CHUNK),)  # noqa: RUF005, no unpacking in Triton
    return chunks


@triton.jit
def resident_product(
    rows, rows_live, chunks, acc, depth: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """``acc + rows @ slice`` with the slice's chunks at hand; dead rows count as zeros."""
    for k0 in tl.static_range(0, depth, CHUNK):
        part = _row_chunk(rows, rows_live, depth, k0, CHUNK)
        acc = _multiply(part, chunks[k0 // CHUNK], acc, PRECISION)
    return acc


@triton.jit
def streamed_product(
    rows,
    rows_live,
    columns,
    columns_live,
    acc,
    stride: tl.constexpr,
    depth: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + rows @ slice``, reading the slice."""
    for k0 in tl.range(0, depth, CHUNK, num_stages=2):
        part = _row_chunk(rows, rows_live, depth, k0, CHUNK)
        far = tl.full((), 0, tl.int64) + k0  # a matrix may have more than 2^31 elements
        weights = _weight_chunk(columns, columns_live, stride, depth, far, CHUNK)
        acc = _multiply(part, weights, acc, PRECISION)
    return acc
