"""Features of images from DINOv3-ConvNeXt, accelerated: one vector for each image, and a map of patches.

python examples/features.py                                              random weights, nothing is downloaded
python examples/features.py --weights facebook/dinov3-convnext-tiny-pretrain-lvd1689m     (asks for the licence)

Needs the "demo" extra (pip install "convnext-kernels[demo]").
"""

import click
import torch
from torch.nn.functional import cosine_similarity
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

import convnext_kernels as ck


def load(weights: str | None) -> DINOv3ConvNextModel:
    """Load the published network, or make a small one with seeded weights; accelerate it."""
    if weights:
        model = DINOv3ConvNextModel.from_pretrained(weights)
    else:
        torch.manual_seed(0)
        config = DINOv3ConvNextConfig(hidden_sizes=[24, 48, 96, 192], depths=[2, 2, 2, 2], layer_scale_init_value=1.0)
        model = DINOv3ConvNextModel(config)
    return ck.accelerate(model.eval().to(memory_format=torch.channels_last))


def features(model: DINOv3ConvNextModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) -> one vector for each image (N, C), and the last stage as a map (N, C, H / 32, W / 32)."""
    with torch.inference_mode():
        out = model(images.to(memory_format=torch.channels_last))
    patches = out.last_hidden_state[:, 1:]  # the first token is the mean of the others
    height, width = images.shape[2] // 32, images.shape[3] // 32
    return out.pooler_output, patches.mT.unflatten(2, (height, width))


@click.command()
@click.option("--weights", metavar="NAME", help="A name on Hugging Face's hub, or a folder.")
def main(weights: str | None) -> None:
    """Compare images by their features: an image, the same one brighter, and another one."""
    model = load(weights)
    print(ck.acceleration_report(model))
    generator = torch.Generator().manual_seed(0)
    image, other = torch.randn(2, 1, 3, 224, 224, generator=generator)
    vectors, maps = features(model, torch.cat([image, image + 0.1, other]))
    print(f"vectors {tuple(vectors.shape)}, maps {tuple(maps.shape)}")
    for name, vector in (("brighter", vectors[1]), ("other", vectors[2])):
        print(f"cosine similarity to the {name} image: {cosine_similarity(vectors[0], vector, dim=0).item():.4f}")


if __name__ == "__main__":
    main()
