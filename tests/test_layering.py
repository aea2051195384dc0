"""Packages import only from the layers below them, and no import is circular. The imports are read, not run."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnext_kernels"

# Package or module -> (what of convnext_kernels it may import, the third-party packages it may import at the top of a
# file). A name that ends in "." is a prefix. Other third-party packages may only be imported inside functions, and only
# by the packages in LAZY.
SPEC = ("spec", "calls", "variants")
BACKEND = (*SPEC, "torch_versions", "tuning", "tuning.")  # what all but eager may import, beside their own files
PACKAGES = {
    "spec": ((), ("torch",)),
    "variants": ((), ("torch",)),
    "calls": (("spec", "torch_versions"), ("torch",)),
    "version": ((), ()),
    "torch_versions": ((), ("torch",)),
    "backends": ((), ()),
    "backends.eager": ((*SPEC, "backends.eager."), ("torch",)),
    "backends.cpu": ((*BACKEND, "backends.cpu.", "_native"), ("torch",)),
    # The code that both GPU backends use; no backend itself.
    "backends.gpu": ((*BACKEND, "backends.gpu."), ("torch",)),
    "backends.cuda": ((*BACKEND, "backends.cuda.", "backends.gpu.", "_native_cuda"), ("torch",)),
    # NumPy: Triton's interpreter runs kernels with it.
    "backends.triton": ((*BACKEND, "exporting", "backends.triton.", "backends.gpu."), ("torch", "triton", "numpy")),
    "tuning": (("spec", "version", "tuning", "tuning."), ("filelock",)),
    "trial": (("spec", "calls", "backends"), ("torch",)),
    "dispatch": (("spec", "calls", "backends", "trial", "tuning", "tuning."), ("torch",)),
    "ops": ((*SPEC, "torch_versions", "exporting", "dispatch", "ops."), ("torch",)),
    "graphs": (("torch_versions",), ("torch",)),
    "exporting": (("torch_versions",), ("torch",)),
    "functional": (("ops", "ops.checks", "ops.registration", "variants"), ("torch",)),
    "nn": (("exporting", "functional", "variants", "nn.", "ops.blocks", "ops.checks"), ("torch",)),
    "compat": (("nn", "compat"), ("torch",)),
    "models": (("functional", "nn", "nn.", "models.", "ops.checks", "ops.flops"), ("torch",)),
    "interop": (
        ("functional", "nn", "nn.", "ops.blocks", "ops.checks", "torch_versions", "variants", "exporting", "interop."),
        ("torch",),
    ),
    "environment": (("dispatch", "tuning.cpus", "version"), ("torch",)),
    "_native": ((), ()),
    "_native_cuda": ((), ()),
}
EXTENSIONS = ("_native", "_native_cuda")  # compiled: they have no Python file
LAZY = ("models", "interop", "environment")
# The top layer: the public names, what runs whole models to time or explain them, the benchmarks and the command line.
# They may import everything.
TOP = ("", "tuning.explain", "tuning.recorded", "tuning.tune", "bench", "cli", "__main__")


def _package(module: str) -> str:
    """The row of a module in PACKAGES: "backends.cpu" for "backends.cpu.block"."""
    parts = module.split(".")
    if module in TOP:
        return module
    return ".".join(parts[:2]) if parts[0] == "backends" and len(parts) > 1 else parts[0]


def _imports(tree: ast.Module, module: str, is_package: bool):
    """Yield (imported module, line, whether inside a function) for every import statement."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    base = ".".join([*above, base]).rstrip(".")
                # In "from a import b", b may be a module or a name in a: `_resolve` looks for the file.
                for alias in child.names:
                    yield f"{base}.{alias.name}", child.lineno, inside
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, inside or function)

    yield from walk(tree, False)


def _resolve(name: str, modules: set[str]) -> str:
    """The module that an import statement loads: `name` or, where its last part is an attribute, its parent."""
    inner = name.removeprefix(f"{PACKAGE}.") if name != PACKAGE else ""
    while inner and inner not in modules and inner not in EXTENSIONS:
        inner = inner.rpartition(".")[0]
    return inner


def _files() -> dict[str, Path]:
    """The modules of the package, named without it."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = _files()
IMPORTS = {
    module: list(_imports(ast.parse(path.read_text()), f"{PACKAGE}.{module}".rstrip("."), path.name == "__init__.py"))
    for module, path in FILES.items()
}


@pytest.mark.parametrize("module", [module for module in FILES if _package(module) not in TOP])
def test_imports(module):
    package = _package(module)
    inner, outer = PACKAGES[package]
    for name, line, inside in IMPORTS[module]:
        top = name.split(".")[0]
        if top == PACKAGE:
            target = _resolve(name, set(FILES))
            allowed = any(target == p or (p.endswith(".") and f"{target}.".startswith(p)) for p in inner)
        else:
            allowed = top in sys.stdlib_module_names or top in outer or (inside and package in LAZY)
        assert allowed, f"line {line} imports {name}"


def test_no_circular_imports():
    """Imports inside functions count too."""
    done = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in FILES and module not in done:
            for name, _, _ in IMPORTS[module]:
                if name.split(".")[0] == PACKAGE:
                    visit(_resolve(name, set(FILES)), [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


@pytest.mark.parametrize(("folder", "other"), [("common", "(cpu|cuda)/"), ("cpu", "cuda/"), ("cuda", "cpu/")])
def test_includes(folder, other):
    forbidden = re.compile(rf'^#include ["<](\.\./)*(Python\.h|pybind11/|torch/|ATen/|c10/|{other}).*', re.MULTILINE)
    for path in (ROOT / "csrc" / folder).rglob("*.*"):
        assert not forbidden.search(path.read_text()), path
