"""Fine-tune a ConvNeXt of timm on a new task, in bf16 autocast and under torch.compile.

python examples/finetune.py                    scikit-learn's digits, random weights, a few steps on a CPU
python examples/finetune.py --pretrained --model convnext_tiny.fb_in22k --steps 500 --compile

Needs the "demo" extra (pip install "convnext-kernels[demo]").
"""

import click
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import convnext_kernels as ck


def data(size: int) -> tuple[Tensor, Tensor]:
    """Return the digits as images (N, 3, size, size) with 10 labels; put your own here."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return nn.functional.interpolate(images, size=(size, size), mode="bilinear"), torch.from_numpy(digits.target)


@click.command()
@click.option("--model", "name", default="convnext_atto", show_default=True, help="A convnext* model of timm.")
@click.option("--pretrained", is_flag=True, help="Download timm's weights.")
@click.option("--size", default=32, show_default=True, help="Height and width of the images.")
@click.option("--steps", default=30, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the model; pays for long runs.")
def main(name: str, pretrained: bool, size: int, steps: int, batch: int, compiled: bool) -> None:
    """Fine-tune, and print the accuracy on held-out images."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(name, pretrained=pretrained, num_classes=10, drop_path_rate=0.1, ls_init_value=0.1)
    model = ck.accelerate(model.to(device, memory_format=torch.channels_last))  # same parameters: any optimizer works
    run = torch.compile(model, fullgraph=True) if compiled else model

    images, labels = data(size)
    images = images.to(device, memory_format=torch.channels_last)
    order, labels = torch.randperm(len(images)), labels.to(device)
    train, held_out = order[:-200], order[-200:]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        chosen = train[torch.randint(len(train), (batch,))]
        with torch.autocast(device, torch.bfloat16):  # the parameters and their gradients stay fp32
            loss = nn.functional.cross_entropy(run(images[chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    model.eval()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        right = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"accuracy on {len(held_out)} held-out images: {right:.3f}")


if __name__ == "__main__":
    main()
