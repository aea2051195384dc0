"""``convnext-kernels models``: parameters and FLOPs of the models, and which models of other libraries are served."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import click
import torch
from torch import nn

from convnext_kernels.bench.tables import Table
from convnext_kernels.cli import options
from convnext_kernels.interop import acceleration_report
from convnext_kernels.models import create_model, list_models, published
from convnext_kernels.models.counting import count

SHARE = 0.01  # allowed difference from the published figure, unless ours rounds to it
TRANSFORMERS = ("ConvNext", "ConvNextV2", "DINOv3ConvNext")


def counted(names: tuple[str, ...]) -> tuple[Table, str]:
    """Count the models `names`, or all; the table and a sentence. ClickException suggests names for an unknown one."""
    options.check_names("NAMES: unknown model", names, list_models())
    rows = []
    for row in published.models():
        if names and row.name not in names:
            continue
        with torch.device("meta"):
            model = create_model(row.name)
        counts = count(model, row.size)
        parameters, gflops = counts.parameters / 1e6, counts.multiply_adds / 1e9
        met = row.parameters.met_by(parameters, SHARE) and row.gflops.met_by(gflops, SHARE)
        shape = ("-".join(map(str, numbers)) for numbers in (model.depths, model.dims))
        cells = (f"{row.parameters.value:g}", f"{parameters:.2f}", f"{row.gflops.value:g}", f"{gflops:.3f}")
        top1 = f"{row.top1.value}" if row.top1 else "-"
        rows.append((row.name, str(row.size), *shape, *cells, top1, "yes" if met else "no"))
    columns = ("model", "size", "depths", "dims", "M params", "counted", "GFLOPs", "counted", "top-1 %", "agrees")
    title = "The ConvNeXt models: published in the papers, and counted here (multiply-adds per image)"
    agree = sum(row[-1] == "yes" for row in rows)
    said = f"{agree} of {len(rows)} rows are within {SHARE:.0%} of the published figures, or round to them"
    return Table(title, columns, rows), said


def _makers() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Yield (library, name, function that makes the model) for each installed library."""
    with suppress(ImportError):
        import timm

        for name in timm.list_models("*convnext*"):
            yield "timm", name, lambda name=name: timm.create_model(name)
    with suppress(ImportError):
        from torchvision import models

        for name in models.list_models(include="convnext*"):
            yield "torchvision", name, lambda name=name: models.get_model(name)
    with suppress(ImportError):
        import transformers

        for name in TRANSFORMERS:
            if kind := getattr(transformers, f"{name}Model", None):
                config = getattr(transformers, f"{name}Config")
                yield "transformers", f"{name}Model", lambda kind=kind, config=config: kind(config())


def coverage(names: tuple[str, ...]) -> tuple[Table, str]:
    """How much of the models `names`, or of all, is served: the table, and sentences. ClickException as `counted`."""
    makers = list(_makers())
    options.check_names("NAMES: unknown model", names, [name for _, name, _ in makers])
    rows, totals, whole = [], [0] * 4, 0
    for library, name, make in makers:
        if names and name not in names:
            continue
        with torch.device("meta"):
            model = make()
        found = acceleration_report(model).rows
        blocks, layers = ([row.replaceable for row in found if (row.kind == "block") == of] for of in (True, False))
        numbers = (len(blocks), sum(blocks), len(layers), sum(layers))
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        reasons = sorted({f"{row.kind}: {row.reason}" for row in found if not row.replaceable})
        whole += not reasons
        rows.append((library, name, *map(str, numbers), "; ".join(reasons)))
    said = (
        f"{totals[1]} of {totals[0]} blocks are served, {whole} of {len(rows)} models whole\n"
        f"{totals[3]} of {totals[2]} norms and downsampling layers between them are served\n"
        "Stems and other convolutions over all channels are matrix products: cuDNN and oneDNN compute them."
    )
    columns = ("library", "model", "blocks", "served", "norms, downsampling", "served", "why not")
    return Table("What accelerate() replaces", columns, rows), said


@click.command("models")
@click.argument("names", nargs=-1)
@click.option("--coverage", "served", is_flag=True, help="Of timm, torchvision, transformers: what is served.")
def command(names: tuple[str, ...], served: bool) -> None:
    """Count parameters and multiply-adds of the models NAMES (default: all).

    The table shows them beside the figures that the papers publish.
    """
    table, said = coverage(names) if served else counted(names)
    options.show(table, width=130)
    click.echo(said)
