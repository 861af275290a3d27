"""Two ranks train what one process trains; ``torchrun`` runs it, test_distributed.py launches it.

Every case trains a model in parallel, each rank on its half of every batch, and compares all
parameters with those that one process gets from the whole batches.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlstm
from cases import tolerance

T, B, IN, H = 6, 4, 5, 8  # B sequences in all, half of them on each rank
STEPS = 3
Trained = dict[str, Tensor]


class Model(nn.Module):
    """Two LSTMs and a head; the first may be recomputed, or its saved tensors moved away."""

    def __init__(self, lstm: type[nn.RNNBase] = fastlstm.LSTM) -> None:
        super().__init__()
        self.encoder = lstm(IN, H, bidirectional=True)
        self.decoder = lstm(2 * H, H, num_layers=2, proj_size=3)
        self.head = nn.Linear(3, 1)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            encoded, _ = checkpoint(self.encoder, x, use_reentrant=False)
        else:
            encoded, _ = self.encoder(x)
        decoded, (h_n, _) = self.decoder(encoded)
        return self.head(decoded).square().mean() + h_n.square().mean()


def fresh(lstm: type[nn.RNNBase] = fastlstm.LSTM) -> Model:
    torch.manual_seed(1)
    return Model(lstm)


def batches(parts: int) -> list[list[Tensor]]:
    """For every step, ``parts`` micro-batches of B sequences."""
    generator = torch.Generator().manual_seed(2)
    shape = STEPS, parts, T, B, IN
    return [list(step) for step in torch.randn(shape, generator=generator)]


def train(
    model: nn.Module,
    share: Callable[[Tensor], Tensor],
    parts: int = 1,
    unsynchronized: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """SGD with momentum on the mean loss; gradients of all but the last part may stay local."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in batches(parts):
        for k, x in enumerate(step):
            with contextlib.nullcontext() if k == parts - 1 else unsynchronized():
                (model(share(x)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def mine(x: Tensor) -> Tensor:
    return x.chunk(2, dim=1)[dist.get_rank()]


def whole(state: dict[str, Tensor]) -> Trained:
    """Without what wrappers put before names, and without shards."""
    full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    return {name.removeprefix("module."): tensor.detach() for name, tensor in full.items()}


def alone(parts: int = 1) -> Trained:
    """What one process gets, and it must have moved."""
    model = fresh()
    train(model, lambda x: x, parts)
    found = whole(dict(model.named_parameters()))
    for name, before in fresh().named_parameters():
        assert (found[name] - before).abs().max() > 1e-6, f"{name} was not trained"
    return found


def assert_same(actual: Trained, expected: Trained) -> None:
    assert actual.keys() == expected.keys(), (actual.keys(), expected.keys())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, **tolerance(tensor.dtype), msg=lambda text, n=name: f"{n}: {text}"
        )


# --- cases: each on both ranks -----------------------------------------------------------


def ddp() -> None:
    model = DistributedDataParallel(fresh())
    train(model, mine)
    assert_same(whole(dict(model.named_parameters())), alone())


def ddp_accumulates_without_sync() -> None:
    model = DistributedDataParallel(fresh())
    train(model, mine, parts=2, unsynchronized=model.no_sync)
    assert_same(whole(dict(model.named_parameters())), alone(parts=2))


def ddp_with_activation_checkpointing() -> None:
    model = DistributedDataParallel(fresh())
    model.module.recompute = True
    train(model, mine)
    assert_same(whole(dict(model.named_parameters())), alone())


def ddp_with_saved_tensors_on_cpu() -> None:
    model = DistributedDataParallel(fresh())
    with torch.autograd.graph.save_on_cpu():
        train(model, mine)
    assert_same(whole(dict(model.named_parameters())), alone())


def ddp_around_what_is_replaced_afterwards() -> None:
    model = DistributedDataParallel(fresh(nn.LSTM))
    report = fastlstm.replace_lstm_(model)
    assert report.replaced == ["module.encoder", "module.decoder"], str(report)
    train(model, mine)
    assert_same(whole(dict(model.named_parameters())), alone())


def fsdp1() -> None:
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    model = fresh()
    model.encoder, model.decoder = wrap(model.encoder), wrap(model.decoder)
    model = wrap(model)
    train(model, mine)
    with FullyShardedDataParallel.summon_full_params(model):
        names = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
        assert_same(whole({n: p.clone() for n, p in names.items()}), alone())


def sharded(model: Model) -> Model:
    """FSDP2: every LSTM is a unit of its own."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for part in (model.encoder, model.decoder, model):
        fully_shard(part, mesh=mesh)
    return model


def fsdp2() -> None:
    model = sharded(fresh())
    assert isinstance(model.encoder.weight_ih_l0, DTensor)
    train(model, mine)
    assert_same(whole(dict(model.named_parameters())), alone())


def fsdp2_accumulates_and_recomputes() -> None:
    model = sharded(fresh())
    model.recompute = True

    @contextlib.contextmanager
    def unsynchronized():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    train(model, mine, parts=2, unsynchronized=unsynchronized)
    assert_same(whole(dict(model.named_parameters())), alone(parts=2))


def distributed_checkpoint(folder: Path) -> None:
    """Saved from shards; loaded into shards, and into nn.LSTM in one process."""
    model = sharded(fresh())
    train(model, mine)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    other = sharded(Model())
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    assert_same(whole(dict(other.named_parameters())), alone())
    stock = Model(nn.LSTM)
    state = {"model": stock.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    stock.load_state_dict(state["model"])
    assert_same(whole(dict(stock.named_parameters())), alone())


def main() -> None:
    warnings.simplefilter("ignore")  # torch's own, of CPUs and of what it deprecates
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that a gradient lost or doubled can't hide
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for case in (
        ddp,
        ddp_accumulates_without_sync,
        ddp_with_activation_checkpointing,
        ddp_with_saved_tensors_on_cpu,
        ddp_around_what_is_replaced_afterwards,
        fsdp1,
        fsdp2,
        fsdp2_accumulates_and_recomputes,
        partial(distributed_checkpoint, folder),
    ):
        name = getattr(case, "func", case).__name__
        try:
            case()
        except Exception as error:
            error.add_note(f"rank {dist.get_rank()}, case {name}")
            raise
        if dist.get_rank() == 0:
            print(f"ok {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
