"""Draw the feature pyramid of a photograph, with a ConvNeXt as the backbone of a detector or a segmenter.

python examples/backbone.py --weights convnext_tiny.safetensors --image photo.jpg

Needs the "demo" extra (pip install "convnext-kernels[demo]"). Without --weights the network is random; its maps then
show edges and bright areas, as any random filters do.
"""

from pathlib import Path

import click
import numpy
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from convnext_kernels.models import ConvNeXt, create_model, list_models, load_weights

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))  # of ImageNet
SIZE = (640, 480)  # width, height
NAMES = [name for name in list_models() if "isotropic" not in name]  # with four stages
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def build(name: str, weights: Path | None) -> ConvNeXt:
    """Return the backbone: four maps, each with its own LayerNorm, as detectors and segmenters use them."""
    torch.manual_seed(0)
    # Layer scale starts at 1e-6: an untrained network would then be only its downsampling layers.
    options = {} if weights else {"layer_scale_init_value": 1.0}
    model = create_model(name, features_only=True, out_indices=(0, 1, 2, 3), feature_norm=True, **options)
    if weights:
        # The classifier's norm and layer are not needed; the four norms are new and trained with the detector.
        load_weights(model, weights, head="skip")
    return model.eval().to(memory_format=torch.channels_last)


def photograph(file: Path | None) -> Image.Image:
    """Read a picture, or the one that comes with scikit-learn, cropped to SIZE."""
    image = ImageOps.exif_transpose(Image.open(file)) if file else Image.fromarray(load_sample_image("china.jpg"))
    return ImageOps.fit(image.convert("RGB"), SIZE)


def draw(photo: Image.Image, maps: list[torch.Tensor], file: Path) -> None:
    """Draw the photograph, then over it the root mean square of each map's channels, black to white."""
    figure = Figure(figsize=(15, 2.9), layout="constrained")
    axes = figure.subplots(1, 5, subplot_kw={"xticks": (), "yticks": ()})
    axes[0].imshow(photo)
    for axis, feature in zip(axes[1:], maps, strict=True):
        energy = feature[0].square().mean(0).sqrt()
        low, high = energy.quantile(torch.tensor((0.01, 0.99))).tolist()
        axis.imshow(photo.convert("L"), cmap="gray")
        axis.imshow(energy.numpy(), "inferno", alpha=0.75, vmin=low, vmax=high, extent=(0, SIZE[0], SIZE[1], 0))
        axis.set_title(f"{feature.shape[1]} channels, {feature.shape[3]} x {feature.shape[2]}")
    figure.savefig(file, dpi=120)


@click.command()
@click.option("--model", "name", type=click.Choice(NAMES, False), metavar="NAME", default="convnext_tiny")
@click.option("--weights", type=FILE, help="Any format load_weights reads.")
@click.option("--image", type=FILE, help="[default: a temple in China]")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default="backbone.png", show_default=True)
def main(name: str, weights: Path | None, image: Path | None, output: Path) -> None:
    """Draw the feature pyramid of a photograph."""
    try:
        photo, model = photograph(image), build(name, weights)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    x = ((torch.from_numpy(numpy.array(photo)) / 255 - MEAN) / STD).permute(2, 0, 1)[None]  # NHWC in memory
    with torch.inference_mode():
        maps = model(x)
    for feature, info in zip(maps, model.feature_info, strict=True):
        click.echo(f"stride {info.stride:2}: {tuple(feature.shape)}")
    draw(photo, maps, output)
    click.echo(f"{name}, {f'weights of {weights}' if weights else 'random weights'}: {output}")


if __name__ == "__main__":
    main()
