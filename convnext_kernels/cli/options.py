"""Options, checks and output that several commands share."""

import errno
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.results import plain

if TYPE_CHECKING:
    from convnext_kernels.bench.tables import Table

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AUTO_DEVICE = "[default: cuda if PyTorch can use it, else cpu]"


def complete(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """A `shell_complete` function that offers the names that start with the typed text."""
    return lambda ctx, param, incomplete: [name for name in names() if name.startswith(incomplete)]


def _backend_names() -> tuple[str, ...]:
    from convnext_kernels.backends import NAMES

    return ("auto", *NAMES)


def _model_names() -> list[str]:
    """The names of the papers' models that torchvision or timm has: listing those two takes seconds."""
    from convnext_kernels.models import list_models

    return [name for name in list_models() if "isotropic" not in name]


def count(name: str, default: int | None, text: str, least: int = 1) -> Callable[..., object]:
    """An option that is a number of at least `least`."""
    return click.option(name, type=click.IntRange(min=least), metavar="N", default=default, help=text)


def report(default: Path | None, text: str, metavar: str = "DIR") -> Callable[..., object]:
    """The option --report."""
    return click.option("--report", type=click.Path(path_type=Path), default=default, metavar=metavar, help=text)


dtypes = click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(list(DTYPES)),
    multiple=True,
    default=("fp32", "bf16"),
    help="Data type, can be repeated.",
)
dtype = click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16")
training = click.option("--training", is_flag=True, help="Forward and backward pass.")
batch = count("--batch", 8, "Images per pass.")
size = count("--size", 224, "Height and width of the images.", least=32)
threads = count("--threads", None, "CPU threads of PyTorch.")
backend = click.option(
    "--backend",
    default="auto",
    metavar="NAME",
    shell_complete=complete(_backend_names),
    help="Backend, see `info`.",
)
device = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
auto_device = click.option("--device", type=click.Choice(["cpu", "cuda"]), help=AUTO_DEVICE)
model = click.option(
    "--model",
    "model_name",
    default="convnext_tiny",
    metavar="NAME",
    shell_complete=complete(_model_names),
    help="In torchvision or timm.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")


def one_line(error: BaseException, most: int = 300) -> str:
    """An error as one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.{most}}"


def print_json(value: object) -> None:
    """Print `value` as one JSON document."""
    click.echo(json.dumps(plain(value), indent=2))


def warn(lines: Iterable[str]) -> None:
    """Print warnings on stderr, for --json."""
    for line in lines:
        click.echo(f"warning: {line}", err=True)


def show(*tables: "Table", width: int = 0) -> None:
    """Print tables; in a file or a pipe with at least `width` columns."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    console.print(*(table.rich() for table in tables))


def described(batch: int, size: int, dtype: str, training: bool) -> str:
    """What is computed, for the title of a table."""
    direction = "forward and backward" if training else "forward"
    return f"batch {batch}, {size} x {size}, {dtype}, {direction}"


def check_names(what: str, names: Iterable[str], known: list[str]) -> None:
    """Raise ClickException for a name that is not among `known`; suggests near ones."""
    from convnext_kernels.models.convnext import near

    for name in names:
        if name not in known:
            raise click.ClickException(f"{what} {name!r}; {near(name, known)}")


def need(module: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Import a module of an extra of the package; if it is missing, ClickException says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # installed but broken: show the original error
            raise
        raise click.ClickException(
            f'{purpose} needs {error.name}, which is not installed: pip install "convnext-kernels[{extra}]"'
        ) from error


def check_backend(name: str) -> None:
    """Raise ClickException unless backend `name` exists and runs here; BackendError for a bad environment variable."""
    from convnext_kernels.dispatch import AUTO, list_backends, requested_backend

    if name == AUTO:
        requested_backend()
        return
    status = list_backends().get(name)
    if status is None:
        known = ", ".join((AUTO, *list_backends()))
        raise click.ClickException(f"--backend: unknown backend {name!r}, expected one of {known}")
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
    """Check `name` and return it; None means "cuda" if PyTorch can use it, else "cpu"."""
    from convnext_kernels.environment import gpus

    if name is None:
        return "cuda" if gpus()[0] else "cpu"
    check_device(name)
    return name


def check_writable(file: Path, option: str) -> None:
    """Create the folder of `file`; ClickException if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file name")
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise click.ClickException(f"{option} {file}: cannot be written: {error.strerror}") from error


def check_report(file: Path | None, extra: str = "demo") -> None:
    """Raise ClickException unless an HTML report can be written to `file` (None: no report)."""
    if file is not None:
        need("jinja2", "the report", extra)
        need("matplotlib", "the report", extra)
        check_writable(file, "--report")


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads inside the context; None changes nothing."""
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
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the remaining time if stderr is a terminal; yields ``advance(current_step, steps_done)``.

    `total` may be unknown (None).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    remaining = (TextColumn("remaining"), TimeRemainingColumn())
    # sys.stderr as it is now: it is redirected later to silence peers, and the bar must stay visible.
    stderr = Console(file=sys.stderr)
    disable = not stderr.is_terminal
    with Progress(*columns, *remaining, console=stderr, transient=True, disable=disable) as progress:
        task = progress.add_task(description, total=total)
        yield lambda what, steps: progress.update(task, description=what, advance=steps)
