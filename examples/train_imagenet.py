"""Train or fine-tune a ConvNeXt with the paper's recipe on a folder of pictures, in one process or under torchrun.

python examples/train_imagenet.py imagenet --accumulate 32
torchrun --nproc-per-node 8 examples/train_imagenet.py imagenet --model convnext_base --accumulate 8 --amp
torchrun --nproc-per-node 8 examples/train_imagenet.py pictures --recipe finetune --model convnext_base \
    --weights convnext_base_22k_224.pth --size 384
python examples/train_imagenet.py imagenet --eval --weights train_imagenet/model_ema.safetensors

The folder has train/ and val/, each with a folder of pictures per class. Augmentation, mixup, losses, layer decay,
schedule and EMA are timm's. Needs the "demo" extra (pip install "convnext-kernels[demo]"). The output folder gets the
log (log.jsonl), its curves (curve.png), settings.json, a checkpoint that is replaced after each epoch and, at the end,
the weights with the official names.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import click
import numpy
import safetensors.torch
import timm
import torch
from imagenet_recipe import DROP_PATH, RECIPES, Recipe, make_schedule, parameter_groups, resolve
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from whole_file import write

from convnext_kernels import FusedConvNeXtBlock, accelerate, list_backends
from convnext_kernels.models import create_model, export_weights, load_weights, read_state_dict


class PictureError(click.ClickException):
    """A picture that cannot be read."""

    def __init__(self, message: str) -> None:
        # From a worker process the message starts with the traceback, as text.
        super().__init__(message.strip().splitlines()[-1].rpartition("PictureError: ")[2])


def read_picture(file: str) -> Image.Image:
    """Read a picture as RGB; the error names the file."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{file}: cannot be read as a picture: {' '.join(str(error).split())}") from error


def transform(size: int, recipe: Recipe | None) -> Callable[[Image.Image], Tensor]:
    """Return the augmentation of a recipe or, for None, the transform of the official evaluation."""
    if recipe:
        return create_transform(
            size,
            is_training=True,
            color_jitter=None,
            auto_augment=recipe.randaugment or None,
            interpolation="bicubic",
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    # From size 384 on, the whole picture is resized to the square; below, the centre is cropped, as 224 of 256.
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if size >= 384 else {"crop_pct": 224 / 256}
    return create_transform(size, interpolation="bicubic", **crop)


def folder(data: Path, part: str, size: int, recipe: Recipe | None) -> ImageFolder:
    """Open DATA/train or DATA/val."""
    place = data / part
    if not place.is_dir():
        found = ", ".join(sorted(p.name for p in data.iterdir())[:10]) or "nothing"
        raise click.ClickException(
            f"{place}: no such folder. Expected train/ and val/ in {data}, each with a folder of pictures per "
            f"class; it contains: {found}"
        )
    try:
        return ImageFolder(str(place), transform(size, recipe), loader=read_picture)
    except FileNotFoundError as error:  # no class or a class without pictures
        raise click.ClickException(f"{place}: {error}") from error


@dataclass(frozen=True)
class World:
    """One of torchrun's processes."""

    rank: int
    size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Print in the first process only."""
        if self.rank == 0:
            click.echo(text)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values


@contextmanager
def join(device: str) -> Iterator[World]:
    """Connect to the other processes, if torchrun started this one, and disconnect at the end."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise click.ClickException("--device cuda: PyTorch finds no CUDA device")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(0, 1, torch.device(device))
        return
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), torch.device(device))
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Options:
    """The options of the command line, except those of the recipe."""

    data: Path
    model: str
    library: str
    weights: Path | None
    size: int
    accumulate: int
    workers: int
    amp: bool
    compile: bool
    backend: str
    memory: str
    seed: int
    no_val: bool
    output: Path
    resume: bool
    eval: bool


def build(options: Options, classes: int, recipe: Recipe) -> nn.Module:
    """Build our model, or timm's with our kernels, with new weights or those of a file."""
    known = ["auto", *(name for name, status in list_backends().items() if status.available)]
    if options.backend not in known:
        raise ValueError(f"--backend {options.backend}: expected one that runs here: {', '.join(known)}")
    common = {"num_classes": classes, "drop_path_rate": recipe.drop_path, "head_init_scale": recipe.head_init_scale}
    if options.library == "timm":
        if options.memory != "auto":
            raise ValueError(f"--memory {options.memory}: with --library timm only 'auto' is possible")
        # Layer scale is timm's: also 1e-6 for V1, none for V2.
        model = accelerate(timm.create_model(options.model, **common), backend=options.backend)
        if options.weights:
            load_timm(model, options.weights, skip_head=not options.eval)
        return model
    if "isotropic" not in options.model:  # those have no layer scale
        common["layer_scale_init_value"] = recipe.layer_scale_init
    model = create_model(options.model, backend=options.backend, **common)
    for module in model.modules():
        if isinstance(module, FusedConvNeXtBlock):
            module.memory = options.memory
    if options.weights:  # with "skip", a classifier for other classes stays newly initialised
        load_weights(model, options.weights, head="require" if options.eval else "skip")
    return model


