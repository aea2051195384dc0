"""Make a repository for Hugging Face's package `kernels` from this package: the Triton and the eager backend.

    python release/hf_kernels.py OUT

OUT, a folder that does not exist or is empty, gets

    build.toml                     what kernel-builder reads
    torch-ext/convnext_kernels/    the sources, for kernel-builder
    build/torch-cuda/ ...          the same with metadata.json, once per backend of PyTorch: what `kernels` loads
    README.md                      how to use it

The sources are those of `convnext_kernels` that the layers need, with two changes that the format asks for: imports are
relative, and the ops have a namespace of their own, so that several versions, and this package, can be loaded together.
The folders are those of kernel-builder for kernels without compiled code; `torch-universal`, one folder for all, is the
older form, and `kernels` looks for it last.
"""

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "convnext_kernels"
LAYERS = Path(__file__).with_name("hf_layers.py")
BACKENDS = ("cuda", "rocm", "cpu")
VERSION = 1  # of the layers: their names, arguments and meaning
# What is imported by name only (`backends.get`, `backends.op_module`).
ROOTS = ("functional.py", "dispatch.py", "backends/eager/*.py", "backends/triton/*.py")
REPLACED = (
    ("backends/__init__.py", 'NAMES = ("triton", "cuda", "cpu", "eager")', 'NAMES = ("triton", "eager")'),
    ("ops/registration.py", 'NAMESPACE = "convnext_kernels"', 'NAMESPACE = "_NAMESPACE_"'),
)
INIT = '''"""Fused ConvNeXt blocks: Triton kernels, forward and backward."""

from . import functional, layers
from .dispatch import list_backends, use_backend

__all__ = ["functional", "layers", "list_backends", "use_backend"]
'''
BUILD = f"""[general]
name = "convnext-kernels"
version = {VERSION}
edition = 5
license = "mit"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
README = """---
license: mit
tags:
- kernels
---
# convnext-kernels

The ConvNeXt block (V1, V2, DINOv3) in one op: Triton kernels, forward and backward, for `kernels`. Layers:
`ConvNextLayer`, `ConvNextV2Layer`, `DINOv3ConvNextLayer`, which take the place of transformers' blocks of these names.

```python
from pathlib import Path

from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers.models.convnext.modeling_convnext import ConvNextLayer

replace_kernel_forward_from_hub(ConvNextLayer, "ConvNextLayer")
here = LocalLayerRepository(repo_path=Path("."), layer_name="ConvNextLayer")  # from the Hub: LayerRepository
with use_kernel_mapping({"ConvNextLayer": {"cuda": here, "cpu": here}}):
    model = kernelize(model, mode=Mode.INFERENCE)
```

CPU tensors are computed by PyTorch's operators. The package `convnext-kernels` has CPU and CUDA kernels too.
"""


def imported(source: str) -> set[str]:
    """Return the names of this package that a source imports, also inside functions, such as "ops.block"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            inside = node.module.partition(".")[2]
            found |= {inside} | {f"{inside}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == PACKAGE.name}
    return found


def needed() -> dict[str, str]:
    """Return the sources of the package that the roots and the layers need, by their paths in it."""
    found: dict[str, str] = {}
    waiting = {file for root in ROOTS for file in PACKAGE.glob(root)}
    sources = [LAYERS.read_text(encoding="utf-8")]
    while waiting or sources:
        for file in waiting:
            name = file.relative_to(PACKAGE).as_posix()
            found[name] = file.read_text(encoding="utf-8")
            sources.append(found[name])
        waiting = set()
        for name in set().union(*map(imported, sources)):
            parts = name.split(".") if name else []
            # The package's own __init__ is replaced by INIT.
            files = [PACKAGE.joinpath(*parts[: i + 1], "__init__.py") for i in range(len(parts))]
            files.append(PACKAGE.joinpath(*parts).with_suffix(".py"))
            waiting |= {f for f in files if f.is_file() and f.relative_to(PACKAGE).as_posix() not in found}
        sources = []
    return found | {"layers.py": LAYERS.read_text(encoding="utf-8"), "__init__.py": INIT}


def own_namespace(name: str, source: str) -> str:
    """Return a source with relative imports and "_NAMESPACE_" for the namespace of the ops."""
    dots = "." * len(Path(name).parts)
    source = re.sub(r"^( *)from convnext_kernels(?:\.(\S+))? import", rf"\1from {dots}\2 import", source, flags=re.M)
    source = re.sub(r"^( *)import convnext_kernels\.(\w+)(?= |$)", rf"\1from {dots} import \2", source, flags=re.M)
    for file, old, new in REPLACED:
        if file == name:
            assert source.count(old) == 1, f"{file}: expected {old!r} once"
            source = source.replace(old, new)
    source = re.sub(r"torch\.ops\.convnext_kernels\b", "torch.ops._NAMESPACE_", source).replace(
        "convnext_kernels::", "_NAMESPACE_::"
    )
    assert not imported(source), f"{name}: {imported(source)} would be imported from the installed package"
    return source


def _write(folder: Path, files: dict[str, str], namespace: str) -> None:
    for name, source in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.replace("_NAMESPACE_", namespace), encoding="utf-8")
    for file in PACKAGE.glob("tuning/measured_*.json"):
        shutil.copy(file, folder / file.relative_to(PACKAGE))


def make(out: Path) -> None:
    """Write the repository to `out`. Raises FileExistsError if there is something."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"OUT: expected an empty or a new folder, {out} has files")
    files = {name: own_namespace(name, source) for name, source in sorted(needed().items())}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    sources = out / "torch-ext" / PACKAGE.name
    _write(sources, files, f"_convnext_kernels_{digest}")
    for backend in BACKENDS:
        name = f"_convnext_kernels_{backend}_{digest}"
        folder = out / "build" / f"torch-{backend}"
        _write(folder, files, name)
        metadata = {
            "name": "convnext-kernels",
            "id": name,
            "version": VERSION,
            "license": "MIT",
            "backend": {"type": backend},
            "python-depends": [],
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (out / "build.toml").write_text(BUILD, encoding="utf-8")
    (out / "README.md").write_text(README, encoding="utf-8")
    shutil.copy(PACKAGE.parent / "LICENSE", out / "LICENSE")
    print(f"{out}: {len(files)} files for each of {', '.join(BACKENDS)}, version {digest}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
