"""What the host does to launch the Triton kernels, with a driver that only keeps a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlstm.kernels import launch
from fastlstm.kernels.config import Limits

SCRIPT = Path(__file__).parent / "launch_ahead.py"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, SCRIPT]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_compiled_for_the_number_of_steps_sequences_or_rows(
    record: dict[str, Any],
) -> None:
    """Two kernels for each class of batches of a kind, padded and packed, and no more."""
    padded, packed = slice(0, 9), slice(9, None)
    alone, team = record["loaded"]["alone"], record["loaded"]["team"]
    assert alone[padded] == [2] * 9 and alone[packed] == [4] * 6  # one class
    assert team[padded] == [2] * 6 + [4] * 3  # of 8 rows, and from 225 sequences on of 32
    assert team[packed] == [6] * 4 + [8] * 2


def test_a_second_call_asks_nothing_again(record: dict[str, Any]) -> None:
    """The script would have failed, had it asked the compiler."""
    assert record["loaded_again"] == []


@pytest.mark.parametrize(
    ("room", "spans", "grid", "cooperative"),
    [
        ("together", [(0, 3, 0)], [5, 9, 1], True),
        ("in turns", [(0, 3, 0), (0, 3, 1)], [1, 9, 1], True),
        ("by exchanges", [(0, 1, 0), (1, 2, 0), (2, 3, 0)], [5, 9, 1], False),
    ],
    ids=["together", "in turns", "by exchanges"],
)
def test_launches_are_cooperative_where_programs_wait(
    room: str,
    spans: list[tuple[int, ...]],
    grid: list[int],
    cooperative: bool,
    record: dict[str, Any],
) -> None:
    """Three steps; the backward walk has a position more, for the gradient of h0."""
    launched = record["launched"][room]
    forward = [one for one in launched if one["kernel"] == "lstm_forward"]
    backward = [one for one in launched if one["kernel"] == "lstm_backward"]
    assert [(one["begin"], one["end"], one["first_team"]) for one in forward] == spans
    assert len(backward) == len(forward) + (room == "by exchanges")
    assert max(one["end"] for one in backward) == 4
    for one in launched:
        assert one["grid"] == grid and one["cooperative"] == cooperative
        assert one["stream"] == 7 and one["steps"] == 3 and one["batch"] == 40
        assert one["odd"] == [] and one["fault_is_a_tensor"]


def test_room_for_programs() -> None:
    h100 = Limits(132, 232448, 233472, 65536, 2048)
    assert h100.programs(registers=128, shared=1024, warps=8) == 2  # by registers
    assert h100.programs(registers=32, shared=100 << 10, warps=4) == 2  # by shared memory
    assert h100.programs(registers=32, shared=0, warps=16) == 4  # by threads
    assert h100.programs(registers=255, shared=228 << 10, warps=8) == 0


def test_an_odd_address_is_refused() -> None:
    """Kernels are compiled for tensors at multiples of 16 bytes."""

    class Kernel:
        arg_names = ("x", "fault")

    tensors = dict(x=torch.zeros(8)[1:], fault=torch.zeros(1))
    with pytest.raises(ValueError, match="odd address"):
        launch._values(Kernel, tensors)
    values = launch._values(Kernel, dict(tensors, x=torch.zeros(8)))
    assert isinstance(values[0], int) and values[1] is tensors["fault"]


SWITCHES = {
    "": "ieee",  # as torch is set by itself
    "cuda.matmul.allow_tf32 = True": "tf32",
    "cuda.matmul.allow_tf32 = False": "ieee",
    "cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "cuda.matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'": "tf32",
    "fp32_precision = 'none'; torch.set_float32_matmul_precision('high')": "tf32",
    "fp32_precision = 'none'; torch.set_float32_matmul_precision('medium')": "tf32",
    "fp32_precision = 'none'; torch.set_float32_matmul_precision('highest')": "ieee",
}


def test_float32_follows_torchs_switches() -> None:
    """The older ones and the newer ones, and without a warning."""
    script = ["import torch, warnings", "from fastlstm import triton"]
    script.append("warnings.simplefilter('error')")
    for switch in SWITCHES:
        script += [f"torch.backends.{switch}"] if switch else []
        script.append("print(triton._precision(torch.float32), triton._product(torch.float32))")
    script.append("print(triton._precision(torch.float16), triton._product(torch.bfloat16))")
    words = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert found == [*([want] * 2 for want in SWITCHES.values()), ["ieee", "half"]]
