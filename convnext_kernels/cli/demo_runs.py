"""What the demo measures of a model, eager and accelerated: of a classifier on photographs, of a vocoder on a sound."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import click
import torch
from torch import Tensor, nn

from convnext_kernels.bench.numerics import Comparison, Top5, compare, compare_top5
from convnext_kernels.bench.timing import WARMUP, Times, interleave, steady_allocator
from convnext_kernels.cli import options
from convnext_kernels.cli.memory import peak_growth
from convnext_kernels.interop import accelerate

NAMES = ("eager", "accelerated")


@dataclass(frozen=True)
class Result:
    """The results in one dtype."""

    dtype: str
    comparison: Comparison
    top5: list[Top5]  # one per photograph
    times: dict[str, Times]
    peak: dict[str, tuple[int, int]]  # bytes, in the first pass and in a later one
    outputs: int  # logits per image, or samples of the sound
    sounds: dict[str, Tensor]  # of a vocoder: the sound (samples,) that each model makes

    @property
    def speedup(self) -> float:
        """Median time of eager over the median time of accelerated."""
        return self.times["eager"].median / self.times["accelerated"].median

    def count(self, verdict: str) -> int:
        """Number of photographs whose top 5 classes have this verdict."""
        return sum(top5.verdict == verdict for top5 in self.top5)

    def failures(self, names: list[str]) -> list[str]:
        """A line for each rule of `numerics` that is broken; `names` of the photographs."""
        found = [f"{self.dtype}: {self.comparison.reason}"] if self.comparison.reason else []
        different = [name for name, top5 in zip(names, self.top5, strict=True) if top5.verdict == "different"]
        return found + ([f"{self.dtype}: the top 5 classes differ on {', '.join(different)}"] if different else [])


@dataclass
class Run:
    """A classifier on photographs."""

    model: nn.Module  # fp32, on the CPU, as its library built it
    x: Tensor  # all inputs in fp32; here photographs (N, 3, size, size)
    batch: int
    repeats: int
    backend: str
    device: str
    output: ClassVar = "logits"

    def cast(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """`model` on the device, in `dtype`."""
        return model.to(self.device, dtype, memory_format=torch.channels_last)

    def build(self, dtype: str, name: str) -> nn.Module:
        """A copy of the model, eager or accelerated."""
        model = self.cast(copy.deepcopy(self.model), getattr(torch, options.DTYPES[dtype]))
        return accelerate(model, backend=self.backend) if name == "accelerated" else model

    def inputs(self, dtype: str) -> Tensor:
        """All inputs, in channels_last if they are images."""
        layout = torch.channels_last if self.x.dim() == 4 else torch.preserve_format
        return self.x.to(self.device, getattr(torch, options.DTYPES[dtype]), memory_format=layout)

    def timed_batch(self, dtype: str) -> Tensor:
        """Exactly `batch` inputs, repeated if they are too few."""
        x = self.inputs(dtype)
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return x[torch.arange(self.batch, device=self.device) % len(x)].contiguous(memory_format=layout)

    def outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is compared: the logits."""
        with torch.inference_mode():
            parts = [model(chunk) for chunk in x.split(self.batch)]
        if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
            raise click.ClickException("--model: expected a classifier with one output tensor (images, classes)")
        return torch.cat(parts)

    def measure(self, dtypes: tuple[str, ...]) -> list[Result]:
        """Memory, errors and times in each dtype."""
        results, peaks = [], {}
        with options.progress_bar("demo", len(dtypes) * (4 + WARMUP + self.repeats)) as advance:
            for dtype in dtypes:  # before steady_allocator, which keeps freed memory
                for name in NAMES:
                    peaks[dtype, name] = peak_growth(
                        lambda d=dtype, n=name: self.build(d, n), self.timed_batch(dtype), self.device
                    )
                    advance(f"{dtype} memory, {name}", 1)
            with steady_allocator():
                for dtype in dtypes:
                    models = {name: self.build(dtype, name) for name in NAMES}
                    x = self.inputs(dtype)
                    # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
                    reference = self.outputs(copy.deepcopy(models["eager"]).to(torch.float64), x.double())
                    advance(f"{dtype} fp64 reference", 1)
                    eager, accelerated = (self.outputs(models[name], x) for name in NAMES)
                    advance(f"{dtype} outputs", 1)
                    x = self.timed_batch(dtype)
                    times = interleave(
                        {name: lambda m=models[name], x=x: m(x) for name in NAMES},
                        rounds=self.repeats,
                        device=self.device,
                        on_round=lambda d=dtype: advance(f"{d} timing", 1),
                    )
                    images = self.output == "logits"
                    sounds = zip(NAMES, (eager, accelerated), strict=True)
                    result = Result(
                        dtype,
                        compare(reference, eager, accelerated, self.output),
                        compare_top5(reference, eager, accelerated) if images else [],
                        times,
                        {name: peaks[dtype, name] for name in NAMES},
                        reference.shape[1],
                        {} if images else {name: y[0].float().cpu() for name, y in sounds},
                    )
                    results.append(result)
        return results


class SoundRun(Run):
    """A vocoder (`sound.Vocoder`) on the mel spectrogram (1, mels, frames) of a sound."""

    output = "samples"

    def cast(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Cast the backbone; the head stays in fp32, because PyTorch has no Fourier transform of bf16."""
        model.backbone.to(dtype)
        return model.to(self.device)
