"""DDP, FSDP1, FSDP2 and distributed checkpoints on two ranks: tests/distributed_program.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("distributed_program.py")
CASES = (
    "ddp",
    "ddp_accumulates_without_sync",
    "ddp_with_activation_checkpointing",
    "ddp_with_saved_tensors_on_cpu",
    "ddp_around_what_is_replaced_afterwards",
    "fsdp1",
    "fsdp2",
    "fsdp2_accumulates_and_recomputes",
    "distributed_checkpoint",
)


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *launch, PROGRAM, tmp_path / "checkpoint"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # What a rank said; the launcher's own traceback only where no rank said anything.
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, done.stdout + ("\n".join(said) or done.stderr)
    assert done.stdout.split() == [word for name in CASES for word in ("ok", name)]
