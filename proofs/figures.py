"""Tables in Markdown, for the terminal and for pages; counted figures with their limits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    first, *lines = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return [first, "|" + "---|" * len(header), *lines]


@dataclass(frozen=True)
class Figure:
    """One counted figure and its limit; no kernel can be below `floor`."""

    what: str
    value: float
    floor: float
    limit: float | None
    unit: str

    @property
    def fails(self) -> bool:
        return self.limit is not None and self.value > self.limit


def markdown(figures: list[Figure]) -> list[str]:
    """Return the lines of a table of figures."""

    def cells(f: Figure) -> tuple[str, ...]:
        limit = "" if f.limit is None else f"{f.limit:g}"
        return f.what, f"{f.value:.4g} {f.unit}".strip(), f"{f.floor:g}", limit, "MISSED" if f.fails else ""

    return table(("figure", "counted", "floor", "limit", ""), map(cells, figures))


def command(file: Path, title: str, text: str, *makers: Callable[[int], Iterable[Figure]], missing: str = "") -> None:
    """The command line of a script that counts what `makers` yield for an architecture, and writes a page of records/.

    `missing`: why it cannot run here.
    """

    @click.command(help=title)
    @click.option("--arch", multiple=True, type=int, default=(90,), help="May be repeated.", show_default=True)
    @click.option("--check", is_flag=True, help="Fail if a figure exceeds its limit.")
    @click.option("--update", is_flag=True, help=f"Write {file.name}.")
    def main(arch: tuple[int, ...], check: bool, update: bool) -> None:
        if missing:
            raise click.ClickException(missing)
        figures = [figure for a in arch for make in makers for figure in make(a)]
        failed = [figure.what for figure in figures if figure.fails]
        lines = markdown(figures)
        print("\n".join(lines))
        print(f"{len(figures)} figures counted, {len(failed)} above their limit; nothing ran on a GPU.")
        if update:
            file.write_text("\n".join([f"# {title}", "", text, "", *lines]) + "\n")
        if check and failed:
            raise SystemExit("above their limit: " + "; ".join(failed))

    main()


def block_arguments(n: int, channels: int, size: int, grn: bool, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Return arguments of `functional.convnext_block`: images in channels_last, weights that keep magnitudes."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    hidden = 4 * channels
    arguments = {
        "x": normal(n, channels, size, size).contiguous(memory_format=torch.channels_last),
        "dwconv_weight": normal(channels, 1, 7, 7) / 7,
        "dwconv_bias": normal(channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "pwconv1_weight": normal(hidden, channels) / channels**0.5,
        "pwconv1_bias": normal(hidden),
        "pwconv2_weight": normal(channels, hidden) / hidden**0.5,
        "pwconv2_bias": normal(channels),
    }
    if grn:
        return arguments | {"grn_weight": normal(hidden), "grn_bias": normal(hidden)}
    return arguments | {"gamma": normal(channels)}
