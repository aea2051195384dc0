"""Tables in Markdown, for the terminal and for pages; counted figures with their limits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    cells = (
        (f.what, f"{f.value:.4g} {f.unit}".strip(), f"{f.floor:g}", "" if f.limit is None else f"{f.limit:g}")
        for f in figures
    )
    marked = ((*row, "MISSED" if f.fails else "") for row, f in zip(cells, figures, strict=True))
    return table(("figure", "counted", "floor", "limit", ""), marked)


def show(figures: list[Figure]) -> list[str]:
    """Print the figures; return those above their limit."""
    print("\n".join(markdown(figures)))
    failed = [f.what for f in figures if f.fails]
    print(f"{len(figures)} figures counted, {len(failed)} above their limit; nothing ran on a GPU.")
    return failed


def page(title: str, text: str, figures: list[Figure]) -> str:
    """Return a page of records/: its title, what `text` says of the figures, their table."""
    return "\n".join([f"# {title}", "", text, "", *markdown(figures)]) + "\n"


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
