"""What the steps of ``make gpu`` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import monotonic

import torch


def arguments(description: str | None) -> argparse.Namespace:
    """What benches/gpu_run.py hands to every step; ``deadline`` is by the monotonic clock."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=300.0, help="to come to an end in")
    args = parser.parse_args()
    args.deadline = monotonic() + args.seconds
    return args


def device_of(name: str) -> torch.device:
    """With its index, as kernels' faults are kept by it."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
