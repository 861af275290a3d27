"""Where a backend has been shown to be faster than torch's own LSTM: data, from recorded runs.

``benches/make_dispatch.py`` writes dispatch.json, and decides what a run shows; here it is only
looked up. A call for which there is no record goes to torch's own LSTM.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .backends import Call

PATH = Path(__file__).with_name("dispatch.json")
FORMAT = 1
# Hidden sizes between the recorded ones must be multiples of this, as those are: others make rows
# begin at addresses that are read in smaller pieces.
_ALIGNED = 64


class Record(NamedTuple):
    """Calls for which ``backend`` is faster."""

    device: str  # as torch names it
    backend: str
    mode: str  # "train" or "infer"
    precision: str  # "bf16", "fp16", "tf32" or "fp32"
    variant: str  # "plain", "packed", "bidirectional" or "resets"
    batch: tuple[int, int]  # rows of the longest step, from and to
    hidden: tuple[int, int]  # hidden size, from and to
    steps: int  # this many or more
    fill: float  # the share of (steps, batch) that has rows; this much or more
    ratio: float  # so many times as fast, or more
    run: str  # the file of the run that says so

    def covers(self, batch: int, hidden: int, steps: int, rows: int) -> bool:
        """Is such a call among those?"""
        return (
            self.batch[0] <= batch <= self.batch[1]
            and self.hidden[0] <= hidden <= self.hidden[1]
            and (hidden % _ALIGNED == 0 or hidden in self.hidden)
            and steps >= self.steps
            and rows >= self.fill * steps * batch
        )


def recorded(call: Call) -> tuple[str, ...]:
    """Backends that are faster than torch's own LSTM for ``call``, the fastest first.

    Raises:
        RuntimeError: dispatch.json is damaged; the message says where.
    """
    precision = _precision(call.x.dtype)
    rows, steps = call.x.shape[:-1].numel(), call.batch_sizes.numel()
    if precision is None or rows == 0:
        return ()
    batch = int(call.batch_sizes[0])
    traits = {
        "packed": rows != steps * batch,
        "bidirectional": call.h0.size(0) == 2,
        "resets": call.reset is not None,
        "projected": call.weights.w_hr is not None,
    }
    variant = "+".join(name for name, present in traits.items() if present) or "plain"
    mode = "train" if call.train or call.need_reserve else "infer"
    hidden = call.weights.w_hh.size(0) // 4
    return _lookup(_name(call.x.device), mode, precision, variant, batch, hidden, steps, rows)


@functools.lru_cache(maxsize=4096)
def _lookup(
    device: str,
    mode: str,
    precision: str,
    variant: str,
    batch: int,
    hidden: int,
    steps: int,
    rows: int,
) -> tuple[str, ...]:
    found = [
        (record.ratio, record.backend)
        for record in _records()
        if record[0] == device
        and record[2:5] == (mode, precision, variant)
        and record.covers(batch, hidden, steps, rows)
    ]
    return tuple(dict.fromkeys(backend for _, backend in sorted(found, reverse=True)))


@functools.cache
def _records() -> tuple[Record, ...]:
    """What dispatch.json holds."""
    try:
        return parse(json.loads(PATH.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{PATH}: {error}") from error


def parse(table: Any) -> tuple[Record, ...]:
    """The records of a table.

    Raises:
        ValueError: it is none of this format; the message says where.
    """
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"got no table of format {FORMAT}")
    if not isinstance(table.get("records"), list):
        raise ValueError("records: got none, expected a list")
    return tuple(_record(place, entry) for place, entry in enumerate(table["records"]))


def _record(place: int, entry: Any) -> Record:
    if not isinstance(entry, dict) or set(entry) != set(Record._fields):
        raise ValueError(f"records[{place}]: expected exactly {', '.join(Record._fields)}")
    for name, wanted in _TYPES.items():
        if not _is(entry[name], wanted):
            raise ValueError(f"records[{place}].{name}: got {entry[name]!r}, expected {wanted}")
    spans = {name: tuple(entry[name]) for name in ("batch", "hidden")}
    return Record(**{**entry, **spans})


_TYPES = {
    **dict.fromkeys(("device", "backend", "mode", "precision", "variant", "run"), "a string"),
    **dict.fromkeys(("batch", "hidden"), "two positive integers, the smaller first"),
    "steps": "a positive integer",
    **dict.fromkeys(("fill", "ratio"), "a positive number"),
}


def _is(value: Any, wanted: str) -> bool:
    def natural(number: Any) -> bool:
        return type(number) is int and number > 0

    if wanted == "a string":
        return isinstance(value, str)
    if wanted == "a positive integer":
        return natural(value)
    if wanted == "a positive number":
        return type(value) in (int, float) and value > 0
    pair = isinstance(value, list) and len(value) == 2 and all(map(natural, value))
    return pair and value[0] <= value[1]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _precision(dtype: torch.dtype) -> str | None:
    """As runs are recorded: how both sides multiply. None where they do it differently, as by
    torch's own defaults they do: then nothing that was recorded is about this call."""
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    ours = torch.backends.cuda.matmul.fp32_precision == "tf32"
    theirs = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return {(True, True): "tf32", (False, False): "fp32"}.get((ours, theirs))
