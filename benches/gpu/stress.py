"""A step of ``make gpu``: the barriers under load, in OUT/stress.json.

Long walks with random delays, two streams at once, captured graphs, offsets beyond 2^31, and a
wait that is given up. Results are compared bit by bit wherever the same is computed twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from types import ModuleType

import torch
from recording import arguments, write_json
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from fastlstm import triton as backend
from fastlstm.cli.compare import difference
from fastlstm.kernels import launch
from gpu.common import by_exchanges, captured, device_of, setting, synchronize


class Skipped(Exception):
    """This device cannot show it; the message says why."""


class Stress:
    """A layer and its input, of a size for the device."""

    waits: ModuleType = launch  # its JITTER and POLLS are those of the kernels

    def __init__(self, device: torch.device) -> None:
        self.device, self.dry = device, device.type == "cpu"
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        # (T, B, H): several programs in a team, also in a dry run.
        self.steps, self.batch, self.hidden = (2, 3, 80) if self.dry else (10_000, 64, 512)

    def cuda_only(self) -> None:
        if self.dry:
            raise Skipped("it needs a GPU")

    def module(self, inputs: int | None = None, **config: object) -> nn.Module:
        inputs = inputs or self.hidden
        made = dict(device=self.device, dtype=self.dtype, **config)
        return fastlstm.LSTM(inputs, self.hidden, **{"backend": "triton", **made})

    def check(self) -> None:
        """Raise what the kernels have reported."""
        synchronize(self.device)
        backend.check(self.device)

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """In which every wait of the kernels is given up at once."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(setting(launch, "POLLS", 0))
            if self.dry:  # one program after the other: only who never came is missed
                plan = launch.plan
                late = setting(launch, "plan", lambda begin, *rest: plan(begin + 1, *rest))
                stack.enter_context(late)
            yield

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def input(self, steps: int | None = None, batch: int | None = None) -> Tensor:
        return self.values(steps or self.steps, batch or self.batch, self.hidden)


def train(
    module: nn.Module, x: Tensor, dy: Tensor, batch_sizes: Tensor | None = None
) -> list[Tensor]:
    """Outputs, final states and all gradients; of packed rows where there are batch_sizes."""
    leaf = x.detach().requires_grad_()
    y, (h_n, c_n) = module(leaf if batch_sizes is None else PackedSequence(leaf, batch_sizes))
    y = y if batch_sizes is None else y.data
    gradients = torch.autograd.grad(y, [leaf, *module.parameters()], dy)
    return [y.detach(), h_n.detach(), c_n.detach(), *gradients]


def expect_same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    """Raise unless all bits agree."""
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a, b):
            count = int((a != b).sum())
            raise AssertionError(f"{what}: {count} of {a.numel()} values of result {place} differ")


def repeated(stress: Stress) -> str:
    """The same bits every time, whatever the delays, forward and backward."""
    module, x = stress.module(bidirectional=True), stress.input()
    dy = torch.cat([stress.input(), stress.input()], -1)
    want = train(module, x, dy)
    if not all(t.isfinite().all() for t in want):
        raise AssertionError("a result is not finite")
    delays = (2,) if stress.dry else (0, 0, 1, 3, 10, 30, 100)
    for jitter in delays:
        with setting(stress.waits, "JITTER", jitter):
            got = train(module, x, dy)
            stress.check()
        expect_same(got, want, f"delays up to {jitter}")
    return f"T={stress.steps}, {len(delays) + 1} runs"


def near_stock(stress: Stress) -> str:
    """A walk of all steps still agrees with nn.LSTM's."""
    module, x = stress.module(), stress.input()
    stock = nn.LSTM(stress.hidden, stress.hidden, device=stress.device, dtype=stress.dtype)
    stock.load_state_dict(module.state_dict())
    with torch.no_grad():
        text = difference(module(x)[0], stock(x)[0])
    if text is not None:
        raise AssertionError(f"output {text}")
    return f"T={stress.steps}"


