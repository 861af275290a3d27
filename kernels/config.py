"""How a layer is cut into programs: the one place where tiles are chosen.

The choice depends on sizes of the model, the dtype, the device and a coarse class of the batch
size, and on nothing else that changes from call to call.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Limits(NamedTuple):
    """What a device has."""

    multiprocessors: int
    shared: int  # bytes of shared memory that one program can have


class Config(NamedTuple):
    """How a kernel is compiled and launched."""

    batch_tile: int  # sequences of a program
    hidden_tile: int  # hidden units (and outputs) of a program
    chunk: int  # of the depth of the exchanged product
    warps: int
    resident: bool  # does the slice of W_hh stay in shared memory, or is it read at every step?

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
# (largest number of sequences, batch tile). Beyond 32 the tensor core instructions of sm_90 take
# their operands by descriptors, and those of a whole slice are more than the registers hold.
_BATCH_TILES = ((16, 16), (None, 32))
_STREAMED_BATCH_TILES = ((16, 16), (32, 32), (None, 64))
# Of the depth, by kind, bytes of a weight and batch tile. The rows of a chunk travel together and
# chunks one after the other, so the longest that leave registers to spare.
_CHUNKS = {
    (FORWARD, 2): {16: 512, 32: 256},
    (FORWARD, 4): {16: 128, 32: 64},
    (BACKWARD, 2): {16: 256, 32: 256},
    (BACKWARD, 4): {16: 64, 32: 64},
}
_STREAMED_TILE, _STREAMED_CHUNKS = 32, {2: 64, 4: 32}
_WARPS = 8


def choose(
    kind: str, hidden: int, output: int, itemsize: int, sequences: int, limits: Limits
) -> Config:
    """The configuration of a kernel.

    Args:
        kind: FORWARD or BACKWARD.
        hidden, output: H and P.
        itemsize: bytes of a weight.
        sequences: rows of the longest step.
    """
    depth = output if kind == FORWARD else 4 * hidden
    batch_tile = _by_class(_BATCH_TILES, sequences)
    alone = [tile for tile in _ALONE_TILES if tile >= max(hidden, output)][:1]
    candidates = [(tile, _ALONE_BATCH_TILE) for tile in alone]
    candidates += [(tile, batch_tile) for tile in _TEAM_TILES]
    for tile, rows in candidates:
        chunk = _chunk(depth, _CHUNKS[kind, itemsize][rows])
        config = Config(rows, tile, chunk, _WARPS, resident=True)
        fits = shared_bytes(kind, config, depth, itemsize) <= limits.shared
        if fits and config.tiles(hidden, output) <= limits.multiprocessors:
            return config
    return Config(
        _by_class(_STREAMED_BATCH_TILES, sequences),
        _STREAMED_TILE,
        _chunk(depth, _STREAMED_CHUNKS[itemsize]),
        _WARPS,
        resident=False,
    )


def shared_bytes(kind: str, config: Config, depth: int, itemsize: int) -> int:
    """At least what a kernel with a resident slice takes of shared memory."""
    columns = config.hidden_tile * (4 if kind == FORWARD else 1)
    weights = -(-depth // config.chunk) * config.chunk * columns * itemsize
    exchange = config.batch_tile * config.chunk * itemsize
    sums = config.batch_tile * config.hidden_tile * 2 * 4  # half of the gates, changing layout
    return weights + max(exchange, sums) + 2048  # and a little for the barrier and alignment


def _chunk(depth: int, most: int) -> int:
    """A power of two within what a dot takes and ``most``; of a great depth it wastes little."""
    chunk = min(most, max(16, 1 << (depth - 1).bit_length()))
    while depth > 256 and -depth % chunk > depth // 8:
        chunk //= 2
    return chunk


def _by_class(classes: tuple[tuple[int | None, int], ...], sequences: int) -> int:
    return next(tile for most, tile in classes if most is None or sequences <= most)
