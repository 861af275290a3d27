"""pytest-benchmark: a training step of the character model, at the shape of tests/cases.py.

Run ``pytest benches/test_bench_model.py``.  For the ratio use run.py: its rivals are timed in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from model import ModelContest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from cases import MODEL


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_model(benchmark, who: str) -> None:
    benchmark.group = f"model {MODEL}"
    contest = ModelContest(MODEL)  # a new one: steps change the weights of who takes them
    assert contest.problem() is None
    benchmark.pedantic(contest.step, (getattr(contest, who),), rounds=20, warmup_rounds=1)
