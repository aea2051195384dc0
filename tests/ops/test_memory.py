"""What a forward pass keeps for its gradient, counted as autograd keeps it."""

import pytest
import torch

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, op_calls, with_gradients
from tests.shapes import TRITON, Case, chosen

CASE = Case("wide enough for auto to keep the hidden", n=2, c=208, h=5, w=6)
VARIANTS = {"v1": Case("V1", c=24), "v2": Case("V2", c=24, variant="v2"), "drop": Case("drop path", c=24, drop=True)}


def kept(block, x):
    """Bytes that ``block(x)`` keeps for its gradient, beside its parameters, in units of x."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(storages.values()) / (x.numel() * x.element_size())


@chosen(lambda memory, use_grn, backend: backend != TRITON or (memory == "balanced" and use_grn))
@pytest.mark.parametrize(("memory", "limit"), [("min", 2.1), ("balanced", 6.1), ("auto", 6.1)])
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_block_keeps(memory, limit, use_grn, backend):
    block = FusedConvNeXtBlock(CASE.c, use_grn=use_grn, memory=memory, backend=backend, dtype=torch.bfloat16)
    x = torch.randn(CASE.n, CASE.c, CASE.h, CASE.w, dtype=torch.bfloat16, requires_grad=True)
    x = x.to(memory_format=torch.channels_last)
    assert kept(block, x) <= limit


@chosen(lambda memory, backend: memory == "balanced" or backend != TRITON)
@pytest.mark.parametrize(("memory", "limit"), [("min", 1), ("balanced", 3)])
def test_block_keeps_half_under_autocast(memory, limit, backend):
    """x, y and the hidden in bf16 of an fp32 x, and the weights; on a CPU the first two in fp32."""
    limit = {"eager": 1, "cpu": limit + 1}.get(backend, limit)
    block = FusedConvNeXtBlock(CASE.c, memory=memory, backend=backend)
    x = torch.randn(CASE.n, CASE.c, CASE.h, CASE.w, requires_grad=True).to(memory_format=torch.channels_last)
    weights = 0 if backend in ("eager", "cpu") else 2 * 2 * 4 * CASE.c**2 / (4 * x.numel())
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(block, x) - weights == pytest.approx(limit, abs=0.01)


@pytest.mark.parametrize("op", ["mlp", "block"])
def test_inference_keeps_nothing(op):
    """Also where the weights want gradients: the hidden is not even allocated."""
    arguments = with_gradients(OPERATORS[op].arguments(CASE, torch.float32))
    for grad, memory in ((True, "auto"), (False, "nothing")):
        with torch.set_grad_enabled(grad):
            ((_, given, _),) = op_calls(lambda: OPERATORS[op].serve("eager", **arguments))
        assert given[-2] == memory
