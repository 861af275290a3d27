"""The kernels of thread block clusters: their protocol, in the emulator, and who is taken when.

That they compute what the reference does is in test_cuda_kernels.py, which runs over both kinds.
"""

from __future__ import annotations

import re

import pytest
import torch
from cuda_checks import (  # noqa: F401 - fixtures among them
    KERNELS,
    ON_GPU,
    PACKED,
    both_walks,
    emulator_only,
    kernel,
    library,
    poison,
)

import emulated
from cases import Layer
from fastlstm import backends
from fastlstm import cuda as backend
from fastlstm.contract import OutputGradients
from kernel_checks import ALL, assert_same_bits

GIVEN_UP = "gave up waiting"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no thread block clusters")
    monkeypatch.setattr(backend, "KERNEL", "cluster")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # 16 blocks of 32 units, all or not quite all of them in use.
        (Layer((9, 2), 6, 512, reset=0.3), torch.bfloat16),
        (Layer((9, 2), 6, 264, directions=2), torch.bfloat16),
        # Floats, by 16 and by 32 units.
        (Layer((3, 2), 6, 256), torch.float32),
        (Layer((17, 2), 6, 136), torch.float32),
    ],
    ids=str,
)
@pytest.mark.usefixtures("cluster")
def test_wide_layers_equal_reference(case: Layer, dtype: torch.dtype) -> None:
    layer = KERNELS.layer(case, dtype)
    refused = backend.unsupported(backends.Call(*layer[:3], layer.weights[0], None, False, False))
    if ON_GPU and refused is not None and "holds 0 of such a cluster" in refused:
        pytest.skip(refused)  # not every device has clusters of 16 blocks
    assert refused is None, refused
    KERNELS.check_layer(case, dtype)
    if not ON_GPU:  # room for one cluster: slices are wide
        emulated.setting("clusters", 8 if dtype == torch.float32 else 16)
        KERNELS.check_layer(case, dtype)


