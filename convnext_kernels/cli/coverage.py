"""``convnext-kernels models --coverage``: which blocks of other libraries' ConvNeXt models the kernels serve."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from convnext_kernels.cli import options

if TYPE_CHECKING:
    from torch.nn import Module

TRANSFORMERS = ("ConvNext", "ConvNextV2", "DINOv3ConvNext")


@dataclass(frozen=True)
class Coverage:
    """The blocks of one entry point of a library."""

    library: str
    model: str
    blocks: int
    served: int
    reasons: tuple[str, ...]  # why the others are not


def _makers() -> Iterator[tuple[str, str, Callable[[], "Module"]]]:
    """Yield (library, name, function that makes the model) for each installed library."""
    try:
        import timm
    except ImportError:
        pass
    else:
        for name in timm.list_models("*convnext*"):
            yield "timm", name, lambda name=name: timm.create_model(name)
    try:
        from torchvision import models
    except ImportError:
        pass
    else:
        for name in models.list_models(include="convnext*"):
            yield "torchvision", name, lambda name=name: models.get_model(name)
    try:
        import transformers
    except ImportError:
        pass
    else:
        for name in TRANSFORMERS:
            if kind := getattr(transformers, f"{name}Model", None):
                config = getattr(transformers, f"{name}Config")
                yield "transformers", f"{name}Model", lambda kind=kind, config=config: kind(config())


def coverage(names: tuple[str, ...]) -> list[Coverage]:
    """Look at the models `names`, or at all without names; ClickException for a name that no library has."""
    import torch

    from convnext_kernels.interop import acceleration_report

    makers = list(_makers())
    if not makers:
        raise click.ClickException('none of timm, torchvision, transformers is installed: pip install ".[demo]"')
    known = [name for _, name, _ in makers]
    for name in names:
        if name not in known:
            from convnext_kernels.models.convnext import near

            raise click.ClickException(f"NAMES: unknown model {name!r}; {near(name, known)}")
    found = []
    for library, name, make in makers:
        if names and name not in names:
            continue
        with torch.device("meta"):
            rows = [row for row in acceleration_report(make()).rows if row.kind == "block"]
        refused = [row.reason for row in rows if not row.replaceable]
        found.append(Coverage(library, name, len(rows), len(rows) - len(refused), tuple(sorted(set(refused)))))
    return found


def show(found: list[Coverage], as_json: bool) -> None:
    """Print the table, or one JSON document."""
    if as_json:
        options.print_json([vars(row) | {"reasons": list(row.reasons)} for row in found])
        return
    from rich.table import Table

    table = Table(title="Blocks that accelerate() replaces")
    for name in ("library", "model", "why not"):
        table.add_column(name, overflow="fold")
    for name in ("blocks", "served"):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(row.library, row.model, "; ".join(row.reasons), str(row.blocks), str(row.served))
    console = options.console(110)
    console.print(table)
    blocks, served = sum(row.blocks for row in found), sum(row.served for row in found)
    whole = sum(row.served == row.blocks for row in found)
    console.print(f"{served} of {blocks} blocks are served, {whole} of {len(found)} models whole")
