"""Vocos (arXiv 2306.00814), the vocoder of the demo, and the sound that it is given.

The network comes from the package ``vocos``. It makes a waveform from a mel spectrogram: a backbone of eight ConvNeXt
blocks over time, and a head with an inverse Fourier transform.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor, nn

from convnext_kernels.bench.tables import one_line
from convnext_kernels.cli.load import RANDOM, SEED, Loaded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

RATE = 24_000  # samples per second
SECONDS = 10
# The published model charactr/vocos-mel-24khz: its config.yaml.
_MEL = {"sample_rate": RATE, "n_fft": 1024, "hop_length": 256, "n_mels": 100, "padding": "center"}
_BACKBONE = {"input_channels": 100, "dim": 512, "intermediate_dim": 1536, "num_layers": 8}
_HEAD = {"dim": 512, "n_fft": 1024, "hop_length": 256, "padding": "center"}
_PUBLISHED = "charactr/vocos-mel-24khz"


class Vocoder(nn.Module):
    """Vocos without the part that makes the spectrogram: (N, mels, frames) -> samples (N, T)."""

    def __init__(self, vocos: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = vocos.backbone, vocos.head

    def forward(self, mel: Tensor) -> Tensor:
        """Run the backbone in its dtype and the head in its own, which has no bf16."""
        return self.head(self.backbone(mel).to(self.head.out.weight.dtype))


def load(pretrained: bool) -> Loaded:
    """Vocos for mel spectrograms at 24 kHz, with pretrained or random weights."""
    from vocos.feature_extractors import MelSpectrogramFeatures
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone
    from vocos.pretrained import Vocos

    if pretrained:
        return Loaded(Vocos.from_pretrained(_PUBLISHED).eval(), "vocos", f"pretrained, {_PUBLISHED}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # the package's own first values: each block adds its eighth
        model = Vocos(MelSpectrogramFeatures(**_MEL), VocosBackbone(**_BACKBONE), ISTFTHead(**_HEAD)).eval()
    return Loaded(model, "vocos", RANDOM)


def shipped() -> Path:
    """The recording in the wheel of pygame-ce: seven seconds of music, 11 kHz."""
    found = importlib.util.find_spec("pygame")  # not imported: that starts SDL
    if found is None:
        raise ModuleNotFoundError(name="pygame")
    return Path(found.submodule_search_locations[0]) / "examples/data/house_lo.wav"


def _scaled(samples: "ndarray") -> Tensor:
    """Samples of a WAV file as fp32 between -1 and 1."""
    import numpy

    if samples.dtype.kind == "f":
        return torch.from_numpy(samples.astype(numpy.float32))
    zero, size = (128, 128) if samples.dtype == numpy.uint8 else (0, -float(numpy.iinfo(samples.dtype).min))
    return torch.from_numpy(((samples.astype(numpy.float64) - zero) / size).astype(numpy.float32))


def read(file: Path) -> Tensor:
    """Ten seconds of a WAV file, (1, samples) at 24 kHz: its channels averaged, repeated if it is shorter."""
    from scipy import signal
    from scipy.io import wavfile

    if not file.is_file():
        raise click.ClickException(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
    try:
        rate, samples = wavfile.read(file)
    except (OSError, ValueError, EOFError) as error:
        raise click.ClickException(f"{file}: not a WAV file that can be read: {one_line(error)}") from None
    sound = _scaled(samples)
    sound = sound.mean(1) if sound.dim() == 2 else sound
    if not sound.numel() or not sound.isfinite().all():
        raise click.ClickException(f"{file}: expected finite samples, got {'none' if not sound.numel() else 'others'}")
    sound = torch.from_numpy(signal.resample_poly(sound[: rate * SECONDS].numpy(), RATE, rate))
    return sound.repeat(-(-RATE * SECONDS // len(sound)))[: RATE * SECONDS].unsqueeze(0)


def _decibels(sound: Tensor) -> Tensor:
    """(samples,) to (frequencies, frames)."""
    power = torch.stft(sound, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs().square()
    return 10 * power.clamp_min(1e-10).log10()


def loudest(sound: Tensor) -> float:
    """The largest value in the spectrogram of a sound (samples,), in decibels."""
    return _decibels(sound).max().item()


def picture(sound: Tensor, high: float) -> "Figure":
    """The spectrogram of a sound (samples,) from `high` - 80 to `high` decibels."""
    from matplotlib.figure import Figure

    decibels = _decibels(sound)
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    extent = (0, decibels.shape[1] * 256 / RATE, 0, RATE / 2000)
    look = {"origin": "lower", "aspect": "auto", "cmap": "magma", "vmin": high - 80, "vmax": high}
    image = axes.imshow(decibels.numpy(), extent=extent, **look)
    axes.set(xlabel="seconds", ylabel="kHz")
    figure.colorbar(image, label="dB")
    return figure
