"""The ConvNeXt block at the four stages of ConvNeXt-T, this package against eager PyTorch, channels_last.

`convnext-kernels blocks` interleaves the two in one process and prints the ratio; this file gives
pytest-benchmark's statistics. Numbers are checked before a speed is reported.
"""

import copy

import pytest
import torch

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.cli.blocks import eager_block


@pytest.mark.parametrize("candidate", ["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_block(benchmark, candidate, stage, batch, dtype, version):
    channels, size = stage
    benchmark.group = f"block {version} C{channels} {size}x{size} batch {batch} {str(dtype)[6:]}"
    torch.manual_seed(0)
    eager = eager_block(channels, use_grn=version == "V2").eval()
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.05)
    fused = FusedConvNeXtBlock(channels, use_grn=version == "V2", layer_scale_init_value=1.0).eval()
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(batch, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
    eager, fused = eager.to(dtype), fused.to(dtype)

    reference = copy.deepcopy(eager).double()(x.double())
    errors = {name: (model(x) - reference).abs().max().item() for name, model in (("eager", eager), ("fused", fused))}
    floor = 8 * torch.finfo(dtype).eps * reference.abs().max().item()
    assert errors["fused"] <= 2 * errors["eager"] + floor, errors

    benchmark.extra_info["error"] = errors[candidate]
    benchmark.extra_info["multiply_adds"] = batch * size * size * channels * (49 + 8 * channels)
    benchmark(fused if candidate == "fused" else eager, x)
