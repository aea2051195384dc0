"""``convnext-kernels info``: versions, backends and the machine."""

import json

import click

from convnext_kernels import environment
from convnext_kernels.bench.results import plain
from convnext_kernels.bench.tables import machine
from convnext_kernels.cli import options
from convnext_kernels.tuning import cache


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def command(as_json: bool) -> None:
    """Show versions, backends and the machine; for a backend that cannot run here, why."""
    values = environment.collect() | {
        "commit": environment.commit(),
        "cache_directory": str(cache.folder()),
        "cached_choices": cache.size(),
    }
    if as_json:
        click.echo(json.dumps(plain(values), indent=2))
        return
    backends, versions = machine(values)
    cached = f"{values['cached_choices']} timed choices of kernel configurations"
    rows = [*versions.rows, ("cache directory", f"{values['cache_directory']} ({cached})")]
    options.show(backends, versions._replace(rows=rows))
