"""The ConvNeXt paper's training recipes: their values, and functions that make an optimizer and a schedule from them.

`train_imagenet.py` in this folder uses them.
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
    """The values of a training run. The defaults are common to the three recipes."""

    epochs: int
    warmup_epochs: float
    batch_size: int = 4096  # pictures per step of the optimizer, over all processes
    lr: float = 4e-3  # peak for this batch size; scaled linearly for others
    min_lr: float = 1e-6  # at the end; from the official code, the paper gives none
    weight_decay: float = 0.05  # none on biases, norms and layer scale
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0  # ratio of the learning rates of one group of layers and the next one
    drop_path: float = 0.0  # stochastic depth of the last block: DROP_PATH
    layer_scale_init: float = 1e-6
    head_init_scale: float = 1.0
    randaugment: str = "rand-m9-mstd0.5-inc1"  # timm's name for (9, 0.5); "" for none
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25
    label_smoothing: float = 0.1
    ema: float = 0.0  # decay of the averaged weights; 0 for none


# Pre-training: arXiv 2201.03545, table 5; no gradient clipping. That table prints "trunc. normal (0.2)" for the initial
# weights; the official code uses a standard deviation of 0.02, and so do our models and timm's.
# Fine-tuning: table 6 and the commands in the official TRAINING.md, for models that were pre-trained on ImageNet-22K.
# From ImageNet-1K at 384, use `--set layer_decay=0.7` and a drop_path of 0.8 (B) or 0.95 (L).
# Not included: ConvNeXt V2. It starts from masked pre-training (FCMAE), and the values of its fine-tuning differ for
# each size (2301.00808, appendix; the official TRAINING.md).
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
# Stochastic depth where it is published, from tiny to xlarge. The isotropic networks' values are in the official
# TRAINING.md, which also uses 50 warm-up epochs for them (`--set warmup_epochs=50`).
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
    """Return the recipe of a run: scaled to its batch size and length, then with the `changes` ("mixup=0.2").

    The learning rate is proportional to the batch size; the warm-up is the same share of a shorter or longer run.
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
    # epochs and batch_size have their own options; other values depend on them.
    types = {k: type(v) for k, v in asdict(recipe).items() if k not in ("epochs", "batch_size", "betas")}
    values: dict[str, float | str] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in types:
            raise click.ClickException(f"--set {change}: expected NAME=VALUE with one of {', '.join(types)}")
        try:
            values[key] = types[key](text)
        except ValueError as error:
            raise click.ClickException(f"--set {change}: expected a number, got {text!r}") from error
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
            f"warmup_epochs: expected fewer than the run's {epochs} epochs, got {recipe.warmup_epochs}"
        )
    return recipe


def layer_ids(names: Iterable[str]) -> dict[str, int]:
    """Group parameters for layer decay like the official code, by our names or timm's.

    The stem is group 0, stages 1 and 2 are groups 1 and 2. Every three blocks of stage 3 are one group, stage 4 is the
    next, and the last norm and the classifier are the last. A downsampling layer is in the group of the blocks after
    it. For depths (3, 3, 27, 3) the groups are 0 to 13, as in the official ``get_num_layer_for_convnext``; for T, with
    9 blocks in stage 3, 0 to 7, as in the official detectors.
    """
    names = list(names)
    blocks = [re.match(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.", name) for name in names]
    between = [re.match(r"(?:downsample_layers\.|stages\.(?=\d\.downsample))(\d)\.", name) for name in names]
    third = [int(m[2]) for m in blocks if m and m[1] == "2"]
    if not third:
        raise ValueError("layer_decay: needs a network of four stages; --set layer_decay=1 turns it off")
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
    """Return the optimizer's groups: no weight decay on vectors, including GRN's (1, 1, 1, C) in V2."""
    vectors = [name for name, _ in model.named_parameters() if name.endswith((".gamma", ".beta"))]
    if recipe.layer_decay == 1:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=vectors)
    # timm gets the groups from the model. Its own ConvNeXts would give one per block; for a model without
    # `group_matcher` it would group every twelve parameters.
    ids = layer_ids(name for name, _ in model.named_parameters())
    model.group_matcher = lambda coarse=False: ids.get
    return param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=vectors, layer_decay=recipe.layer_decay
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine down to `min_lr`; an epoch has `steps` steps."""
    warmup = round(recipe.warmup_epochs * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(recipe.epochs * steps - warmup, 1),
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
