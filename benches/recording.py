"""What names and keeps a recorded run, and a step of one is told. The standard library only."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77  # exit status of a step that this machine has no use or no tools for


def slug(model: str) -> str:
    """A processor's name as part of a file name: ``amd-epyc-7763``."""
    noise = r"\((r|tm)\)|\bcpu\b|@.*|\b(\d+-core )?processor\b"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(noise, " ", model.lower())).strip("-") or "unknown"


def commit() -> str | None:
    """The commit measured, ``+`` if files differ from it. Where git cannot say, as in a copy
    without .git: what FASTLSTM_COMMIT says, or None."""

    def git(*command: str) -> str:
        # Without optional locks: measuring changes nothing, not even .git.
        words = ["git", "--no-optional-locks", *command]
        return subprocess.check_output(words, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD").strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTLSTM_COMMIT")


def now() -> str:
    """The date and time in UTC, as runs record it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stem(kind: str, date: str, device: str) -> str:
    """A recorded run's file name without its ending."""
    return f"{kind}-{re.sub('[:T]', '-', date.split('+')[0])}-{slug(device)}"


def write_json(path: Path, value: Any) -> None:
    """In one go: who reads it, or stops us, finds the old file or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def arguments(description: str | None) -> argparse.Namespace:
    """What gpu/run.py hands to every step; ``deadline`` is by the monotonic clock."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=300.0, help="to come to an end in")
    args = parser.parse_args()
    args.deadline = monotonic() + args.seconds
    return args
