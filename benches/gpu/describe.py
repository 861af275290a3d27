"""A step of ``make gpu``: what the figures depend on, in OUT/machine.json."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import torch
import triton
from recording import arguments, commit, cpu_count, now, write_json

import fastlstm
from fastlstm.cli.info import cpu_model
from gpu.common import device_of

QUERIES = (
    *("name", "driver_version", "vbios_version", "clocks.max.sm", "clocks.max.mem"),
    *("clocks.sm", "clocks.mem", "power.limit", "temperature.gpu", "mig.mode.current"),
)


def nvidia_smi() -> dict[str, str]:
    """What the driver says; why not, where it does not."""
    if shutil.which("nvidia-smi") is None:
        return {"error": "nvidia-smi is not installed"}
    words = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=8)
    except subprocess.TimeoutExpired:
        return {"error": "nvidia-smi does not answer"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(QUERIES):
        return {"error": (done.stdout + done.stderr).strip()}
    return dict(zip(QUERIES, values, strict=True))


def properties(device: torch.device) -> dict[str, object]:
    """Of a GPU, as torch sees it; of a CPU its name."""
    if device.type != "cuda":
        return {"name": cpu_model()}
    found = torch.cuda.get_device_properties(device)
    names = [name for name in dir(found) if not name.startswith("_")]
    values = {name: getattr(found, name) for name in names}
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str))}


def main() -> int:
    args = arguments(__doc__)
    device = device_of(args.device)
    machine = {
        "date": now(),
        "device": properties(device),
        "driver": nvidia_smi() if device.type == "cuda" else {},
        "cpu": {"name": cpu_model(), "cpus": cpu_count()},
        "versions": {
            "fastlstm": fastlstm.__version__,
            "commit": commit(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(args.out / "machine.json", machine)  # the rest takes a library, or its compiler
    machine["backends"] = fastlstm.available_backends()
    write_json(args.out / "machine.json", machine)
    reason = machine["backends"]["triton"]
    print(f"{machine['device']['name']}: {reason or 'the triton backend is there'}")
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
