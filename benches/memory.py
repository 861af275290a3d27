"""Peak memory of calls beyond inputs, outputs and gradients, of ours and of nn.LSTM:

python benches/memory.py T,B,I,H...

A row of JSON for each shape and mode.  One thread: threads add buffers of their own to both sides.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlstm
from fastlstm.cli.arguments import Shape, shape_of
from fastlstm.cli.contest import MODES

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import peak_memory

SIDES = {"ours": fastlstm.LSTM, "theirs": nn.LSTM}


def rows(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Measured by a process of its own, in which nothing was run before."""
    words = [sys.executable, __file__, *(",".join(map(str, shape)) for shape in shapes)]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(shape: Shape, mode: str, who: str) -> int:
    """Bytes, in this process."""
    steps, batch, inputs, hidden = shape
    torch.set_num_threads(1)
    module, warm = SIDES[who](inputs, hidden), SIDES[who](8, 8)
    return peak_memory.measure(module, steps, batch, mode, warm)[0]


def main() -> None:
    shapes = [shape_of(text) for text in sys.argv[1:]]
    # Each measurement is made by a child that inherits no more than what was imported.
    todo = [(shape, mode, who) for shape in shapes for mode in MODES for who in SIDES]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = dict(zip(todo, pool.starmap(measure, todo, chunksize=1), strict=True))
    table = [
        {
            "shape": s,
            "mode": m,
            "threads": 1,
            "peak_bytes": {who: found[s, m, who] for who in SIDES},
        }
        for s in shapes
        for m in MODES
    ]
    print(json.dumps(table))


if __name__ == "__main__":
    main()
