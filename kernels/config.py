"""How a layer is cut into programs: the one place where tiles are chosen.

The choice depends on sizes of the model, the dtype, the device and a coarse class of the batch
size, and on nothing else that changes from call to call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Limits(NamedTuple):
    """What a device has."""

    multiprocessors: int
    shared: int  # bytes of shared memory that one program can have
    shared_together: int  # .. that all programs of a multiprocessor have
    registers: int  # of a multiprocessor
    threads: int  # of a multiprocessor

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many programs a multiprocessor has room for, where each thread takes ``registers``
        and each program ``shared`` bytes."""
        # Registers come in blocks of 256 for each warp; the system takes 1 KiB for each program.
        per_warp = -(-registers * 32 // 256) * 256
        return min(
            self.registers // (per_warp * warps),
            self.shared_together // (shared + 1024),
            self.threads // (32 * warps),
        )


class Config(NamedTuple):
    """How a kernel is compiled and launched."""

    batch_tile: int  # sequences of a program
    hidden_tile: int  # hidden units (and outputs) of a program
    chunk: int  # of the depth of the exchanged product
    warps: int
    split: int  # parts of a chunk, each for a warp; 1: warps share out rows and columns instead
    resident: bool  # does the slice of W_hh stay in the program, or is it read at every step?
    registers: bool = False  # does it stay in registers, or in shared memory?

    def options(self) -> dict[str, int]:
        """For Triton's compiler.

        ptxas spills a few bytes of small tiles to stay below 128 registers, where shared memory
        has no room for a second program anyway; of larger ones when it is given all 255.
        """
        # One stage: a pipelined time loop would read ahead of the barrier.
        registers = {} if self.batch_tile > 16 else dict(maxnreg=255)
        return dict(num_warps=self.warps, num_stages=1, **registers)

    def tiles(self, hidden: int, output: int) -> int:
        """Programs in a team."""
        return -(-max(hidden, output) // self.hidden_tile)


# A team of one has no barrier: best where its slice fits, and then few sequences each, since any
# number of such programs may go together. Otherwise small tiles spread W_hh over many programs;
# the smaller serve where the larger do not fit. In the order of preference.
_ALONE_TILES = (16, 32, 64, 128)
_ALONE_BATCH_TILE = 16
_TEAM_TILES = (16, 8)
# A larger batch tile serves where not all teams with a smaller have a multiprocessor for each
# program. Beyond 32 rows the tensor core instructions of sm_90 take their operands by descriptors,
# and those of a whole slice are more than the registers hold. Eight rows need the slice as the left
# operand, from registers.
_BATCH_TILES = (8, 16, 32)
# Bytes of a slice that find room in registers, 64 of each thread's.
_REGISTER_SLICE = 64 << 10
# (largest number of sequences, batch tile)
_STREAMED_BATCH_TILES = ((16, 16), (32, 32), (None, 64))
# Of the depth, by kind, product and batch tile: the longest that leave registers to spare, and a
# shorter one where shared memory has no room. The rows of a chunk travel together, and chunks one
# after the other, each after a wait for the L2 cache.
_CHUNKS = {
    (FORWARD, "half"): {8: (512,), 16: (1024, 512), 32: (256,)},
    (FORWARD, "tf32"): {8: (256,), 16: (256,), 32: (128,)},
    (FORWARD, "ieee"): {16: (128,), 32: (32,)},
    (BACKWARD, "half"): {8: (2048,), 16: (2048, 1024, 512), 32: (512,)},
    (BACKWARD, "tf32"): {8: (256,), 16: (256,), 32: (256, 128)},
    (BACKWARD, "ieee"): {16: (64,), 32: (64,)},
}
_STREAMED_TILE = 32
_STREAMED_CHUNKS = {
    FORWARD: {"half": 64, "tf32": 32, "ieee": 32},
    BACKWARD: {"half": 128, "tf32": 128, "ieee": 32},
}
_WARPS = 8
_DOT_DEPTH = 16  # the least that Triton multiplies
_ITEMSIZE = {"half": 2, "tf32": 4, "ieee": 4}
_PROJECTION_CHUNK = 128  # as in exchange.py


def choose(
    kind: str,
    hidden: int,
    output: int,
    product: str,
    directions: int,
    sequences: int,
    limits: Limits,
) -> Config:
    """The configuration of a kernel.

    Args:
        kind: FORWARD or BACKWARD.
        hidden, output: H and P.
        product: of what the weights are and how they are multiplied: "half", "tf32" or "ieee".
        sequences: rows of the longest step.
    """
    teams = tuple(directions * -(-sequences // rows) for rows in _BATCH_TILES)
    streamed_batch_tile = _by_class(_STREAMED_BATCH_TILES, sequences)
    return _chosen(kind, hidden, output, product, teams, streamed_batch_tile, limits)


@functools.lru_cache(maxsize=1024)
def _chosen(
    kind: str,
    hidden: int,
    output: int,
    product: str,
    teams: tuple[int, ...],  # with each of _BATCH_TILES
    streamed_batch_tile: int,
    limits: Limits,
) -> Config:
    alone = [tile for tile in _ALONE_TILES if tile >= max(hidden, output)][:1]
    candidates = [(tile, _ALONE_BATCH_TILE) for tile in alone]
    for tile in _TEAM_TILES:
        programs = [each * -(-max(hidden, output) // tile) for each in teams]
        enough = [most <= limits.multiprocessors or most == programs[-1] for most in programs]
        found = [rows for rows, yes in zip(_BATCH_TILES, enough, strict=True) if yes]
        candidates += [(tile, rows) for rows in found if rows < 16 or rows == _least(found)]
    for tile, rows in candidates:
        for most in _CHUNKS[kind, product].get(rows, ()):
            config = _resident(kind, hidden, output, product, tile, rows, most)
            fits = shared_bytes(kind, config, hidden, output, product) <= limits.shared
            tiles = config.tiles(hidden, output)
            if fits and tiles <= limits.multiprocessors and (rows >= 16 or config.registers):
                return config
    most = _STREAMED_CHUNKS[kind][product]
    chunk, split = _cut(kind, product, _STREAMED_TILE, _depth(kind, hidden, output), most)
    return Config(streamed_batch_tile, _STREAMED_TILE, chunk, _WARPS, split, resident=False)


def _least(batch_tiles: list[int]) -> int:
    """The smallest that serves a slice in shared memory, too."""
    return min(rows for rows in batch_tiles if rows >= 16)


def _resident(
    kind: str, hidden: int, output: int, product: str, tile: int, rows: int, most: int
) -> Config:
    """With chunks of up to ``most``."""
    depth = _depth(kind, hidden, output)
    chunk, split = _cut(kind, product, tile, depth, most)
    taken = _slice_bytes(kind, tile, depth, chunk, product)
    # A projection takes registers of its own, and more than 16 rows do.
    registers = split > 1 and taken <= _REGISTER_SLICE and hidden == output and rows <= 16
    return Config(rows, tile, chunk, _WARPS, split, resident=True, registers=registers)


def _depth(kind: str, hidden: int, output: int) -> int:
    """Of the exchanged product."""
    return output if kind == FORWARD else 4 * hidden


def _columns(kind: str, tile: int) -> int:
    """Of a slice."""
    return tile * (4 if kind == FORWARD else 1)


def _slice_bytes(kind: str, tile: int, depth: int, chunk: int, product: str) -> int:
    return -(-depth // chunk) * chunk * _columns(kind, tile) * _ITEMSIZE[product]


def _cut(kind: str, product: str, tile: int, depth: int, most: int) -> tuple[int, int]:
    """How ``depth`` is cut into chunks of up to ``most``, and each of these into parts."""
    # Warps share out the depth where there are few columns for them, and tensor cores. Rows that
    # are read element by element, as they begin at any address, would take too many registers.
    columns = _columns(kind, tile)
    splits = product != "ieee" and depth % 8 == 0 and (kind == BACKWARD or columns <= 64)
    least = _WARPS * _DOT_DEPTH if splits else _DOT_DEPTH
    chunk = min(most, max(_DOT_DEPTH, 1 << (depth - 1).bit_length()))
    while chunk > least and depth > 256 and -depth % chunk > depth // 8:
        chunk //= 2  # wastes little of a great depth
    return chunk, _WARPS if splits and chunk >= least else 1


def shared_bytes(kind: str, config: Config, hidden: int, output: int, product: str) -> int:
    """At least what a kernel with a resident slice takes of shared memory."""
    columns = _columns(kind, config.hidden_tile)
    depth = _depth(kind, hidden, output)
    weights = _slice_bytes(kind, config.hidden_tile, depth, config.chunk, product)
    exchange = config.batch_tile * config.chunk * _ITEMSIZE[product]
    # The parts' results; else half of the gates. Both change their layout.
    sums = config.batch_tile * max(config.split * columns, config.hidden_tile * 2) * 4
    projected = 0
    if output != hidden:
        rows_and_columns = config.batch_tile + config.hidden_tile
        projected = 2 * min(config.chunk, _PROJECTION_CHUNK) * rows_and_columns * _ITEMSIZE[product]
    return weights + max(exchange, sums, projected) + 2048  # and the barrier's, and alignment


def _by_class(classes: tuple[tuple[int | None, int], ...], sequences: int) -> int:
    return next(tile for most, tile in classes if most is None or sequences <= most)
