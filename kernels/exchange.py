"""What the forward and the backward kernel share: the rows of a step, and the exchanged product.

The product is ``rows @ slice``, where the rows (BATCH_TILE, depth) were written by the whole team
and the slice (depth, columns) of a weight matrix belongs to one program. It goes in chunks of the
depth, so that neither operand passes through registers whole. A *resident* slice is loaded once,
before the time loop, and its chunks stay in shared memory; any other is read again at every step.

With SPLIT > 1 every chunk is cut into so many parts of the depth, one for each warp: a product of
(SPLIT, ..) matrices, whose results are added up at the end. A slice has few columns and a great
depth; warps that share out its columns would all read all rows, in one long chain of products.

With REGISTERS the slice is the left operand, transposed, and the rows are the right one. Triton
moves the reading of a left operand that does not change out of the time loop, and keeps it in
registers; of a right operand it moves it next to the product, where a step would read the whole
slice from shared memory again. And a right operand may have as few as eight columns.
"""

import triton
import triton.language as tl

# Triton 3.6's interpreter multiplies the bits of bfloat16 as if they were integers.
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Of the depth of a projection, whose weights are read at every step, two chunks at a time.
PROJECTION_CHUNK = tl.constexpr(128)


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
def _places(k0, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """Of a chunk along the depth: (SPLIT, CHUNK / SPLIT)."""
    PART: tl.constexpr = CHUNK // SPLIT
    return k0 + tl.arange(0, SPLIT)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def _weight_chunk(
    columns,
    live,
    stride: tl.constexpr,
    depth: tl.constexpr,
    k0,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(CHUNK, columns), or (SPLIT, CHUNK / SPLIT, columns)."""
    if SPLIT == 1:
        k = k0 + tl.arange(0, CHUNK)
        pointers = columns[None, :] + k[:, None] * stride
        mask = (k < depth)[:, None] & live[None, :]
    else:
        k = _places(k0, CHUNK, SPLIT)
        pointers = columns[None, None, :] + k[:, :, None] * stride
        mask = (k < depth)[:, :, None] & live[None, None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _row_chunk(
    rows,
    live,
    depth: tl.constexpr,
    k0,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """(BATCH_TILE, CHUNK), or (SPLIT, BATCH_TILE, CHUNK / SPLIT); with REGISTERS the latter's
    last two axes are exchanged."""
    if SPLIT == 1:
        k = k0 + tl.arange(0, CHUNK)
        pointers = rows[:, None] + k[None, :]
        mask = live[:, None] & (k < depth)[None, :]
    elif REGISTERS:
        k = _places(k0, CHUNK, SPLIT)
        pointers = rows[None, None, :] + k[:, :, None]
        mask = live[None, None, :] & (k < depth)[:, :, None]
    else:
        k = _places(k0, CHUNK, SPLIT)
        pointers = rows[None, :, None] + k[:, None, :]
        mask = live[None, :, None] & (k < depth)[:, None, :]
    # From L2: a line in L1 may be older than what another program has stored in it.
    return tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr, SPLIT: tl.constexpr):
    """What ``_multiply`` adds to."""
    if SPLIT == 1:
        return tl.zeros((rows, columns), tl.float32)
    else:
        return tl.zeros((SPLIT, rows, columns), tl.float32)


@triton.jit
def _multiply(left, right, acc, PRECISION: tl.constexpr):
    if _WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _added(acc, rows: tl.constexpr, columns: tl.constexpr, SPLIT: tl.constexpr):
    """The sum of all parts, (rows, columns).

    By splitting the last axis, which takes the parts of an element into one thread: a reduction
    over the warps would cost shuffles, and leave its result, and all that is computed with it,
    laid out as tensor cores have it, in which values to load and to store first must be brought.
    """
    if SPLIT == 1:
        return acc
    else:
        tl.static_assert(SPLIT == 8, "the parts are added in three steps")
        acc = tl.permute(acc, (1, 2, 0))
        a, b = tl.split(tl.reshape(acc, (rows, columns, 4, 2)))
        a, b = tl.split(tl.reshape(a + b, (rows, columns, 2, 2)))
        a, b = tl.split(a + b)
        return a + b


@triton.jit
def resident_slice(
    columns,
    live,
    stride: tl.constexpr,
    depth: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All chunks of a slice; a column's element k is at ``columns + k*stride``."""
    chunks = ()
    for k0 in tl.static_range(0, depth, CHUNK):
        chunks = chunks + (_weight_chunk(columns, live, stride, depth, k0, CHUNK, SPLIT),)  # noqa: RUF005, no unpacking in Triton
    return chunks


@triton.jit
def resident_product(
    rows,
    rows_live,
    chunks,
    columns: tl.constexpr,
    depth: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``rows @ slice`` with the slice's chunks at hand; dead rows count as zeros."""
    if REGISTERS:
        acc = _zeros(columns, rows.shape[0], SPLIT)
    else:
        acc = _zeros(rows.shape[0], columns, SPLIT)
    for k0 in tl.static_range(0, depth, CHUNK):
        part = _row_chunk(rows, rows_live, depth, k0, CHUNK, SPLIT, REGISTERS)
        if REGISTERS:
            chunks_transposed = tl.permute(chunks[k0 // CHUNK], (0, 2, 1))
            acc = _multiply(chunks_transposed, part, acc, PRECISION)
        else:
            acc = _multiply(part, chunks[k0 // CHUNK], acc, PRECISION)
    if REGISTERS:
        acc = tl.permute(acc, (0, 2, 1))
    return _added(acc, rows.shape[0], columns, SPLIT)


@triton.jit
def streamed_product(
    rows,
    rows_live,
    columns,
    columns_live,
    stride: tl.constexpr,
    depth: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``rows @ slice``, reading the slice."""
    acc = _zeros(rows.shape[0], columns.shape[0], SPLIT)
    for k0 in tl.range(0, depth, CHUNK, num_stages=2):
        part = _row_chunk(rows, rows_live, depth, k0, CHUNK, SPLIT, False)
        far = tl.full((), 0, tl.int64) + k0  # a matrix may have more than 2^31 elements
        weights = _weight_chunk(columns, columns_live, stride, depth, far, CHUNK, SPLIT)
        acc = _multiply(part, weights, acc, PRECISION)
    return _added(acc, rows.shape[0], columns.shape[0], SPLIT)
