"""Take an accelerated model elsewhere: a program of PyTorch's operators, one with this package's kernels, a CUDA graph.

python examples/export.py --output folder

Needs the "demo" extra (pip install "convnext-kernels[demo]"). With the extra "bench" also ONNX, for ONNX Runtime.
"""

import importlib.util
from pathlib import Path

import click
import torch
import torchvision

import convnext_kernels as ck


def build() -> torch.nn.Module:
    """Make the model to export; use your own, with its weights."""
    torch.manual_seed(0)
    settings = [
        torchvision.models.convnext.CNBlockConfig(c, o, n) for c, o, n in ((24, 48, 1), (48, 96, 1), (96, None, 2))
    ]
    model = torchvision.models.ConvNeXt(settings, layer_scale=1.0, num_classes=10).eval()
    return ck.accelerate(model)


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="exported", show_default=True)
def main(output: Path) -> None:
    """Export a model in every way, load each file again and compare its logits with the model's."""
    output.mkdir(parents=True, exist_ok=True)
    model = build().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    other = torch.randn(5, 3, 64, 64)  # a batch of another size
    wanted = model(other)
    batch = ({0: torch.export.Dim("batch")},)

    def show(what: str, logits: torch.Tensor) -> None:
        print(f"{what}: logits differ by at most {(logits - wanted).abs().max().item():.1e}")

    # PyTorch's operators: runs where this package is not installed.
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=batch, strict=False), output / "operators.pt2")
    show("operators.pt2", torch.export.load(output / "operators.pt2").module()(other))

    # This package's ops, kept as such: its kernels, on the backend of the machine that loads the file.
    with ck.keep_ops():
        program = torch.export.export(model, (x,), dynamic_shapes=batch, strict=False)
    torch.export.save(program, output / "kernels.pt2")
    show("kernels.pt2", torch.export.load(output / "kernels.pt2").module()(other))

    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        import onnxruntime

        torch.onnx.export(model, (x,), output / "model.onnx", dynamo=True, dynamic_shapes=batch, verbose=False)
        session = onnxruntime.InferenceSession(output / "model.onnx")
        show("model.onnx", torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]))

    if torch.cuda.is_available():  # the launches of a fixed shape, captured once and replayed without Python
        graph = ck.graphed(model.cuda(), x.cuda())
        print(f"CUDA graph: logits differ by at most {(graph(x.cuda()) - model(x.cuda())).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
