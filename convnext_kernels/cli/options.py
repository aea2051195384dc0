"""Options that several commands share, which check their own values, and output."""

import errno
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from convnext_kernels.backends import NAMES
from convnext_kernels.bench.results import plain
from convnext_kernels.bench.tables import Table, report_missing
from convnext_kernels.models import list_models
from convnext_kernels.models.convnext import near

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FILE = click.Path(path_type=Path)
Decorator = Callable[[Any], Any]


def complete(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """A `shell_complete` function that offers the names that start with the typed text."""
    return lambda context, parameter, incomplete: [name for name in names() if name.startswith(incomplete)]


def _backend_names() -> tuple[str, ...]:
    return ("auto", *NAMES)


def _model_names() -> list[str]:
    """The names of the papers' models that torchvision or timm has: listing those two takes seconds."""
    return [name for name in list_models() if "isotropic" not in name]


def _available_backend(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    from convnext_kernels.dispatch import AUTO, list_backends, requested_backend

    if name == AUTO:
        requested_backend()  # BackendError for a bad environment variable
        return name
    status = list_backends().get(name)
    if status is None:
        raise click.ClickException(
            f"--backend: unknown backend {name!r}, expected one of {', '.join(_backend_names())}"
        )
    if not status.available:
        raise click.ClickException(f"--backend: {name} is not available: {' '.join(status.reason.split())}")
    return name


def _usable_device(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str:
    """The device; None means "cuda" if PyTorch can use it, else "cpu"."""
    from convnext_kernels.environment import gpus

    found, reason = gpus() if name != "cpu" else ([], "")
    if name == "cuda" and not found:
        raise click.ClickException(f"--device cuda: {reason}")
    return name or ("cuda" if found else "cpu")


def _use_threads(context: click.Context, _parameter: click.Parameter, count: int | None) -> None:
    """Let PyTorch use `count` CPU threads while the command runs."""
    if count is not None:
        context.call_on_close(partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(count)


def count(name: str, default: int | None, text: str, least: int = 1, **more: Any) -> Decorator:
    """An option that is a number of at least `least`."""
    return click.option(name, type=click.IntRange(min=least), metavar="N", default=default, help=text, **more)


def device(default: str | None = None) -> Decorator:
    """The option --device; None: the GPU if there is one."""
    text = None if default else "[default: cuda if PyTorch can use it, else cpu]"
    kind = click.Choice(["cpu", "cuda"])
    return click.option("--device", type=kind, default=default, callback=_usable_device, help=text)


def no_report(context: click.Context, _parameter: click.Parameter, chosen: bool) -> bool:
    """Of an eager flag with which no report is written."""
    context.meta["no_report"] = context.meta.get("no_report") or chosen
    return chosen


def report(default: Path | None, text: str, name: str = "") -> Decorator:
    """The option --report: a folder, in which a file `name` is written, or without a name a file; and --no-report.

    The command gets a path that can be written, with what a report needs installed, or None for no report.
    """

    def checked(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is None or context.meta.get("no_report"):
            return None
        if why_not := report_missing():
            raise click.ClickException(why_not)
        check_writable(path / name, "--report")
        return path

    def decorate(command: Any) -> Any:
        metavar = "DIR" if name else "FILE"
        if default is not None:
            options = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": no_report}
            command = click.option("--no-report", help="Write no files.", **options)(command)
        return click.option("--report", type=FILE, default=default, metavar=metavar, help=text, callback=checked)(
            command
        )

    return decorate


_dtype = click.Choice(list(DTYPES))
dtypes = click.option(
    "--dtype", "dtypes", type=_dtype, multiple=True, default=("fp32", "bf16"), help="Data type, can be repeated."
)
dtype = click.option("--dtype", type=_dtype, default="bf16")
training = click.option("--training", is_flag=True, help="Forward and backward pass.")
batch = count("--batch", 8, "Images per pass.")
size = count("--size", 224, "Height and width of the images.", least=32)
threads = count("--threads", None, "CPU threads of PyTorch.", callback=_use_threads, expose_value=False)
backend = click.option(
    "--backend",
    default="auto",
    metavar="NAME",
    callback=_available_backend,
    shell_complete=complete(_backend_names),
    help="Backend, see `info`.",
)
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
    return f"batch {batch}, {size} x {size}, {dtype}, {'forward and backward' if training else 'forward'}"


def check_names(what: str, names: Iterable[str], known: list[str]) -> None:
    """Raise ClickException for a name that is not among `known`; suggests near ones."""
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
        text = f'{purpose} needs {error.name}, which is not installed: pip install "convnext-kernels[{extra}]"'
        raise click.ClickException(text) from error


def check_writable(file: Path, option: str) -> None:
    """Create the folder of `file`; ClickException if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file name")
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise click.ClickException(f"{option} {file}: cannot be written: {error.strerror}") from error


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the remaining time if stderr is a terminal; yields ``advance(current_step, steps_done)``.

    `total` may be unknown (None).
    """
    from rich.console import Console
    from rich.progress import Progress

    # sys.stderr as it is now: it is redirected later to silence peers, and the bar must stay visible.
    stderr = Console(file=sys.stderr)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda what, steps: progress.update(task, description=what, advance=steps)
