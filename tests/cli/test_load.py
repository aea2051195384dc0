import pytest
import torch

from convnext_kernels.cli import load

TEST_MODEL = "timm/test_convnext"


def test_unknown_models(fails):
    fails("demo", "--model", "convnext_tinny", words=("convnext_tinny", "close", "convnext_tiny"))
    fails("demo", "--model", "torchvision/convnextv2_atto", words=("not found in torchvision",))
    fails("demo", "--model", "hub/convnext_tiny", words=("'hub'", "torchvision/", "timm/"))
    fails("demo", "--model", "", words=("not found",))


def test_a_model_without_convnext_blocks(fails):
    fails("demo", "--model", "resnet18", words=("torchvision/resnet18", "nothing to accelerate"))


@pytest.mark.parametrize("name", ["timm/convnextv2_atto", "torchvision/convnext_tiny"])
def test_random_weights_let_every_block_contribute(name):
    model = load.load(name, False).model
    again = load.load(name, False).model
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
