"""Builds the native libraries: the CPU's when the package is installed, else at its first use.

``library_path()`` is what the loader asks.  It answers with, in this order,

1. the file that ``FASTLSTM_LIBRARY`` names: a developer's override, there so that
   ``make sanitize`` can test its own build;
2. ``_C.so`` inside the package, put there by ``setup.py``.  It carries a digest of the
   sources it was compiled from, and one that disagrees with today's sources is an error:
   a developer who has edited ``csrc/`` must hear of it, not measure the old code;
3. a library built now, once, in this user's cache directory.

The CUDA library, ``_cuda.so``, is made where nvcc is and only when asked for:
``FASTLSTM_BUILD=cuda`` on installation, ``make cuda`` in a checkout.

Both use LibTorch's stable ABI and no Python, so one file serves every Python and every torch
from 2.10 on.  ``setup.py`` loads this file by its path, before the package
is importable: it imports the standard library only, and torch inside functions.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent
LIBRARY, CUDA_LIBRARY = "_C.so", "_cuda.so"
MODES = ("auto", "cpu", "cuda", "none")
TORCH_MINIMUM = (2, 10)

# -ffp-contract=fast lets a multiply and an add become one fma; -fno-math-errno lets sqrt
# and friends be instructions.  Neither changes what NaN, inf or the order of a sum means,
# which -ffast-math would.
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno", "-ffp-contract=fast"),
)
SANITIZE_FLAGS = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
# The floor of the stable ABI: symbols newer than torch 2.10 do not compile.
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000ULL",)
# No rpath: torch has loaded libtorch_cpu.so and libgomp.so.1 before us, and the dynamic
# loader matches libraries by that name.
LINK_FLAGS = ("-shared", "-fopenmp", "-Wl,--no-undefined", "-Wl,--as-needed", "-ltorch_cpu")

# One object per instruction set, each compiled with FASTLSTM_ISA naming its table of kernels.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# gcc 12's own AVX-512 header starts a variable with itself, on purpose, and warns of it; clang, of
# warnings that only gcc has.
_GCC_NOISE = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = _AVX2
    ISA_FLAGS["avx512"] = (*_AVX512, *_AVX2, "-mprefer-vector-width=512", *_GCC_NOISE)
    ISA_FLAGS["avx512_bf16"] = (*ISA_FLAGS["avx512"], "-mavx512bf16")
    ISA_FLAGS["amx"] = (*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16")
# On every machine, so that no source of an instruction set is taken for a common one.
ISA_SOURCES = dict.fromkeys(ISA_FLAGS, "cpu/isa.cpp")
# Those that not every compiler and assembler knows, each with an instruction of its own. Where they
# do, dispatch.cpp is told so: FASTLSTM_AVX512_BF16, FASTLSTM_AMX.
NEW_ISA = {
    "avx512_bf16": "vdpbf16ps %zmm0, %zmm1, %zmm2",
    "amx": "tdpbf16ps %tmm0, %tmm1, %tmm2",
}
ISA_SOURCES.update((name, f"cpu/{name}.cpp") for name in NEW_ISA)

# No fast math for CUDA either: gate_math.h's primitives name the approximations they take.
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
# The last also as PTX, which a driver can compile for what is newer.
CUDA_ARCHITECTURES = ("90a", "100a", "80")
# One object each: (storage dtype, rows of h of up to 512 bytes times so many).
CUDA_INSTANCES = tuple((dtype, n) for dtype in ("bf16", "f16", "f32") for n in (1, 2, 3, 4, 8))
# Those of thread block clusters: (storage dtype, blocks of a cluster, hidden units of a block).
CLUSTER_INSTANCES = tuple(
    (dtype, blocks, units)
    for dtype in ("bf16", "f16", "f32")
    for blocks, units in ((8, 16), (8, 32), (16, 16), (16, 32))
    if dtype != "f32" or blocks * units <= 256
)
# The first architecture that has clusters. Its PTX serves what is newer, where older ones are
# compiled for and theirs does so for the other kernels.
FIRST_WITH_CLUSTERS = "90"
# The runtime is part of the library, and looks for the driver when it is first called.
CUDA_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")

_STAMP = b"fastlstm-build:"  # what stands before the stamp inside a library


class BuildError(RuntimeError):
    """The native library could not be built or must not be used; the message says why."""


class MissingError(BuildError):
    """Something the build needs is not on this machine."""


class Toolchain(NamedTuple):
    """What is taken from the machine: compiler, ninja and torch."""

    compiler: tuple[str, ...]
    compiler_version: str
    isa: tuple[str, ...]  # the instruction sets that the compiler knows
    ninja: str
    torch_dir: Path
    torch_version: str


class Cuda(NamedTuple):
    """CUDA's compiler, and where it is installed."""

    nvcc: str
    home: Path
    version: str


