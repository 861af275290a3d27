"""A GPU or, in a dry run, the CPU: what the steps of ``make gpu`` have in common."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """With its index, as kernels' faults are kept by it."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
