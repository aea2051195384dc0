import pickle

import pytest
import torch
from safetensors.torch import save_file

from convnext_kernels.cli import load

TEST_MODEL = "timm/test_convnext"
DEMO = ("demo", "--no-report", "--size", "32", "--model", TEST_MODEL)


@pytest.fixture(scope="module")
def state():
    loaded = load.load(TEST_MODEL, None, False)
    return {name: value + 0.25 for name, value in loaded.model.state_dict().items()}


def test_torchvision_comes_before_timm():
    assert load.resolve("convnext_tiny") == ("torchvision", "convnext_tiny")
    assert load.resolve("timm/convnext_tiny") == ("timm", "convnext_tiny")
    assert load.resolve("convnextv2_atto") == ("timm", "convnextv2_atto")
    assert load.resolve("timm/convnext_tiny.fb_in22k") == ("timm", "convnext_tiny.fb_in22k")


def test_unknown_models(fails):
    fails("demo", "--no-report", "--model", "convnext_tinny", words=("convnext_tinny", "close", "convnext_tiny"))
    fails("demo", "--no-report", "--model", "torchvision/convnextv2_atto", words=("not found in torchvision",))
    fails("demo", "--no-report", "--model", "hub/convnext_tiny", words=("'hub'", "torchvision/", "timm/"))
    fails("demo", "--no-report", "--model", "", words=("not found",))


def test_a_model_without_convnext_blocks(fails):
    fails("demo", "--no-report", "--model", "resnet18", words=("torchvision/resnet18", "nothing to accelerate"))


@pytest.mark.parametrize("name", [TEST_MODEL, "timm/convnextv2_atto", "torchvision/convnext_tiny"])
def test_random_weights_let_every_block_contribute(name):
    model = load.load(name, None, False).model
    again = load.load(name, None, False).model
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    blocks = [m for m in model.modules() if type(m).__name__ in ("CNBlock", "ConvNeXtBlock")]
    assert blocks
    share = []

    def watch(_, inputs, output):
        share.append(((output - inputs[0]).std() / output.std()).item())

    for block in blocks:
        block.register_forward_hook(watch)
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert len(share) == len(blocks)
    assert min(share) > 0.1, share
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_weights_from_pth(state, tmp_path, wrapped):
    torch.save(state if wrapped is None else {wrapped: state, "epoch": 3}, tmp_path / "w.pth")
    loaded = load.load(TEST_MODEL, tmp_path / "w.pth", False)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert "w.pth" in loaded.weights
    assert len(loaded.classes) == 1000


def test_weights_from_safetensors(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    loaded = load.load(TEST_MODEL, tmp_path / "w.safetensors", False)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_weights_of_another_model(fails, state, tmp_path):
    key, *others = state
    torch.save({name: state[name] for name in others} | {"head.odd": torch.zeros(2)}, tmp_path / "w.pth")
    fails(*DEMO, "--weights", tmp_path / "w.pth", words=("w.pth", "Missing", key, "Unexpected", "head.odd"))
    torch.save(state | {key: torch.zeros(7, 5)}, tmp_path / "w.pth")
    fails(*DEMO, "--weights", tmp_path / "w.pth", words=("size mismatch", key, "[7, 5]"))


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_pickled_code_is_refused(fails, run, tmp_path):
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name, words in (("evil.pth", ("evil.pth", "pickled code")), ("plain.pth", ("plain.pth",))):
        fails(*DEMO, "--weights", tmp_path / name, words=words)
        assert "this code ran" not in run(*DEMO, "--weights", tmp_path / name).output


@pytest.mark.parametrize(
    ("name", "content"), [("w.pth", b""), ("w.pt", b"hello, world"), ("w.safetensors", bytes(range(256)) * 9)]
)
def test_damaged_weights(fails, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fails(*DEMO, "--weights", tmp_path / name, words=(name,))


def test_weights_that_are_no_state_dict(fails, tmp_path):
    for value in ([1, 2], {"a": 1}, torch.zeros(3)):
        torch.save(value, tmp_path / "w.pth")
        fails(*DEMO, "--weights", tmp_path / "w.pth", words=("w.pth", "state dict"))


def test_missing_and_odd_weights_files(fails, tmp_path):
    fails(*DEMO, "--weights", tmp_path / "none.pth", words=("none.pth", "no such file"))
    fails(*DEMO, "--weights", tmp_path, words=("not a regular file",))
    (tmp_path / "w.onnx").write_bytes(b"")
    fails(*DEMO, "--weights", tmp_path / "w.onnx", words=("w.onnx", ".safetensors"))


def test_pretrained_without_internet(fails, monkeypatch):
    import urllib.error

    import torchvision

    def offline(name, weights):
        assert weights == "DEFAULT"
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    words = ("convnext_tiny", "no pretrained weights", "no route", "--weights FILE")
    fails("demo", "--no-report", "--pretrained", words=words)
