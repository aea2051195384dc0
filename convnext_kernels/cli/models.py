"""``convnext-kernels models``: parameters and FLOPs of the models, and which models of other libraries are served."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

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


def counted(names: tuple[str, ...]) -> list[dict[str, object]]:
    """Count the models `names`, or all without names; ClickException suggests names for an unknown one."""
    options.check_names("NAMES: unknown model", names, list_models())
    found = []
    for row in published.models():
        if names and row.name not in names:
            continue
        with torch.device("meta"):
            model = create_model(row.name)
        counts = count(model, row.size)
        parameters, gflops = counts.parameters / 1e6, counts.multiply_adds / 1e9
        found.append(
            {
                "model": row.name,
                "size": row.size,
                "depths": model.depths,
                "dims": model.dims,
                "parameters_m": {"published": row.parameters.value, "counted": parameters},
                "gflops": {"published": row.gflops.value, "counted": gflops},
                "top1": row.top1 and row.top1.value,
                "met": row.parameters.met_by(parameters, SHARE) and row.gflops.met_by(gflops, SHARE),
            }
        )
    return found


def counted_table(found: list[dict[str, object]]) -> tuple[Table, str]:
    """What `counted` returns, and a sentence about it."""
    rows = [
        (
            row["model"],
            str(row["size"]),
            *("-".join(map(str, row[name])) for name in ("depths", "dims")),
            f"{row['parameters_m']['published']:g}",
            f"{row['parameters_m']['counted']:.2f}",
            f"{row['gflops']['published']:g}",
            f"{row['gflops']['counted']:.3f}",
            f"{row['top1'] or '-'}",
            "yes" if row["met"] else "no",
        )
        for row in found
    ]
    columns = ("model", "size", "depths", "dims", "M params", "counted", "GFLOPs", "counted", "top-1 %", "agrees")
    title = "The ConvNeXt models: published in the papers, and counted here (multiply-adds per image)"
    met = sum(row["met"] for row in found)
    said = f"{met} of {len(found)} rows are within {SHARE:.0%} of the published figures, or round to them"
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


def coverage(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """How much of the models `names`, or of all, is served; ClickException for a name that no library has."""
    makers = list(_makers())
    options.check_names("NAMES: unknown model", names, [name for _, name, _ in makers])
    found = []
    for library, name, make in makers:
        if names and name not in names:
            continue
        with torch.device("meta"):
            model = make()
        rows = acceleration_report(model).rows
        blocks, layers = ([row.replaceable for row in rows if (row.kind == "block") == of] for of in (True, False))
        # Convolutions over all channels whose windows overlap: stems, which stay PyTorch's.
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.kernel_size > m.stride]
        found.append(
            {
                "library": library,
                "model": name,
                "blocks": len(blocks),
                "served": sum(blocks),
                "layers": len(layers),
                "layers_served": sum(layers),
                "reasons": sorted({f"{row.kind}: {row.reason}" for row in rows if not row.replaceable}),
                "overlapping": sorted({f"{c.kernel_size[0]}x{c.kernel_size[1]} stride {c.stride[0]}" for c in convs}),
            }
        )
    return found


def coverage_table(found: list[dict[str, Any]]) -> tuple[Table, str]:
    """What `coverage` returns, and sentences about it."""
    names = ("blocks", "served", "layers", "layers_served")
    rows = []
    for r in found:
        stem = [f"stem {conv}: PyTorch's" for conv in r["overlapping"]]
        rows.append((r["library"], r["model"], *(str(r[name]) for name in names), "; ".join(r["reasons"] + stem)))
    blocks, served, layers, layers_served = (sum(row[name] for row in found) for name in names)
    whole = sum(not row["reasons"] for row in found)
    said = (
        f"{served} of {blocks} blocks are served, {whole} of {len(found)} models whole\n"
        f"{layers_served} of {layers} norms and downsampling layers between them are served"
    )
    if any(row["overlapping"] for row in found):
        said += (
            "\nA stem's overlapping convolutions sum over all channels, so they are matrix products: cuDNN and oneDNN "
            "compute them, and this package has no kernel for them."
        )
    columns = ("library", "model", "blocks", "served", "norms, downsampling", "served", "why not; stem")
    return Table("What accelerate() replaces", columns, rows), said


@click.command("models")
@click.argument("names", nargs=-1)
@click.option("--coverage", "served", is_flag=True, help="Of timm, torchvision, transformers: what is served.")
@options.as_json
def command(names: tuple[str, ...], served: bool, as_json: bool) -> None:
    """Count parameters and multiply-adds of the models NAMES (default: all).

    The table shows them beside the figures that the papers publish.
    """
    found = coverage(names) if served else counted(names)
    if as_json:
        options.print_json(found)
        return
    table, said = coverage_table(found) if served else counted_table(found)
    options.show(table, width=130)
    click.echo(said)
