import numpy
import pytest
import torch
from PIL import Image

from convnext_kernels.cli import photos

DEMO = ("demo", "--size", "32")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(numpy.arange(40 * 60 * 3, dtype=numpy.uint8).reshape(40, 60, 3)).save(path)
    return path


def test_shipped_photographs():
    found = photos.shipped(64)
    assert len({photo.name for photo in found}) == len(found) == 8
    for photo in found:
        assert photo.pixels.shape == (3, 64, 64)
        assert photo.pixels.dtype == torch.uint8
        assert photo.pixels.float().std() > 5  # a photograph, not a plain square
        assert photo.thumbnail.startswith("data:image/jpeg;base64,")


def test_modes(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.jpg", "c.gif")]
    for file, mode in zip(files, ("RGBA", "L", "P"), strict=True):
        Image.new(mode, (50, 30)).save(file)
    found = photos.read(files, 32)
    assert [photo.name for photo in found] == list(map(str, files))
    assert {photo.pixels.shape for photo in found} == {(3, 32, 32)}


def test_the_middle_is_taken_and_exif_is_obeyed(tmp_path):
    image = Image.new("RGB", (96, 32))
    image.paste((255, 0, 0), (32, 0, 64, 16))  # in the middle third, the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "a.png", exif=exif)
    (photo,) = photos.read([tmp_path / "a.png"], 32)
    assert photo.pixels[0, 20:, 4:28].float().mean() > 250
    assert photo.pixels[0, :12, 4:28].float().mean() < 5


def test_what_is_no_image_is_named(fails, tmp_path, monkeypatch, picture):
    (tmp_path / "text.png").write_text("hello")
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    for name, word in {
        "none.png": "No such file",
        "text.png": "cannot identify",
        **dict.fromkeys(("cut.png", "cut.jpg", "cut.webp"), "cannot be read"),
    }.items():
        fails(*DEMO, tmp_path / name, words=(name, word))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fails(*DEMO, picture, words=("picture.png", "cannot be read"))
