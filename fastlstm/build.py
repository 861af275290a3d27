"""Builds the native CPU library: when the package is installed, else at its first use.

``library_path()`` is what the loader asks.  It answers with, in this order,

1. the file that ``FASTLSTM_LIBRARY`` names: a developer's override, there so that
   ``make sanitize`` can test its own build;
2. ``_C.so`` inside the package, put there by ``setup.py``.  It carries a digest of the
   sources it was compiled from, and one that disagrees with today's sources is an error:
   a developer who has edited ``csrc/`` must hear of it, not measure the old code;
3. a library built now, once, in this user's cache directory.

The library uses LibTorch's stable ABI and no Python, so one file serves every Python and
every torch from 2.10 on.  ``setup.py`` loads this file by its path, before the package
is importable: it imports the standard library only, and torch inside functions.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent
LIBRARY = "_C.so"
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
# gcc 12's own AVX-512 header starts a variable with itself, on purpose, and warns of it.
_GCC_NOISE = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = _AVX2
    ISA_FLAGS["avx512"] = (*_AVX512, *_AVX2, "-mprefer-vector-width=512", *_GCC_NOISE)
    ISA_FLAGS["amx"] = (*ISA_FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
# On every machine, so that no source of an instruction set is taken for a common one.
ISA_SOURCES = {**dict.fromkeys(ISA_FLAGS, "cpu/isa.cpp"), "amx": "cpu/amx.cpp"}

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


class Step(NamedTuple):
    """One source file made into one object."""

    output: str
    source: Path
    flags: tuple[str, ...]


def library_path() -> Path:
    """The library to load, built first if need be."""
    override = os.environ.get("FASTLSTM_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise BuildError(f"FASTLSTM_LIBRARY={override}: no such file")
        return Path(override)
    shipped = PACKAGE / LIBRARY
    if not shipped.is_file():
        return _cached_library()
    if build_info(shipped).get("sources") != sources_digest():
        raise BuildError(
            f"{shipped} was built from other sources than those in {sources_dir()}: "
            "run `make build` in a checkout, else reinstall fastlstm"
        )
    return shipped


def build_for_install(build_dir: Path) -> Path | None:
    """What an installation ships, obeying FASTLSTM_BUILD; None: the first use builds."""
    mode = os.environ.get("FASTLSTM_BUILD", "auto")
    if mode not in MODES:
        raise BuildError(f"FASTLSTM_BUILD={mode}: expected one of {', '.join(MODES)}")
    if mode == "cuda":
        raise BuildError("FASTLSTM_BUILD=cuda: this version has no CUDA sources yet")
    if mode == "none":
        return None
    try:
        return build(build_dir)
    except MissingError as error:
        if mode == "cpu":
            raise
        _say(f"installing without the CPU library, its first use will build it: {error}")
        return None


def build(build_dir: Path, sanitize: bool = False) -> Path:
    """Brings ``build_dir``'s library up to date with the sources and returns its path."""
    tools = find_toolchain()
    build_dir.mkdir(parents=True, exist_ok=True)
    with _locked(build_dir / "lock"):
        output = _run_ninja(build_dir, tools, sanitize)
    if "warning:" in output:
        _say(f"the compiler warns:\n{output}")
    return build_dir.resolve() / LIBRARY


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
    """Names and contents of the sources, and the flags they are compiled with."""
    digest = hashlib.sha256(repr((COMPILE_FLAGS, TORCH_FLAGS, LINK_FLAGS, ISA_FLAGS)).encode())
    root = sources_dir()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".cpp", ".h")):
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
    isa = tuple(name for name in ISA_FLAGS if name != "amx" or _takes(compiler, ISA_FLAGS[name]))
    return Toolchain(compiler, version, isa, _find_ninja(), torch_dir, torch_version)


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