class Step(NamedTuple):
    """One source file made into one object."""

    output: str
    source: Path
    flags: tuple[str, ...]
    rule: str = "compile"


def library_path() -> Path:
    """The library to load, built first if need be."""
    named = _named_library("FASTLSTM_LIBRARY")
    if named is not None:
        return named
    if not (PACKAGE / LIBRARY).is_file():
        return _cached_library()
    return _shipped_library(LIBRARY, sources_digest(), "make build")


def cuda_library_path() -> Path:
    """The CUDA library to load; it is not built here."""
    named = _named_library("FASTLSTM_CUDA_LIBRARY")
    if named is not None:
        return named
    if not (PACKAGE / CUDA_LIBRARY).is_file():
        raise MissingError(
            "its library was not built: install with FASTLSTM_BUILD=cuda where nvcc is, "
            "or run `make cuda` in a checkout"
        )
    return _shipped_library(CUDA_LIBRARY, cuda_sources_digest(), "make cuda")


def _named_library(variable: str) -> Path | None:
    """The file that an environment variable names, if it does."""
    named = os.environ.get(variable)
    if not named:
        return None
    if not Path(named).is_file():
        raise BuildError(f"{variable}={named}: no such file")
    return Path(named)


def _shipped_library(name: str, digest: str, command: str) -> Path:
    """The one in the package, made of the sources that are there."""
    shipped = PACKAGE / name
    if build_info(shipped).get("sources") != digest:
        raise BuildError(
            f"{shipped} was built from other sources than those in {sources_dir()}: "
            f"run `{command}` in a checkout, else reinstall fastlstm"
        )
    return shipped


def build_for_install(build_dir: Path) -> list[Path]:
    """What an installation ships, obeying FASTLSTM_BUILD; nothing: the first use builds."""
    mode = os.environ.get("FASTLSTM_BUILD", "auto")
    if mode not in MODES:
        raise BuildError(f"FASTLSTM_BUILD={mode}: expected one of {', '.join(MODES)}")
    if mode == "none":
        return []
    try:
        if mode == "cuda":
            return [build(build_dir), build_cuda(build_dir.parent / "cuda")]
        return [build(build_dir)]
    except MissingError as error:
        if mode != "auto":
            raise
        _say(f"installing without the CPU library, its first use will build it: {error}")
        return []


def build(build_dir: Path, sanitize: bool = False) -> Path:
    """Brings ``build_dir``'s library up to date with the sources and returns its path."""
    tools = find_toolchain()
    build_dir.mkdir(parents=True, exist_ok=True)
    with _locked(build_dir / "lock"):
        output = _make(build_dir, tools, sanitize)
    if "warning:" in output:
        _say(f"the compiler warns:\n{output}")
    return build_dir.resolve() / LIBRARY


