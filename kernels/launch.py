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
from triton.runtime import driver

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
        arguments: of ``kernel``, but for those that this function knows. Tensors are contiguous
            and begin at multiples of 16 bytes.
    """
    arguments = {
        **arguments,
        **dict(fault=_fault_word(device), polls=POLLS, jitter=JITTER),
        **dict(BATCH_TILE=config.batch_tile, HIDDEN_TILE=config.hidden_tile),
        **dict(CHUNK=config.chunk, SPLIT=config.split),
        **dict(RESIDENT=config.resident, REGISTERS=config.registers),
        **dict(begin=begin, end=end, first_team=0),
    }
    if not isinstance(kernel, triton.JITFunction):
        for span in plan(begin, end, teams, tiles, 0):
            arguments.update(begin=span.begin, end=span.end, first_team=span.first_team)
            kernel[(span.teams, tiles)](**arguments, **config.options())
        return
    prepared = _prepare(kernel, arguments, config, tiles, device)
    values = _values(kernel, arguments)
    places = [kernel.arg_names.index(name) for name in ("begin", "end", "first_team")]
    stream = driver.active.get_current_stream(device.index)
    for span in plan(begin, end, teams, tiles, prepared.together):
        for place, value in zip(places, span[:3], strict=True):
            values[place] = value
        prepared.compiled[(span.teams, tiles, 1)](*values, stream=stream)


class _Prepared(NamedTuple):
    """A kernel that is compiled for one kind of arguments, and loaded on one device."""

    compiled: Any
    together: int  # how many teams can be on the device at once


# By the kernel, the device and all that it is compiled for: nothing that differs between the calls
# of a layer, so that a call after the first asks neither the compiler nor the device.
_PREPARED: dict[tuple[Any, ...], _Prepared] = {}


def _prepare(
    kernel: Any, arguments: Mapping[str, Any], config: Config, tiles: int, device: torch.device
) -> _Prepared:
    kinds = [_kind(arguments[name]) for name in _compiled_for(kernel)]
    key = (kernel, device, config, *kinds)
    prepared = _PREPARED.get(key)
    if prepared is None:
        compiled, together = _compile(kernel, arguments, config, tiles > 1), 0
        if tiles > 1:
            room = limits(device)
            each = room.programs(
                compiled.n_regs, compiled.metadata.shared, compiled.metadata.num_warps
            )
            together = each * room.multiprocessors // tiles
            if together == 0:  # nobody waits inside a launch
                compiled = _compile(kernel, arguments, config, cooperative=False)
        prepared = _PREPARED[key] = _Prepared(compiled, together)
    return prepared


def _compile(kernel: Any, arguments: Mapping[str, Any], config: Config, cooperative: bool) -> Any:
    """The kernel for these arguments, loaded, so that it knows its registers."""
    option = dict(launch_cooperative_grid=True) if cooperative else {}
    compiled = kernel.warmup(**arguments, **config.options(), **option, grid=(1,))
    _ = compiled.run
    return compiled


@functools.cache
def _compiled_for(kernel: Any) -> tuple[str, ...]:
    """The arguments that make a difference to the compiler."""
    return tuple(p.name for p in kernel.params if not p.do_not_specialize)


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else value


def _values(kernel: Any, arguments: Mapping[str, Any]) -> list[Any]:
    """In the kernel's order. Tensors as addresses, about which the launcher need not ask the
    driver; but for the fault word, which is the host's."""
    values, addresses = [], 0
    for name in kernel.arg_names:
        value = arguments[name]
        if isinstance(value, Tensor) and name != "fault":
            value = value.data_ptr()
            addresses |= value
        values.append(value)
    if addresses % 16 != 0:
        raise ValueError("arguments: got a tensor at an odd address, expected a multiple of 16")
    return values


@functools.cache
def limits(device: torch.device) -> Limits:
    """What ``device`` has; in the interpreter, which has no limits, an H100's."""
    if device.type != "cuda":
        return Limits(132, 232448, 233472, 65536, 2048)
    properties = torch.cuda.get_device_properties(device)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.regs_per_multiprocessor,
        properties.max_threads_per_multi_processor,
    )


@functools.cache
def _fault_word(device: torch.device) -> Tensor:
    """(1) int64 that kernels on ``device`` write to and the host reads without waiting."""
    with torch.inference_mode(False):  # or nobody could set it back, were the first call in one
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
