"""A model of the exchange between the programs of a team, which fails when an ordering is removed.

Generators play programs, under the kernels' rule: an exchange is a share stored, then an arrival; a
program that has ``epoch = exchange * programs`` arrivals before it may read what was exchanged.
Memory is weak: a store stays in its program's buffer until that program releases, in any order and
after any delay, and a program keeps reading its own old copy of memory until it acquires. One
program runs at a time, and at every operation a seeded choice says who goes on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS, EXCHANGES = 4, 6


class Memory:
    """Shared memory and what each program sees and has not yet released."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.shared: dict[tuple[int, int], int] = {}
        self.counter = 0
        self.seen: list[dict[tuple[int, int], int]] = [{} for _ in range(PROGRAMS)]
        self.pending: list[list[tuple[tuple[int, int], int]]] = [[] for _ in range(PROGRAMS)]

    def store(self, program: int, place: tuple[int, int], value: int) -> None:
        self.pending[program].append((place, value))

    def drain(self, program: int, everything: bool) -> None:
        """Some stores become visible whenever they like; all do at a release."""
        waiting = self.pending[program]
        self.rng.shuffle(waiting)
        for _ in range(len(waiting) if everything else self.rng.randint(0, len(waiting))):
            place, value = waiting.pop()
            self.shared[place] = value

    def acquire(self, program: int) -> None:
        self.seen[program] = dict(self.shared)

    def load(self, program: int, place: tuple[int, int]) -> int | None:
        own = [value for where, value in self.pending[program] if where == place]
        return own[-1] if own else self.seen[program].get(place)


class Protocol:
    """The kernels' rule; a test takes one ordering out of it."""

    slots = EXCHANGES  # every step has rows of its own
    release = acquire = wait = True
    store_before_arrival = True
    epochs = True  # else a program waits for a full round of arrivals, whichever it is

    def enough(self, arrivals: int, exchange: int) -> bool:
        if not self.epochs:
            return arrivals >= min(exchange, 1) * PROGRAMS
        return arrivals >= exchange * PROGRAMS


def value_of(program: int, exchange: int) -> int:
    return 1 + program + PROGRAMS * exchange


def program(me: int, rule: Protocol, memory: Memory, errors: list[str]) -> Generator[None]:
    """One program of a team; it may be interrupted at every ``yield``."""
    for exchange in range(EXCHANGES):
        while rule.wait and not rule.enough(memory.counter, exchange):
            yield
        if rule.acquire:
            memory.acquire(me)
        yield
        for other in range(PROGRAMS if exchange else 0):
            got = memory.load(me, ((exchange - 1) % rule.slots, other))
            if got != value_of(other, exchange - 1):
                errors.append(f"program {me} read {got} of {other} in exchange {exchange}")
            yield
        share = ((exchange % rule.slots, me), value_of(me, exchange))
        if rule.store_before_arrival:
            memory.store(me, *share)
            yield
        memory.drain(me, everything=rule.release)
        memory.counter += 1
        yield
        if not rule.store_before_arrival:
            memory.store(me, *share)
            yield


def run(rule: Protocol, seed: int) -> list[str]:
    """What went wrong under one schedule."""
    rng = random.Random(seed)
    memory, errors = Memory(rng), list[str]()
    alive = {me: program(me, rule, memory, errors) for me in range(PROGRAMS)}
    favourite = rng.randrange(PROGRAMS)  # some are always faster than others
    for _ in range(100_000):
        if not alive:
            return errors
        me = favourite if favourite in alive and rng.random() < 0.3 else rng.choice(list(alive))
        memory.drain(rng.randrange(PROGRAMS), everything=False)
        if next(alive[me], "ended") == "ended":
            del alive[me]
    return [*errors, "the team never came to its end"]


def test_the_protocol_is_right_under_every_schedule() -> None:
    for seed in range(300):
        assert run(Protocol(), seed) == []


@pytest.mark.parametrize(
    "broken",
    [
        dict(wait=False),
        dict(epochs=False),
        dict(acquire=False),
        dict(release=False),
        dict(store_before_arrival=False),
        dict(slots=1),  # one buffer for all steps: overwritten while others still read
    ],
    ids=str,
)
def test_without_one_ordering_it_fails(broken: dict[str, object]) -> None:
    rule: Protocol = type("Broken", (Protocol,), broken)()
    assert any(run(rule, seed) for seed in range(300))


def test_two_slots_are_enough_and_what_the_kernels_have_is_more() -> None:
    """A program can be one exchange ahead of another, never two."""
    two: Protocol = type("TwoSlots", (Protocol,), dict(slots=2))()
    for seed in range(300):
        assert run(two, seed) == []


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("barrier.py", r"epoch = exchange\.to\(tl\.int64\) \* programs"),
        ("barrier.py", r"debug_barrier\(\)\n.*\n\s+tl\.atomic_add\(counter, 1, sem=\"release\""),
        ("forward.py", r"wait\(counter, exchange, tiles,"),
        ("backward.py", r"wait\(counter, exchange, tiles,"),
    ],
)
def test_the_model_has_the_kernels_rule(file: str, pattern: str) -> None:
    assert re.search(pattern, (ROOT / "kernels" / file).read_text())
