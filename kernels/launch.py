"""Launches of a walk: in one piece where its programs can wait for each other, else step by step.

Programs that wait must all be on the device at once. Whether they are is computed from what the
compiled kernel takes and what the device has, and asked for by a cooperative launch. Teams wait
for none but their own, so as many teams as fit go together, and the others after them. Where not
even one team fits, and in the interpreter, which runs one program after another, each exchange is
a launch of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .config import Config, Limits

# Looks at a counter before a program gives up: seconds, where an exchange takes microseconds.
POLLS = 1 << 23
# A stress test may ask for up to so many looks more than needed, at every wait.
JITTER = 0

_KINDS = {1: "lstm_forward", 2: "lstm_backward"}  # the lowest bits of a fault word


class Launch(NamedTuple):
    """Exchanges ``begin <= e < end`` of the walk, for ``teams`` teams from ``first_team`` on."""

    begin: int
    end: int
    first_team: int
    teams: int


def plan(begin: int, end: int, teams: int, tiles: int, together: int) -> Iterator[Launch]:
    """The launches of a walk, in order.

    Args:
        tiles: programs in a team.
        together: how many teams can be on the device at once.
    """
    if tiles == 1:  # nobody waits
        yield Launch(begin, end, 0, teams)
    elif together == 0:
        for exchange in range(begin, end):
            yield Launch(exchange, exchange + 1, 0, teams)
    else:
        for first in range(0, teams, together):
            yield Launch(begin, end, first, min(together, teams - first))


def run(
    kernel: Any,
    arguments: Mapping[str, Any],
    config: Config,
    begin: int,
    end: int,
    teams: int,
    tiles: int,
    device: torch.device,
) -> None:
    """Walk from exchange ``begin`` to ``end``, on the current stream.

    Args:
        arguments: of ``kernel``, but for those that this function knows.
    """
    arguments = {
        **arguments,
        **dict(fault=_fault_word(device), polls=POLLS, jitter=JITTER),
        **dict(BATCH_TILE=config.batch_tile, HIDDEN_TILE=config.hidden_tile),
        **dict(CHUNK=config.chunk, RESIDENT=config.resident),
    }
    options = config.options()
    together = 0
    if tiles > 1 and isinstance(kernel, triton.JITFunction):
        compiled = kernel.warmup(
            **arguments,
            **options,
            **dict(begin=begin, end=end, first_team=0),
            launch_cooperative_grid=True,
            grid=(tiles, teams),
        )
        together = _programs_together(compiled, device) // tiles
    for launch in plan(begin, end, teams, tiles, together):
        cooperative = dict(launch_cooperative_grid=True) if tiles > 1 and together else {}
        kernel[(tiles, launch.teams)](
            **arguments,
            **options,
            **cooperative,
            begin=launch.begin,
            end=launch.end,
            first_team=launch.first_team,
        )


@functools.cache
def limits(device: torch.device) -> Limits:
    """What ``device`` has; in the interpreter, which has no limits, an H100's."""
    if device.type != "cuda":
        return Limits(132, 232448)
    properties = torch.cuda.get_device_properties(device)
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def programs_per_multiprocessor(
    registers: int,
    shared: int,
    warps: int,
    most_registers: int,
    most_shared: int,
    most_threads: int,
) -> int:
    """How many programs that take so much find room where there is so much."""
    # Registers come in blocks of 256 for each warp; the system takes 1 KiB of each program's share.
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        most_registers // (per_warp * warps),
        most_shared // (shared + 1024),
        most_threads // (32 * warps),
    )


def _programs_together(compiled: Any, device: torch.device) -> int:
    _ = compiled.run  # loads the kernel, which tells its registers
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * programs_per_multiprocessor(
        compiled.n_regs,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        properties.regs_per_multiprocessor,
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
    )


@functools.cache
def _fault_word(device: torch.device) -> Tensor:
    """(1) int64 that kernels on ``device`` write to and the host reads without waiting."""
    return torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")


def check(device: torch.device) -> None:
    """Raise if a program of an earlier launch on ``device`` gave up waiting.

    Looks at what has been reported so far, and does not wait for the device.

    Raises:
        RuntimeError: it names the kernel, the step and the team. Raised once.
    """
    word = _fault_word(device)
    place = int(word)
    if place == 0:
        return
    word.zero_()
    raise RuntimeError(
        f"{_KINDS[place & 15]} on {device}: a program gave up waiting for the others of team "
        f"{place >> 4 & 0xFFFFF} at step {place >> 24} of the walk; the results of that call "
        "are worthless"
    )
