"""Vocos (arXiv 2306.00814) accelerated: a waveform from a mel spectrogram, by ConvNeXt blocks over time.

python examples/vocoder.py                                   random weights, a tone of one second
python examples/vocoder.py --pretrained --input speech.wav   the published 24 kHz model, which is downloaded

Needs the extra "vocos" (pip install "convnext-kernels[vocos]").
"""

import time
from pathlib import Path

import click
import numpy
import torch
from scipy.io import wavfile
from torch import Tensor
from vocos.feature_extractors import MelSpectrogramFeatures
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone
from vocos.pretrained import Vocos

import convnext_kernels as ck

RATE = 24_000


def load(pretrained: bool) -> Vocos:
    """The published model, or one of its kind with seeded weights."""
    if pretrained:
        return Vocos.from_pretrained("charactr/vocos-mel-24khz").eval()
    torch.manual_seed(0)
    features = MelSpectrogramFeatures(sample_rate=RATE, n_fft=1024, hop_length=256, n_mels=100, padding="center")
    backbone = VocosBackbone(input_channels=100, dim=512, intermediate_dim=1536, num_layers=8)
    return Vocos(features, backbone, ISTFTHead(dim=512, n_fft=1024, hop_length=256, padding="center")).eval()


def sound(file: Path | None) -> Tensor:
    """Samples (1, T) of a WAV file of 24 kHz, or of a tone."""
    if file is None:
        return 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)[None]
    rate, samples = wavfile.read(file)
    if rate != RATE or samples.dtype != numpy.int16:
        raise click.ClickException(f"{file}: expected 16-bit samples at {RATE} Hz, got {samples.dtype} at {rate} Hz")
    return torch.from_numpy(samples.astype(numpy.float32).reshape(len(samples), -1).mean(1) / 2**15)[None]


@click.command()
@click.option("--pretrained", is_flag=True)
@click.option("--input", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default="vocoder.wav", show_default=True)
def main(pretrained: bool, file: Path | None, output: Path) -> None:
    """Make a waveform with and without this package."""
    model = load(pretrained)
    with torch.inference_mode():
        mel = model.feature_extractor(sound(file))  # (1, 100, frames)

        def run() -> tuple[Tensor, float]:
            model.decode(mel)  # warm
            start = time.perf_counter()
            return model.decode(mel), time.perf_counter() - start

        original, before = run()
        ck.accelerate(model)  # the eight blocks of the backbone
        wave, after = run()
    difference = (wave - original).abs().max() / original.abs().max()
    print(f"{ck.acceleration_report(model)}")
    print(
        f"{before * 1e3:.1f} ms before, {after * 1e3:.1f} ms after; samples differ by {difference:.1e} of the largest"
    )
    wavfile.write(output, RATE, (wave[0].clamp(-1, 1) * 32767).short().numpy())


if __name__ == "__main__":
    main()
