"""Weights of other libraries: logits equal, round trips exact, nothing half-loaded."""

import os

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.models import FORMATS, ConvNeXt, export_weights, load_weights, read_state_dict
from convnext_kernels.models.weights import detect_format
from tests.interop import helpers as interop
from tests.tolerance import randomize_

DEPTHS, DIMS, CLASSES = (1, 2, 1, 1), (8, 16, 24, 32), 5
SIZES = {"depths": DEPTHS, "dims": DIMS}


def ours(use_grn=False, **options):
    return ConvNeXt(**SIZES, use_grn=use_grn, **{"num_classes": CLASSES, **options}).eval()


MODELS = {"timm-v2, 1x1": interop.Model(lambda _: interop._timm(0, conv_mlp=True, **interop._V2), *interop._TIMM)}
# a model of these or of tests/interop/helpers.py: the format of its weights, and our network
TWO, FOUR = {"depths": (2, 2), "dims": (8, 16)}, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
THEIRS = {
    "timm-v1": ("timm", FOUR),
    "timm-v2": ("timm", FOUR | {"use_grn": True}),
    "timm-v2, 1x1": ("timm", FOUR | {"use_grn": True}),
    "torchvision": ("torchvision", TWO),
    "transformers-v1": ("transformers", TWO | {"num_classes": 2}),
    "transformers-v2": ("transformers", TWO | {"use_grn": True, "num_classes": 2}),
    "transformers-dinov3": ("dinov3", TWO | {"num_classes": 0}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_round_trip(name):
    form, options = THEIRS[name]
    theirs = (MODELS | interop.MODELS)[name].make()
    for module in theirs.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6  # of the last norm, where V1's configuration has 1e-12
    state = theirs.state_dict()
    assert detect_format(state) == form
    model = load_weights(ConvNeXt(**{"num_classes": 10, **options}).double().eval(), state)
    x = interop.images()
    with torch.no_grad(), ck.use_backend("eager"):
        torch.testing.assert_close(model(x), interop.logits(theirs, x), rtol=1e-9, atol=1e-9)
    back = export_weights(model, form)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key].reshape(value.shape), value), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("form", FORMATS)
def test_files(form, suffix, tmp_path):
    options = {"num_classes": 0 if form == "dinov3" else CLASSES, "layer_scale_init_value": 1.0}
    model, other = randomize_(ours(**options)), ours(**options)
    file = tmp_path / f"weights{suffix}"
    state = export_weights(model, form, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert read_state_dict(file).keys() == state.keys()
    load_weights(other, file)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def sparse(model):
    """The encoder of masked pre-training, as models/fcmae.py of ConvNeXt-V2 stores it, with a decoder."""
    state = {}
    for key, value in model.state_dict().items():
        *path, last = key.split(".")
        if path[0] in ("norm", "head"):
            continue
        between = path[0] == "downsample_layers" and path[1] != "0"
        if "dwconv" in path or (between and path[2] == "1"):
            if last == "weight":  # tap = column * side + row
                last, value = "kernel", value.permute(3, 2, 1, 0).flatten(0, 1).squeeze(1)
            else:
                value = value[None]
        elif "grn" in path:
            value = value[0, 0]
        elif path[-1] in ("pwconv1", "pwconv2"):
            path.append("linear")
        elif path[-1] == "norm" or between:
            path.append("ln")
        state[".".join(("encoder", *path, last))] = value
    return {
        **state,
        "mask_token": torch.zeros(1, 512, 1, 1),
        "proj.weight": torch.zeros(512, 32, 1, 1),
        "decoder.0.dwconv.weight": torch.zeros(512, 1, 7, 7),
        "decoder.0.grn.gamma": torch.zeros(1, 1, 1, 2048),
        "pred.weight": torch.zeros(3072, 512, 1, 1),
    }


def test_masked_pre_training():
    model, other = randomize_(ours(True)), ours(True)
    head = other.head.weight.clone()
    state = sparse(model)
    assert detect_format(state) == "fcmae"
    load_weights(other, state, head="skip")
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) != key.startswith(("norm.", "head.")), key
    assert torch.equal(other.head.weight, head)
    with pytest.raises(ValueError, match=r"4 missing \(first: norm.weight.*head='skip'"):
        load_weights(other, state)
    with pytest.raises(ValueError, match="format: fcmae can only be read"):
        export_weights(other, "fcmae")


@pytest.mark.parametrize("use_grn", [False, True])
def test_weights_of_another_size_change_nothing(use_grn):
    model = randomize_(ours(use_grn))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = ConvNeXt((1, 1, 1, 1), (8, 16, 24, 40), use_grn=use_grn, num_classes=CLASSES).state_dict()
    del other["stages.0.0.dwconv.bias"]
    with pytest.raises(ValueError, match="official weights do not fit the model") as caught:
        load_weights(model, other)
    words = str(caught.value)
    assert "missing (first: stages.0.0.dwconv.bias, stages.1.1." in words
    assert "of another shape (first: downsample_layers.3.1.weight, got (40, 24, 2, 2), expected (32, 24, 2, 2)" in words
    assert "head='skip'" not in words
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Code:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_code_in_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"head.weight": torch.zeros(1)}, "extra": Code()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: it contains more than tensors \(pickled code\)"):
        load_weights(ours(), "bad.pth")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.pth", None, FileNotFoundError, "missing.pth: no such file"),
        ("weights.npz", b"x", ValueError, r"weights.npz: expected .safetensors, .pth, .pt or .bin"),
        ("w.pth", b"nonsense", ValueError, "w.pth: PyTorch cannot read it as a file of tensors"),
    ],
)
def test_bad_files(name, content, error, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        load_weights(ours(), tmp_path / name)
