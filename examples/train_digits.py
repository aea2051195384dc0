"""Train a small ConvNeXt V1 and V2 on scikit-learn's handwritten digits, in about a minute.

python examples/train_digits.py
python examples/train_digits.py --resume          # after a kill: continues after the last complete epoch
python examples/train_digits.py --compare-eager   # also trains with PyTorch's operators, and draws both curves

Needs the "demo" extra (pip install "convnext-kernels[demo]"). For each variant the output folder gets v1.pt (a
checkpoint, written after every epoch), v1.png (the curves) and v1.safetensors (the weights, with the official names).

The test pictures (30 % of each digit) and the number of epochs are fixed in advance. The result is the accuracy of
the averaged weights after the last epoch.
"""

import io
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from whole_file import write

from convnext_kernels import BackendError, list_backends
from convnext_kernels.models import ConvNeXt, export_weights

FORMAT = "convnext_kernels train_digits 1"  # of the checkpoints
SIZE = 32  # side of the enlarged 8 x 8 pictures: one of their pixels is one patch of the stem


@dataclass(frozen=True)
class Settings:
    """Everything that a curve depends on; a checkpoint can only be resumed with the same settings."""

    variant: str
    backend: str
    dtype: str
    device: str
    threads: int  # PyTorch rounds sums in another order for another number of threads
    seed: int
    epochs: int
    depths: tuple[int, ...] = (2, 2)
    dims: tuple[int, ...] = (32, 64)
    kernel_size: int = 5
    drop_path: float = 0.1
    batch_size: int = 32
    lr: float = 4e-3  # peak: linear warm-up over the first tenth, then half a cosine down to 0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema: float = 0.98  # decay of the averaged weights, by step
    shift: float = 0.5  # augmentation: at most this many of the 8 pixels
    turn: float = 0.15  # radians
    zoom: float = 0.1


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 1, 8, 8) from 0 to 1 and their digits (N,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | list[int] | slice) -> "Digits":
        return Digits(self.pictures[index], self.labels[index])


def split(device: str) -> tuple[Digits, Digits]:
    """Return the training and the test pictures, the same for every seed."""
    data = load_digits()
    # The original pictures have 32 x 32 pixels of ink or paper; scikit-learn's pixels are sums of 4 x 4, 0 to 16.
    x = torch.tensor(data.images[:, None] / 16, dtype=torch.float32, device=device)
    y = torch.tensor(data.target, dtype=torch.int64, device=device)
    train, test = train_test_split(range(len(y)), test_size=0.3, stratify=data.target, random_state=0)
    return Digits(x, y)[train], Digits(x, y)[test]