def build_cuda(
    build_dir: Path,
    instances: Sequence[tuple[str, int]] = CUDA_INSTANCES,
    architectures: Sequence[str] = CUDA_ARCHITECTURES,
    clusters: Sequence[tuple[str, int, int]] = CLUSTER_INSTANCES,
) -> Path:
    """Brings ``build_dir``'s CUDA library up to date with the sources and returns its path."""
    tools, cuda = find_toolchain(), find_cuda()
    build_dir.mkdir(parents=True, exist_ok=True)
    build_dir = build_dir.resolve()
    with _locked(build_dir / "lock"):
        info = {
            "sources": cuda_sources_digest(),
            "compiler": cuda.version,
            "torch": tools.torch_version,
            "architectures": list(architectures),
        }
        _write_if_new(build_dir / "stamp.cpp", _stamp_source(info))
        _write_if_new(build_dir / "instances.cpp", _instances_source(instances, clusters))
        steps = _cuda_steps(tools, build_dir, instances, architectures)
        steps += _cluster_steps(architectures, clusters)
        link = [f"-L{cuda.home / folder}" for folder in ("lib64", "lib")]
        link += [f"-L{tools.torch_dir / 'lib'}", *LINK_FLAGS, *CUDA_LINK_FLAGS]
        text = _ninja_file(tools.compiler, steps, CUDA_LIBRARY, link, nvcc=cuda.nvcc)
        _write_if_new(build_dir / "build.ninja", text)
        _run_ninja(build_dir, tools.ninja, CUDA_LIBRARY)
    return build_dir / CUDA_LIBRARY


def build_info(library: Path) -> dict[str, Any]:
    """The stamp inside a library: sources digest, compiler, torch, instruction sets, flags."""
    content = library.read_bytes()
    start = content.find(_STAMP)
    if start < 0:
        return {}
    start += len(_STAMP)
    return dict(json.loads(content[start : content.index(b"\0", start)]))


def sources_dir() -> Path:
    """``csrc`` inside an installed package, beside the package in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise MissingError(f"the C++ sources are missing: no csrc/bindings.cpp in or beside {PACKAGE}")


def sources_digest() -> str:
    """Names and contents of the CPU library's sources, and the flags they are compiled with."""
    return _digest((COMPILE_FLAGS, TORCH_FLAGS, LINK_FLAGS, ISA_FLAGS), but="cuda")


def cuda_sources_digest() -> str:
    """The same of the CUDA library."""
    flags = (COMPILE_FLAGS, TORCH_FLAGS, LINK_FLAGS, CUDA_FLAGS, CUDA_LINK_FLAGS)
    instances = (CUDA_INSTANCES, CLUSTER_INSTANCES, FIRST_WITH_CLUSTERS)
    return _digest((flags, instances), but="cpu")


def _digest(flags: object, but: str) -> str:
    """Of all sources but those in folder ``but``."""
    digest = hashlib.sha256(repr(flags).encode())
    root = sources_dir()
    sources = (p for p in root.rglob("*") if p.suffix in (".cpp", ".h", ".cu"))
    for path in sorted(p for p in sources if p.relative_to(root).parts[0] != but):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


# --- the machine -----------------------------------------------------------------------


def find_toolchain() -> Toolchain:
    """Everything the build needs, or MissingError naming the first thing that is not there."""
    if sys.platform != "linux":
        raise MissingError(f"the CPU library is built on Linux only, this is {sys.platform}")
    compiler, version = _find_compiler()
    torch_dir, torch_version = _find_torch()
    isa = tuple(name for name in ISA_FLAGS if name not in NEW_ISA or _takes(compiler, name))
    return Toolchain(compiler, version, isa, _find_ninja(), torch_dir, torch_version)


