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
