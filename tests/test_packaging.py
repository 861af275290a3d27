"""The wheel and the first-use build: that what a user installs works outside this tree."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fastlstm import build

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "build" / "native"

# What a user would run first; it prints where the package and the library were found.
PROGRAM = """
import torch, fastlstm
from fastlstm import build

torch.manual_seed(0)
stock = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours = fastlstm.LSTM(5, 7, num_layers=2, bidirectional=True, backend="cpu")
ours.load_state_dict(stock.state_dict())
for module in (stock, ours):
    module.x = torch.linspace(-1, 1, 4 * 3 * 5).view(4, 3, 5).requires_grad_()
    module.y, (module.h, module.c) = module(module.x)
    (module.y.square().sum() + module.h.sum() + module.c.sum()).backward()
torch.testing.assert_close(ours.y, stock.y)
torch.testing.assert_close(ours.x.grad, stock.x.grad)
for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, msg=name)
print(fastlstm.__file__)
print(build.library_path())
"""


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in another folder, without what would lead it back to this checkout."""
    base = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTLSTM_LIBRARY")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**base, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def pip_wheel(out: Path, mode: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out)
    command = (sys.executable, "-m", "pip", "wheel", *options, ROOT)
    return run(*command, cwd=out, FASTLSTM_BUILD=mode)


