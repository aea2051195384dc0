import itertools

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.tuning import GPUS, explain
from convnext_kernels.tuning.explain import Call

H100 = GPUS["H100"]
BF16 = torch.bfloat16
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))


def block(c=96, size=56, n=8, grn=False):
    return Call("block", (n, c, size, size), 4 * c, (7, 7), grn=grn)


def row(call, training=False, gpu=H100, dtype=BF16):
    recording = explain.Recording()
    recording.calls[call] += 1
    (found,) = explain.explain(recording, dtype, training, gpu)
    return found


def test_a_model_is_recorded_by_kinds_of_calls():
    with torch.device("meta"):
        v1, v2 = ck.FusedConvNeXtBlock(32), ck.FusedConvNeXtBlock(32, use_grn=True)
        model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), v1, v1, v2)
    recording = explain.record(model, (2, 3, 32, 32))
    assert recording.calls == {
        Call("block", (2, 32, 8, 8), 128, (7, 7)): 2,
        Call("block", (2, 32, 8, 8), 128, (7, 7), grn=True): 1,
    }
    (stem,) = recording.others
    assert stem[1] == 2 * 2 * 32 * 8 * 8 * 3 * 16  # FLOPs


@pytest.mark.parametrize(("stage", "picoseconds"), list(zip(STAGES, (313, 878, 2948, 10667), strict=True)))
def test_bytes_of_eager_and_the_limit_of_two_kernels(stage, picoseconds):
    """bf16 V1, as docs/ops/block.md: dwconv 4, LN 4, fc1 10, GELU 16, fc2 10, scale 4, add 6; then the weights."""
    c, size = stage
    found, pixels = row(block(c, size)), 8 * size**2
    assert found.eager.bytes == pixels * 54 * c + 2 * 2 * 4 * c * c
    assert found.eager.launches == 7
    assert found.limit.seconds / pixels * 1e12 == pytest.approx(picoseconds, rel=0.01)
    assert found.limit.bytes == pixels * 10 * c


CALLS = [
    *(block(c, size, grn=grn) for c, size in STAGES for grn in (False, True)),
    Call("dwconv", (8, 96, 56, 56), 0, (31, 31)),
    Call("mlp", (8, 96, 56, 56), 384),
    Call("layernorm", (8, 96, 56, 56)),
    Call("grn", (8, 384, 56, 56), grn=True),
    Call("downsample", (8, 96, 56, 56), 192, (2, 2)),
]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_op_has_a_plan_no_faster_than_the_limit(gpu):
    for call, training in itertools.product(CALLS, (False, True)):
        found = row(call, training, gpu)
        assert found.plan, call
        assert found.ours.launches >= 1
        assert found.ours.seconds >= found.limit.seconds
        assert found.eager.seconds >= found.limit.seconds
