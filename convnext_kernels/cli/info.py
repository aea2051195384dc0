"""``convnext-kernels info``: versions, backends with their reasons, and the machine."""

import json

import click
import platformdirs

from convnext_kernels import environment


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(as_json: bool) -> None:
    """Show versions, backends with the reason of those that cannot run, and the machine."""
    cache = str(platformdirs.user_cache_path("convnext_kernels"))
    values = environment.collect() | {"cache_directory": cache}
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
    machine.add_row("cache directory", Text(f"{cache} (nothing is kept there yet)"))
    console = Console()
    console.print(backends, machine)
