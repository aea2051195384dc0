"""Every ConvNeXt that torchvision, timm and transformers define: accelerated logits are as good as eager's.

The error against the same weights in fp64 is at most twice that of the unchanged model, plus the floor of
`tests.tolerance`, in fp32 and bf16. Images are small, 64 x 64, so that the largest models take seconds; which
kernels serve depends on the channels, not on the image. The smaller models run always, the others with ``-m extended``.
"""

import copy
import gc
import os
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers

import convnext_kernels as ck
from tests.interop.helpers import fused_calls, images, logits
from tests.tolerance import assert_as_good_as_eager, randomize_

# The five larger models take minutes each and up to 20 bytes a parameter: pytest -m extended with the variable at 1e9.
MAX_PARAMETERS = float(os.environ.get("CNK_PARITY_MAX_PARAMETERS", "220e6"))

TRANSFORMERS = ("ConvNext", "ConvNextV2", "DINOv3ConvNext")  # in the sizes of "tiny": others are only wider

FAST = {f"timm-{name}" for name in ("test_convnext2", "test_convnext3", "convnext_zepto_rms")}  # tanh, SiLU, RMSNorm


def from_transformers(kind):
    config = getattr(transformers, f"{kind}Config")()
    classifier = getattr(transformers, f"{kind}ForImageClassification", None)
    return (classifier or getattr(transformers, f"{kind}Model"))(config)


def models():
    found = {
        f"torchvision-{name}": partial(torchvision.models.get_model, name)
        for name in torchvision.models.list_models(include="convnext*")
    }
    for name in timm.list_models(["convnext_*", "convnextv2_*", "test_convnext*"]):
        found[f"timm-{name}"] = partial(timm.create_model, name)
    found |= {f"transformers-{kind}": partial(from_transformers, kind) for kind in TRANSFORMERS}
    assert found.keys() >= FAST
    return [
        pytest.param(name, build, id=name, marks=() if name in FAST else pytest.mark.extended)
        for name, build in found.items()
    ]


@pytest.mark.parametrize(("name", "build"), models())
def test_logits(name, build):
    with torch.device("meta"):  # the libraries' own initialisation takes longer than all the rest
        model = build().double().eval()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"{parameters / 1e6:.0f}M parameters, CNK_PARITY_MAX_PARAMETERS is {MAX_PARAMETERS / 1e6:.0f}M")
    assert not list(model.buffers())
    exact = randomize_(model.to_empty(device="cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        eager = copy.deepcopy(exact).to(dtype)
        exact.load_state_dict(eager.state_dict())  # the reference has the rounded weights
        x = images(n=2, dtype=dtype)
        with torch.inference_mode():
            reference = logits(exact, x.double())
            expected = logits(eager, x)
            accelerated = ck.accelerate(eager)
            calls = fused_calls(lambda model=accelerated, x=x: logits(model, x))
            actual = logits(accelerated, x)
        eager_error = (expected.double() - reference).square().mean() / reference.square().mean()
        assert eager_error.sqrt() < 8 * torch.finfo(dtype).eps, "PyTorch itself is wrong, and sets no standard"
        rows = ck.acceleration_report(accelerated).rows
        blocks = [r for r in rows if r.kind == "block"]
        assert all(r.replaced for r in rows)
        assert calls["block"] == len(blocks) > 0
        assert_as_good_as_eager(actual, expected, reference, what=f"{name}, {dtype}")
        del eager, accelerated
        gc.collect()