def load_timm(model: nn.Module, file: Path, skip_head: bool) -> None:
    """Load weights with timm's names."""
    state, own, head = read_state_dict(file), model.state_dict(), model.pretrained_cfg["classifier"]
    differ = [k for k in {**own, **state} if k not in own or k not in state or own[k].shape != state[k].shape]
    problems = [k for k in differ if not (skip_head and k.startswith(head))]
    if problems:
        raise ValueError(f"{file}: does not fit the model: {len(problems)} keys differ (first: {problems[0]})")
    model.load_state_dict({key: value for key, value in state.items() if key not in differ}, strict=False)


def seed_all(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch with all of the numbers."""
    random_seed(int(numpy.random.SeedSequence(numbers).generate_state(1)[0]))


def read_checkpoint(file: Path, settings: Mapping[str, object]) -> dict:
    """Read a checkpoint of `Training.save`, made with the same settings."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        theirs = dict(state["settings"])
        missing = {"model", "optimizer", "history"} - state.keys()
        if missing:
            raise KeyError(*missing)
    except Exception as error:
        raise click.ClickException(
            f"{file}: damaged, or not a checkpoint of this script ({type(error).__name__}); the file was not changed"
        ) from error
    other = [f"{k}={theirs.get(k)!r}, now {v!r}" for k, v in settings.items() if theirs.get(k) != v]
    if other:
        raise click.ClickException(f"{file}: made with {'; '.join(other)}. Use the same settings, or another --output")
    return state


def draw(history: list[dict], stream: BinaryIO) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axis, keys in ((loss, ("train_loss", "val_loss", "ema_loss")), (accuracy, ("val_top1", "ema_top1"))):
        for key in keys:
            if key in history[0]:
                axis.plot([h["epoch"] for h in history], [h[key] for h in history], marker=".", label=key)
        axis.set_xlabel("epoch")
        if axis.lines:
            axis.legend()
    loss.set_ylabel("cross entropy")
    accuracy.set_ylabel("top-1, %")
    figure.savefig(stream, format="png", dpi=120)


class Training:
    """A run: model, average, optimizer, data, and progress."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        options: Options,
        world: World,
        train: ImageFolder,
        val: ImageFolder | None,
    ) -> None:
        self.model, self.recipe, self.options, self.world = model, recipe, options, world
        self.train, self.val = train, val
        self.steps = len(train) // recipe.batch_size  # per epoch; the last of the shuffled pictures are not used
        self.micro_batch = micro_batch(recipe, options, world)
        if not self.steps:
            raise ValueError(f"--batch-size {recipe.batch_size}: more than the {len(train)} pictures in {train.root}")
        self.ema = ModelEmaV3(model, recipe.ema) if recipe.ema else None  # a copy, made before the model is wrapped
        self.optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.betas)
        self.schedule = make_schedule(self.optimizer, recipe, self.steps)
        self.mixup, self.loss = None, LabelSmoothingCrossEntropy(recipe.label_smoothing)
        if recipe.mixup or recipe.cutmix:
            smoothing = {"label_smoothing": recipe.label_smoothing, "num_classes": len(train.classes)}
            self.mixup, self.loss = Mixup(recipe.mixup, recipe.cutmix, **smoothing), SoftTargetCrossEntropy()
        self.parallel = DistributedDataParallel(model) if world.size > 1 else model
        self.network = torch.compile(self.parallel) if options.compile else self.parallel
        self.history: list[dict] = []

    def fit(self, settings: dict[str, object]) -> None:
        """Train the remaining epochs, and write the results."""
        while len(self.history) < self.recipe.epochs:
            epoch, started = len(self.history) + 1, time.perf_counter()
            entry = {"epoch": epoch, "steps": epoch * self.steps, **self.train_epoch(epoch)}
            for name, model in (("val", self.model), ("ema", self.ema)):
                if self.val and model:
                    found = evaluate(model, self.val, self.micro_batch, self.options, self.world)
                    entry |= {f"{name}_{key}": round(value, 4) for key, value in found.items()}
            self.history.append(entry | {"seconds": round(time.perf_counter() - started, 2)})
            if self.world.rank == 0:
                self.save(settings)
            self.world.say("  ".join(f"{key} {value:.6g}" for key, value in self.history[-1].items()))
        for name, model in (("model", self.model), ("model_ema", self.ema and self.ema.module)):
            if model and self.world.rank == 0:
                timms = self.options.library == "timm"
                state = model.state_dict() if timms else export_weights(model, "official")
                content = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
                write(self.options.output / f"{name}.safetensors", lambda stream, c=content: stream.write(c))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch, counted from 1."""
        # All random numbers of an epoch depend only on these three. So a checkpoint needs no generator state, and no
        # two epochs or processes use the same augmentation.
        seed_all(self.options.seed, epoch, self.world.rank)
        # For any number of processes, a step uses the same pictures.
        sampler = DistributedSampler(self.train, self.world.size, self.world.rank, seed=self.options.seed)
        sampler.set_epoch(epoch)
        pinned = self.world.device.type == "cuda"
        loader = DataLoader(
            self.train, self.micro_batch, sampler=sampler, num_workers=self.options.workers, pin_memory=pinned
        )
        self.network.train()
        batches, started, total = iter(loader), time.perf_counter(), 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=self.world.rank > 0) as progress:
            for step in progress.track(range(self.steps), description=f"epoch {epoch}/{self.recipe.epochs}"):
                self.schedule.step_update((epoch - 1) * self.steps + step)  # its only state is this number
                loss = self.step(batches)
                if not math.isfinite(loss):
                    raise click.ClickException(f"epoch {epoch}, step {step + 1}: the loss is {loss}; try a lower --lr")
                total += loss
        seconds = time.perf_counter() - started
        mean = self.world.sum(torch.tensor(total / self.steps / self.world.size, device=self.world.device))
        return {
            "lr": max(group["lr"] for group in self.optimizer.param_groups),  # of the last step, before layer decay
            "train_loss": round(mean.item(), 6),
            "images_per_second": round(self.steps * self.recipe.batch_size / seconds, 2),
        }

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Run one step of the optimizer on `accumulate` batches and return this process's loss."""
        total = torch.zeros((), device=self.world.device)
        for left in reversed(range(self.options.accumulate)):
            x, target = on_device(next(batches), self.world.device)
            if self.mixup:
                x, target = self.mixup(x, target)
            # Gradients are averaged over the processes only once, with the last batch.
            with self.parallel.no_sync() if left and self.world.size > 1 else nullcontext():
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.options.amp):
                    logits = self.network(x)
                loss = self.loss(logits.float(), target) / self.options.accumulate
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        return total.item()

    def save(self, settings: dict[str, object]) -> None:
        """Write log, curves and checkpoint after an epoch."""
        lines = "".join(f"{json.dumps(entry)}\n" for entry in self.history)
        write(self.options.output / "log.jsonl", lambda stream: stream.write(lines.encode()))
        write(self.options.output / "curve.png", lambda stream: draw(self.history, stream))
        state = {"settings": settings, "history": self.history, "optimizer": self.optimizer.state_dict()}
        state["model"] = self.model.state_dict()  # load_weights takes "model_ema" from a checkpoint, else "model"
        if self.ema:
            state["model_ema"] = self.ema.module.state_dict()
        write(self.options.output / "checkpoint.pth", lambda stream: torch.save(state, stream))

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["model_ema"])
        self.history = state["history"]


