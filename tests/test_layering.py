"""The structure the design promises: which file may import, load and mention what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "fastlstm").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))

# Bottom to top: a module imports only what stands above it in this list.  A new module
# must be given its place here.
LAYERS = (
    *("contract", "modes", "build", "native", "steps", "products", "samples", "dispatch"),
    "walks",
    *("reference", "aten", "cpu", "triton", "cuda"),
    *("backends", "checkpoint", "ops", "packing", "exported"),
    *(
        "gradients",
        "tangents",
        "second_order",
        "differentiated",
        "backward",
        "autograd",
        "functional",
        "tracers",
    ),
    *("per_sample", "checks", "plain", "module", "cell", "inspect", "compat", "surgery", "opacus"),
    *("cli", "__init__", "__main__"),
)
# Who may name the compiled library: what builds it, what loads it, what calls it.
NATIVE = {
    "load_library": {"native"},
    "fastlstm_C": {"native", "cpu"},
    "_C.so": {"build", "native"},
    "fastlstm_cuda": {"native", "cuda"},
    "_cuda.so": {"build", "native"},
}
# Without reference, which is also the oracle and what autograd falls back on.
BACKENDS = {"aten", "cpu", "triton", "cuda"}


def room(path: Path) -> str:
    """A module of the package; a folder of it is one room, named as the folder."""
    return path.relative_to(ROOT / "fastlstm").with_suffix("").parts[0]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from runtime_nodes(child)


def imported(path: Path, package: str) -> Iterator[str]:
    """Full names of what a file imports; ``from a import b`` counts as a and as a.b."""
    for node in runtime_nodes(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def identify(path: Path) -> str:
    return path.relative_to(ROOT / "fastlstm").with_suffix("").as_posix()


def siblings(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    folder = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    names = {name.split(".")[1] for name in imported(path, folder) if name.startswith("fastlstm.")}
    return (names & set(map(room, PACKAGE))) - {room(path)}


def strings_and_names(path: Path) -> Iterator[str]:
    """Identifiers and string constants, without docstrings."""
    tree = parsed(path)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # a string that is a statement
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield str(node.value)


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_imports_run_downward(path: Path) -> None:
    assert room(path) in LAYERS, f"give {room(path)} its place in LAYERS"
    below = LAYERS[: LAYERS.index(room(path))]
    assert siblings(path) <= set(below)


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_only_backends_imports_a_backend(path: Path) -> None:
    if room(path) != "backends":
        assert siblings(path).isdisjoint(BACKENDS)


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
@pytest.mark.parametrize("needle", NATIVE)
def test_the_library_is_named_where_it_is_loaded_and_called(path: Path, needle: str) -> None:
    if room(path) not in NATIVE[needle]:
        assert not [text for text in strings_and_names(path) if needle in text]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_each_other(path: Path) -> None:
    for name in imported(path, "fastlstm.kernels"):
        top = name.split(".")[0]
        known = top in ("torch", "triton") or top in sys.stdlib_module_names
        assert known or name.startswith("fastlstm.kernels")


def test_build_imports_the_standard_library_only() -> None:
    """setup.py loads it before anything is installed; torch and ninja inside functions."""
    top_level = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in parsed(ROOT / "fastlstm" / "build.py").body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert not {"torch", "ninja", "numpy", None} & set(top_level)


def test_csrc_knows_torch_in_its_bindings_alone() -> None:
    """And of torch only what is stable; nothing but a CUDA source includes CUDA's headers."""
    bindings = {"bindings.cpp", "cuda/bindings.cpp", "tensor_checks.h"}
    on_a_gpu = {"cuda/device.h", "cuda/launch.h", "cuda/probe.cu"}
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        name = source.relative_to(ROOT / "csrc").as_posix()
        for header in re.findall(r"#\s*include\s*[<\"]([^>\"]+)", source.read_text()):
            if header.startswith(("torch/", "ATen/", "c10/")):
                assert name in bindings, f"{name} includes {header}"
                assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), header
            elif header.startswith("cuda_"):
                assert name in on_a_gpu, f"{name} includes {header}"
            elif header.startswith("../") and name not in bindings:  # or torch could come by it
                assert header in ("../layer.h", "../gate_math.h"), f"{name} includes {header}"


def test_no_file_speaks_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    folders = [f"/{name}/".encode() for name in ("work", "root", "home", "Users")]
    for name in filter(None, listed):
        path = ROOT / name.decode()
        content = path.read_bytes() if path.is_file() else b""
        assert not [folder for folder in folders if folder in content], path
