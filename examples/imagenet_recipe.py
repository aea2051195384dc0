"""The ConvNeXt paper's training recipes: their figures, and what turns them into an optimizer and a schedule.

`train_imagenet.py`, beside this file, trains by them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import click
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """The figures of a training. The defaults are those that the three recipes share."""

    epochs: int
    warmup_epochs: float
    batch_size: int = 4096  # pictures per step of the optimizer, over all processes
    lr: float = 4e-3  # peak, for this batch; scaled linearly for another
    min_lr: float = 1e-6  # at the end; the official code's, the paper gives none
    weight_decay: float = 0.05  # none on biases, norms and layer scale
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0  # factor on the learning rate from each group of layers to the one before it
    drop_path: float = 0.0  # stochastic depth of the last block: DROP_PATH
    layer_scale_init: float = 1e-6
    head_init_scale: float = 1.0
    randaugment: str = "rand-m9-mstd0.5-inc1"  # timm's name of (9, 0.5); "" for none
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25
    label_smoothing: float = 0.1
    ema: float = 0.0  # decay of the averaged weights; 0 for none


# Pre-training: arXiv 2201.03545, table 5; no gradient clipping. That table prints "trunc. normal (0.2)" for the initial
# weights; the official code draws them with a standard deviation of 0.02, and so do our models and timm's.
# Fine-tuning: table 6 and the commands in the official TRAINING.md, for models that were pre-trained on ImageNet-22K.
# From ImageNet-1K at 384 it is `--set layer_decay=0.7` and a drop_path of 0.8 (B) or 0.95 (L).
# ConvNeXt V2 starts from masked pre-training (FCMAE) and is fine-tuned by other figures, for each size its own
# (2301.00808, appendix; the official TRAINING.md), which are not here.
RECIPES = {
    "imagenet-1k": Recipe(epochs=300, warmup_epochs=20.0, ema=0.9999),
    "imagenet-22k": Recipe(epochs=90, warmup_epochs=5.0),
    "finetune": Recipe(
        epochs=30,
        warmup_epochs=0.0,
        batch_size=512,
        lr=5e-5,
        weight_decay=1e-8,
        layer_decay=0.8,
        head_init_scale=0.001,
        mixup=0.0,
        cutmix=0.0,
    ),
}
# Stochastic depth where it is published, from tiny to xlarge. The isotropic networks' stands in the official
# TRAINING.md, which also warms them up for 50 epochs (`--set warmup_epochs=50`).
_SIZES = [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
DROP_PATH: dict[str, dict[str, float]] = {
    "imagenet-1k": dict(zip(_SIZES, (0.1, 0.4, 0.5, 0.5), strict=False)),
    "imagenet-22k": dict(zip(_SIZES, (0.0, 0.0, 0.1, 0.1, 0.2), strict=True)),
    "finetune": dict(zip(_SIZES[2:], (0.2, 0.3, 0.4), strict=True)),
}
DROP_PATH["imagenet-1k"] |= {f"convnext_isotropic_{k}": v for k, v in (("small", 0.1), ("base", 0.2), ("large", 0.5))}


def resolve(
    name: str, model: str, epochs: int | None, batch_size: int | None, lr: float | None, changes: Iterable[str]
) -> Recipe:
    """Return the recipe of a run: scaled to its batch and length, then with the `changes` ("mixup=0.2") as they are.

    The learning rate grows linearly with the batch; a shorter or longer run keeps the warm-up's share of it.
    """
    recipe = RECIPES[name]
    epochs, batch_size = epochs or recipe.epochs, batch_size or recipe.batch_size
    peak = recipe.lr * batch_size / recipe.batch_size if lr is None else lr
    recipe = replace(
        recipe,
        epochs=epochs,
        batch_size=batch_size,
        lr=peak,
        min_lr=recipe.min_lr * peak / recipe.lr,
        warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs,
        drop_path=DROP_PATH[name].get(model.partition(".")[0], 0.0),  # timm: convnext_base.fb_in22k
    )
    # The first two have options of their own, on which the others depend.
    types = {k: type(v) for k, v in asdict(recipe).items() if k not in ("epochs", "batch_size", "betas")}
    values: dict[str, float | str] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in types:
            raise click.ClickException(f"--set {change}: expected NAME=VALUE with one of {', '.join(types)}")
        try:
            values[key] = types[key](text)
        except ValueError as error:
            raise click.ClickException(f"--set {change}: expected a number") from error
    recipe = replace(recipe, **values)
    for key in types.keys() - {"randaugment"}:
        value = getattr(recipe, key)
        top = 1.0 if key in ("drop_path", "label_smoothing", "ema") else math.inf
        if not 0 <= value < top:
            raise click.ClickException(
                f"{key}: expected a number from 0 up to but not including {top:g}, got {value:g}"
            )
    if recipe.warmup_epochs >= epochs:
        raise click.ClickException(
            f"warmup_epochs: expected fewer than the {epochs} epochs, got {recipe.warmup_epochs}"
        )
    return recipe


def layer_ids(names: Iterable[str]) -> dict[str, int]:
    """Group parameters for layer decay as the official code does, by our names or timm's.

    The stem is 0, stages 1 and 2 are 1 and 2, each three blocks of stage 3 one more, stage 4 the next, and the last
    norm and the classifier the last; a downsampling layer goes with the blocks behind it. For depths (3, 3, 27, 3)
    that is 0 to 13, as in the official ``get_num_layer_for_convnext``; for T, which has 9, 0 to 7, as in its detectors.
    """
    names = list(names)
    blocks = [re.match(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.", name) for name in names]
    between = [re.match(r"(?:downsample_layers\.|stages\.(?=\d\.downsample))(\d)\.", name) for name in names]
    third = [int(m[2]) for m in blocks if m and m[1] == "2"]
    if not third:
        raise ValueError(
            "layer_decay: the groups are made for networks of four stages; --set layer_decay=1 does without"
        )
    last = 4 + max(third) // 3
    ids = {}
    for name, block, down in zip(names, blocks, between, strict=True):
        if down:  # the stem is the first of ours
            ids[name] = (0, 2, 3, last)[int(down[1])]
        elif block:
            ids[name] = (1, 2, 3 + int(block[2]) // 3, last)[int(block[1])]
        else:
            ids[name] = 0 if name.startswith("stem") else last + 1
    return ids


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return the optimizer's groups: no weight decay on vectors, which V2's (1, 1, 1, C) of GRN are too."""
    vectors = [name for name, _ in model.named_parameters() if name.endswith((".gamma", ".beta"))]
    if recipe.layer_decay == 1:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=vectors)
    # timm asks the model for its groups. Its own ConvNeXts would give one per block; without an answer it would
    # count parameters in dozens.
    ids = layer_ids(name for name, _ in model.named_parameters())
    model.group_matcher = lambda coarse=False: ids.get
    return param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=vectors, layer_decay=recipe.layer_decay
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine down to `min_lr`, by steps of which an epoch has `steps`."""
    warmup = round(recipe.warmup_epochs * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(recipe.epochs * steps - warmup, 1),
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