def micro_batch(recipe: Recipe, options: Options, world: World) -> int:
    """Return the number of pictures in one pass of one process."""
    parts, pair = world.size * options.accumulate, 2 if recipe.mixup or recipe.cutmix else 1
    if recipe.batch_size % (parts * pair):
        raise ValueError(
            f"--batch-size {recipe.batch_size}: expected a multiple of {parts * pair}: {world.size} processes x "
            f"{options.accumulate} passes{' x 2, because mixup and cutmix use pairs' if pair == 2 else ''}"
        )
    return recipe.batch_size // parts


def on_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy a batch to the device, in the fast memory format."""
    x, target = batch
    x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
    return x, target.to(device, non_blocking=True)


@torch.inference_mode()
def evaluate(model: nn.Module, val: ImageFolder, batch: int, options: Options, world: World) -> dict[str, float]:
    """Cross entropy, top-1 and top-5 in percent; each picture counts once, in one of the processes."""
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    mine = Subset(val, range(world.rank, len(val), world.size))
    for pair in DataLoader(mine, batch, num_workers=options.workers):
        x, target = on_device(pair, world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=options.amp):
            logits = model(x).float()
        right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        totals += torch.stack((loss, right[:, 0].sum(), right.any(1).sum(), torch.ones_like(target).sum()))
    loss, top1, top5, count = world.sum(totals).tolist()
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def run(options: Options, recipe_name: str, recipe: Recipe, world: World) -> None:
    """Check everything, then evaluate or train."""
    if not options.weights and (options.eval or recipe_name == "finetune"):
        raise click.ClickException(f"{'--eval' if options.eval else '--recipe finetune'} needs --weights")
    val = None if options.no_val and not options.eval else folder(options.data, "val", options.size, None)
    train = None if options.eval else folder(options.data, "train", options.size, recipe)
    if train and val and train.classes != val.classes:
        odd = ", ".join(sorted({*train.classes} ^ {*val.classes})[:10])
        raise click.ClickException(
            f"{options.data}: train/ and val/ have different classes; only one of them has: {odd}"
        )
    seed_all(options.seed, 0, 0)  # the same new weights in every process
    try:
        model = build(options, len((train or val).classes), recipe).to(world.device, memory_format=torch.channels_last)
        training = None if options.eval else Training(model, recipe, options, world, train, val)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if not training:
        found = evaluate(model, val, 64, options, world)
        world.say(f"{options.weights}: {len(val)} pictures of {len(val.classes)} classes")
        world.say(json.dumps({key: round(value, 4) for key, value in found.items()}))
        return
    settings = {"recipe": recipe_name, "model": options.model, "library": options.library, "size": options.size}
    settings |= {"seed": options.seed, "classes": len(train.classes), "pictures": len(train), **asdict(recipe)}
    checkpoint = options.output / "checkpoint.pth"
    if checkpoint.exists() and not options.resume:
        raise click.ClickException(f"{checkpoint} exists: use --resume to continue, or another --output")
    if checkpoint.exists():
        training.restore(read_checkpoint(checkpoint, settings))
        world.say(f"{checkpoint}: continues after {len(training.history)} of {recipe.epochs} epochs")
    elif world.rank == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        write(options.output / "settings.json", lambda stream: stream.write(json.dumps(settings, indent=1).encode()))
    if not recipe.drop_path and options.model.partition(".")[0] not in DROP_PATH[recipe_name]:
        world.say(f"no stochastic depth: this recipe has no value for {options.model}; --set drop_path=... sets one")
    if recipe.ema and training.steps * recipe.epochs * (1 - recipe.ema) < 1:
        world.say(
            f"ema {recipe.ema:g} is too slow for this run, the average stays near the initial weights; --set ema=... "
            "changes it"
        )
    world.say(
        f"{options.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(train)} pictures "
        f"of {len(train.classes)} classes; {recipe.epochs} epochs of {training.steps} steps of {recipe.batch_size} "
        f"({world.size} x {options.accumulate} x {training.micro_batch}); peak lr {recipe.lr:.3g}; on {world.device}"
    )
    training.fit(settings)
    world.say(f"{options.output}: log.jsonl, curve.png, checkpoint.pth and the weights")


def cores() -> int:
    """Return the cores for each process of this machine, at most 10."""
    return min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 10)


_FILE, _FOLDER = click.Path(exists=True, dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="imagenet-1k")
@click.option("--model", default="convnext_tiny", metavar="NAME", help="A name of convnext_kernels.models, or timm's.")
@click.option("--library", type=click.Choice(["ours", "timm"]), default="ours", help="timm's runs on our kernels.")
@click.option("--weights", type=_FILE, help="Weights to start from, or to evaluate.")
@click.option("--size", type=click.IntRange(32), default=224, help="Side of the pictures.")
@click.option("--epochs", type=click.IntRange(1), help="[default: the recipe's]")
@click.option("--batch-size", type=click.IntRange(1), help="Of a step, over all processes.  [default: the recipe's]")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Passes per step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak.  [default: scaled from the recipe's]")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change the recipe; may be repeated.")
@click.option("--workers", type=click.IntRange(0), default=cores, help="Reading processes per training process.")
@click.option("--amp", is_flag=True, help="Compute in bf16.")
@click.option("--compile", is_flag=True, help="Use torch.compile.")
@click.option("--backend", default="auto", help="A backend of convnext_kernels.")
@click.option("--memory", type=click.Choice(["auto", "min", "balanced"]), default="auto", help="Kept for gradients.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--no-val", is_flag=True, help="Train without val/, which ImageNet-22K does not have.")
@click.option("--output", type=_FOLDER, default="train_imagenet")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the output folder, if there is one.")
@click.option("--eval", is_flag=True, help="Only evaluate --weights on val/.")
def main(
    recipe: str,
    device: str,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    changes: tuple[str, ...],
    **others: object,
) -> None:
    """Train a ConvNeXt on DATA/train and DATA/val with a recipe of the paper."""
    options = Options(**others)
    resolved = resolve(recipe, options.model, epochs, batch_size, lr, changes)
    with join(device) as world:
        run(options, recipe, resolved, world)


if __name__ == "__main__":
    main()
