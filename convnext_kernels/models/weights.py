"""Load weights of other libraries into our models, and export them.

Our names are those of the official repositories (facebookresearch/ConvNeXt, ConvNeXt-V2). For every other format there
is one list of substitutions in `_FORMATS` that makes its names from the official ones. Loading and exporting use the
same list, so the two cannot disagree.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convnext_kernels.models.convnext import ConvNeXt, IsotropicConvNeXt, near

Replacement = str | Callable[[re.Match[str]], str]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HEAD = re.compile(r"(norm\d?|head)\.")  # the layers after the stages, and the norms of a features_only model


@dataclass(frozen=True)
class Format:
    """How a library names the parameters of a ConvNeXt."""

    marks: str  # regular expression that only a key of this format matches
    substitutions: tuple[tuple[str, Replacement], ...] = ()  # official name -> its name, applied one after the other
    prefixes: tuple[str, ...] = ()  # that files may have before their names; the last one is exported
    headless: bool = False  # whether its networks have no classifier
    grn: bool = True  # whether it has V2 networks
    axes: Mapping[str, Callable[[Tensor], Tensor]] | None = (
        None  # of exported tensors, by the end of their official name
    )


def _vector(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def _pointwise(tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None]


# timm's V2 networks of these widths (Atto to Nano) have 1x1 convolutions instead of linear layers.
_TIMM_CONVOLUTIONS = {(40, 80, 160, 320), (48, 96, 192, 384), (64, 128, 256, 512), (80, 160, 320, 640)}
_TRANSFORMERS = (
    (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
    (r"^downsample_layers\.(\d+)\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"(^|\.)norm\.", r"\1layernorm."),
    (r"\.grn\.gamma$", ".grn.weight"),
    (r"\.grn\.beta$", ".grn.bias"),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^head\.", "classifier."),
)
_FORMATS = {
    "official": Format(r"^(downsample_layers\.0\.0|stem)\.weight$"),
    # the sparse encoder of masked pre-training (ConvNeXt-V2, models/fcmae.py); its decoder is not loaded
    "fcmae": Format(
        r"\.(kernel|linear\.weight)$",
        (
            (r"(\.dwconv|^downsample_layers\.[1-9]\d*\.1)\.weight$", r"\1.kernel"),
            (r"(\.norm|^downsample_layers\.[1-9]\d*\.0)\.", r"\1.ln."),
            (r"\.(pwconv\d)\.", r".\1.linear."),
        ),
        prefixes=("encoder.",),
        headless=True,
    ),
    "timm": Format(
        r"\.conv_dw\.|^stem\.0\.",
        (
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv(\d)\.", r".mlp.fc\1."),
            (r"\.grn\.gamma$", ".mlp.grn.weight"),
            (r"\.grn\.beta$", ".mlp.grn.bias"),
            (r"^head\.", "head.fc."),
            (r"^norm\.", "head.norm."),
        ),
        axes={"grn.gamma": _vector, "grn.beta": _vector},
    ),
    "torchvision": Format(
        r"^features\.0\.0\.",
        (
            (r"^downsample_layers\.(\d+)\.", lambda m: f"features.{2 * int(m[1])}."),
            (r"^stages\.(\d+)\.(\d+)\.", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.block."),
            (r"\.dwconv\.", ".0."),
            (r"\.norm\.", ".2."),
            (r"\.pwconv1\.", ".3."),
            (r"\.pwconv2\.", ".5."),
            (r"\.block\.gamma$", ".layer_scale"),
            (r"^norm\.", "classifier.0."),
            (r"^head\.", "classifier.2."),
        ),
        grn=False,
        axes={".gamma": lambda tensor: tensor[:, None, None]},
    ),
    "transformers": Format(r"embeddings\.patch_embeddings\.", _TRANSFORMERS, prefixes=("convnext.", "convnextv2.")),
    "dinov3": Format(
        r"\.depthwise_conv\.",
        (
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.layers.\2."),
            (r"\.dwconv\.", ".depthwise_conv."),
            (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
            (r"(^|\.)norm\.", r"\1layer_norm."),
        ),
        prefixes=("model.",),
        headless=True,
        grn=False,
    ),
}
FORMATS = tuple(name for name in _FORMATS if name != "fcmae")  # that `export_weights` writes


def read_state_dict(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth, .pt, .bin; code in a file is never run.

    The dictionaries of training scripts ("model", "model_ema", "state_dict") are unwrapped, and ``module.`` of data
    parallel models is removed. Raises FileNotFoundError, or ValueError for another kind of file and for one that
    contains more than tensors or no state dict.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # PyTorch's own message is a page long and offers to run the code after all.
            reason = "PyTorch cannot read it as a file of tensors"
            if "GLOBAL" in str(error):  # the pickle instruction that names a class or a function
                reason = "it contains more than tensors (pickled code), which is never run"
            raise ValueError(f"{file}: {reason}") from error
    for key in ("model_ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: expected a state dict (names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _format(name: str) -> Format:
    if name not in _FORMATS:
        raise ValueError(f"format: unknown format {name!r}; {near(name, list(_FORMATS))}")
    return _FORMATS[name]


def detect_format(state: Mapping[str, Tensor]) -> str:
    """Return the format whose names `state` has: one of `FORMATS`, or "fcmae". Raises ValueError if there is none."""
    # fcmae before official, whose stem it shares
    for name in ("fcmae", *FORMATS):
        mark = re.compile(_FORMATS[name].marks)
        if any(mark.search(key.removeprefix("module.")) for key in state):
            return name
    raise ValueError(
        f"source: no ConvNeXt weights of a known format ({', '.join(_FORMATS)}); its first name is "
        f"{next(iter(state), 'missing')!r}"
    )


def _renamed(key: str, form: Format) -> str:
    for pattern, replacement in form.substitutions:
        key = re.sub(pattern, replacement, key)
    return key


def _sparse_kernel(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's (K*K, C) or (K*K, C_in, C_out) -> (C_out, C_in or 1, K, K); vertical taps vary fastest."""
    side = round(kernel.shape[0] ** 0.5)
    if kernel.dim() == 2:
        kernel = kernel[:, None]
    return kernel.reshape(side, side, *kernel.shape[1:]).permute(3, 2, 1, 0)


