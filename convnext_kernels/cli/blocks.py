"""``convnext-kernels blocks``: FusedConvNeXtBlock against the plain block, at the four stages of ConvNeXt-T."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.cli import options

if TYPE_CHECKING:
    from torch import nn

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels, height = width (arXiv 2201.03545, table 9)


def eager_block(dim: int, use_grn: bool) -> "nn.Module":
    """The block as its papers define it, in plain PyTorch; parameters have the official names."""
    import torch
    from torch import nn

    class ResponseNorm(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(1, 1, 1, hidden))
            self.beta = nn.Parameter(torch.zeros(1, 1, 1, hidden))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
            response = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
            return self.gamma * (x * response) + self.beta + x

    class EagerBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.pwconv1 = nn.Linear(dim, 4 * dim)
            self.act = nn.GELU()
            self.grn = ResponseNorm(4 * dim) if use_grn else None
            self.pwconv2 = nn.Linear(4 * dim, dim)
            self.gamma = None if use_grn else nn.Parameter(torch.ones(dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            y = self.act(self.pwconv1(y))
            if self.grn is not None:
                y = self.grn(y)
            y = self.pwconv2(y)
            if self.gamma is not None:
                y = self.gamma * y
            return x + y.permute(0, 3, 1, 2)

    return EagerBlock()


def serving_backend(dim: int, dtype: str, use_grn: bool, device: str, backend: str) -> str:
    """Name of the backend that serves this block; BackendError when none does."""
    import torch

    from convnext_kernels.planner import choose
    from convnext_kernels.spec import OpSpec

    torch_dtype = getattr(torch, options.DTYPES[dtype])
    spec = OpSpec("block", device, torch_dtype, torch_dtype, dim, 7, 1, 4 * dim, use_grn)
    return choose(spec, backend).__name__.split(".")[2]


def measure(
    dim: int, size: int, use_grn: bool, batch: int, dtype: str, device: str, backend: str, repeats: int
) -> dict[str, object]:
    """One cell of the table as plain values; times are None where the numbers are wrong."""
    import copy

    import torch

    from convnext_kernels import FusedConvNeXtBlock
    from convnext_kernels.cli.compare import compare
    from convnext_kernels.cli.models import initialise
    from convnext_kernels.cli.timing import interleave

    place = {"device": device, "dtype": getattr(torch, options.DTYPES[dtype])}
    eager = eager_block(dim, use_grn)
    initialise(eager)
    eager.to(**place, memory_format=torch.channels_last)
    fused = FusedConvNeXtBlock(dim, use_grn=use_grn, backend=backend, **place)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(batch, dim, size, size, generator=torch.Generator().manual_seed(1))
    x = x.to(**place, memory_format=torch.channels_last)
    with torch.inference_mode():
        comparison = compare(copy.deepcopy(eager).double()(x.double()), eager(x), fused(x))
    cell = {
        "version": "V2" if use_grn else "V1",
        "channels": dim,
        "size": size,
        "batch": batch,
        "dtype": dtype,
        "backend": serving_backend(dim, dtype, use_grn, device, backend),
        "eager_error": comparison.eager_error,
        "accelerated_error": comparison.accelerated_error,
        "allowed_error": comparison.allowed,
        "within": comparison.within,
        "eager_ms": None,
        "accelerated_ms": None,
        "speedup": None,
    }
    if comparison.within:
        candidates = {"eager": lambda: eager(x), "accelerated": lambda: fused(x)}
        times = interleave(candidates, repeats=repeats, device=device)
        for name, timing in times.items():
            cell[f"{name}_ms"] = {"median": timing.median, "minimum": timing.minimum}
        cell["speedup"] = times["eager"].median / times["accelerated"].median
    return cell


def _table(cells: list[dict[str, object]], title: str) -> object:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for column in ("block", "batch", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("eager ms", "fused ms", "speed-up", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        block = f"{cell['version']} C{cell['channels']} {cell['size']}x{cell['size']}"
        row = [block, str(cell["batch"]), cell["dtype"]]
        if cell["within"]:
            for name in ("eager_ms", "accelerated_ms"):
                row.append(f"{cell[name]['median']:.2f} ({cell[name]['minimum']:.2f})")
            row.append(Text(f"{cell['speedup']:.2f}x", "green" if cell["speedup"] > 1 else "red"))
        else:
            row += ["", "", Text("wrong", "red")]
        error = cell["accelerated_error"] / cell["allowed_error"]
        table.add_row(*row, ">10" if error > 10 else f"{error:.2f}")
    return table


@click.command("blocks")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8), show_default=True)
@options.dtypes
@click.option("--repeats", type=click.IntRange(min=1), default=30, show_default=True, help="Timed calls of each.")
@options.threads
@options.backend
@options.device
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the table to this file.")
def command(
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    repeats: int,
    threads: int | None,
    backend: str,
    device: str,
    json_file: Path | None,
) -> None:
    """Time FusedConvNeXtBlock against the plain eager block, V1 and V2, at the four stages of ConvNeXt-T.

    Both take the same channels_last input and are called in turn in one process; numbers are checked against
    fp64 before a time is taken. Fails where a result is wrong.
    """
    from rich.console import Console
    from rich.text import Text

    from convnext_kernels.cli.compare import RULE
    from convnext_kernels.cli.info import collect
    from convnext_kernels.cli.timing import steady_allocator

    options.check_backend(backend)
    options.check_device(device)
    if json_file is not None:
        options.check_writable(json_file, "--json")
    wanted = [
        (dim, size, use_grn, batch, dtype)
        for use_grn in (False, True)
        for dtype in dict.fromkeys(dtypes)
        for batch in dict.fromkeys(batches)
        for dim, size in STAGES
    ]
    cells = []
    with (
        options.thread_count(threads),
        steady_allocator(),
        options.progress_bar("blocks", len(wanted)) as advance,
    ):
        machine = collect()
        for dim, size, use_grn, batch, dtype in wanted:
            advance(f"V{1 + use_grn} C{dim} batch {batch} {dtype}", 0)
            cells.append(measure(dim, size, use_grn, batch, dtype, device, backend, repeats))
            advance("blocks", 1)
    served = ", ".join(dict.fromkeys(cell["backend"] for cell in cells))
    console = Console()
    console.print(_table(cells, f"ConvNeXt block, ms: median (minimum) of {repeats}"), highlight=False)
    where = machine["gpus"][0] if device == "cuda" else machine["cpu"]["name"]
    notes = (
        f"fused: backend {served}. {where}, CPU threads: {machine['threads']['torch']}.",
        f"error: the fused block's largest error to fp64 over the allowed one. {RULE}",
    )
    for note in notes:
        console.print(Text(note, "dim"))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "repeats": repeats, "cells": cells}, indent=2) + "\n")
    wrong = sum(not cell["within"] for cell in cells)
    faster = sum(cell["within"] and cell["speedup"] > 1 for cell in cells)
    click.echo(f"The fused block is faster than eager in {faster} of {len(cells)} cells.")
    if all(cell["backend"] == "eager" for cell in cells):
        click.echo("Only the eager backend served: both columns are PyTorch (`convnext-kernels info` says why).")
    if wrong:
        raise click.ClickException(f"wrong results in {wrong} of {len(cells)} cells: error above the allowed one")
