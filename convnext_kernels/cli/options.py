"""Options that several commands share, which check their own values, and output."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from convnext_kernels import environment
from convnext_kernels.bench.tables import Table
from convnext_kernels.models.convnext import near

INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
Decorator = Callable[[Any], Any]


class Output(click.Path):
    """A file that can be written, or a folder in which a file `name` can be; made if it is missing. None for ""."""

    def __init__(self, name: str = "") -> None:
        super().__init__(path_type=Path)
        self.file = name

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Path | None:
        """Refuse what cannot be written now, and not after the work."""
        if not value:
            return None
        path = Path(value)
        file = path / self.file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = not file.exists()
            file.open("ab").close()
            if new:
                file.unlink()
        except OSError as error:
            self.fail(f"{file} cannot be written: {error.strerror}", parameter, context)
        return path


def _usable_device(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str:
    """The device; None means "cuda" if PyTorch can use it, else "cpu"."""
    found, reason = environment.gpus() if name != "cpu" else ([], "")
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


_dtype = click.Choice(["fp32", "bf16", "fp16"])
dtypes = click.option(
    "--dtype", "dtypes", type=_dtype, multiple=True, default=("fp32", "bf16"), help="Data type, can be repeated."
)
dtype = click.option("--dtype", type=_dtype, default="bf16")
training = click.option("--training", is_flag=True, help="Forward and backward pass.")
batch = count("--batch", 8, "Images per pass.")
size = count("--size", 224, "Height and width of the images.", least=32)
threads = count("--threads", None, "CPU threads of PyTorch.", callback=_use_threads, expose_value=False)
model = click.option("--model", "model_name", default="convnext_tiny", metavar="NAME", help="In torchvision or timm.")


def show(*tables: Table, width: int = 0) -> None:
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