def _first(what: str, keys: list[str]) -> list[str]:
    return [f"{len(keys)} {what} (first: {', '.join(keys[:3])})"] if keys else []


def load_weights(
    model: ConvNeXt | IsotropicConvNeXt,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    format: str | None = None,
    head: str = "require",
) -> ConvNeXt | IsotropicConvNeXt:
    """Copy weights into `model`, in place, and return it. All of them are checked before the first one is copied.

    Args:
        model: a model of `create_model`.
        source: a file (see `read_state_dict`) or a state dict, with the names of the official V1 and V2 repositories,
            their FCMAE pre-training, timm, torchvision, or transformers (ConvNeXt, ConvNeXt V2, DINOv3).
        format: one of `FORMATS` or "fcmae"; None detects it.
        head: "require" needs all parameters. With "skip", the last norm and the classifier do not change if the
            source does not have them or has other shapes, and further parameters of them in the source are ignored.
            Use it for pre-trained encoders and for fine-tuning with other classes.

    Logits equal those of the library that the weights come from, with one exception: the last norm of transformers'
    ConvNeXt V1 and DINOv3 may have another epsilon (1e-12) than ours and the official one (1e-6).

    Raises ValueError for an unknown format, and for weights that do not fit, with the first keys that are missing,
    unexpected or of another shape. Raises what `read_state_dict` raises, and TypeError for a model that is not of
    this package.
    """
    if not isinstance(model, (ConvNeXt, IsotropicConvNeXt)):
        raise TypeError(f"model: expected a ConvNeXt of convnext_kernels.models, got {type(model).__name__}")
    if head not in ("require", "skip"):
        raise ValueError(f"head: expected 'require' or 'skip', got {head!r}")
    where = "source" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_state_dict(source)
    if format is None:
        format = detect_format(state)
    form = _format(format)
    if format == "fcmae":  # without the decoder, the mask token and the projection between them
        state = {key: value for key, value in state.items() if key.startswith("encoder.")} or state
    by_name = {_without_prefix(key.removeprefix("module."), form.prefixes): value for key, value in state.items()}
    targets = model.state_dict()
    names = {key: _renamed(key, form) for key in targets}
    optional = {key for key in targets if head == "skip" and _HEAD.match(key)}

    found: dict[str, Tensor] = {}
    missing, shapes = [], []
    for key, target in targets.items():
        value = by_name.get(names[key])
        if value is None:
            missing += [] if key in optional else [names[key]]
            continue
        if names[key].endswith(".kernel"):
            value = _sparse_kernel(value)
        if value.shape != target.shape:
            if _sides(value) != _sides(target):  # more than axes of size 1
                if key not in optional:
                    shapes.append(f"{names[key]}, got {tuple(value.shape)}, expected {tuple(target.shape)}")
                continue
            value = value.reshape(target.shape)
        found[key] = value
    expected = set(names.values())
    ends = {_renamed(key, form) for key in ("norm.weight", "norm.bias", "head.weight", "head.bias")}
    unexpected = [key for key in by_name if key not in expected]
    if head == "skip":
        unbuilt = _unbuilt(model, form)
        unexpected = [key for key in unexpected if key not in ends and not key.startswith(unbuilt)]
    problems = [*_first("missing", missing), *_first("unexpected", unexpected), *_first("of another shape", shapes)]
    if problems:
        message = f"{where}: {format} weights do not fit the model: {'; '.join(problems)}"
        heads = ends | {_renamed(f"norm{i}.{end}", form) for i in range(4) for end in ("weight", "bias")}
        if {key.split(",")[0] for key in (*missing, *unexpected, *shapes)} <= heads:
            message += "; head='skip' loads everything before the head"
        raise ValueError(message)
    with torch.no_grad():
        for key, value in found.items():
            targets[key].copy_(value)  # the tensors of a state dict are the model's own
    return model


