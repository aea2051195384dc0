"""What the demo measures of a model, eager and accelerated: of a classifier on photographs, of a vocoder on a sound."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from convnext_kernels.bench.measure import peak_growth
from convnext_kernels.bench.numerics import Top5, allowed, compare_top5, judge
from convnext_kernels.bench.timing import Times, interleave, steady_allocator
from convnext_kernels.cli import load, photos, sound
from convnext_kernels.cli.options import DTYPES
from convnext_kernels.cli.photos import Photo
from convnext_kernels.interop import accelerate

NAMES = ("eager", "accelerated")
MODELS = 3  # whose peaks are measured: single ones differ by a third, because freed blocks are reused differently
MEMORY = (
    "Peak memory: growth of the process's resident set (Linux) or of what PyTorch's CUDA allocator holds, during the "
    "first and the second forward pass of a new model; medians of three models. A pass of a copy loads code and "
    "libraries first. The first pass includes the weights that a backend packs and keeps, never the model's own."
)


@dataclass(frozen=True)
class Result:
    """The results in one dtype."""

    dtype: str
    errors: dict[str, float]  # the largest, against fp64
    allowed: float  # for the accelerated model
    reason: str  # how `numerics.RULE` is broken; "" if it holds
    top5: list[Top5]  # one per photograph
    times: dict[str, Times]
    peak: dict[str, list[int]]  # bytes, in the first pass and in a later one; empty where they cannot be measured
    outputs: dict[str, Tensor]  # the logits, or the sound (1, samples)

    @property
    def speedup(self) -> float:
        """Median time of eager over the median time of accelerated."""
        return self.times["eager"].median / self.times["accelerated"].median

    def count(self, verdict: str) -> int:
        """Number of photographs whose top 5 classes have this verdict."""
        return sum(top5.verdict == verdict for top5 in self.top5)

    def failures(self, names: list[str]) -> list[str]:
        """A line for each rule of `numerics` that is broken; `names` of the photographs."""
        found = [f"{self.dtype}: {self.reason}"] if self.reason else []
        different = [name for name, top5 in zip(names, self.top5, strict=False) if top5.verdict == "different"]
        return found + ([f"{self.dtype}: the top 5 classes differ on {', '.join(different)}"] if different else [])


def _peaks(build: Callable[[], nn.Module], x: Tensor, device: str) -> list[int]:
    build()(x)
    found = []
    for _ in range(MODELS):
        model = build()
        found.append([peak_growth(partial(model, x), device) for _ in range(2)])
    return [] if None in found[0] else [int(statistics.median(peaks)) for peaks in zip(*found, strict=True)]


@dataclass
class Subject:
    """A model and what it is run on."""

    loaded: load.Loaded
    x: Tensor  # all inputs in fp32: photographs (N, 3, size, size), or a mel spectrogram (1, mels, frames)
    shape: str  # of an input, for the title
    about: str  # where the inputs come from, for the notes
    photos: list[Photo] = field(default_factory=list)
    sound: Tensor | None = None  # (samples,)

    def build(self, name: str, dtype: torch.dtype, device: str, backend: str) -> nn.Module:
        """A copy of the model, "eager" or "accelerated"."""
        model = copy.deepcopy(self.loaded.model)
        if self.sound is None:
            model = model.to(device, dtype, memory_format=torch.channels_last)
        else:  # the head stays in fp32, because PyTorch has no Fourier transform of bf16
            model.backbone.to(dtype)
            model.to(device)
        return accelerate(model, backend=backend) if name == "accelerated" else model

    def measure(
        self, dtype_name: str, batch: int, repeats: int, device: str, backend: str, on_step: Callable[[str], None]
    ) -> Result:
        """Memory, errors and times in one dtype; `on_step` is told what is done next."""
        dtype, what = getattr(torch, DTYPES[dtype_name]), "logits" if self.photos else "samples"
        x = self.x[torch.arange(batch) % len(self.x)].to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if self.photos else x
        build, peak = partial(self.build, dtype=dtype, device=device, backend=backend), {}
        with torch.inference_mode():
            for name in NAMES:  # before steady_allocator, which keeps freed memory
                on_step(f"memory, {name}")
                peak[name] = _peaks(partial(build, name), x, device)
            with steady_allocator():
                on_step("errors and times")
                models = {name: build(name) for name in NAMES}
                # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
                truth = copy.deepcopy(models["eager"]).to(torch.float64)(x.double())
                outputs = {name: model(x) for name, model in models.items()}
                if not isinstance(truth, Tensor) or truth.ndim != 2:
                    raise ValueError("--model: expected a classifier with one output tensor (images, classes)")
                calls = {name: partial(model, x) for name, model in models.items()}
                times = interleave(calls, rounds=repeats, device=device)
        eager, ours = (outputs[name] for name in NAMES)
        errors = {name: (y.double() - truth).abs().max().item() for name, y in outputs.items()}
        judgement = judge({what: truth}, {what: eager}, {what: ours}, eager.dtype)
        most = allowed(errors["eager"], truth.abs().max().item(), eager.dtype)
        top5 = compare_top5(truth, eager, ours)[: len(self.photos)]
        return Result(dtype_name, errors, most, judgement.reason, top5, times, peak, outputs)


def photographs(paths: tuple[Path, ...], size: int, model_name: str, weights: Path | None, pretrained: bool) -> Subject:
    """A classifier on photographs: those in `paths`, or those that are shipped."""
    chosen = photos.read(paths, size) if paths else photos.shipped(size)
    loaded = load.load(model_name, weights, pretrained)
    x = photos.normalise(torch.stack([photo.pixels for photo in chosen]), *loaded.mean_std)
    about = f"Images: {len(x)}, each cropped to a square at the centre and resized to {size}x{size}."
    return Subject(loaded, x, f"{size}x{size}", about, photos=chosen)


def vocoder(paths: tuple[Path, ...], weights: Path | None, pretrained: bool) -> Subject:
    """Vocos on the sound in `paths`, or the one that is shipped."""
    if len(paths) > 1:
        raise click.UsageError(f"--model vocos: expected one WAV file, got {len(paths)}")
    file = paths[0] if paths else sound.shipped()
    samples = sound.read(file)
    loaded = sound.load(weights, pretrained)
    mel = sound.mel(loaded.model, samples)
    about = f"Sound: {sound.SECONDS} seconds of {file.name}, as a mel spectrogram of {mel.shape[-1]} frames."
    loaded = replace(loaded, model=sound.Vocoder(loaded.model))
    return Subject(loaded, mel, f"{sound.SECONDS} s of sound", about, sound=samples[0])
