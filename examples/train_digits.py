"""Train a small ConvNeXt V1 and V2 on scikit-learn's handwritten digits, in about a minute.

python examples/train_digits.py
python examples/train_digits.py --compare-eager   # also trains with PyTorch's operators, and draws both curves

Needs the "demo" extra (pip install "convnext-kernels[demo]"). For each variant the output folder gets v1.png (the
curves), v1.json (loss and accuracy after each epoch) and v1.safetensors (the weights, with the official names).

The test pictures (30 % of each digit) and the number of epochs are fixed in advance. The result is the accuracy of
the averaged weights after the last epoch. `train_imagenet.py` shows checkpoints that a run continues from.
"""

import json
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnext_kernels import BackendError, list_backends
from convnext_kernels.models import ConvNeXt, export_weights

SIZE = 32  # side of the enlarged 8 x 8 pictures: one of their pixels is one patch of the stem
BATCH = 32
RATE = 4e-3  # peak of the learning rate: up over the first tenth, then half a cosine down to 0


def split(device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training and the test pictures (N, 1, 8, 8) from 0 to 1, each with the digits (N,)."""
    data = load_digits()
    # The original pictures have 32 x 32 pixels of ink or paper; scikit-learn's pixels are sums of 4 x 4, 0 to 16.
    x = torch.tensor(data.images[:, None] / 16, dtype=torch.float32, device=device)
    y = torch.tensor(data.target, dtype=torch.int64, device=device)
    train, test = train_test_split(range(len(y)), test_size=0.3, stratify=data.target, random_state=0)
    return (x[train], y[train]), (x[test], y[test])


def enlarge(pictures: Tensor, augment: bool = False) -> Tensor:
    """Enlarge to SIZE and, to augment, shift (half a pixel of 8), rotate (0.15 radians) and zoom (10 %) at random."""
    n = len(pictures)
    # Random numbers from the CPU, so that every device gets the same pictures.
    most = torch.tensor((0.125, 0.125, 0.15, 0.1)) * augment
    dx, dy, angle, scale = (torch.rand(4, n) * 2 - 1) * most[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrix = torch.stack((cos, -sin, dx, sin, cos, dy), 1).view(n, 2, 3).to(pictures.device)
    grid = functional.affine_grid(matrix, [n, 1, SIZE, SIZE], align_corners=False)
    x = functional.grid_sample(pictures, grid, align_corners=False)  # bilinear; paper outside the border
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def train(name: str, backend: str, epochs: int, seed: int, device: str, output: Path) -> list[dict[str, float]]:
    """Train one network, write its weights, and return loss and test accuracy (percent) of each epoch."""
    (pictures, digits), (test, expected) = split(device)
    torch.manual_seed(seed)
    model = ConvNeXt(
        (2, 2),
        (32, 64),
        in_chans=1,
        num_classes=10,
        use_grn=name == "v2",
        kernel_size=5,
        drop_path_rate=0.1,
        layer_scale_init_value=0.1,
        backend=backend,
    ).to(device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    # No weight decay on vectors; GRN's have the shape (1, 1, 1, C).
    matrices = [p for p in model.parameters() if p.squeeze().dim() > 1]
    vectors = [p for p in model.parameters() if p.squeeze().dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    steps = epochs * -(-len(digits) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1, cycle_momentum=False)
    history = []
    for epoch in track(range(epochs), f"{name}, backend {backend}", transient=True):
        total = 0.0
        model.train()
        for chosen in torch.randperm(len(digits)).to(device).split(BATCH):
            logits = model(enlarge(pictures[chosen], augment=True))
            loss = functional.cross_entropy(logits, digits[chosen], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.update_parameters(model)
            total += loss.item() * len(chosen)
        average.eval()
        with torch.inference_mode():
            right = average(enlarge(test)).argmax(1) == expected
        accuracy = 100 * right.double().mean().item()
        history.append({"epoch": epoch + 1, "loss": total / len(digits), "accuracy": accuracy})
    export_weights(average.module, "official", output / f"{name}.safetensors")
    click.echo(f"{name}, backend {backend}: {accuracy:.2f} % of {len(test)} test pictures after {epochs} epochs")
    return history


def draw(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Draw the loss and the accuracy of one or two runs over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("training loss", "test accuracy, %"), strict=True
    ):
        for (backend, history), style in zip(runs.items(), ("-", "--"), strict=False):
            epochs, values = ([entry[k] for entry in history] for k in ("epoch", key))
            axis.plot(epochs, values, style, label=f"backend {backend}")
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)


@click.command()
@click.option("--backend", type=click.Choice(["auto", *list_backends()]), default="auto", show_default=True)
@click.option("--compare-eager", is_flag=True, help="Also train with the eager backend, and draw both curves.")
@click.option("--epochs", type=click.IntRange(1, 999), default=30, show_default=True)
@click.option("--seed", type=click.IntRange(0, 10**6), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="train_digits", show_default=True)
def main(backend: str, compare_eager: bool, epochs: int, seed: int, device: str, output: Path) -> None:
    """Train a small ConvNeXt V1 and V2 on handwritten digits."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no CUDA device")
    # On two idle cores a second thread saves a tenth of the time. With other processes running it took ten times as
    # long, because threads wait for each other at every one of these small operations.
    torch.set_num_threads(1)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("v1", "v2"):
            backends = dict.fromkeys([backend, "eager"] if compare_eager else [backend])
            runs = {each: train(name, each, epochs, seed, device, output) for each in reversed(backends)}
            (output / f"{name}.json").write_text(json.dumps(runs, indent=1))
            draw(runs, output / f"{name}.png")
    except (BackendError, OSError) as error:  # OSError: the disk
        raise click.ClickException(str(error)) from error
    click.echo(f"curves and weights: {output}")


if __name__ == "__main__":
    main()