def _unbuilt(model: ConvNeXt | IsotropicConvNeXt, form: Format) -> tuple[str, ...]:
    """Return the prefixes of the stages after the last map, which a model with ``features_only`` does not have."""
    found = []
    for i in range(len(getattr(model, "stages", ())) or len(model.dims), len(model.dims)):
        found.append(f"downsample_layers.{i}.")
        found += [f"stages.{i}.{j}.{end}" for j in range(model.depths[i]) for end in ("", "gamma")]
    return tuple(_renamed(name, form) for name in found)


def _without_prefix(key: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _sides(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side != 1]


def export_weights(
    model: ConvNeXt | IsotropicConvNeXt, format: str, file: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """Return the weights of `model` with the names and shapes of `format`, one of `FORMATS`; write them to `file`.

    The library's own model of the same sizes loads them strictly; for "transformers" the one for image classification
    or, without a classifier, the bare model. The name of `file` ends in .safetensors, .pth, .pt or .bin. The file is
    never left half written. The tensors share memory with the model.

    Raises ValueError for an unknown format, for one that has no such network and for another ending of `file`;
    OSError if it cannot be written.
    """
    form = _format(format)
    if format not in FORMATS:
        raise ValueError(f"format: {format} can only be read; expected one of {', '.join(FORMATS)}")
    if format != "official":
        refusal = None
        if isinstance(model, IsotropicConvNeXt):
            refusal = "isotropic networks"
        elif model.features_only:
            refusal = "networks with features_only"
        elif model.use_grn and not form.grn:
            refusal = "V2 networks"
        elif form.headless and model.num_classes:
            refusal = "classifiers (create the model with num_classes=0)"
        elif format == "torchvision" and not model.num_classes:
            refusal = "networks without a classifier"
        if refusal:
            raise ValueError(f"format: {format} has no {refusal}")
    axes = dict(form.axes or {})
    if format == "timm" and model.use_grn and model.dims in _TIMM_CONVOLUTIONS:
        axes |= dict.fromkeys(("pwconv1.weight", "pwconv2.weight"), _pointwise)
    state = {}
    for key, value in model.state_dict().items():
        change = next((change for end, change in axes.items() if key.endswith(end)), None)
        state[_exported(key, format, model)] = change(value) if change else value
    if file is not None:
        _write(state, Path(file))
    return state


def _exported(key: str, format: str, model: nn.Module) -> str:
    name = _renamed(key, _FORMATS[format])
    if format == "dinov3" and not name.startswith("layer_norm."):
        return f"model.{name}"
    if format == "transformers" and model.num_classes and not name.startswith("classifier."):
        return f"{'convnextv2' if model.use_grn else 'convnext'}.{name}"
    return name


def _write(state: dict[str, Tensor], file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"file: expected a name ending in {', '.join(SUFFIXES)}, got {str(file)!r}")
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    os.close(handle)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in state.items()}, name)
        else:
            torch.save(state, name)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
