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
BACKEND = (
    *SPEC,
    "torch_versions",
    "tuning",
    "tuning.",
)  # what every backend but eager may import, beside its own files
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
    "dispatch": (("spec", "backends", "trial", "tuning", "tuning."), ("torch",)),
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

C_FOLDERS = {"common": ("common",), "cpu": ("cpu", "common"), "cuda": ("cuda", "common")}
C_FORBIDDEN = re.compile(r"^(Python\.h|pybind11/|torch/|ATen/|c10/|caffe2/)")


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


def _allowed(target: str, patterns: tuple[str, ...]) -> bool:
    return any(target == p or (p.endswith(".") and (target + ".").startswith(p)) for p in patterns)


def _files(root: Path) -> dict[str, Path]:
    """The modules of `root`/convnext_kernels, named without the package."""
    files = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(root / PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def python_violations(root: Path) -> list[str]:
    """Every import in `root`/convnext_kernels that PACKAGES does not allow."""
    files = _files(root)
    found = []
    for module, path in files.items():
        package = _package(module)
        if package in TOP:
            continue
        if package not in PACKAGES:
            found.append(f"{module}: no row for {package!r} in PACKAGES")
            continue
        inner, outer = PACKAGES[package]
        full = f"{PACKAGE}.{module}"
        for name, line, inside in _imports(ast.parse(path.read_text()), full, path.name == "__init__.py"):
            top = name.split(".")[0]
            if top == PACKAGE:
                target = _resolve(name, set(files))
                if not _allowed(target, inner):
                    found.append(f"{module}:{line} imports {target or PACKAGE}")
            elif top not in sys.stdlib_module_names and top not in outer and not (inside and package in LAZY):
                found.append(f"{module}:{line} imports {top}")
    return found


def circular_imports(root: Path) -> list[str]:
    """Circular imports in `root`/convnext_kernels, as "a -> b -> a". Imports inside functions count too."""
    files = _files(root)
    imported = {}
    for module, path in files.items():
        full = f"{PACKAGE}.{module}".rstrip(".")
        names = [name for name, _, _ in _imports(ast.parse(path.read_text()), full, path.name == "__init__.py")]
        inner = (name for name in names if name.split(".")[0] == PACKAGE)
        imported[module] = sorted({_resolve(name, set(files)) for name in inner})
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join(name or PACKAGE for name in [*path[path.index(module) :], module]))
        elif module not in done:
            for target in imported.get(module, ()):
                visit(target, [*path, module])
            done.add(module)

    for module in imported:
        visit(module, [])
    return found


def c_violations(root: Path) -> list[str]:
    """Every #include in `root`/csrc of a folder that C_FOLDERS does not allow, of Python or of torch."""
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        folder = path.relative_to(root / "csrc").parts[0]
        if path.suffix not in (".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh", ".inc") or folder not in C_FOLDERS:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
            if not match:
                continue
            where = f"csrc/{path.relative_to(root / 'csrc')}:{number}"
            kind, name = match.groups()
            if C_FORBIDDEN.match(name):
                found.append(f"{where} includes {name}")
            if kind == '"':
                candidates = [(base / name).resolve() for base in (path.parent, root / "csrc")]
                target = next((c for c in candidates if c.is_file()), None)
                inside = target is not None and target.is_relative_to((root / "csrc").resolve())
                if not inside or target.relative_to((root / "csrc").resolve()).parts[0] not in C_FOLDERS[folder]:
                    found.append(f"{where} includes {name}")
    return found


def test_python():
    assert python_violations(ROOT) == []


def test_no_circular_imports():
    assert circular_imports(ROOT) == []


def test_c():
    assert c_violations(ROOT) == []


# A file and a line of it that is wrong, in a package where all other files are empty.
WRONG = {
    "backends sideways, relative": ("backends/cpu/dwconv.py", "from ..eager import dwconv"),
    "up, in a function": ("backends/eager/dwconv.py", "def f():\n    from convnext_kernels import nn"),
    "to the top": ("backends/eager/dwconv.py", "import convnext_kernels"),
    "a third-party package in a class body": ("interop/timm.py", "class A:\n    import timm"),
    "a package without a row": ("utils/misc.py", "import torch"),
}


@pytest.mark.parametrize(("file", "source"), WRONG.values(), ids=WRONG)
def test_violations_are_seen(tmp_path, file, source):
    for name in ("__init__", "nn/__init__", "backends/eager/__init__", "backends/eager/dwconv"):
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import torch")
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert len(python_violations(tmp_path)) == 1


def test_circular_imports_are_found(tmp_path):
    folder = tmp_path / PACKAGE / "nn"
    folder.mkdir(parents=True)
    (folder / "layers.py").write_text("def f():\n    from convnext_kernels.nn import block")
    (folder / "block.py").write_text("from convnext_kernels.nn.layers import f")
    assert circular_imports(tmp_path) == ["nn.block -> nn.layers -> nn.block"]


@pytest.mark.parametrize(
    ("file", "include", "wrong"),
    [
        ("cpu/a.cpp", '"common/vec.h"', False),
        ("cpu/a.cpp", '"../cuda/k.cuh"', True),
        ("cuda/k.cu", "<torch/extension.h>", True),
    ],
)
def test_includes(tmp_path, file, include, wrong):
    for name in ("common/vec.h", "cpu/a.cpp", "cuda/k.cu", "cuda/k.cuh"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "csrc" / file).write_text(f"#  include {include}\n")
    assert bool(c_violations(tmp_path)) == wrong