def split(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have an operator walk in two launches."""
    op = getattr(torch.ops.fastlstm_cuda, name)

    def twice(begin: int, end: int, **given: object) -> None:
        op(begin=begin, end=begin + 2, **given)
        op(begin=begin + 2, end=end, **given)

    monkeypatch.setattr(torch.ops.fastlstm_cuda, name, twice)


@pytest.mark.usefixtures("kernel")
def test_a_walk_goes_on_where_another_launch_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    want = both_walks()
    for name in ("forward", "backward"):
        split(monkeypatch, name)
    torch.manual_seed(0)
    for got, whole in zip(both_walks(), want, strict=True):
        assert_same_bits(got, whole)


# --- the protocol --------------------------------------------------------------------------


def said(walk: str, polls: int, ordering: str | None = None, detect: bool = False) -> str:
    """What goes wrong in one walk, of those that come before it nothing."""
    layer = KERNELS.layer(PACKED, torch.bfloat16)
    out = backend.layer_forward(*layer, True, True) if walk == "backward" else None
    emulated.setting("detect", detect)
    emulated.setting("omit", 0 if ordering is None else 1 + emulated.ORDERINGS.index(ordering))
    text = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "POLLS", polls)
        try:
            if out is None:
                backend.layer_forward(*layer, True, True)
            else:
                need = ALL._replace(w_hr=False)
                backend.layer_backward(OutputGradients(*out[:4]), *layer, out.reserve(), need)
        except RuntimeError as error:
            text.append(str(error))
    for name in ("detect", "omit"):
        emulated.setting(name, 0)
    try:
        backend.check("cpu")
    except RuntimeError as error:
        text.append(str(error))
    return "; ".join(text)


RACE = "a race of a (read and a write|write and a read)"
# What is said where an ordering is missing, by whatever comes first.
MISSED = {
    "the_wait": RACE,
    "the_acquire": RACE,
    "the_barrier_of_sums": RACE,
    "the_barrier_of_stores": RACE,
    "the_barrier_of_zeros": "a race of two writes",
    "the_bytes": f"more bytes than an mbarrier expects|{RACE}",
    "the_arrival": GIVEN_UP,
    "the_fence_of_mbarriers": "an mbarrier that others use without a fence",
    "the_first_meeting": "a race of an mbarrier's initialisation|that is not init|at no mbarrier",
    "the_last_meeting": "into a block that has ended|while it is still sent to",
    "the_outlasting": "while it is still sent to",
}
# The forward kernel alone has sums of warps, the backward kernel zeros of units that are not there.
ONLY = {"the_barrier_of_sums": "forward", "the_barrier_of_zeros": "backward"}
# Needed by blocks that give up. How slow stores and how short waits are that show it.
LEAVING = {"the_last_meeting": (1, 20), "the_outlasting": (30, 0)}
LEFT_OUT = [
    (ordering, walk)
    for ordering in MISSED
    for walk in ("forward", "backward")
    if ONLY.get(ordering, walk) == walk
]


def test_every_ordering_is_left_out_once() -> None:
    assert tuple(MISSED) == emulated.OF_A_CLUSTER


@emulator_only
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("ordering", "walk"), LEFT_OUT)
def test_what_is_left_out_is_missed(
    ordering: str, walk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the race detector, under every schedule. Blocks that give up have races, and chance
    decides whether they leave too early."""
    if ordering == "the_barrier_of_zeros":  # where a launch goes on, cells are written at once
        split(monkeypatch, "backward")
    if ordering in LEAVING:
        slow, polls = LEAVING[ordering]
        emulated.setting("slow", slow)
        found = []
        for seed in range(4):
            emulated.setting("seed", seed)
            found.append(said(walk, polls, ordering))
        assert any(re.search(MISSED[ordering], text) for text in found), found
        return
    for seed in range(2):
        emulated.setting("seed", seed)
        text = said(walk, 200, ordering, detect=ordering != "the_arrival")
        assert re.search(MISSED[ordering], text), text


@emulator_only
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("walk", ["forward", "backward"])
@pytest.mark.parametrize(("slow", "polls"), [(1, 0), (1, 20), (30, 0), (30, 60)])
def test_blocks_that_give_up_end_in_order(slow: int, polls: int, walk: str) -> None:
    """Whoever gives up, and when: all others do, and nobody is sent to who has left."""
    emulated.setting("slow", slow)
    found = []
    for seed in range(4):
        emulated.setting("seed", seed)
        found.append(said(walk, polls))
    assert all(re.match(r"lstm_\w+_cluster on cpu: .* gave up|$", text) for text in found), found
    assert any(found)


# --- who is taken --------------------------------------------------------------------------


def plan(hidden: int, rows: int, dtype: str = "bfloat16", kernel: str = "best") -> str:  # noqa: F811
    """Of a walk of one direction."""
    plans = {
        torch.ops.fastlstm_cuda.plan(backward, dtype, hidden, 1, rows, kernel).split(";")[0]
        for backward in (False, True)
    }
    assert len(plans) == 1
    return plans.pop()


@emulator_only
def test_a_cluster_is_taken_where_all_fit_at_once_in_small_blocks() -> None:
    for clusters, hidden, rows, want in (
        (1 << 20, 128, 64, "cluster: 8 blocks of 16 units, 8 sequences"),
        (64, 128, 65, "cluster: 8 blocks of 16 units, 16 sequences"),
        (16, 128, 64, "grid: 8 blocks of 16 units, 8 sequences"),  # threads would have two cells
        (8, 128, 32, "grid: 8 blocks of 16 units, 8 sequences"),
        (8, 128, 8, "cluster: 8 blocks of 16 units, 8 sequences"),
        (8, 128, 64, "grid: 8 blocks of 16 units, 8 sequences"),  # and take two turns
        (0, 128, 8, "grid: 8 blocks of 16 units, 8 sequences"),
        (1 << 20, 512, 16, "cluster: 16 blocks of 32 units, 8 sequences"),
    ):
        emulated.setting("clusters", clusters)
        assert plan(hidden, rows) == want, (clusters, hidden, rows)
    # Floats have two divisions: the finer one, unless there is no such cluster.
    for clusters, want in ((16, "cluster: 16 blocks of 16 units"), (8, "cluster: 8 blocks of 32")):
        emulated.setting("clusters", clusters)
        assert plan(256, 8, "float32").startswith(want)


@emulator_only
def test_a_cluster_takes_turns_where_no_grid_fits() -> None:
    emulated.setting("blocks", 4)
    emulated.setting("clusters", 8)
    assert plan(128, 64) == "cluster: 8 blocks of 16 units, 32 sequences"


@emulator_only
def test_who_is_named_is_taken_or_refused() -> None:
    assert plan(128, 8, kernel="grid").startswith("grid")
    assert torch.ops.fastlstm_cuda.refusal("bfloat16", 520, 1, 8, "cluster") == (
        "no cluster kernel was compiled for 520 units of bfloat16; "
        "the backends 'triton' and 'aten' have no such limit"
    )
    emulated.setting("clusters", 0)
    refused = plan(128, 8, kernel="cluster")
    assert "take 8 blocks that wait for each other, and this device holds 0 of such" in refused
    with pytest.raises(RuntimeError, match="kernel: got both, expected best, grid or cluster"):
        plan(128, 8, kernel="both")


@emulator_only
def test_the_best_by_default() -> None:
    """As a user's call: forward and backward."""
    assert backend.KERNEL == "best"
    KERNELS.check_layer(PACKED, torch.bfloat16)