def _takes(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    """Does the compiler know these flags?  gcc has AMX since 11, clang since 12."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


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
    include = tools.torch_dir / "include"
    # The prefix maps keep this machine's paths out of the library's error messages.
    common = (
        *COMPILE_FLAGS,
        *(SANITIZE_FLAGS if sanitize else ()),
        f"-I{root}",
        f"-ffile-prefix-map={root}=csrc",
        f"-ffile-prefix-map={include}=include",
        *(("-DFASTLSTM_AMX",) if "amx" in tools.isa else ()),
    )
    with_torch = (*common, *TORCH_FLAGS, "-isystem", str(include))
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


def _ninja_file(tools: Toolchain, steps: Sequence[Step], sanitize: bool) -> str:
    link = [f"-L{tools.torch_dir / 'lib'}", *(SANITIZE_FLAGS if sanitize else ()), *LINK_FLAGS]
    compiler = _ninja_words(tools.compiler)
    lines = [
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in -o $out $flags",
        "  description = $out",
    ]
    for step in steps:
        lines.append(f"build {step.output}: compile {_ninja_path(step.source)}")
        lines.append(f"  flags = {_ninja_words(step.flags)}")
    lines.append(f"build {LIBRARY}: link {' '.join(step.output for step in steps)}")
    lines.append(f"  flags = {_ninja_words(link)}")
    return "\n".join(lines) + "\n"


def _ninja_words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _stamp_source(tools: Toolchain, sanitize: bool) -> str:
    """A C++ file whose one constant is what ``build_info`` reads back."""
    info = {
        "sources": sources_digest(),
        "compiler": tools.compiler_version,
        "torch": tools.torch_version,
        "isa": list(tools.isa),
        "flags": shlex.join(COMPILE_FLAGS + (SANITIZE_FLAGS if sanitize else ())),
    }
    text = f"{_STAMP.decode()}{json.dumps(info)}"
    return (
        "extern const char fastlstm_build_stamp[];\n"
        f'__attribute__((used)) const char fastlstm_build_stamp[] = R"stamp({text})stamp";\n'
    )


def _run_ninja(build_dir: Path, tools: Toolchain, sanitize: bool) -> str:
    """Makes ``build_dir``'s library and returns what ninja and the compiler said."""
    build_dir = build_dir.resolve()
    _write_if_new(build_dir / "stamp.cpp", _stamp_source(tools, sanitize))
    steps = _steps(tools, build_dir, sanitize)
    _write_if_new(build_dir / "build.ninja", _ninja_file(tools, steps, sanitize))
    done = subprocess.run(
        [tools.ninja, "-C", str(build_dir), LIBRARY],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise BuildError(f"compiling the CPU library failed; the last output was:\n{tail}")
    return done.stdout


def _write_if_new(path: Path, text: str) -> None:
    """Leaves an unchanged file alone, so that ninja has nothing to redo."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


# --- the cache -------------------------------------------------------------------------


def _cached_library() -> Path:
    tools = find_toolchain()
    key = (sources_digest(), tools.torch_version, tools.compiler, tools.compiler_version)
    name = hashlib.sha256(repr((key, platform.machine())).encode()).hexdigest()[:32]
    entry = _private_dir(_cache_root()) / name
    library = entry / LIBRARY
    if library.is_file():  # complete: it was renamed into place
        return library
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
        _run_ninja(Path(folder), tools, sanitize=False)
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
    target = folder / LIBRARY
    partial = folder / f"{LIBRARY}.{os.getpid()}"
    shutil.copyfile(library, partial)
    os.replace(partial, target)
    return target


def _say(message: str) -> None:
    print(f"fastlstm: {message}", file=sys.stderr, flush=True)


def main() -> int:
    """``python -P fastlstm/build.py`` in a checkout: builds and prints the library's path."""
    parser = argparse.ArgumentParser(description="Build the CPU library of this checkout.")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    sanitize = parser.parse_args().sanitize
    folder = PACKAGE.parent / "build"
    try:
        if sanitize:
            print(build(folder / "sanitize", sanitize=True))
        else:
            print(copy_library(build(folder / "native"), PACKAGE))
    except BuildError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
