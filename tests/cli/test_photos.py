import numpy
import pytest
from PIL import Image

from convnext_kernels.cli import photos

DEMO = ("demo", "--size", "32")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(numpy.arange(40 * 60 * 3, dtype=numpy.uint8).reshape(40, 60, 3)).save(path)
    return path


def test_the_middle_is_taken_and_exif_is_obeyed(tmp_path):
    image = Image.new("RGB", (96, 32))
    image.paste((255, 0, 0), (32, 0, 64, 16))  # in the middle third, the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "a.png", exif=exif)
    (photo,) = photos.read([tmp_path / "a.png"], 32)
    assert photo.pixels[0, 20:, 4:28].float().mean() > 250
    assert photo.pixels[0, :12, 4:28].float().mean() < 5


def test_what_is_no_image_is_named(fails, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8))
    noise.save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for name, word in {"text.png": "cannot identify", "cut.png": "be read"}.items():
        fails(*DEMO, tmp_path / name, words=(name, word))
    fails(*DEMO, tmp_path / "none.png", words=("none.png", "does not exist"), code=2)
