"""Figures printed in the papers (arXiv 2201.03545, 2301.00808); GFLOPs are billions of multiply-adds.

The tables are CSV files in this folder, each with its source in the first lines.
"""

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Figure:
    """A printed number, and half a unit of its last digit: the largest rounding error."""

    text: str

    @property
    def value(self) -> float:
        """The number."""
        return float(self.text)

    @property
    def half_unit(self) -> float:
        """Half a unit of the last digit."""
        return 0.5 * 10.0 ** -len(self.text.partition(".")[2])

    def deviation(self, ours: float) -> float:
        """Return `ours` relative to the printed number, minus 1."""
        return ours / self.value - 1

    def met_by(self, ours: float, share: float) -> bool:
        """Whether `ours` is within that share of the printed number, or rounds to it."""
        return abs(ours - self.value) <= max(share * self.value, self.half_unit)


@dataclass(frozen=True)
class Model:
    """A row of the model tables."""

    name: str  # of `create_model`
    size: int  # side of the images
    parameters: Figure  # millions
    gflops: Figure
    v100: Figure | None  # images/s, fp32
    a100: Figure | None  # images/s, TF32, channels_last
    top1: Figure | None  # %, ImageNet-1k, trained on nothing else


@dataclass(frozen=True)
class Regime:
    """The figures of a step in one of the two columns."""

    top1: Figure  # %
    top1_deviation: Figure | None  # of three runs
    gflops: Figure


@dataclass(frozen=True)
class RoadmapRow:
    """A row of the tables of the modernization path."""

    title: str
    regimes: dict[str, Regime]  # by the names of `roadmap.REGIMES`


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def _figure(text: str) -> Figure | None:
    return Figure(text) if text else None


def models() -> list[Model]:
    """Return all rows of tables 1, 2 and 12 (V1) and of the V2 paper."""
    found = []
    for row in _rows("families.csv"):
        name, at, _ = row["model"].removesuffix("px").partition("_384")
        optional = (_figure(row[key]) for key in ("img_s_v100", "img_s_a100", "top1_1k"))
        found.append(Model(name, 384 if at else 224, Figure(row["params_m"]), Figure(row["gflops"]), *optional))
    return found


def roadmap() -> list[RoadmapRow]:
    """Return all rows of tables 10 (ResNet-50) and 11 (ResNet-200), with the original recipe and with Swin."""
    return [
        RoadmapRow(
            row["step"],
            {
                "resnet50": Regime(Figure(row["r50_top1"]), _figure(row["r50_std"]), Figure(row["r50_gflops"])),
                "resnet200": Regime(Figure(row["r200_top1"]), None, Figure(row["r200_gflops"])),
            },
        )
        for row in _rows("roadmap.csv")
    ]
