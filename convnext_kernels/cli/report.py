"""``convnext-kernels report``: tables, HTML report and measured choices from the lines of `verify`."""

from pathlib import Path

import click

from convnext_kernels.bench import lines, results
from convnext_kernels.bench import report as html
from convnext_kernels.bench.results import FILE
from convnext_kernels.cli import options
from convnext_kernels.tuning import cache


@click.command("report")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=options.INPUT)
@click.option("--report", type=options.OUTPUT, metavar="DIR", default=Path("convnext-kernels-report"), help="Folder.")
@click.option("--choices", type=options.OUTPUT, metavar="FILE", help="Add the measured choices to this file.")
def command(files: tuple[Path, ...], report: Path, choices: Path | None) -> None:
    """Turn the results of `verify` (results.jsonl, one or several) into tables in Markdown and an HTML report.

    All files must be from the same GPU or CPU; of two results of the same case the later one counts. A file whose last
    line is cut is read up to there. results.json is for benchmarks/results, from which README's figures are made.
    """
    runs = [run for file in files for run in lines.read(file)]
    run = lines.as_run(runs)
    every = [line for found in runs for line in found]
    tables = [table for table in (lines.host(every), lines.tuned(every)) if table.rows]
    options.check_writable(report / FILE)
    results.save(run, report / FILE)
    shown = [*html.everything(run), *tables]
    click.echo("\n\n".join(table.markdown() for table in shown) or "No times in these files.")
    for line in run.not_run:
        click.echo(f"not run: {line}", err=True)
    if choices is not None:
        entries = lines.choices(every)
        if not entries:
            raise click.ClickException("--choices: these files have no measured choices (the step `candidates`)")
        options.check_writable(choices)
        cache.write(choices, entries)
        click.echo(f"{len(entries)} choices: {choices}", err=True)
    click.echo(html.write(run, report, tables), err=True)
