"""Random shapes outside of the table, drawn where kernels tend to fall off a cliff."""

from __future__ import annotations

import random
from collections.abc import Callable

from fastlstm.cli.arguments import Shape
from fastlstm.cli.contest import flops

# A larger shape is drawn again: a sweep is many shapes, not long ones.
MOST_FLOPS = 4e9  # of one forward pass


def random_shapes(count: int, seed: int) -> list[Shape]:
    """``count`` different (T, B, I, H), each kind of cliff in turn; equal for equal seeds."""
    draw, found = random.Random(seed), list[Shape]()
    while len(found) < count:
        shape = KINDS[len(found) % len(KINDS)](draw)
        if shape not in found and flops(shape, "infer") <= MOST_FLOPS:
            found.append(shape)
    return found


def spread(draw: random.Random, least: int, most: int) -> int:
    """Every octave is as likely as any other."""
    return round(least * (most / least) ** draw.random())


def anything(draw: random.Random) -> Shape:
    steps, batch = spread(draw, 1, 1024), spread(draw, 1, 256)
    return steps, batch, spread(draw, 1, 1024), spread(draw, 4, 1024)


def odd_units(draw: random.Random) -> Shape:
    steps, batch, inputs, hidden = anything(draw)
    return steps, batch, inputs, hidden | 1


def part_of_a_vector(draw: random.Random) -> Shape:
    """H two short of a multiple of 16, or two beyond it."""
    steps, batch, inputs, _ = anything(draw)
    return steps, batch, inputs, 16 * spread(draw, 1, 40) + draw.choice((-2, 2))


def few_steps(draw: random.Random) -> Shape:
    _, batch, inputs, hidden = anything(draw)
    return draw.randint(1, 4), batch, inputs, hidden


def many_sequences(draw: random.Random) -> Shape:
    batch = spread(draw, 512, 8192)
    return spread(draw, 1, 32), batch, spread(draw, 4, 128), spread(draw, 8, 256)


def wide_input(draw: random.Random) -> Shape:
    steps, batch, _, hidden = anything(draw)
    return min(steps, 128), batch, 16 * hidden, hidden


KINDS: tuple[Callable[[random.Random], Shape], ...] = (
    *(anything, odd_units, part_of_a_vector, few_steps, many_sequences, wide_input),
)
