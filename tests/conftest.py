"""Make tests/ and examples/ importable, choose where Triton runs, make every test reproducible."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))

# Read when a kernel is defined. On a machine with a GPU the same tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Without it torch refuses products on a GPU where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
