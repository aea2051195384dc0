"""Load the service of `examples/serve.py` with many clients at once: torchvision's ConvNeXt, then the same accelerated.

python examples/serve_load.py --seconds 60

The weights are random. Every answer is compared with the model's own; nothing may fail.
"""

import asyncio
import contextlib
import io
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import torch
import torchvision
import uvicorn
from PIL import Image
from sklearn.datasets import load_sample_images

import convnext_kernels as ck

sys.path.insert(0, str(Path(__file__).parent))
import serve


@contextlib.contextmanager
def running(app: object) -> Iterator[str]:
    """Serve `app` in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def photographs() -> list[bytes]:
    """JPEG files: scikit-learn's two photographs, each mirrored as well."""
    files = []
    for array in load_sample_images().images:
        for pixels in (array, array[:, ::-1]):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            files.append(file.getvalue())
    return files


async def load(address: str, files: list[bytes], answers: list[int], clients: int, seconds: float) -> dict[str, object]:
    """Send requests from `clients` at once; count answers that are missing or not the expected class."""
    latencies: list[float] = []
    wrong = failed = 0
    end = time.monotonic() + seconds

    async def client(i: int, http: httpx.AsyncClient) -> None:
        nonlocal wrong, failed
        while time.monotonic() < end:
            i = (i + 1) % len(files)
            begin = time.perf_counter()
            response = await http.post(f"{address}/classify", content=files[i])
            latencies.append(time.perf_counter() - begin)
            if response.status_code != 200:
                failed += 1
            elif response.json()["classes"][0] != answers[i]:
                wrong += 1

    async with httpx.AsyncClient(timeout=60) as http:
        await asyncio.gather(*(client(i, http) for i in range(clients)))
    percentiles = statistics.quantiles(latencies, n=100)
    return {"requests": len(latencies), "failed": failed, "wrong": wrong} | {
        f"p{p} ms": round(1e3 * percentiles[p - 1], 1) for p in (50, 90, 99)
    }


@click.command()
@click.option("--model", "name", default="convnext_tiny", help="A ConvNeXt of torchvision.", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--clients", default=16, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
def main(name: str, device: str, clients: int, seconds: float) -> None:
    """Measure the service."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, layer_scale=1.0)  # of the default, 1e-6, no block would show
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.eval().to(device, dtype, memory_format=torch.channels_last)
    files = photographs()
    answers = serve.prepare(model)([serve.preprocess(file) for file in files]).argmax(1).tolist()
    for way in ("eager", "accelerated"):
        if way == "accelerated":
            ck.accelerate(model)
        with running(serve.application(serve.prepare(model))) as address:
            result = asyncio.run(load(address, files, answers, clients, seconds))
        print(way, " ".join(f"{key}: {value}" for key, value in result.items()), flush=True)
        if result["failed"] or result["wrong"]:
            raise SystemExit("some requests failed or got another answer")


if __name__ == "__main__":
    main()
