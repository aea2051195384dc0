"""``convnext-kernels info``: versions, backends with their reasons, and the machine."""

import json

import click

from convnext_kernels import environment
from convnext_kernels.tuning import cache


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(as_json: bool) -> None:
    """Show versions, backends with the reason of those that cannot run, and the machine."""
    values = environment.collect() | {"cache_directory": str(cache.folder()), "cached_choices": cache.size()}
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    backends = Table("backend", "available", "what it is, or why it cannot run", title="Backends, best first")
    for name, status in values["backends"].items():
        available = Text("yes", "green") if status["available"] else Text("no", "red")
        # Text, not str: rich would read square brackets in a reason as markup.
        backends.add_row(name, available, Text(status["reason"] or status["description"]))
    machine = Table(show_header=False, title="Versions and machine")
    for what, value in environment.rows(values):
        machine.add_row(what, Text(value))
    kept = f"{values['cached_choices']} timed choices of kernel configurations"
    machine.add_row("cache directory", Text(f"{values['cache_directory']} ({kept})"))
    console = Console()
    console.print(backends, machine)
