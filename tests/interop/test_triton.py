"""Accelerated models whose every kernel is Triton's: the eager logits and gradients."""

import copy

import pytest
import torch

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, gradients, images, logits
from tests.shapes import chosen

pytestmark = pytest.mark.skipif(
    not ck.list_backends()["triton"].available or torch.cuda.is_available(),
    reason="for Triton's kernels on CPU tensors (the interpreter); on a GPU `convnext-kernels verify` does this",
)


@chosen(lambda name: name == "timm-v1-conv")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_fp32(name):
    eager = MODELS[name].make(dtype=torch.float32)
    fast = ck.accelerate(copy.deepcopy(eager), backend="triton")
    x = images(2, 32, torch.float32)
    with torch.no_grad():
        assert_close(logits(fast, x), logits(eager, x), torch.float32)
    expected, actual = gradients(eager, x), gradients(fast, x)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(actual[parameter], gradient, torch.float32, parameter)


@chosen(lambda name: name == "timm-v2")
@pytest.mark.parametrize("name", ["torchvision", "timm-v2", "transformers-dinov3"])
def test_logits_and_gradients_bf16(name):
    """The fused kernels: against fp64, at most twice eager's error in bf16 and a rounding."""
    wide = MODELS[name].make(dtype=torch.float64)
    eager = copy.deepcopy(wide).bfloat16()
    fast = ck.accelerate(copy.deepcopy(eager), backend="triton")
    x = images(2, 32, torch.bfloat16)
    found = {"wide": gradients(wide, x.double()), "eager": gradients(eager, x), "fast": gradients(fast, x)}
    for model, m in (("wide", wide), ("eager", eager), ("fast", fast)):
        with torch.no_grad():
            found[model]["logits"] = logits(m, x.double() if model == "wide" else x)
    errors = {}
    for parameter, reference in found["wide"].items():
        scale = reference.abs().max().clamp_min(1e-3)
        difference = ((found[m][parameter].double() - reference).abs().max() / scale for m in ("eager", "fast"))
        errors[parameter] = [d.item() for d in difference]
    typical = sorted(e for e, _ in errors.values())[len(errors) // 2]
    for parameter, (theirs, ours) in errors.items():
        assert ours <= 2 * max(theirs, typical) + 0.01, f"{parameter}: error {ours:.2e}, eager's {theirs:.2e}"