def find_cuda() -> Cuda:
    """CUDA's compiler, or MissingError."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    nvcc = shutil.which(named)
    if not nvcc:
        raise MissingError(f"no CUDA compiler: {named} does not run; name it in NVCC or CUDA_HOME")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    # nvcc may be a script elsewhere: it says itself where the rest is.
    dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    if answer.returncode != 0 or top is None:
        raise MissingError(f"no CUDA compiler: {nvcc} fails: {(answer.stderr + dry.stderr)[-300:]}")
    (version,) = re.findall(r"release.*", answer.stdout)
    return Cuda(nvcc, Path(top[1]).resolve(), f"nvcc {version}")


def _find_compiler() -> tuple[tuple[str, ...], str]:
    """The command and the first line of its --version."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "c++", "clang++"]:
        words = tuple(shlex.split(command))
        if words and shutil.which(words[0]):
            answer = subprocess.run([*words, "--version"], capture_output=True, text=True)
            if answer.returncode == 0:
                return words, answer.stdout.partition("\n")[0]
    looked = f"CXX={named} does not run" if named else "no g++, c++ or clang++ on PATH"
    raise MissingError(f"no C++ compiler: {looked}; install one, or name it in CXX")


def _takes(compiler: Sequence[str], isa: str) -> bool:
    """Does the compiler know this instruction set, and its assembler too?  gcc knows bfloat16
    vectors since 10 and AMX since 11, clang since 9 and 12.
    """
    program = f'void f() {{ asm("{NEW_ISA[isa]}"); }}'
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *ISA_FLAGS[isa], "-x", "c++", "-c", "-", "-o", f"{folder}/f.o"]
        answer = subprocess.run(command, input=program, text=True, capture_output=True)
    return answer.returncode == 0


def _find_ninja() -> str:
    """ninja from its Python package, else from PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    found = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else None
    found = found or shutil.which("ninja")
    if not found:
        raise MissingError("no ninja: `pip install ninja`")
    return found


def _find_torch() -> tuple[Path, str]:
    try:
        import torch
    except ImportError as error:
        raise MissingError(
            f"torch cannot be imported ({error}); an installation that should build needs "
            "torch first and `pip install --no-build-isolation`"
        ) from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_MINIMUM:
        raise MissingError(f"torch {version} is too old, expected 2.10 or newer")
    folder = Path(torch.__file__).parent
    for needed in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so"):
        if not (folder / needed).is_file():
            raise MissingError(f"torch {version} came without {needed}, looked in {folder}")
    return folder, version


# --- ninja -----------------------------------------------------------------------------


def _steps(tools: Toolchain, build_dir: Path, sanitize: bool) -> list[Step]:
    root = sources_dir()
    common = (
        *_common_flags(tools),
        *(SANITIZE_FLAGS if sanitize else ()),
        *(f"-DFASTLSTM_{name.upper()}" for name in NEW_ISA if name in tools.isa),
    )
    with_torch = (*common, *_torch_flags(tools))
    steps = [Step("stamp.o", build_dir / "stamp.cpp", common)]
    for source in sorted(root.glob("*.cpp")):  # the bindings; only they may include torch
        steps.append(Step(f"{source.stem}.o", source, with_torch))
    for source in sorted(root.glob("cpu/*.cpp")):
        if source.relative_to(root).as_posix() not in ISA_SOURCES.values():
            steps.append(Step(f"cpu.{source.stem}.o", source, common))
    for isa in tools.isa if (root / "cpu").is_dir() else ():
        named = (*common, *ISA_FLAGS[isa], f"-DFASTLSTM_ISA={isa}")
        steps.append(Step(f"cpu.isa.{isa}.o", root / ISA_SOURCES[isa], named))
    return steps


def _cuda_steps(
    tools: Toolchain,
    build_dir: Path,
    instances: Sequence[tuple[str, int]],
    architectures: Sequence[str],
) -> list[Step]:
    root, common = sources_dir(), _common_flags(tools)
    device = _device_flags(architectures)
    steps = [
        Step("stamp.o", build_dir / "stamp.cpp", common),
        Step("instances.o", build_dir / "instances.cpp", common),
        Step("dispatch.o", root / "cuda" / "dispatch.cpp", common),
        Step("bindings.o", root / "cuda" / "bindings.cpp", (*common, *_torch_flags(tools))),
        Step("probe.o", root / "cuda" / "probe.cu", device, "nvcc"),
    ]
    for dtype, pairs in instances:
        named = (*device, f"-DFASTLSTM_STORAGE={dtype}", f"-DFASTLSTM_PAIRS={pairs}")
        steps.append(Step(f"walk.{dtype}.{pairs}.o", root / "cuda" / "walk.cu", named, "nvcc"))
    return steps


def _cluster_steps(
    architectures: Sequence[str], clusters: Sequence[tuple[str, int, int]]
) -> list[Step]:
    root, steps = sources_dir(), []
    chosen = [a for a in architectures if int(a.rstrip("a")) >= int(FIRST_WITH_CLUSTERS)]
    if len(chosen) < len(architectures):
        chosen.append(FIRST_WITH_CLUSTERS)
    for dtype, blocks, units in clusters:
        words = dict(STORAGE=dtype, BLOCKS=blocks, UNITS=units)
        flags = [*_device_flags(chosen), *(f"-DFASTLSTM_{k}={v}" for k, v in words.items())]
        name = f"cluster.{dtype}.{blocks}x{units}.o"
        steps.append(Step(name, root / "cuda" / "cluster.cu", tuple(flags), "nvcc"))
    return steps


def _device_flags(architectures: Sequence[str]) -> tuple[str, ...]:
    """Of every source for the device: code for all, and the last one's PTX."""
    *others, last = architectures
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in others]
    code.append(f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]")
    return (*CUDA_FLAGS, *code, f"-I{sources_dir()}")


