"""Make tests/ and examples/ importable, choose where Triton runs, make every test reproducible."""

import os
import random
import sys
from pathlib import Path

import pytest

# Read when torch is loaded. Threads that wait busily take the cores from the processes that share
# the tests (`make test`): these took twice as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))

# Read when a kernel is defined. On a machine with a GPU the same tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Without it torch refuses products on a GPU where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Chosen here for all: processes that share the tests must collect the same ones.
os.environ.setdefault("FASTLSTM_SEED", str(random.SystemRandom().randrange(10**6)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
