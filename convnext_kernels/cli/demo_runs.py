"""What the demo measures of a model, eager and accelerated: of a classifier on photographs, of a vocoder on a sound."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from convnext_kernels.cli import options
from convnext_kernels.cli.demo_report import Result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convnext_kernels.bench.numerics import Top5

NAMES = ("eager", "accelerated")
FP64_COST = 4  # steps of the progress bar for one fp64 pass


@dataclass
class Run:
    """A classifier on photographs."""

    model: "nn.Module"  # fp32, on the CPU, as its library built it
    x: "Tensor"  # all inputs in fp32; here photographs (N, 3, size, size)
    batch: int
    repeats: int
    backend: str
    device: str
    output: ClassVar = "logits"

    def cast(self, model: "nn.Module", dtype: str) -> "nn.Module":
        """`model` on the device, in `dtype`."""
        import torch

        return model.to(self.device, getattr(torch, options.DTYPES[dtype]), memory_format=torch.channels_last)

    def build(self, dtype: str, name: str) -> "nn.Module":
        """A copy of the model, eager or accelerated."""
        from convnext_kernels.interop import accelerate

        model = self.cast(copy.deepcopy(self.model), dtype)
        return accelerate(model, backend=self.backend) if name == "accelerated" else model

    def inputs(self, dtype: str) -> "Tensor":
        """All inputs."""
        import torch

        return self.x.to(self.device, getattr(torch, options.DTYPES[dtype]), memory_format=torch.channels_last)

    def timed_batch(self, dtype: str) -> "Tensor":
        """Exactly `batch` inputs, repeated if they are too few."""
        import torch

        x = self.inputs(dtype)
        rows = torch.arange(self.batch, device=self.device) % len(self.x)
        return x[rows].contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)

    def outputs(self, model: "nn.Module", x: "Tensor") -> "Tensor":
        """What is compared: the logits."""
        import torch

        with torch.inference_mode():
            parts = [model(chunk) for chunk in x.split(self.batch)]
        if not all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in parts):
            raise click.ClickException("--model: expected a classifier with one output tensor (images, classes)")
        return torch.cat(parts)

    def top5(self, reference: "Tensor", eager: "Tensor", accelerated: "Tensor") -> "list[Top5]":
        """For each photograph, whether both models see the same."""
        from convnext_kernels.bench.numerics import compare_top5

        return compare_top5(reference, eager, accelerated)

    def kept(self, eager: "Tensor", accelerated: "Tensor") -> "dict[str, Tensor]":
        """The outputs that the report draws."""
        return {}

    def steps(self, dtypes: tuple[str, ...]) -> int:
        """Length of the progress bar."""
        from convnext_kernels.bench.timing import WARMUP
        from convnext_kernels.cli.memory import RUNS

        chunks = -(-len(self.x) // self.batch)
        return len(dtypes) * (2 * (1 + 2 * RUNS) + (2 + FP64_COST) * chunks + 2 * (WARMUP + self.repeats))

    def measure(self, dtypes: tuple[str, ...]) -> list[Result]:
        """Memory, errors and times in each dtype."""
        import torch

        from convnext_kernels.bench.numerics import compare
        from convnext_kernels.bench.timing import interleave, steady_allocator
        from convnext_kernels.cli.memory import RUNS, peak_growth

        results = []
        chunks = -(-len(self.x) // self.batch)
        with options.progress_bar("demo", self.steps(dtypes)) as advance:
            peaks = {}
            for dtype in dtypes:  # before steady_allocator, which keeps freed memory
                x = self.timed_batch(dtype)
                for name in NAMES:
                    advance(f"{dtype} memory, {name}", 0)
                    peaks[dtype, name] = peak_growth(lambda d=dtype, n=name: self.build(d, n), x, self.device)
                    advance(f"{dtype} memory, {name}", 1 + 2 * RUNS)
            with steady_allocator():
                for dtype in dtypes:
                    models = {name: self.build(dtype, name) for name in NAMES}
                    x = self.inputs(dtype)
                    advance(f"{dtype} fp64 reference", 0)
                    # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
                    reference = self.outputs(copy.deepcopy(models["eager"]).to(torch.float64), x.double())
                    advance(f"{dtype} outputs", FP64_COST * chunks)
                    outputs = {name: self.outputs(models[name], x) for name in NAMES}
                    advance(f"{dtype} timing", 2 * chunks)
                    x = self.timed_batch(dtype)
                    times = interleave(
                        {name: lambda m=models[name], x=x: m(x) for name in NAMES},
                        rounds=self.repeats,
                        device=self.device,
                        on_round=lambda d=dtype: advance(f"{d} timing", 2),
                    )
                    results.append(
                        Result(
                            dtype,
                            compare(reference, outputs["eager"], outputs["accelerated"], self.output),
                            self.top5(reference, outputs["eager"], outputs["accelerated"]),
                            times,
                            {name: peaks[dtype, name] for name in NAMES},
                            reference.shape[1],
                            self.kept(outputs["eager"], outputs["accelerated"]),
                        )
                    )
        return results


class SoundRun(Run):
    """A vocoder (`sound.Vocoder`) on the mel spectrogram (1, mels, frames) of a sound."""

    output = "samples"

    def cast(self, model: "nn.Module", dtype: str) -> "nn.Module":
        """Cast the backbone; the head stays in fp32, because PyTorch has no Fourier transform of bf16."""
        import torch

        model.backbone.to(getattr(torch, options.DTYPES[dtype]))
        return model.to(self.device)

    def inputs(self, dtype: str) -> "Tensor":
        """The spectrogram, rounded as the backbone will see it."""
        import torch

        return self.x.to(self.device, getattr(torch, options.DTYPES[dtype]))

    def outputs(self, model: "nn.Module", x: "Tensor") -> "Tensor":
        """The samples of the sound that the model makes."""
        import torch

        with torch.inference_mode():
            return torch.cat([model(chunk) for chunk in x.split(self.batch)])

    def top5(self, *_: "Tensor") -> "list[Top5]":
        """No classes."""
        return []

    def kept(self, eager: "Tensor", accelerated: "Tensor") -> "dict[str, Tensor]":
        """The sound that each model makes."""
        return {"eager": eager[0].float().cpu(), "accelerated": accelerated[0].float().cpu()}
