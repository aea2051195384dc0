"""Measure how long Triton compiles before the first training step of a ConvNeXt, with and without its cache.

    python proofs/triton_compile_time.py [--arch 90] [--batch 8] [--check]

A whole model runs forward and backward on CPU tensors with a driver that compiles our kernels and launches none of
them (PyTorch's own operators run on uninitialised data). First with an empty cache on disk, then with another batch
size of the same class (plans are chosen for powers of two), then with the first one again. Compiling uses one core.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

LIMIT = 60.0  # seconds, cold


def step(arch: int, model: str, batch: int) -> tuple[float, int, int]:
    """Return (seconds, launches, kernels compiled or loaded) of one training step in bf16."""
    import checkout  # noqa: F401
    import timm
    import torch
    from compile_only import compile_only

    import convnext_kernels as ck

    net = timm.create_model(model, pretrained=False).bfloat16()
    x = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with compile_only(arch, "cpu") as launches:
        net = ck.accelerate(net, backend="triton").train()
        start = time.perf_counter()
        net(x).sum().backward()
    return time.perf_counter() - start, len(launches), len({launch.hash for launch in launches})


@click.command()
@click.option("--arch", type=int, default=90, show_default=True)
@click.option("--model", default="convnext_tiny", show_default=True, help="A model of timm.")
@click.option("--batch", type=int, default=8, show_default=True)
@click.option("--check", is_flag=True, help=f"Fail above {LIMIT:g} s, or if another batch size compiles a kernel.")
@click.option("--once", is_flag=True, hidden=True)
def main(arch: int, model: str, batch: int, check: bool, once: bool) -> None:
    """Time the compilation of a whole training step."""
    if once:
        seconds, launches, kernels = step(arch, model, batch)
        print(f"{seconds:.1f} s, {launches} launches, {kernels} kernels")
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        command = [sys.executable, __file__, "--once", "--arch", str(arch), "--model", model]
        results = []
        for what, size in (("cold", batch), ("another batch size, new process", batch - 1), ("again", batch)):
            before = len(list(Path(folder).iterdir()))
            done = subprocess.run([*command, "--batch", str(size)], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            new = len(list(Path(folder).iterdir())) - before
            results.append((float(done.stdout.split()[0]), new))
            line = f"{model} sm_{arch} batch {size}, {what}: {done.stdout.strip()}, {new} new entries in the cache"
            print(line, flush=True)
    if check:
        if results[0][0] > LIMIT:
            raise SystemExit(f"cold compilation took {results[0][0]:.0f} s, limit {LIMIT:g} s")
        if results[1][1]:
            raise SystemExit(f"another batch size compiled {results[1][1]} kernels")


if __name__ == "__main__":
    main()
