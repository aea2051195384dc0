"""``convnext-kernels models``: parameters and FLOPs of the models, counted and as published."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from convnext_kernels.cli import options

if TYPE_CHECKING:
    from convnext_kernels.models.published import Model

SHARE = 0.01  # allowed difference from the published figure, unless ours rounds to it


@dataclass(frozen=True)
class Row:
    """A model at one image size."""

    published: "Model"
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    parameters: float  # millions
    gflops: float  # billions of multiply-adds

    @property
    def met(self) -> bool:
        """Whether both figures agree with the published ones."""
        p = self.published
        return p.parameters.met_by(self.parameters, SHARE) and p.gflops.met_by(self.gflops, SHARE)


def _names() -> list[str]:
    from convnext_kernels.models import list_models

    return list_models()


def rows(names: tuple[str, ...]) -> list[Row]:
    """Count the models `names`, or all without names; ClickException suggests names for an unknown one."""
    import torch

    from convnext_kernels.models import create_model, published
    from convnext_kernels.models.convnext import near
    from convnext_kernels.models.counting import count

    for name in names:
        if name not in _names():
            raise click.ClickException(f"NAMES: unknown model {name!r}; {near(name, _names())}")
    found = []
    for row in published.models():
        if names and row.name not in names:
            continue
        with torch.device("meta"):
            model = create_model(row.name)
        counted = count(model, row.size)
        found.append(Row(row, model.depths, model.dims, counted.parameters / 1e6, counted.multiply_adds / 1e9))
    return found


@click.command("models")
@click.argument("names", nargs=-1, shell_complete=options.complete(_names))
@click.option("--coverage", is_flag=True, help="Of timm, torchvision and transformers: which blocks are served.")
@options.as_json
def command(names: tuple[str, ...], coverage: bool, as_json: bool) -> None:
    """Count parameters and multiply-adds of the models NAMES (default: all).

    The table shows them beside the figures that the papers publish.
    """
    if coverage:
        from convnext_kernels.cli import coverage as served

        served.show(served.coverage(names), as_json)
        return
    found = rows(names)
    if as_json:
        values = [
            {
                "model": row.published.name,
                "size": row.published.size,
                "depths": row.depths,
                "dims": row.dims,
                "parameters_m": {"published": row.published.parameters.value, "counted": row.parameters},
                "gflops": {"published": row.published.gflops.value, "counted": row.gflops},
                "met": row.met,
            }
            for row in found
        ]
        options.print_json(values)
        return
    from rich.table import Table

    table = Table(title="The ConvNeXt models: published in the papers, and counted here (multiply-adds per image)")
    for name in ("model", "size", "depths", "dims"):
        table.add_column(name, overflow="fold")
    for name in ("M params", "counted", "GFLOPs", "counted", "top-1 %"):
        table.add_column(name, justify="right")
    table.add_column("agrees")
    for row in found:
        p = row.published
        table.add_row(
            *(p.name, str(p.size), "-".join(map(str, row.depths)), "-".join(map(str, row.dims))),
            *(p.parameters.text, f"{row.parameters:.2f}", p.gflops.text, f"{row.gflops:.3f}"),
            *(p.top1.text if p.top1 else "-", "[green]yes" if row.met else "[red]no"),
        )
    console = options.console(130)
    console.print(table)
    met = sum(row.met for row in found)
    console.print(f"{met} of {len(found)} rows are within {SHARE:.0%} of the published figures, or round to them")
