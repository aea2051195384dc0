"""Models of torchvision and timm, with weights from a file, pretrained, or random."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click
from torch import nn

from convnext_kernels.bench.workloads import initialise
from convnext_kernels.cli.photos import IMAGENET_MEAN_STD
from convnext_kernels.models.convnext import near

SEED = 0
RANDOM = f"random (seed {SEED}): every block contributes, the results have no meaning"


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 and eval mode, with its class names and normalisation."""

    model: nn.Module
    name: str  # library/name
    weights: str  # origin of the weights, for the reader
    classes: Sequence[str] | None = None  # of the pretrained weights
    mean_std: tuple[Sequence[float], Sequence[float]] = IMAGENET_MEAN_STD


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


def build(library: str, name: str, pretrained: bool) -> Loaded:
    """Build a model in eval mode; with pretrained weights they are downloaded."""
    classes = None
    if library == "torchvision":
        from torchvision import models

        model = models.get_model(name, weights="DEFAULT" if pretrained else None)
        classes = models.get_model_weights(name).DEFAULT.meta["categories"] if pretrained else None
        return Loaded(model.eval(), f"torchvision/{name}", "", classes)
    import timm

    model = timm.create_model(name, pretrained=pretrained).eval()
    config = timm.data.resolve_model_data_config(model)
    if pretrained and (subset := timm.data.infer_imagenet_subset(model)):
        info = timm.data.ImageNetInfo(subset)
        classes = [info.index_to_description(i) for i in range(info.num_classes())]
    return Loaded(model, f"timm/{name}", "", classes, mean_std=(config["mean"], config["std"]))


def load(name: str, pretrained: bool) -> Loaded:
    """Build the model `name` with pretrained or random weights."""
    library, plain = resolve(name)
    built = build(library, plain, pretrained)
    if pretrained:
        return replace(built, weights=f"pretrained, of {library}")
    initialise(built.model, SEED)
    return replace(built, weights=RANDOM)