def two_streams(stress: Stress) -> str:
    """Two walks at once, beside products that keep the device busy."""
    stress.cuda_only()
    steps, rounds = 1000, 10
    modules = [stress.module() for _ in range(2)]
    inputs = [stress.input(steps) for _ in range(2)]
    dy = stress.input(steps)
    want = [train(module, x, dy) for module, x in zip(modules, inputs, strict=True)]
    busy, filler = torch.cuda.Stream(), stress.values(4096, 4096)
    streams = [torch.cuda.Stream() for _ in range(2)]
    synchronize(stress.device)
    for _ in range(rounds):
        got = []
        with torch.cuda.stream(busy):
            for _ in range(20):
                filler @ filler
        for stream, module, x in zip(streams, modules, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(train(module, x, dy))
        stress.check()
        for a, b in zip(got, want, strict=True):
            expect_same(a, b, "two streams")
    return f"T={steps}, {rounds} rounds"


def graph(stress: Stress) -> str:
    """Captured once and replayed on new inputs: the bits of a plain call. In one launch, and with
    one for each exchange; padded and packed."""
    stress.cuda_only()
    steps, rounds = 500, 5
    module, sizes = stress.module(), torch.arange(steps, 0, -1) * stress.batch // steps + 1
    for batch_sizes in (None, sizes):
        x = (
            stress.input(steps)
            if batch_sizes is None
            else stress.values(int(sizes.sum()), stress.hidden)
        )
        plain = partial(train, module, x, torch.randn_like(x), batch_sizes)
        for kind in (contextlib.nullcontext, by_exchanges):
            with kind():
                replay, results = captured(plain)
            for _ in range(rounds):
                x.copy_(torch.randn_like(x))
                replay()
                stress.check()
                expect_same([t.clone() for t in results], plain(), f"replay, {kind.__name__}")
    return f"T={steps}, {rounds} replays each"


def every_exchange(stress: Stress) -> str:
    """A launch for each exchange computes the bits of a launch for all."""
    steps = min(stress.steps, 500)
    module, x, dy = stress.module(bidirectional=True), stress.input(steps), stress.input(steps)
    dy = torch.cat([dy, dy], -1)
    want = train(module, x, dy)
    with by_exchanges():
        got = train(module, x, dy)
    expect_same(got, want, "by exchanges")
    return f"T={steps}"


def occupancy(stress: Stress) -> str:
    """As many programs fit on a multiprocessor as was computed, says the driver."""
    stress.cuda_only()
    train(stress.module(), stress.input(2), stress.input(2))
    driver, found = ctypes.CDLL("libcuda.so.1"), []
    for prepared in launch._PREPARED.values():
        taken, count = prepared.compiled.metadata, ctypes.c_int()
        status = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count), ctypes.c_void_p(prepared.compiled.function),
            ctypes.c_int(32 * taken.num_warps), ctypes.c_size_t(taken.shared),
        )  # fmt: skip
        computed = launch.limits(stress.device).programs(
            prepared.compiled.n_regs, taken.shared, taken.num_warps
        )
        found.append((taken.name, computed, count.value))
        if status != 0 or computed != count.value:
            raise AssertionError(f"status {status}, (kernel, computed, driver's): {found[-1]}")
    return str(found)


def large_offsets(stress: Stress) -> str:
    """More than 2^31 gates: the same as two halves of the batch on their own."""
    stress.cuda_only()
    steps, batch, inputs = 1100, 1024, 64
    gates = steps * batch * 4 * stress.hidden
    if gates <= 2**31:
        raise AssertionError(f"only {gates} gates")
    free, wanted = torch.cuda.mem_get_info(stress.device)[0], 16 * gates
    if free < wanted:
        raise Skipped(f"{free >> 30} GiB are free, it takes up to {wanted >> 30}")
    module = stress.module(inputs)
    x, dy = stress.values(steps, batch, inputs), stress.input(steps, batch)
    y, h_n, c_n, dx, *gradients = train(module, x, dy)
    for half in range(2):
        part = slice(half * batch // 2, (half + 1) * batch // 2)
        want = train(module, x[:, part].contiguous(), dy[:, part].contiguous())
        pairs = zip((y[:, part], h_n[:, part], c_n[:, part], dx[:, part]), want, strict=False)
        for place, (a, b) in enumerate(pairs):
            text = difference(a, b)
            if text is not None:
                raise AssertionError(f"result {place} of half {half} {text}")
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise AssertionError("a gradient of the parameters is not finite")
    return f"{gates} gates"


def given_up(stress: Stress) -> str:
    """A wait that is too long is reported, once, and the next call is served."""
    module, x = stress.module(), stress.input(min(stress.steps, 1000))
    with torch.no_grad():
        want = [module(x)[0]]
        with stress.given_up():
            module(x)
            synchronize(stress.device)
        try:
            stress.check()
        except RuntimeError as error:
            message = str(error)
        else:
            raise AssertionError("nothing was reported")
        got = [module(x)[0]]
    stress.check()
    expect_same(got, want, "the call after the report")
    return message


CASES = (
    *(occupancy, repeated, near_stock, every_exchange),
    *(two_streams, graph, given_up, large_offsets),
)


def run_case(case: Callable[[Stress], str], device: torch.device) -> dict[str, object]:
    """How it went; whatever was raised is the message."""
    begin = monotonic()
    torch.manual_seed(0)
    try:
        result, message = "ok", case(Stress(device))
    except Skipped as reason:
        result, message = "skipped", str(reason)
    except Exception as error:  # the other cases are run all the same
        result, message = "failed", f"{type(error).__name__}: {error}"[:1000]
    seconds = round(monotonic() - begin, 2)
    return {"case": case.__name__, "result": result, "message": message, "seconds": seconds}


def main() -> int:
    args = arguments(__doc__)
    device = device_of(args.device)
    rows: list[dict[str, object]] = []
    for case in CASES:
        if monotonic() > args.deadline:
            rows.append({"case": case.__name__, "result": "failed", "message": "no time was left"})
        else:
            rows.append(run_case(case, device))
        write_json(args.out / "stress.json", rows)
        print(rows[-1], flush=True)
    return int(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