def _common_flags(tools: Toolchain) -> tuple[str, ...]:
    """Of every host source; the prefix maps keep this machine's paths out of error messages."""
    root, include = sources_dir(), tools.torch_dir / "include"
    maps = (f"-ffile-prefix-map={root}=csrc", f"-ffile-prefix-map={include}=include")
    return (*COMPILE_FLAGS, f"-I{root}", *maps)


def _torch_flags(tools: Toolchain) -> tuple[str, ...]:
    return (*TORCH_FLAGS, "-isystem", str(tools.torch_dir / "include"))


def _instances_source(
    instances: Sequence[tuple[str, int]], clusters: Sequence[tuple[str, int, int]]
) -> str:
    """A C++ file that lists the tables of all objects made of cuda/walk.cu and cuda/cluster.cu."""
    names = [f"instances_{dtype}_{pairs}" for dtype, pairs in instances]
    names += [f"clusters_{dtype}_{blocks}x{units}" for dtype, blocks, units in clusters]
    declared = "".join(f"extern const Instance {name}[];\n" for name in names)
    return (
        '#include "cuda/dispatch.h"\n\nnamespace fastlstm {\nnamespace cuda {\n\n'
        f"{declared}const Instance* const instance_tables[] = {{{', '.join(names)}, nullptr}};\n\n"
        "}  // namespace cuda\n}  // namespace fastlstm\n"
    )


def _ninja_file(
    compiler_words: Sequence[str],
    steps: Sequence[Step],
    library: str,
    link: Sequence[str],
    nvcc: str = "nvcc",
) -> str:
    compiler = _ninja_words(compiler_words)
    lines = [
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {_ninja_words([nvcc])} $flags -MD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in -o $out $flags",
        "  description = $out",
    ]
    for step in steps:
        lines.append(f"build {step.output}: {step.rule} {_ninja_path(step.source)}")
        lines.append(f"  flags = {_ninja_words(step.flags)}")
    lines.append(f"build {library}: link {' '.join(step.output for step in steps)}")
    lines.append(f"  flags = {_ninja_words(link)}")
    return "\n".join(lines) + "\n"


def _ninja_words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _stamp_source(info: dict[str, Any]) -> str:
    """A C++ file whose one constant is what ``build_info`` reads back."""
    text = f"{_STAMP.decode()}{json.dumps(info)}"
    return (
        "extern const char fastlstm_build_stamp[];\n"
        f'__attribute__((used)) const char fastlstm_build_stamp[] = R"stamp({text})stamp";\n'
    )


