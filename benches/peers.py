"""Others that run an LSTM: each as a module with nn.LSTM's weights and arguments, to be timed.

A peer that is not installed, or has no use for this machine, is named with the reason.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlstm.cli.arguments import Shape
from fastlstm.cli.contest import Contest

State = tuple[Tensor, Tensor]
ONNX_GATES = (0, 3, 1, 2)  # i o f g, of torch's i f g o


class Peer(NamedTuple):
    """Who else runs an LSTM, and how to have it from an nn.LSTM for so many threads."""

    name: str
    packages: tuple[str, ...]
    modes: tuple[str, ...]
    make: Callable[[nn.LSTM, int], nn.Module] | None  # None: it runs on GPUs only
    most_steps: int | None = None  # more are not tried


class PeerContest(Contest):
    """fastlstm against a peer, both with nn.LSTM's weights, both checked against it."""

    def __init__(self, shape: Shape, peer: Peer, threads: int) -> None:
        super().__init__(shape, torch.float32)
        self.stock = self.theirs
        self.peer, self.theirs = peer, peer.make(self.stock, threads)

    def results(self, module: nn.Module) -> dict[str, Tensor | None]:
        """What is compared: all that the peer computes."""
        if "train" in self.peer.modes:
            return super().results(module)
        found = self.infer(module.eval())
        return dict(zip(("output", "h_n", "c_n"), found, strict=True))

    def problem(self) -> str | None:
        """How ours or the peer's results differ from nn.LSTM's, or None."""
        peer = self.theirs
        try:
            self.theirs = self.stock
            text = super().problem()
        finally:
            self.theirs = peer
        return f"fastlstm: {text}" if text else self.peers_problem()

    def peers_problem(self) -> str | None:
        """How the peer's results differ from ours, which are right."""
        text = super().problem()
        return f"{self.peer.name}: {text}" if text else None


class Compiled(nn.Module):
    """torch.compile of the plain loop over steps, which it unrolls: its time to compile grows with
    T, so that only a short sequence is tried."""

    def __init__(self, stock: nn.LSTM, threads: int) -> None:
        super().__init__()
        for name, parameter in stock.named_parameters():
            self.register_parameter(name, parameter)
        self.loop = torch.compile(self.plain, fullgraph=True, dynamic=False)

    def plain(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias, outputs = self.bias_ih_l0 + self.bias_hh_l0, []
        ahead = torch.addmm(bias, x.flatten(0, 1), self.weight_ih_l0.t())
        for part in ahead.unflatten(0, x.shape[:2]):
            i, f, g, o = torch.addmm(part, h, self.weight_hh_l0.t()).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), h, c

    def forward(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        output, h, c = self.loop(x, hx[0][0], hx[1][0])
        return output, (h[None], c[None])


def onnx_model(stock: nn.LSTM) -> bytes:
    """One LSTM node with the weights of one layer, any T and B."""
    from onnx import TensorProto, checker, helper, numpy_helper

    hidden, inputs = stock.hidden_size, stock.input_size

    def gates(*tensors: Tensor) -> Tensor:
        """(1, 4H, ..) or, of both biases, (1, 8H), with the gates in ONNX's order."""
        parts = [
            t.detach().unflatten(0, (4, hidden))[list(ONNX_GATES)].flatten(0, 1) for t in tensors
        ]
        return torch.cat(parts)[None]

    weights = {
        "W": gates(stock.weight_ih_l0),
        "R": gates(stock.weight_hh_l0),
        "B": gates(stock.bias_ih_l0, stock.bias_hh_l0),
    }
    values = [numpy_helper.from_array(t.numpy(), name) for name, t in weights.items()]

    def value(name: str, *shape: int | str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    states = [[value(f"{name}{k}", 1, "batch", hidden) for name in "hc"] for k in (0, 1)]
    names = ("x", "W", "R", "B", "", "h0", "c0"), ("y", "h1", "c1")
    node = helper.make_node("LSTM", *names, hidden_size=hidden)
    given = [value("x", "steps", "batch", inputs), *states[0]]
    found = [value("y", "steps", 1, "batch", hidden), *states[1]]
    graph = helper.make_graph([node], "lstm", given, found, values)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)  # that both runtimes know
    checker.check_model(model)
    return model.SerializeToString()


class OnnxRuntime(nn.Module):
    """ONNX Runtime on the CPU."""

    def __init__(self, stock: nn.LSTM, threads: int) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait for the next call would take a core from the side timed then.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        kind = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(onnx_model(stock), options, providers=kind)

    def forward(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        given = {"x": x.detach().numpy(), "h0": hx[0].numpy(), "c0": hx[1].numpy()}
        y, h, c = map(torch.from_numpy, self.session.run(None, given))
        return y[:, 0], (h, c)


class OpenVino(nn.Module):
    """OpenVINO on the CPU, in float32 where it would choose less by itself."""

    def __init__(self, stock: nn.LSTM, threads: int) -> None:
        super().__init__()
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(onnx_model(stock)), "CPU", settings)

    def forward(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        given = {"x": x.detach().numpy(), "h0": hx[0].numpy(), "c0": hx[1].numpy()}
        found = self.compiled(given, share_inputs=True)
        y, h, c = (torch.from_numpy(found[name]) for name in ("y", "h1", "c1"))
        return y[:, 0], (h, c)


BOTH, INFER = ("train", "infer"), ("infer",)
PEERS = (
    Peer("ONNX Runtime", ("onnxruntime", "onnx"), INFER, OnnxRuntime),
    Peer("OpenVINO", ("openvino", "onnx"), INFER, OpenVino),
    Peer("torch.compile", ("torch",), BOTH, Compiled, most_steps=16),
    Peer("haste", ("haste_pytorch",), BOTH, None),
    Peer("FlashRNN", ("flashrnn",), BOTH, None),
    Peer("TorchRL", ("torchrl",), BOTH, None),
)


def standing(peer: Peer) -> str:
    """Its version, or what keeps it out."""
    try:
        version, *_ = map(importlib.metadata.version, peer.packages)
    except importlib.metadata.PackageNotFoundError as error:
        return f"not installed: {error.name}"
    return version if peer.make is not None else f"{version}, not timed: it runs on GPUs only"


def present(peer: Peer) -> bool:
    """Can it be timed here?"""
    return peer.make is not None and not standing(peer).startswith("not installed")
