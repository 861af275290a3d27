"""What the CPU's operator refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from fastlstm import native

_C = torch.ops.fastlstm_C
assert native.instruction_sets()  # which loads the library


def bad_calls():
    """(what is wrong, a change to good arguments of cpu_forward, a piece of the message)"""
    return [
        ("rows", dict(x=torch.zeros(5, 3)), "batch_sizes"),
        ("increasing", dict(batch_sizes=torch.tensor([2, 4])), "never increase"),
        ("negative", dict(batch_sizes=torch.tensor([7, -1])), "batch_sizes"),
        ("huge", dict(batch_sizes=torch.tensor([2**62, 2**62])), "batch_sizes"),
        ("batch_sizes dtype", dict(batch_sizes=torch.tensor([3.0, 3.0])), "batch_sizes"),
        ("batch_sizes rank", dict(batch_sizes=torch.tensor([[3], [3]])), "batch_sizes"),
        ("h0 shape", dict(h0=torch.zeros(1, 2, 4)), "h0"),
        ("h0 dtype", dict(h0=torch.zeros(1, 3, 4).double()), "h0"),
        ("c0 rank", dict(c0=torch.zeros(3, 4)), "h0"),  # h0 has another
        ("c0 vector", dict(c0=torch.zeros(4)), "c0"),
        ("c0 directions", dict(c0=torch.zeros(3, 3, 4)), "c0"),
        ("no weights", dict(w_hh=[]), "w_hh"),
        ("two weights", dict(w_ih=[torch.zeros(16, 3)] * 2), "w_ih"),
        ("w_ih shape", dict(w_ih=[torch.zeros(15, 3)]), "w_ih"),
        ("bias shape", dict(bias=[torch.zeros(15)]), "bias"),
        ("projection missing", dict(w_hh=[torch.zeros(16, 2)], h0=torch.zeros(1, 3, 2)), "w_hr"),
        ("reset shape", dict(reset=torch.zeros(5, dtype=torch.uint8)), "reset"),
        ("reset dtype", dict(reset=torch.zeros(6)), "reset"),
        ("x rank", dict(x=torch.zeros(1, 2, 3, 3)), "x"),
        ("padded", dict(x=torch.zeros(2, 2, 3)), "batch_sizes"),
        ("integers", dict(x=torch.zeros(6, 3, dtype=torch.int32)), "dtype|float"),
    ]


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_operator_refuses_bad_arguments(change: dict, message: str) -> None:
    """The operator is public to whoever finds it: it must refuse, never read out of bounds."""
    good = dict(
        x=torch.zeros(6, 3), batch_sizes=torch.tensor([3, 3]), h0=torch.zeros(1, 3, 4),
        c0=torch.zeros(1, 3, 4), w_ih=[torch.zeros(16, 3)], w_hh=[torch.zeros(16, 4)],
        bias=[torch.zeros(16)], w_hr=[], reset=None, need_reserve=True, need_cells=True,
    )  # fmt: skip
    _C.cpu_forward(*good.values())
    with pytest.raises(RuntimeError, match=message):
        _C.cpu_forward(*{**good, **change}.values())


SAVED = dict(
    y=torch.zeros(6, 4), c_all=torch.zeros(6, 4), gates=torch.zeros(6, 1, 16), m=None,
)  # fmt: skip
BACKWARD = dict(
    dy=torch.zeros(6, 4), dc_all=torch.zeros(6, 4), dh_n=torch.zeros(1, 3, 4),
    dc_n=torch.zeros(1, 3, 4), x=torch.zeros(6, 3), batch_sizes=torch.tensor([3, 3]),
    h0=torch.zeros(1, 3, 4), c0=torch.zeros(1, 3, 4), w_ih=[torch.zeros(16, 3)],
    w_hh=[torch.zeros(16, 4)], w_hr=[], reset=torch.zeros(6, dtype=torch.uint8), **SAVED,
    need=[True] * 6 + [False], chunk_rows=1024, chunk_bytes=1 << 20,
)  # fmt: skip
PLAIN = dict(
    dy=torch.zeros(2, 3, 4), dh_n=torch.zeros(1, 3, 4), dc_n=torch.zeros(1, 3, 4),
    x=torch.zeros(2, 3, 3), h0=torch.zeros(1, 3, 4), c0=torch.zeros(1, 3, 4),
    weights=[torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)],
    reset=torch.zeros(6, dtype=torch.uint8),
    reserve=[torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(6, 1, 16)],
    directions=1, biased=True, hidden_size=4, output_size=4,
    need=[True] * 6 + [False], chunk_rows=1024, chunk_bytes=1 << 20,
)  # fmt: skip
WALK = dict(
    dy=torch.zeros(6, 4), dc_all=torch.zeros(6, 4), dh_n=torch.zeros(1, 3, 4),
    dc_n=torch.zeros(1, 3, 4), batch_sizes=torch.tensor([3, 3]), c0=torch.zeros(1, 3, 4),
    w_hh=[torch.zeros(16, 4)], w_hr=[], reset=torch.zeros(6, dtype=torch.uint8),
    c_all=torch.zeros(6, 4), gates=torch.zeros(6, 1, 16), need=[True] * 3,
)  # fmt: skip
RECOMPUTE = dict(
    pre=torch.zeros(6, 16), batch_sizes=torch.tensor([3, 3]), c0=torch.zeros(1, 3, 4),
    reset=torch.zeros(6, dtype=torch.uint8), need_m=False,
)  # fmt: skip
TANGENT = dict(
    pre=torch.zeros(6, 1, 16), batch_sizes=torch.tensor([3, 3]),
    h0_tangent=torch.zeros(1, 3, 4), c0_tangent=torch.zeros(1, 3, 4),
    w_hh=[torch.zeros(16, 4)], w_hr=[], reset=torch.zeros(6, dtype=torch.uint8),
    c0=torch.zeros(1, 3, 4), c_all=torch.zeros(6, 4), gates=torch.zeros(6, 1, 16),
)  # fmt: skip
CURVATURE = dict(
    batch_sizes=torch.tensor([3, 3]), reset=torch.zeros(6, dtype=torch.uint8),
    c0=torch.zeros(1, 3, 4), c_all=torch.zeros(6, 4), gates=torch.zeros(6, 1, 16),
    c0_tangent=torch.zeros(1, 3, 4), c_tangents=torch.zeros(6, 4),
    a_tangents=torch.zeros(6, 1, 16), dm=torch.zeros(6, 4), dc_all=torch.zeros(6, 4),
    dc_n=torch.zeros(1, 3, 4), m=torch.zeros(6, 4),
)  # fmt: skip


def changed(value):
    """Whatever a caller could give instead: other sizes, another rank, another dtype."""
    if isinstance(value, torch.Tensor):
        yield value.new_zeros(*value.shape[:-1], value.size(-1) + 1)
        yield value.new_zeros(*value.shape[:-1], value.size(-1) - 1)
        yield value.unsqueeze(0)
        yield value.to(torch.float64)
    elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        yield value[:-1]
        yield [*value, value[0]]
        for k, one in enumerate(value):
            yield from ([*value[:k], other, *value[k + 1 :]] for other in changed(one))
    elif isinstance(value, list) and value:
        yield value[:-1]
        yield [*value, True]


OPERATORS = {
    "cpu_backward": BACKWARD,
    "cpu_plain_backward": PLAIN,
    "cpu_walk": WALK,
    "cpu_recompute": RECOMPUTE,
    "cpu_tangent": TANGENT,
    "cpu_curvature": CURVATURE,
}


@pytest.mark.parametrize("name", ["cpu_tangent", "cpu_curvature"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_tangents_are_in_state_dtype(name: str, dtype: torch.dtype) -> None:
    given = {
        argument: tree_map(
            lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
            value,
        )
        for argument, value in OPERATORS[name].items()
    }
    with pytest.raises(RuntimeError, match=r"(pre|c0): expected float32 or float64"):
        getattr(_C, name)(*given.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_argument_is_looked_at(name: str) -> None:
    """Of the passes that follow a forward pass, which are given what it has left."""
    good, operator = OPERATORS[name], getattr(_C, name)
    operator(*good.values())
    for argument, value in good.items():
        for other in changed(value):
            try:
                operator(*{**good, argument: other}.values())
            except RuntimeError:
                continue
            raise AssertionError(f"{argument}: took {other}")
