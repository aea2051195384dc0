"""Serve a classifier over HTTP: an accelerated ConvNeXt that runs the images of waiting requests together.

pip install "convnext-kernels[serve]"
python examples/serve.py --weights convnext_tiny.safetensors
curl --data-binary @photo.jpg localhost:8000/classify

Without --weights the network is random. On a GPU it runs as a CUDA graph. `examples/serve_load.py` measures it.
"""

import asyncio
import io
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import click
import numpy
import torch
import uvicorn
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import convnext_kernels as ck
from convnext_kernels.models import create_model, list_models, load_weights

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))  # of ImageNet
MAX_BYTES, MAX_PIXELS = 10 << 20, 50_000_000  # of an image file, and decoded
MAX_BATCH, MAX_WAITING = 8, 64  # images at once, requests in the queue
SECONDS = 10.0  # for a request to arrive, and again for its turn


def preprocess(data: bytes) -> torch.Tensor:
    """An image file -> (3, 224, 224). Raises ValueError for anything but an image of a reasonable size."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # decoders raise many types
        raise ValueError(f"image: cannot be read: {error}") from error
    if image.width * image.height > MAX_PIXELS:  # before anything is decoded: it may be a decompression bomb
        raise ValueError(f"image: expected at most {MAX_PIXELS} pixels, got {image.width}x{image.height}")
    try:
        image.draft("RGB", (512, 512))  # a JPEG is decoded at a fraction of its size
        pixels = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (224, 224))
    except Exception as error:
        raise ValueError(f"image: cannot be decoded: {error}") from error
    return ((torch.from_numpy(numpy.array(pixels)) / 255 - MEAN) / STD).permute(2, 0, 1)


def prepare(model: torch.nn.Module, minutes: float = 0.0) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Return a function: up to MAX_BATCH images -> probabilities (N, classes). `minutes`: for `ck.tune`."""
    parameter = next(model.parameters())
    like = {"device": parameter.device, "dtype": parameter.dtype, "memory_format": torch.channels_last}
    example = torch.zeros(MAX_BATCH, 3, 224, 224).to(**like)
    if minutes:
        ck.tune(model, example, minutes=minutes)
    run = ck.graphed(model, example) if example.is_cuda else model

    def classify(images: list[torch.Tensor]) -> torch.Tensor:
        count = len(images)
        if example.is_cuda:  # a graph has one batch size
            images = images + [images[0]] * (MAX_BATCH - count)
        with torch.inference_mode():
            return run(torch.stack(images).to(**like))[:count].float().softmax(1).cpu()

    classify(list(example.cpu().float()))  # packs the weights and compiles, before the first request
    return classify


class Batcher:
    """Runs the images of waiting requests together. If that fails, these requests fail and the others go on."""

    def __init__(self, run: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        self.run = run
        self.waiting: deque[tuple[torch.Tensor, asyncio.Future]] = deque()
        self.arrived = asyncio.Event()

    async def classify(self, image: torch.Tensor) -> torch.Tensor:
        """Wait for the image's turn. Raises HTTPException where that would take too long."""
        if len(self.waiting) >= MAX_WAITING:
            raise HTTPException(503, f"busy: {MAX_WAITING} requests are waiting")
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((image, future))
        self.arrived.set()
        try:
            return await asyncio.wait_for(future, SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(503, f"busy: no turn within {SECONDS:g} s") from None

    async def serve(self) -> None:
        """Run batches forever."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.waiting:
                batch = [self.waiting.popleft() for _ in range(min(MAX_BATCH, len(self.waiting)))]
                batch = [(image, future) for image, future in batch if not future.done()]  # the others gave up
                if not batch:
                    continue
                try:
                    results = await run_in_threadpool(self.run, [image for image, _ in batch])
                except Exception as error:
                    for _, future in batch:
                        future.cancelled() or future.set_exception(error)
                    continue
                for (_, future), result in zip(batch, results, strict=True):
                    future.done() or future.set_result(result)


async def body(request: Request) -> bytes:
    """The request's body. Raises HTTPException if it is too large."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"image: expected at most {MAX_BYTES} bytes")
    return bytes(data)


def application(run: Callable[[list[torch.Tensor]], torch.Tensor]) -> Starlette:
    """The service: POST /classify with an image file as the body, GET /healthz."""

    async def classify(request: Request) -> JSONResponse:
        try:
            image = await run_in_threadpool(preprocess, await asyncio.wait_for(body(request), SECONDS))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"image: did not arrive within {SECONDS:g} s") from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        probabilities, classes = (await request.app.state.batcher.classify(image)).topk(5)
        return JSONResponse({"classes": classes.tolist(), "probabilities": probabilities.tolist()})

    async def healthz(request: Request) -> JSONResponse:
        alive = not request.app.state.worker.done()
        return JSONResponse({"ok": alive, "waiting": len(request.app.state.batcher.waiting)}, 200 if alive else 503)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.batcher = Batcher(run)
        app.state.worker = asyncio.create_task(app.state.batcher.serve())
        yield
        app.state.worker.cancel()

    return Starlette(
        routes=[Route("/classify", classify, methods=["POST"]), Route("/healthz", healthz)], lifespan=lifespan
    )


@click.command()
@click.option("--model", "name", default="convnext_tiny", type=click.Choice(list_models()), show_default=True)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A .safetensors or .pth.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--tune", "minutes", default=0.0, help="Minutes to time kernels before the service starts.")
@click.option("--port", default=8000, show_default=True)
def main(name: str, weights: Path | None, device: str, minutes: float, port: int) -> None:
    """Serve a classifier."""
    model = create_model(name).eval()
    if weights:
        load_weights(model, weights)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.to(device, dtype, memory_format=torch.channels_last)
    uvicorn.run(application(prepare(model, minutes)), port=port, log_level="warning")


if __name__ == "__main__":
    main()
