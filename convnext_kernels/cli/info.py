"""``convnext-kernels info``: versions, backends and the machine."""

import click

from convnext_kernels import environment
from convnext_kernels.cli import options
from convnext_kernels.tuning import cache


@click.command("info")
@options.as_json
def command(as_json: bool) -> None:
    """Show versions, backends and the machine; for a backend that cannot run here, why."""
    values = environment.collect() | {
        "commit": environment.commit(),
        "cache_directory": str(cache.folder()),
        "cached_choices": cache.size(),
    }
    if as_json:
        options.print_json(values)
        return

    from rich.table import Table
    from rich.text import Text

    backends = Table("backend", "available", "description, or why it cannot run", title="Backends, best first")
    for name, status in values["backends"].items():
        available = Text("yes", "green") if status["available"] else Text("no", "red")
        # Text, not str: rich would read square brackets in a reason as markup.
        backends.add_row(name, available, Text(status["reason"] or status["description"]))
    machine = Table(show_header=False, title="Versions and machine")
    for what, value in environment.rows(values):
        machine.add_row(what, Text(value))
    cached = f"{values['cached_choices']} timed choices of kernel configurations"
    machine.add_row("cache directory", Text(f"{values['cache_directory']} ({cached})"))
    options.console().print(backends, machine)
