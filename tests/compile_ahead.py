"""Compile the Triton kernels for GPUs that are not there, and print what came out as JSON.

A program of its own: it needs Triton's compiler, and the tests' process has the interpreter.

    python tests/compile_ahead.py all|some [K/N]

K/N: of N processes the one with number K, from 0 on; each compiles its share of the cases.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlstm.kernels import config
from fastlstm.kernels.backward import lstm_backward
from fastlstm.kernels.forward import lstm_forward

# Of A100, H100 and H200, B200.
LIMITS = {
    80: config.Limits(108, 166912, 167936, 65536, 2048),
    90: config.Limits(132, 232448, 233472, 65536, 2048),
    100: config.Limits(148, 232448, 233472, 65536, 2048),
}
KERNELS = {config.FORWARD: lstm_forward, config.BACKWARD: lstm_backward}
PRODUCTS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "ieee": "ieee"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    arch: int
    kind: str
    dtype: str
    hidden: int
    output: int
    sequences: int
    features: bool = False  # packed, reset, all gradients; a projection where output != hidden
    swept: bool = False  # the deepest of all sizes that are cut into programs in its way


def cases(everything: bool) -> Iterator[Case]:
    """A selection of what dispatch can choose, or everything."""
    for arch in LIMITS:
        if everything:
            yield from swept(arch)
        for kind in KERNELS:
            for hidden in (128, 256, 512, 1024):
                for sequences in (16, 64, 256) if everything else (16, 256):
                    yield Case(arch, kind, "bf16", hidden, hidden, sequences)
                    if everything:
                        yield Case(arch, kind, "fp16", hidden, hidden, sequences)
                        yield Case(arch, kind, "tf32", hidden, hidden, sequences)
                        yield Case(arch, kind, "ieee", hidden, hidden, sequences)
            for hidden in (10, 20, 40, 100, 333, 1000) if everything else (40,):
                yield Case(arch, kind, "bf16", hidden, hidden, 64, features=True)
            yield Case(arch, kind, "fp16", 512, 512, 16, features=True)
            yield Case(arch, kind, "bf16", 512, 128, 64, features=True)
            yield Case(arch, kind, "bf16", 2048, 2048, 256)
        if everything or arch == 90:
            yield Case(arch, config.FORWARD, "tf32", 1024, 1024, 16)
            yield Case(arch, config.FORWARD, "ieee", 512, 512, 64)
            yield Case(arch, config.BACKWARD, "tf32", 1024, 1024, 16)
            yield Case(arch, config.BACKWARD, "ieee", 256, 256, 64)


def swept(arch: int) -> Iterator[Case]:
    """One case for every configuration that dispatch can choose: the largest size that has it.

    All sizes up to 300, and of larger ones all remainders by which chunks are cut.
    """
    sizes = {*range(1, 300), *range(300, 2200, 4), *range(301, 2200, 7), 3000, 4096}
    deepest: dict[tuple[Any, ...], Case] = {}
    for kind, (dtype, product), hidden in itertools.product(
        KERNELS, {"bf16": "half", "tf32": "tf32", "ieee": "ieee"}.items(), sorted(sizes)
    ):
        for output, sequences in itertools.product(
            {hidden, max(1, hidden // 2), 64}, (1, 16, 32, 64, 128, 4096)
        ):
            if output > hidden:
                continue
            chosen = config.choose(kind, hidden, output, product, 1, sequences, LIMITS[arch])
            projected = output != hidden
            case = Case(arch, kind, dtype, hidden, output, sequences, projected, swept=True)
            deepest[kind, product, chosen, projected] = case
    yield from deepest.values()


def source(case: Case, chosen: config.Config) -> ASTSource:
    """The kernel with its arguments' types, as a launch on aligned tensors would have them."""
    kernel, storage = KERNELS[case.kind], case.dtype if PRODUCTS[case.dtype] == "half" else "fp32"
    constants: dict[str, Any] = dict(
        D=2 if case.features and not case.swept else 1, H=case.hidden, P=case.output, RESERVE=True,
        BATCH_TILE=chosen.batch_tile, HIDDEN_TILE=chosen.hidden_tile, CHUNK=chosen.chunk,
        SPLIT=chosen.split, RESIDENT=chosen.resident, REGISTERS=chosen.registers,
        PRECISION="tf32" if case.dtype == "tf32" else "ieee",
    )  # fmt: skip
    absent = set() if case.features else {"reset", "starts", "dc_all", "dh_n"}
    if case.output == case.hidden:
        absent |= {"m", "w_hr", "dh_all"}
    pointers = dict.fromkeys(("c_all", "c_carry", "dc_carry", "dc_all"), "*fp32")
    pointers |= dict.fromkeys(("counters", "fault", "starts"), "*i64") | {"reset": "*u8"}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif parameter.annotation_type:  # a run-time value
            assert parameter.do_not_specialize, name
            signature[name] = parameter.annotation_type
        else:
            signature[name] = pointers.get(name, f"*{storage}")
            attributes[(index,)] = [["tt.divisibility", 16]]
    known = {
        (kernel.arg_names.index(name),): value
        for name, value in constants.items()
        if name in kernel.arg_names
    }
    return ASTSource(kernel, signature, constexprs=known, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory: what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return dict(registers=found["REG"], local=found["STACK"] + found["LOCAL"])


def residence(ttgir: str) -> dict[str, int]:
    """Where weights are read and put into shared memory: before the time loop, or inside it."""
    lines = ttgir[ttgir.index("tt.func") :].splitlines()
    # The function's body is indented by four; the time loop is the only loop at that level.
    loop = next(n for n, line in enumerate(lines) if re.match(r" {4}%\S+ = scf\.while", line))

    def count(pattern: str, part: list[str]) -> int:
        return sum(bool(re.match(rf" +%{pattern}", line)) for line in part)

    found = {}
    for place, part in (("before", lines[:loop]), ("inside", lines[loop:])):
        found[f"chunks_{place}"] = count(r"chunks\w* = tt\.load", part)
        found[f"allocs_{place}"] = count(r"chunks\w* = ttg\.local_alloc", part)
        found[f"operands_{place}"] = count(r"chunks\w* = ttg\.local_load", part)
        found[f"loads_{place}"] = count(r"weights\w* = .*(tt\.load|async_copy)", part)
    return found


def order(ttgir: str) -> list[str]:
    """What the exchange consists of, in the order of the program."""
    steps = {
        r"elementwise_inline_asm .*ld\.acquire\.gpu": "acquire",
        r"tt\.atomic_rmw add, release": "release",
        r"(tt\.load|async_copy_global_to_local) .*cacheModifier = cg": "exchanged load",
        r"tt\.store": "store",
        r"gpu\.barrier|ttg\.barrier": "barrier",
    }
    lines = ttgir.splitlines()
    return [name for line in lines for step, name in steps.items() if re.search(step, line)]


def conversions(ttgir: str) -> int:
    """Changes of layout in a step before the wait: each is a barrier that waits for what was read,
    so that reads which could be under way together go one after the other."""
    lines = ttgir[ttgir.index("tt.func") :].splitlines()
    loop = next(n for n, line in enumerate(lines) if re.match(r" {4}%\S+ = scf\.while", line))
    wait = next((n for n, line in enumerate(lines) if "ld.acquire.gpu" in line), loop)
    return sum("ttg.convert_layout" in line for line in lines[loop:wait])


def compile_case(case: Case) -> dict[str, Any]:
    chosen = config.choose(
        case.kind,
        case.hidden,
        case.output,
        PRODUCTS[case.dtype],
        2 if case.features and not case.swept else 1,
        case.sequences,
        LIMITS[case.arch],
    )
    compiled = triton.compile(
        source(case, chosen),
        target=GPUTarget("cuda", case.arch, 32),
        options=dict(chosen.options(), launch_cooperative_grid=True),
    )
    taken, tiles = resources(compiled.asm["cubin"]), chosen.tiles(case.hidden, case.output)
    each = LIMITS[case.arch].programs(taken["registers"], compiled.metadata.shared, chosen.warps)
    return dict(
        case=case._asdict(),
        config=chosen._asdict(),
        tiles=tiles,
        teams_together=each * LIMITS[case.arch].multiprocessors // tiles,
        limit=LIMITS[case.arch].shared,
        shared=compiled.metadata.shared,
        conversions=conversions(compiled.asm["ttgir"]),
        **taken,
        **residence(compiled.asm["ttgir"]),
        order=order(compiled.asm["ttgir"]),
        incoherent_loads=compiled.asm["ptx"].count("ld.global.nc"),
        acquires=len(re.findall(r"ld\.acquire\.gpu\.global", compiled.asm["ptx"])),
        releases=len(re.findall(r"atom\.global\.gpu\.release", compiled.asm["ptx"])),
    )


if __name__ == "__main__":
    index, count = map(int, sys.argv[2].split("/")) if len(sys.argv) > 2 else (0, 1)
    unique = list(dict.fromkeys(cases(sys.argv[1] == "all")))
    for each in unique[index::count]:
        print(json.dumps(compile_case(each)), flush=True)
