"""The repository for Hugging Face's `kernels`, loaded by it from a folder and mapped to transformers' layers."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convnext_kernels.bench.numerics import PEER_SLACK, judge
from tests.interop.helpers import MODELS, assert_as_good_as_a_peer, gradients, images, logits

pytestmark = [pytest.mark.extended, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")]

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "transformers-v1": "ConvNextLayer",
    "transformers-v2": "ConvNextV2Layer",
    "transformers-dinov3": "DINOv3ConvNextLayer",
}


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("kernels", reason="needs the package kernels")


@pytest.fixture(scope="module")
def repository(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "repository"
    subprocess.run([sys.executable, ROOT / "release" / "hf_kernels.py", folder], check=True)
    return folder


@pytest.fixture
def kernelized(hf, repository, monkeypatch):
    """``kernelized(name, mode)``: a model of transformers as it is, and its copy after `kernelize`."""

    def make(name, mode):
        plain = MODELS[name].make(dtype=torch.float32)
        layer = LAYERS[name]
        classes = {type(m) for m in plain.modules() if type(m).__name__ == layer}
        for cls in classes:
            monkeypatch.setattr(cls, "kernel_layer_name", layer, raising=False)
            monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda module: True), raising=False)
        here = hf.LocalLayerRepository(repo_path=repository, layer_name=layer)
        model = copy.deepcopy(plain)
        with hf.use_kernel_mapping({layer: {"cpu": here}}):
            model = hf.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        return plain, model

    return make


def blocks_run(function) -> int:
    """How often the block's op of the repository, not that of the installed package, runs in a call."""
    with torch.profiler.profile() as profile:
        function()
    names = [event.name for event in profile.events()]
    assert not any(name.startswith("convnext_kernels::") for name in names)
    return sum(name.startswith("_convnext_kernels_") and name.endswith("::block") for name in names)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_logits(name, backend, hf, repository, kernelized):
    """On "triton" in Triton's interpreter."""
    plain, model = kernelized(name, hf.Mode.INFERENCE)
    kernel = hf.get_local_kernel(repository)
    status = kernel.list_backends()
    assert set(status) == {"triton", "eager"}
    if not status[backend].available:
        pytest.skip(status[backend].reason)
    x = images(2, dtype=torch.float32)
    with torch.no_grad(), kernel.use_backend(backend):
        assert_as_good_as_a_peer(logits(model, x), plain, x)
        assert blocks_run(lambda: logits(model, x)) == 4
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_training(hf, kernelized):
    plain, model = kernelized("transformers-v2", hf.Mode.TRAINING)
    x = images(2, dtype=torch.float32)
    reference = copy.deepcopy(plain).double()
    assert blocks_run(lambda: logits(model, x)) >= 4  # an event above autograd and one below for each
    found = [gradients(network, x_) for network, x_ in ((reference, x.double()), (plain, x), (model, x))]
    judgement = judge(*found, torch.float32, slack=PEER_SLACK)
    assert judgement.within, judgement.reason


def test_the_repository_stands_alone(repository):
    """It is what kernel-builder reads, and imports nothing of the installed package."""
    code = f"""
import sys
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build
folder = Path({str(repository)!r})
Build.open(folder)
kernel = get_local_kernel(folder)
import torch
kernel.functional.depthwise_conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), None)
assert {set(LAYERS.values())!r} <= set(vars(kernel.layers))
assert "convnext_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
