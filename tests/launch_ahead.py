"""Launch the Triton kernels on a GPU that is not there, and print what it was asked as JSON.

Kernels are compiled for an H100 as they are for a real one; Triton's driver is replaced by one that
keeps a record of what it is to load and to launch. The tensors are the CPU's, and results are
what was in memory. A program of its own, as compile_ahead.py is:

    python tests/launch_ahead.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import compile_ahead
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from cases import Layer, make_layer
from fastlstm import triton as backend
from fastlstm.contract import OutputGradients, Requested, Reserve
from fastlstm.kernels import launch

ALL = Requested(*[True] * 6, False)


class Driver:
    """As much of Triton's driver as compiling and launching ask for."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[dict[str, Any]] = []
        shared = compile_ahead.LIMITS[90].shared
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": shared},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 7

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded.append(name)
        return len(self.loaded), 1, compile_ahead.resources(cubin)["registers"], 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(*args: Any) -> None:
            named = dict(zip(source.fn.arg_names, args[9:], strict=True))
            spans = {name: named[name] for name in ("begin", "end", "first_team", "steps", "batch")}
            odd = [name for name, type_ in source.signature.items() if type_[0] == "*"
                   and name != "fault" and named[name] % 16]  # fmt: skip
            self.launched.append(
                dict(
                    kernel=source.fn.__name__, grid=args[:3], stream=args[3], **spans, odd=odd,
                    cooperative=metadata.launch_cooperative_grid,
                    fault_is_a_tensor=isinstance(named["fault"], Tensor),
                )
            )  # fmt: skip

        return launcher


def train(case: Layer, dtype: torch.dtype) -> None:
    layer = make_layer(case, dtype)
    out = backend.layer_forward(*layer, True, False)
    saved = Reserve(out.y, out.c_all, out.gates, out.m)
    grads = OutputGradients(torch.randn_like(out.y), None, None, None)
    backend.layer_backward(grads, *layer, saved, ALL)


def sizes() -> Iterator[tuple[int, ...]]:
    """batch_sizes, padded and packed, of both classes of batches; values among them that Triton
    likes to compile for, such as 1 and multiples of 16."""
    padded = ((2, 2), (1, 1), (16, 16), (17, 3), (33, 15), (64, 17), (2, 240), (1, 256), (3, 300))
    yield from ((batch,) * steps for steps, batch in padded)
    yield from ((3, 2), (5, 5, 4, 1), (16, 8, 1), (2,) * 17 + (1,), (256, 31), (300, 16, 16, 1))


def compilations(driver: Driver) -> dict[str, list[int]]:
    """For each kind of layer, how many kernels were loaded in all after each of ``sizes()``."""
    counts: dict[str, list[int]] = {}
    for kind, hidden in (("alone", 40), ("team", 144)):
        driver.loaded.clear()
        counts[kind] = []
        for batch_sizes in sizes():
            train(Layer(batch_sizes, 8, hidden), torch.bfloat16)
            counts[kind].append(len(driver.loaded))
    return counts


def launches(driver: Driver) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What forty sequences, in teams of nine programs, are launched as, by what has room."""
    h100 = launch.limits(torch.device("cpu"))
    rooms = {
        "together": h100,
        "in turns": h100._replace(multiprocessors=9, threads=256),
        "by exchanges": h100._replace(shared_together=0),
    }
    for name, room in rooms.items():
        launch.limits = lambda device, room=room: room
        launch._PREPARED.clear()
        driver.launched.clear()
        train(Layer((40, 40, 40), 8, 144), torch.bfloat16)
        yield name, list(driver.launched)
    launch.limits = lambda device: h100
    launch._PREPARED.clear()
    train(Layer((40, 40, 40), 8, 144), torch.bfloat16)


def main() -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    result: dict[str, Any] = {"loaded": compilations(driver), "launched": dict(launches(driver))}
    driver.loaded.clear()
    triton.JITFunction.warmup = triton.JITFunction.run = None  # nobody asks the compiler again
    train(Layer((40,) * 5, 8, 144), torch.bfloat16)
    result["loaded_again"] = driver.loaded
    print(json.dumps(result))


if __name__ == "__main__":
    main()
