"""Models of torchvision and timm, with pretrained or random weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import click
from torch import nn

from convnext_kernels.bench import workloads
from convnext_kernels.cli.photos import IMAGENET_MEAN_STD
from convnext_kernels.interop import AccelerationReport, accelerate, acceleration_report
from convnext_kernels.models.convnext import near

SEED = 0
RANDOM = f"random (seed {SEED}): every block contributes, the results have no meaning"


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 and eval mode, with its class names and normalisation."""

    model: nn.Module
    name: str  # library/name
    weights: str  # where they come from, for the reader
    classes: Sequence[str] | None  # of the pretrained weights
    mean_std: tuple[Sequence[float], Sequence[float]]


def resolve(name: str) -> tuple[str, str]:
    """Return (library, name) for ``torchvision/NAME``, ``timm/NAME`` or NAME, which torchvision has or else timm."""
    library, slash, plain = name.rpartition("/")
    if slash and library not in ("torchvision", "timm"):
        raise click.ClickException(f"--model {name}: unknown library {library!r}, expected torchvision/ or timm/")
    known: list[str] = []
    if library != "timm":
        from torchvision import models

        known = models.list_models(module=models)
        if plain in known:
            return "torchvision", plain
    if library != "torchvision":
        import timm

        if timm.is_model(plain):
            return "timm", plain
        known = [*known, *timm.list_models()]
    hint = near(plain, list(dict.fromkeys(known)))
    hint = f"; {hint}" if hint.startswith("close") else ""  # not all thousand names
    raise click.ClickException(f"--model {name}: not found in {library or 'torchvision or timm'}{hint}")


def load(name: str, pretrained: bool) -> Loaded:
    """The model `name`; pretrained weights are downloaded, otherwise they are random (`workloads.initialise`)."""
    library, plain = resolve(name)
    model, classes, mean_std = workloads.load(library, plain, pretrained), None, IMAGENET_MEAN_STD
    if library == "torchvision" and pretrained:
        from torchvision.models import get_model_weights

        classes = get_model_weights(plain).DEFAULT.meta["categories"]
    if library == "timm":
        from timm import data

        config = data.resolve_model_data_config(model)
        mean_std = config["mean"], config["std"]
        if pretrained and (subset := data.infer_imagenet_subset(model)):
            info = data.ImageNetInfo(subset)
            classes = [info.index_to_description(i) for i in range(info.num_classes())]
    if not pretrained:
        workloads.initialise(model, SEED)
    return Loaded(model, f"{library}/{plain}", f"pretrained, of {library}" if pretrained else RANDOM, classes, mean_std)


def accelerated(model: nn.Module, name: str) -> AccelerationReport:
    """Accelerate `model` in place and report it; ClickException if nothing can be replaced."""
    found = acceleration_report(model)
    if found.rows:
        found = acceleration_report(accelerate(model))
    if not found.replaced:
        reasons = "; ".join(dict.fromkeys(row.reason for row in found.rows)) or str(found)
        raise click.ClickException(f"--model {name}: nothing to accelerate: {reasons}")
    return found
