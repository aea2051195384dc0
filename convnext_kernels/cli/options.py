"""Options that several commands share, and the checks of what they hold."""

import errno
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

dtypes = click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(list(DTYPES)),
    multiple=True,
    default=("fp32", "bf16"),
    show_default=True,
    help="Element type; may be repeated.",
)
threads = click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: PyTorch's]")
backend = click.option("--backend", default="auto", show_default=True, help="A backend listed by `info`, or auto.")
device = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)


def need(module: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Import a module of an extra of the package; ClickException with the way to install it when it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is there, but broken: hide nothing
            raise
        raise click.ClickException(
            f'{purpose} needs {error.name}, which is not installed: pip install "convnext-kernels[{extra}]"'
        ) from error


def check_backend(name: str) -> None:
    """Raise ClickException unless backend `name` exists and runs here; BackendError for a bad environment variable."""
    from convnext_kernels.planner import AUTO, list_backends, requested_backend

    if name == AUTO:
        requested_backend()
        return
    status = list_backends().get(name)
    if status is None:
        expected = ", ".join((AUTO, *list_backends()))
        raise click.ClickException(f"--backend: no backend {name!r}, expected one of {expected}")
    if not status.available:
        raise click.ClickException(f"--backend: {name} is not available: {' '.join(status.reason.split())}")


def check_device(name: str) -> None:
    """Raise ClickException if PyTorch cannot use the device `name` here."""
    from convnext_kernels.environment import gpus

    if name == "cuda":
        _, reason = gpus()
        if reason:
            raise click.ClickException(f"--device cuda: {reason}")


def device_or_default(name: str | None) -> str:
    """Return `name` after `check_device`; for None "cuda" where PyTorch can use it, else "cpu"."""
    from convnext_kernels.environment import gpus

    if name is None:
        return "cuda" if gpus()[0] else "cpu"
    check_device(name)
    return name


def check_writable(file: Path, option: str) -> None:
    """Create the folder of `file` and raise ClickException if the file cannot be written there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file name")
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise click.ClickException(f"{option} {file}: cannot be written: {error.strerror}") from error


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads inside (None: as it is)."""
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the remaining time if stderr is a terminal; yields ``advance(what_is_done_now, steps)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    remaining = (TextColumn("remaining"), TimeRemainingColumn())
    # The stream of now: peers are muted by redirecting sys.stderr, and the bar must stay.
    console = Console(file=sys.stderr)
    disable = not console.is_terminal
    with Progress(*columns, *remaining, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(description, total=total)
        yield lambda what, steps: progress.update(task, description=what, advance=steps)
