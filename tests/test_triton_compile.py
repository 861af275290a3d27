"""The Triton kernels compiled for GPUs that are not there: what is resident, spilled and ordered.

By default a selection of what dispatch can choose, about a minute and a half on one core when
Triton's cache is empty; FASTLSTM_COMPILE=all compiles every configuration, in half an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_ahead.py"


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    which = os.environ.get("FASTLSTM_COMPILE", "some")
    done = subprocess.run(
        [sys.executable, SCRIPT, which], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["case"]["arch"] for r in results} == {80, 90, 100}
    return results


def of(result: dict[str, Any]) -> str:
    return f"{result['case']} {result['config']}"


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for result in compiled:
        assert result["shared"] <= result["limit"], of(result)


def test_weights_are_read_before_the_time_loop(compiled: list[dict[str, Any]]) -> None:
    """A resident slice is put into shared memory before the loop, and not read inside it from
    elsewhere; one in registers is taken from there before the loop, too."""
    for result in compiled:
        case, config = result["case"], result["config"]
        if not config["resident"]:
            assert result["chunks_before"] == 0 and result["loads_inside"] > 0, of(result)
            continue
        forward = case["kind"] == "forward"
        depth = case["output"] if forward else 4 * case["hidden"]
        chunks = -(-depth // config["chunk"])
        assert result["chunks_before"] == chunks, of(result)
        assert result["chunks_inside"] == result["allocs_inside"] == 0, of(result)
        # The layout of a few rows may change within a warp, without shared memory.
        if not (case["swept"] and chunks == 1 and config["chunk"] <= 32):
            held = chunks if config["registers"] else 0
            assert result["allocs_before"] == chunks, of(result)
            assert result["operands_before"] == held, of(result)
            assert (result["operands_inside"] == 0) == config["registers"], of(result)
        # A projection's own weights are read at every step.
        assert (result["loads_inside"] > 0) == (case["output"] != case["hidden"]), of(result)


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    """Plain layers with half-precision weights; all others spill a few bytes at the most, but for
    odd sizes at the edges of what a configuration serves."""
    checked = 0
    for result in compiled:
        case = result["case"]
        plain = case["dtype"] in ("bf16", "fp16") and not case["features"]
        plain &= not case["swept"]
        most = 4096 if case["swept"] else 0 if plain else 64
        assert result["local"] <= most, f"{of(result)}: {result['local']} bytes"
        checked += plain and case["hidden"] in (128, 256, 512, 1024)
    assert checked >= 48


def test_a_team_finds_room(compiled: list[dict[str, Any]]) -> None:
    """All of its programs at once, so that the walk is one launch; streamed weights of the largest
    layers are walked through by exchanges."""
    for result in compiled:
        by_exchanges = result["case"]["swept"] and not result["config"]["resident"]
        assert by_exchanges or result["teams_together"] >= 1, of(result)


def test_reads_before_the_wait_go_together(compiled: list[dict[str, Any]]) -> None:
    """Where warps share out the depth, whose results are laid out as what is read."""
    split = [r for r in compiled if r["config"]["split"] > 1 and r["tiles"] > 1]
    assert len(split) > 20
    for result in split:
        assert result["conversions"] == 0, f"{of(result)}: {result['conversions']}"


def test_exchange_is_ordered(compiled: list[dict[str, Any]]) -> None:
    """Reads of exchanged values come after an acquire, writes before a release."""
    for result in compiled:
        order = result["order"]
        assert result["incoherent_loads"] == 0, of(result)
        if result["tiles"] == 1:  # nobody else: the program's threads wait for each other
            assert not {"acquire", "release"} & set(order) and "barrier" in order, of(result)
            continue
        assert result["acquires"] > 0 and result["releases"] > 0, of(result)
        for n, step in enumerate(order):
            before = order[:n]
            if step == "release":  # something was stored since the exchanged rows were read
                since = before[len(before) - before[::-1].index("exchanged load") :]
                assert before[-1] == "barrier" and "store" in since, of(result)
            elif step == "exchanged load" and before[-1] != "exchanged load":
                since = before[before.index("release") if "release" in before else 0 :]
                assert before[-1] == "barrier" and "acquire" in since, of(result)


def test_what_does_not_fit_is_streamed(compiled: list[dict[str, Any]]) -> None:
    large = [r for r in compiled if r["case"]["hidden"] == r["case"]["output"] == 2048]
    assert large and not any(r["config"]["resident"] for r in large)
