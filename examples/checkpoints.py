"""Checkpoints of the character model: its weights, and what it takes to go on training."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

Run = dict[str, Any]  # "text" (a digest), "batch" and "steps" of a training


class Checkpoint(NamedTuple):
    """What is in a file."""

    vocabulary: str
    shape: dict[str, int]
    weights: dict[str, Tensor]
    training: dict[str, Any] | None = None  # what ``progress`` returns


def progress(learner: Any, step: int, run: Run) -> dict[str, Any]:
    """What it takes to go on after ``step`` as if nothing had happened; every process calls it.

    ``learner`` has an ``optimizer`` (Adam) and a ``state``, h and c of this process's columns.
    """
    state = learner.state
    return {
        "step": step,
        "optimizer": learner.optimizer.state_dict(),
        "state": state and tuple(common.join_columns(part) for part in state),  # each (L, B, H)
        "run": run,
    }


def resume(learner: Any, training: dict[str, Any], lr: float) -> None:
    """Put ``learner``, which has the weights, where ``progress`` was called; ``lr`` is new."""
    learner.optimizer.load_state_dict(copy.deepcopy(training["optimizer"]))
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
    device, state = learner.model.head.weight.device, training["state"]
    learner.state = state and tuple(common.own_columns(part).to(device) for part in state)


def write(path: Path, content: Checkpoint) -> None:
    """Once, by the first process; never half a file in a good one's place."""
    if common.rank() == 0:
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            torch.save(content._asdict(), file)
        part.replace(path)


def load(path: Path, build: Callable[[int, dict[str, int]], nn.Module]) -> Checkpoint:
    """What ``write`` wrote, its parts checked against each other.

    ``build(vocabulary_size, shape)`` makes the model.
    """
    with reading(path) as content:
        names = ("vocabulary", "shape", "weights")
        found = Checkpoint(*(content[name] for name in names), content.get("training"))
        with torch.device("meta"):  # shapes only, no memory
            expected = build(len(found.vocabulary), found.shape)
        vocabulary, fits = found.vocabulary, sizes(found.weights) == sizes(expected.state_dict())
        if found.training is not None:
            fits = fits and training_fits(found.training, found.shape, expected)
    if not (fits and isinstance(vocabulary, str) and len(set(vocabulary)) == len(vocabulary)):
        raise common.UserError(f"{path}: its weights, shape and vocabulary do not fit together")
    return found


def sizes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def training_fits(training: dict[str, Any], shape: dict[str, int], model: nn.Module) -> bool:
    """Is ``training`` of a model like this?"""
    adam, run, state = training["optimizer"]["state"], training["run"], training["state"]
    wanted = (shape["layers"], run["batch"], shape["hidden"])
    moments = [(adam[k], p.shape) for k, p in enumerate(model.parameters())] if adam else []
    return (
        isinstance(training["step"], int)
        and run.keys() == {"text", "batch", "steps"}
        and all(moment["exp_avg"].shape == size for moment, size in moments)
        and all(moment["exp_avg_sq"].shape == size for moment, size in moments)
        and (state is None or [part.shape for part in state] == [wanted, wanted])
    )


def step_to_resume(path: Path, found: Checkpoint, run: Run) -> int:
    """The step that the training in the file at ``path`` goes on with, if it is one of ``run``."""
    if found.training is None:
        raise common.UserError(f"--resume: {path} does not say how far its training was")
    before = found.training["run"]
    for name, value in run.items():
        if value != before[name]:
            was = "another text" if name == "text" else f"--{name} {before[name]}"
            raise common.UserError(f"--resume: {path} was trained with {was}")
    return found.training["step"]


# What unpickling a damaged file, or reading another program's, has been seen to raise.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, LookupError, RuntimeError),
    *(TypeError, ValueError, AttributeError, AssertionError, OverflowError, MemoryError),
)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Yield what is in the file; whatever goes wrong with it in the block is the file's fault."""
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch finds odd in damaged files
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        yield content
    except DAMAGED as error:  # torch's own advice, to load it unsafely, is not passed on
        reason = type(error).__name__
        raise common.UserError(f"{path} is damaged or of another program ({reason})") from None
