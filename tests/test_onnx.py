"""torch.onnx.export gives ONNX LSTM nodes, and ONNX Runtime gives the same output."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from cases import tolerance

T, B, IN, H = 5, 3, 4, 6
SIZES = ((T, B), (9, 2), (1, 1))  # the first is what is exported
BOTH = {"num_layers": 2, "bidirectional": True}


class Model(nn.Module):
    def __init__(self, options: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__()
        self.options = options or {}
        self.lstm = fastlstm.LSTM(IN, H, **config)
        self.head = nn.Linear(H * (1 + self.lstm.bidirectional), 2)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None):
        hx = None if state is None else (state[0], state[1])
        output, (h_n, c_n) = self.lstm(x, hx, lengths=lengths, **self.options)[:2]
        return self.head(output), h_n, c_n


def arguments(model: Model, steps: int, batch: int, ragged: bool, stated: bool) -> dict:
    """By name, as ONNX Runtime takes them."""
    made = {"x": torch.randn((batch, steps, IN) if model.lstm.batch_first else (steps, batch, IN))}
    if stated:
        made["state"] = torch.randn(2, len(model.lstm.all_weights), batch, H)
    if ragged:
        made["lengths"] = torch.randint(0, steps + 1, (batch,))
    return made


def exported(model: Model, example: dict[str, Tensor], **options: Any):
    """The program; T and B are dynamic."""
    both = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    dynamic = {"x": both, "state": {2: Dim.DYNAMIC}, "lengths": {0: Dim.DYNAMIC}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings(action="ignore"):
        return torch.onnx.export(
            model.eval(),
            kwargs=example,
            dynamic_shapes={name: dynamic[name] for name in example},
            dynamo=True,
            verbose=False,
            **options,
        )


@pytest.mark.parametrize(
    ("config", "ragged", "stated"),
    [
        ({}, False, False),
        ({**BOTH, "bias": False}, False, True),
        ({**BOTH, "batch_first": True}, True, True),
    ],
    ids=["plain", "both-state", "both-lengths"],
)
def test_runtime_gives_the_same_output(config, ragged, stated) -> None:
    model = Model(**config)
    program = exported(model, arguments(model, *SIZES[0], ragged, stated)).model_proto
    kinds = [node.op_type for node in program.graph.node]
    assert kinds.count("LSTM") == model.lstm.num_layers
    assert not {"Loop", "Scan", "If"} & set(kinds)
    session = onnxruntime.InferenceSession(program.SerializeToString())
    for steps, batch in SIZES:
        given = arguments(model, steps, batch, ragged, stated)
        with torch.no_grad():
            expected = model(**given)
        actual = session.run(None, {name: t.numpy() for name, t in given.items()})
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), e, **tolerance(e.dtype))


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"proj_size": 2}, {}, "proj_size: ONNX's LSTM has none"),
        ({}, {"return_cells": True}, "return_cells: ONNX's LSTM has none"),
        ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}, "reset: ONNX's LSTM has none"),
    ],
    ids=["proj_size", "return_cells", "reset"],
)
def test_what_onnx_has_not_is_refused(config, options, says) -> None:
    model = Model(options, **config)
    model.head = nn.Identity()
    with pytest.raises(Exception, match=says) as caught:
        exported(model, {"x": torch.randn(T, B, IN)})
    assert "TorchExportError" in type(caught.value).__name__


def test_gates_are_refused() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastlstm.LSTM(IN, H)

        def forward(self, x):
            return fastlstm.gates(self.lstm, x).f

    says = "fastlstm.gates: ONNX's LSTM has none"
    with warnings.catch_warnings(action="ignore"), pytest.raises(Exception, match=says):
        torch.onnx.export(Shows(), (torch.randn(T, B, IN),), dynamo=True, verbose=False)


def test_packed_rows_are_refused() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastlstm.LSTM(IN, H)

        def forward(self, x):
            return self.lstm(PackedSequence(x, torch.tensor([B] * T)))[1]

    says = "a PackedSequence: ONNX's LSTM has none, but"
    with warnings.catch_warnings(action="ignore"), pytest.raises(Exception, match=says):
        torch.onnx.export(Packs(), (torch.randn(T * B, IN),), dynamo=True, verbose=False)