def built_wheel(out: Path, mode: str) -> Path:
    done = pip_wheel(out, mode)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def clean_venv(folder: Path, wheel: Path) -> Path:
    """A new environment with this wheel; its python.

    It borrows torch and the rest from the running environment, but only after the
    installation, so that pip cannot touch what is there.  Path files in a borrowed folder
    are not read, so an editable fastlstm there stays out of sight.
    """
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    needed = ("torch", "numpy", "ninja", "typing_extensions", "sympy")
    specs = [importlib.util.find_spec(name) for name in needed]
    borrowed = {str(Path(spec.origin).parents[0 if spec.name == "typing_extensions" else 1])
                for spec in specs if spec is not None and spec.origin is not None}  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the library; compiling it is left to ninja's incremental build."""
    return built_wheel(tmp_path_factory.mktemp("wheel"), "cpu")


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment whose fastlstm came without the library."""
    pure = built_wheel(tmp_path_factory.mktemp("pure"), "none")
    assert pure.name.endswith("-py3-none-any.whl")
    assert "fastlstm/_C.so" not in zipfile.ZipFile(pure).namelist()
    return clean_venv(tmp_path_factory.mktemp("pure-env") / "venv", pure)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert re.fullmatch(r"fastlstm-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastlstm"}
    for folder in ("fastlstm", "fastlstm/cli", "kernels"):
        installed = folder.replace("kernels", "fastlstm/kernels")
        for source in (ROOT / folder).glob("*.py"):
            assert f"{installed}/{source.name}" in names
    for source in (ROOT / "csrc").rglob("*.*"):
        assert f"fastlstm/csrc/{source.relative_to(ROOT / 'csrc').as_posix()}" in names
    assert {"fastlstm/_C.so", "fastlstm/dispatch.json"} <= set(names)


def test_library_in_the_wheel_knows_nothing_of_this_machine(wheel: Path) -> None:
    library = zipfile.ZipFile(wheel).read("fastlstm/_C.so")
    for folder in {str(ROOT), sys.prefix, os.path.expanduser("~/")}:
        assert folder.encode() not in library
    dynamic = run("readelf", "-d", NATIVE / build.LIBRARY, cwd=ROOT).stdout
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    python = clean_venv(tmp_path / "venv", wheel)
    cache = tmp_path / "cache"
    done = run(python, "-c", PROGRAM, cwd=tmp_path, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    package, library = (Path(line) for line in done.stdout.split())
    assert package.is_relative_to(tmp_path / "venv")
    assert library == package.parent / build.LIBRARY
    assert not cache.exists()


def test_first_use_builds_once_into_the_cache(pure_python: Path, tmp_path: Path) -> None:
    # Without optimisation: what is tested is that it builds and is right, not how fast.
    compiler = tmp_path / "quick-c++"
    real = shlex.join(build.find_toolchain().compiler)
    compiler.write_text(f'#!/bin/sh\nfor a; do shift; [ "$a" = -O3 ] || set -- "$@" "$a"; done\n'
                        f'exec {real} "$@"\n')  # fmt: skip
    compiler.chmod(0o755)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler)}
    done = run(pure_python, "-c", PROGRAM, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fastlstm: building the CPU library") == 1
    library = Path(done.stdout.split()[1])
    assert library.is_relative_to(tmp_path / "cache" / "fastlstm")
    assert sorted(path.name for path in library.parent.iterdir()) == ["_C.so", "lock"]
    assert (tmp_path / "cache" / "fastlstm").stat().st_mode & 0o777 == 0o700
    compiler.unlink()  # what was built needs it no more
    again = run(pure_python, "-c", PROGRAM, cwd=tmp_path, **env)
    assert again.returncode == 0, again.stderr
    assert "building" not in again.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "no-such-c++"}, "no C++ compiler: CXX=no-such-c++ does not run"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler: no g++, c++ or clang++ on PATH"),
    ],
    ids=["CXX", "PATH"],
)
def test_without_a_compiler_the_error_says_so(
    pure_python: Path, tmp_path: Path, env: dict[str, str], message: str
) -> None:
    program = "from fastlstm import build; build.library_path()"
    done = run(pure_python, "-c", program, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path), **env)
    assert done.returncode != 0
    assert "MissingError" in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cuda", "no CUDA compiler: no-such-nvcc does not run"),
        ("yes", "FASTLSTM_BUILD=yes: expected one of auto, cpu, cuda, none"),
    ],
)
def test_what_cannot_be_built_fails_the_installation(
    tmp_path: Path, mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    done = pip_wheel(tmp_path, mode)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_only_auto_installs_without_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-c++")
    monkeypatch.setenv("FASTLSTM_BUILD", "auto")
    assert build.build_for_install(tmp_path) == []
    assert "no-such-c++" in capsys.readouterr().err
    monkeypatch.setenv("FASTLSTM_BUILD", "cpu")
    with pytest.raises(build.MissingError, match="no-such-c"):
        build.build_for_install(tmp_path)


def test_an_isolated_build_leaves_the_library_to_the_first_use(tmp_path: Path) -> None:
    """From the sdist, as from an index: there torch cannot be imported, and that is no error."""
    hook = "from setuptools import build_meta; build_meta.build_sdist('sdist')"
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "_C.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    shutil.copy(ROOT / ".clang-format", source)
    done = run(sys.executable, "-c", hook, cwd=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "sdist").glob("fastlstm-*.tar.gz")
    blocker = tmp_path / "blocked" / "torch"
    blocker.mkdir(parents=True)
    (blocker / "__init__.py").write_text("raise ImportError('not in an isolated build')\n")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path, "-v")
    command = (sys.executable, "-m", "pip", "wheel", *options, sdist)
    done = run(*command, cwd=tmp_path, FASTLSTM_BUILD="auto", PYTHONPATH=str(blocker.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its first use will build it: torch cannot be imported" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastlstm/py.typed", "fastlstm/csrc/bindings.cpp", "fastlstm/cli/info.py"} <= set(names)


def test_sources_are_python_of_the_oldest_version() -> None:
    """Of its syntax; mypy (make lint) looks at its standard library."""
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    for folder in ("fastlstm", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=(3, int(oldest[1])))


def test_importing_is_quick_and_imports_no_kernels() -> None:
    """Beyond torch's own import, in time of this process: other load does not count. Compiled to
    bytecode, as pip leaves it: the first run does so.
    """
    program = (
        "import sys, time, torch; start = time.process_time(); import fastlstm;"
        "print(time.process_time() - start, *sys.modules)"
    )
    command = (sys.executable, "-c", program)
    runs = [run(*command, cwd=ROOT, PYTHONDONTWRITEBYTECODE="") for _ in range(4)]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    seconds, *modules = runs[0].stdout.split()
    assert min(float(done.stdout.split()[0]) for done in runs) < 0.05, seconds
    assert not {"triton", "fastlstm.kernels", "fastlstm.cli", "torch._dynamo"} & set(modules)


@pytest.mark.parametrize("what", ["CUDA_FLAGS", "CUDA_INSTANCES", "CLUSTER_INSTANCES"])
def test_a_cuda_library_with_other_kernels_counts_as_another(what: str, monkeypatch) -> None:
    before = build.cuda_sources_digest()
    monkeypatch.setattr(build, what, getattr(build, what)[:-1])
    assert build.cuda_sources_digest() != before


@pytest.mark.parametrize("isa", [isa for isa in build.find_toolchain().isa if isa != "baseline"])
def test_no_symbol_of_a_newer_instruction_set_can_replace_a_common_one(
    wheel: Path, isa: str
) -> None:
    """The linker keeps one of several weak definitions: an inline std:: function compiled
    for AVX-512 would then run, and crash, on every older CPU.  DW.ref is no code: it is
    the address of the exception handler, the same in every object."""
    symbols = run("nm", "-C", NATIVE / f"cpu.isa.{isa}.o", cwd=ROOT)
    assert symbols.returncode == 0, symbols.stderr
    weak = re.findall(r"^\S* [WVu] (.*)$", symbols.stdout, re.MULTILINE)
    assert [name for name in weak if not name.startswith("DW.ref.")] == []


# --- the machinery, on a tree of its own with one small source ---------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkout_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """build.py of a little checkout; its cache is a folder beside it."""
    package = tmp_path / "tree" / "fastlstm"
    (package.parent / "csrc").mkdir(parents=True)
    package.mkdir()
    shutil.copy(build.__file__, package)
    (package.parent / "csrc" / "bindings.cpp").write_text("int answer() { return 42; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTLSTM_LIBRARY", raising=False)
    return load(package / "build.py")


def test_a_library_older_than_its_sources_is_refused(checkout: ModuleType) -> None:
    built = checkout.build(checkout.PACKAGE.parent / "build" / "native")
    shipped = checkout.copy_library(built, checkout.PACKAGE)
    assert checkout.library_path() == shipped
    assert checkout.build_info(shipped)["isa"] == list(build.find_toolchain().isa)
    (checkout.sources_dir() / "more.h").write_text("// new\n")
    with pytest.raises(checkout.BuildError, match="make build"):
        checkout.library_path()


def test_a_named_library_overrides(
    checkout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLSTM_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(checkout.BuildError, match=r"absent\.so: no such file"):
        checkout.library_path()
    (tmp_path / "absent.so").touch()
    assert checkout.library_path() == tmp_path / "absent.so"


def test_a_compile_error_is_shown_and_mended(checkout: ModuleType) -> None:
    bindings = checkout.sources_dir() / "bindings.cpp"
    bindings.write_text("#error deliberately broken\n")
    with pytest.raises(checkout.BuildError, match="deliberately broken"):
        checkout.library_path()
    bindings.write_text("int answer() { return 42; }\n")
    assert checkout.library_path().is_file()


def test_a_killed_build_blocks_nobody(checkout: ModuleType, tmp_path: Path) -> None:
    """The killed process held the lock and left a half-written folder."""
    sleeper = tmp_path / "sleeping-c++"
    started = tmp_path / "started"
    sleeper.write_text(
        '#!/bin/sh\ncase "$*" in *bindings.cpp*) touch ' + f"{started}; sleep 60;; esac\n"
        'exec g++ "$@"\n'
    )
    sleeper.chmod(0o755)
    command = [sys.executable, "-c", _library_program(checkout)]
    env = {**os.environ, "CXX": str(sleeper)}
    killed = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert killed.poll() is None, "the build ended before it was killed"
        assert time.monotonic() < deadline, "the build never reached the compiler"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (entry,) = (tmp_path / "cache" / "fastlstm").iterdir()
    assert list(entry.glob("build-*"))
    sleeper.write_text('#!/bin/sh\nexec g++ "$@"\n')  # the same command, so the same entry
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in entry.iterdir()) == ["_C.so", "lock"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_source_of_an_instruction_set_is_compiled_for_it_alone(
    machine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a compiler that knows the newer ones, and on machines that have others."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    module = load(Path(build.__file__))
    known = tuple(name for name in module.ISA_FLAGS if name not in module.NEW_ISA)
    tools = module.Toolchain(("g++",), "g++", known, "ninja", tmp_path, "2.10")
    steps = module._steps(tools, tmp_path, sanitize=False)
    assert [s.output for s in steps if s.source.stem == "isa"] == [f"cpu.isa.{n}.o" for n in known]
    assert not [step for step in steps if step.source.stem in module.NEW_ISA]


def test_processes_that_start_together_build_once(checkout: ModuleType) -> None:
    command = [sys.executable, "-c", _library_program(checkout)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    assert "".join(messages).count("building the CPU library") == 1


def test_a_cache_that_others_can_write_is_refused(checkout: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cache" / "fastlstm").mkdir(parents=True)
    (tmp_path / "cache" / "fastlstm").chmod(0o777)
    with pytest.raises(checkout.BuildError, match="mode 700"):
        checkout.library_path()


def _library_program(checkout: ModuleType) -> str:
    """Source that asks ``checkout`` for its library in a process of its own."""
    return (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('b', {checkout.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.library_path()\n"
    )