def _make(build_dir: Path, tools: Toolchain, sanitize: bool) -> str:
    """Makes ``build_dir``'s CPU library and returns what ninja and the compiler said."""
    build_dir = build_dir.resolve()
    info = {
        "sources": sources_digest(),
        "compiler": tools.compiler_version,
        "torch": tools.torch_version,
        "isa": list(tools.isa),
        "flags": shlex.join(COMPILE_FLAGS + (SANITIZE_FLAGS if sanitize else ())),
    }
    _write_if_new(build_dir / "stamp.cpp", _stamp_source(info))
    steps = _steps(tools, build_dir, sanitize)
    link = [f"-L{tools.torch_dir / 'lib'}", *(SANITIZE_FLAGS if sanitize else ()), *LINK_FLAGS]
    text = _ninja_file(tools.compiler, steps, LIBRARY, link)
    _write_if_new(build_dir / "build.ninja", text)
    return _run_ninja(build_dir, tools.ninja, LIBRARY)


def _run_ninja(build_dir: Path, ninja: str, library: str) -> str:
    done = subprocess.run(
        [ninja, "-C", str(build_dir), library],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise BuildError(f"compiling {library} failed; the last output was:\n{tail}")
    return done.stdout


def _write_if_new(path: Path, text: str) -> None:
    """Leaves an unchanged file alone, so that ninja has nothing to redo."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


# --- the cache -------------------------------------------------------------------------


def _cached_library() -> Path:
    """What was built of these sources for this torch and system by the compiler that CXX names, if
    it names one.  If it is there, no compiler is needed; after another was installed it stays."""
    system = (platform.machine(), *platform.libc_ver())
    key = (sources_digest(), _find_torch()[1], os.environ.get("CXX"), system)
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    entry = _private_dir(_cache_root()) / name
    library = entry / LIBRARY
    if library.is_file():  # complete: it was renamed into place
        return library
    tools = find_toolchain()
    try:
        entry.mkdir(mode=0o700, exist_ok=True)
        with _locked(entry / "lock"):
            if not library.is_file():
                _build_into(library, tools)
    except OSError as error:
        raise BuildError(f"cannot build in {entry}: {error}") from error
    return library


def _build_into(library: Path, tools: Toolchain) -> None:
    """Builds in a fresh folder, so that what a killed build left is never linked."""
    for leftover in library.parent.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _say(f"building the CPU library, once, in {library.parent}: up to a minute")
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        _make(Path(folder), tools, sanitize=False)
        os.replace(Path(folder) / LIBRARY, library)


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "fastlstm"


def _private_dir(path: Path) -> Path:
    """Code will be loaded from here: a folder that somebody else could write is refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise BuildError(f"cannot use the cache {path}: {error}; set XDG_CACHE_HOME") from error
    if path.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BuildError(
            f"the cache {path} must be a folder of this user with mode 700: "
            "remove it, or set XDG_CACHE_HOME"
        )
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time.  The kernel drops the lock of a killed process by itself."""
    import fcntl

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- commands --------------------------------------------------------------------------


def copy_library(library: Path, folder: Path) -> Path:
    """Copies by renaming: a process that has the old file loaded keeps the old file."""
    target = folder / library.name
    partial = folder / f"{library.name}.{os.getpid()}"
    shutil.copyfile(library, partial)
    os.replace(partial, target)
    return target


def _say(message: str) -> None:
    print(f"fastlstm: {message}", file=sys.stderr, flush=True)


def main() -> int:
    """``python -P fastlstm/build.py`` in a checkout: builds and prints the library's path."""
    parser = argparse.ArgumentParser(description="Build a library of this checkout.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    kind.add_argument("--cuda", action="store_true", help="the CUDA library, not the CPU's")
    args = parser.parse_args()
    folder = PACKAGE.parent / "build"
    try:
        if args.cuda:
            print(copy_library(build_cuda(folder / "cuda"), PACKAGE))
        elif args.sanitize:
            print(build(folder / "sanitize", sanitize=True))
        else:
            print(copy_library(build(folder / "native"), PACKAGE))
    except BuildError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