def enlarge(pictures: Tensor, settings: Settings | None = None) -> Tensor:
    """Enlarge to SIZE and, with settings, shift, rotate and zoom each picture by random amounts."""
    n = len(pictures)
    shift, turn, zoom = (settings.shift / 4, settings.turn, settings.zoom) if settings else (0.0, 0.0, 0.0)
    # Random numbers from the CPU, so that every device gets the same pictures.
    dx, dy, angle, scale = (torch.rand(4, n) * 2 - 1) * torch.tensor((shift, shift, turn, zoom))[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrix = torch.stack((cos, -sin, dx, sin, cos, dy), 1).view(n, 2, 3).to(pictures.device)
    grid = functional.affine_grid(matrix, [n, 1, SIZE, SIZE], align_corners=False)
    x = functional.grid_sample(pictures, grid, align_corners=False)  # bilinear; paper outside the border
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


class Run:
    """One network in training, and its progress."""

    def __init__(self, name: str, settings: Settings, data: tuple[Digits, Digits], output: Path) -> None:
        self.name, self.settings = name, settings
        self.train, self.test = data
        self.checkpoint, self.weights = output / f"{name}.pt", output / f"{name}.safetensors"
        self.history: list[dict[str, float]] = []
        self.steps = math.ceil(len(self.train) / settings.batch_size)  # of an epoch
        self._seed(0)
        model = ConvNeXt(
            settings.depths,
            settings.dims,
            in_chans=1,
            num_classes=10,
            use_grn=settings.variant == "v2",
            kernel_size=settings.kernel_size,
            drop_path_rate=settings.drop_path,
            layer_scale_init_value=0.1,
            backend=settings.backend,
        )
        self.model = model.to(settings.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        # No weight decay on vectors; GRN's have the shape (1, 1, 1, C).
        matrices = [p for p in model.parameters() if p.squeeze().dim() > 1]
        vectors = [p for p in model.parameters() if p.squeeze().dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)

    def _seed(self, epoch: int) -> None:
        # All random numbers depend only on these two, so a checkpoint needs no generator state, only its epoch.
        torch.manual_seed(1000 * self.settings.seed + epoch)

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            return model(x).float()

    def _learning_rate(self, step: int) -> float:
        total = self.settings.epochs * self.steps
        done, warmup = (step + 1) / total, 0.1
        if done < warmup:
            return self.settings.lr * done / warmup
        return self.settings.lr * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    def train_epoch(self, advance: Callable[[], object]) -> None:
        """Train the next epoch, test, and write the checkpoint; `advance` is called after each step."""
        epoch, started, total = len(self.history) + 1, time.perf_counter(), 0.0
        self._seed(epoch)
        self.model.train()
        order = torch.randperm(len(self.train))
        for step, chosen in enumerate(order.split(self.settings.batch_size), (epoch - 1) * self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            batch = self.train[chosen.to(self.settings.device)]
            loss = functional.cross_entropy(
                self._logits(self.model, enlarge(batch.pictures, self.settings)),
                batch.labels,
                label_smoothing=self.settings.label_smoothing,
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update_parameters(self.model)
            total += loss.item() * len(chosen)
            advance()
        mean = total / len(order)
        if not math.isfinite(mean):
            raise click.ClickException(f"{self.name}, epoch {epoch}: the loss is {mean}; the last checkpoint is kept")
        accuracy, seconds = self.accuracy(self.test), time.perf_counter() - started
        self.history.append({"epoch": epoch, "loss": mean, "accuracy": accuracy, "seconds": seconds})
        self.save()

    @torch.inference_mode()
    def accuracy(self, digits: Digits) -> float:
        """Return the share of digits that the averaged weights classify correctly, in percent."""
        self.ema.eval()
        found = self._logits(self.ema, enlarge(digits.pictures)).argmax(1)
        return 100 * (found == digits.labels).double().mean().item()

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"format": FORMAT, "settings": asdict(self.settings), "history": self.history}
        write(self.checkpoint, lambda stream: torch.save(state, stream))

    def restore(self) -> None:
        """Continue from the checkpoint."""
        data = self.checkpoint.read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if name := archive.testzip():  # torch.load does not check the checksums
                    raise ValueError(f"{name} has changed")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            theirs = dict(state["settings"])
            other = [
                f"{k}={theirs.get(k)!r}, now {v!r}" for k, v in asdict(self.settings).items() if theirs.get(k) != v
            ]
            for name, part in () if other else self._parts().items():
                part.load_state_dict(state[name])
            self.history = list(state["history"])
        except Exception as error:  # a damaged file can raise any exception
            raise click.ClickException(
                f"{self.checkpoint}: damaged, or not a checkpoint of this script ({type(error).__name__}); "
                "the file was not changed. Without --resume, use another --output or --overwrite"
            ) from error
        if other:
            raise click.ClickException(
                f"{self.checkpoint}: made with {'; '.join(other)}. Use the same settings, or another --output"
            )


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draw the loss and the accuracy of one or more runs over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("training loss", "test accuracy, %"), strict=True
    ):
        for run, style in zip(runs, ("-", "--"), strict=False):
            epochs, values = ([entry[k] for entry in run.history] for k in ("epoch", key))
            axis.plot(epochs, values, style, label=f"{run.name}, backend {run.settings.backend}")
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    write(file, lambda stream: figure.savefig(stream, format="png", dpi=120))


def prepare(runs: Sequence[Run], resume: bool, overwrite: bool) -> None:
    """Continue from checkpoints, or make sure that there are none."""
    found = [run for run in runs if run.checkpoint.exists()]
    if resume:
        for run in runs:  # all of them before the first one trains, so that errors come at once
            if run in found:
                run.restore()
                click.echo(f"{run.name}: continues after epoch {len(run.history)} of {run.settings.epochs}")
            else:
                click.echo(f"{run.name}: {run.checkpoint} does not exist, starts at the beginning")
    elif found and not overwrite:
        raise click.ClickException(
            f"{found[0].checkpoint} exists: use --resume to continue, --overwrite to start again, or another --output"
        )
    else:
        for run in runs:
            run.accuracy(run.test[:2])  # fails for a backend that cannot run, before anything is deleted
        for run in found:
            run.checkpoint.unlink()


def describe(run: Run) -> str:
    """Return the progress of a run, for the progress bar."""
    return "{}, epoch {epoch}: loss {loss:.3f}, test {accuracy:.2f} %".format(run.name, **run.history[-1])


def train(run: Run) -> None:
    """Train the remaining epochs, with a progress bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total, done = (epochs * run.steps for epochs in (run.settings.epochs, len(run.history)))
        bar = progress.add_task(describe(run) if done else run.name, total=total, completed=done)
        while len(run.history) < run.settings.epochs:
            run.train_epoch(partial(progress.advance, bar))
            progress.update(bar, description=describe(run))
    export_weights(run.ema.module, "official", run.weights)
    accuracy, seconds = run.history[-1]["accuracy"], sum(entry["seconds"] for entry in run.history)
    click.echo(
        f"{run.name}, backend {run.settings.backend}: {accuracy:.2f} % of {len(run.test)} test pictures after "
        f"{run.settings.epochs} epochs, {seconds:.1f} s"
    )


@click.command()
@click.option("--variant", type=click.Choice(["v1", "v2", "both"]), default="both", show_default=True)
@click.option("--backend", type=click.Choice(["auto", *list_backends()]), default="auto", show_default=True)
@click.option("--compare-eager", is_flag=True, help="Also train with the eager backend, and draw both curves.")
@click.option("--epochs", type=click.IntRange(1, 999), default=30, show_default=True)
@click.option("--seed", type=click.IntRange(0, 10**6), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="bf16: autocast.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
# On two idle cores a second thread saves a tenth of the time. With other processes running it took ten times as long,
# because threads wait for each other at every one of these small operations.
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="More help on idle cores only.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="train_digits", show_default=True)
@click.option("--resume", is_flag=True, help="Continue from the checkpoints in the output folder.")
@click.option("--overwrite", is_flag=True, help="Start again and replace the checkpoints in the output folder.")
def main(
    variant: str, compare_eager: bool, output: Path, resume: bool, overwrite: bool, threads: int, **options: str | int
) -> None:
    """Train a small ConvNeXt V1 and V2 on handwritten digits."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if compare_eager and options["backend"] == "eager":
        raise click.UsageError("--compare-eager needs another --backend than eager")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no CUDA device")
    torch.set_num_threads(threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
        data = split(options["device"])
        pairs = []  # for each variant its run and, with --compare-eager, the eager one
        for name in ("v1", "v2") if variant == "both" else (variant,):
            settings = Settings(variant=name, threads=threads, **options)
            pairs.append([Run(name, settings, data, output)])
            if compare_eager:
                pairs[-1].append(Run(f"{name}-eager", replace(settings, backend="eager"), data, output))
        prepare([run for pair in pairs for run in pair], resume, overwrite)
        for pair in pairs:
            for run in pair:
                train(run)
            draw(pair, output / f"{pair[0].name}.png")
            if compare_eager:
                epochs = list(zip(*(run.history for run in pair), strict=True))
                loss, accuracy = (max(abs(a[key] - b[key]) for a, b in epochs) for key in ("loss", "accuracy"))
                click.echo(
                    f"{pair[0].name}: largest difference from eager: loss {loss:.2g}, accuracy {accuracy:.2f} points"
                )
    except (BackendError, OSError) as error:  # OSError: the disk
        raise click.ClickException(str(error)) from error
    click.echo(f"checkpoints, curves and weights: {output}")


if __name__ == "__main__":
    main()
