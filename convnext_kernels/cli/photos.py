"""Photographs for the demo: those in scikit-learn and scikit-image, or the user's."""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor

from convnext_kernels.bench.tables import one_line

if TYPE_CHECKING:
    from PIL.Image import Image
THUMBNAIL = 176  # pixels
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Photo:
    """A photograph, cropped to a square at the centre."""

    name: str
    pixels: Tensor  # (3, size, size) uint8
    thumbnail: str  # data URI of a JPEG


def _photo(name: str, image: "Image", size: int) -> Photo:
    import numpy
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image).convert("RGB")
    pixels = torch.from_numpy(numpy.array(ImageOps.fit(image, (size, size)))).permute(2, 0, 1)
    jpeg = io.BytesIO()
    ImageOps.fit(image, (THUMBNAIL, THUMBNAIL)).save(jpeg, "JPEG", quality=85)
    return Photo(name, pixels, "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode())


def shipped(size: int) -> list[Photo]:
    """The eight photographs in the wheels of scikit-learn and scikit-image."""
    from PIL import Image
    from skimage import data
    from sklearn import datasets

    arrays = {name: datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name in ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field"):
        arrays[name] = getattr(data, name)()
    arrays["motorcycle"] = data.stereo_motorcycle()[0]
    return [_photo(name.replace("_", " "), Image.fromarray(array), size) for name, array in arrays.items()]


def read(paths: Sequence[Path], size: int) -> list[Photo]:
    """Read image files; ClickException names the first that cannot be read."""
    from PIL import Image

    photos = []
    for file in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as image:
                    photos.append(_photo(str(file), image, size))
        except Exception as error:  # a damaged or far too large picture raises many types
            raise click.ClickException(f"{file}: cannot be read: {one_line(error)}") from error
    return photos
