"""``convnext-kernels models``: the family, counted, beside the papers' figures."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from convnext_kernels.models.published import Model

SHARE = 0.01  # of a printed figure that ours may differ by, if it does not round to it


@dataclass(frozen=True)
class Row:
    """A model at a size of images."""

    published: "Model"
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    parameters: float  # millions
    gflops: float  # billions of multiply-adds

    @property
    def met(self) -> bool:
        """Whether both figures are the published ones."""
        p = self.published
        return p.parameters.met_by(self.parameters, SHARE) and p.gflops.met_by(self.gflops, SHARE)


def rows(names: tuple[str, ...]) -> list[Row]:
    """Count the models called `names`, all without; ClickException for an unknown name, with the near ones."""
    import torch

    from convnext_kernels.models import create_model, list_models, published
    from convnext_kernels.models.convnext import near
    from convnext_kernels.models.counting import count

    for name in names:
        if name not in list_models():
            raise click.ClickException(f"unknown model {name!r}; {near(name, list_models())}")
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
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Count parameters and multiply-adds of the models (all, or NAMES) and show them beside the papers' figures."""
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
        click.echo(json.dumps(values, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The ConvNeXt family: printed in the papers, and counted here (multiply-adds of one image)")
    for name in ("model", "size", "depths", "dims"):
        table.add_column(name, overflow="fold")
    for name in ("M params", "counted", "GFLOPs", "counted", "top-1 %"):
        table.add_column(name, justify="right")
    table.add_column("met")
    for row in found:
        p = row.published
        table.add_row(
            *(p.name, str(p.size), "-".join(map(str, row.depths)), "-".join(map(str, row.dims))),
            *(p.parameters.text, f"{row.parameters:.2f}", p.gflops.text, f"{row.gflops:.3f}"),
            *(p.top1.text if p.top1 else "-", "[green]yes" if row.met else "[red]no"),
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 130)  # of a file or a pipe nobody knows the width
    console.print(table, highlight=False)
    met = sum(row.met for row in found)
    console.print(
        f"{met} of {len(found)} rows within {SHARE:.0%} of the printed figures, or rounding to them", highlight=False
    )
