"""``convnext-kernels report``: tables of what `verify` or `bench` measured, and measured choices from `verify`."""

from pathlib import Path

import click

from convnext_kernels.bench import lines, report, results
from convnext_kernels.bench.results import FILE
from convnext_kernels.cli import options
from convnext_kernels.tuning import cache


@click.command("report")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=options.INPUT)
@click.option("--report", "folder", type=options.Output(FILE), metavar="DIR", default="convnext-kernels-report")
@click.option("--choices", type=options.Output(), metavar="FILE", help="Add the measured choices to this file.")
def command(files: tuple[Path, ...], folder: Path | None, choices: Path | None) -> None:
    """Print every figure in Markdown: of `bench` (one results.json), or of `verify` (results.jsonl, one or several).

    All files of `verify` must be from the same GPU or CPU; of two results of the same case the later one counts. A file
    whose last line is cut is read up to there. They become one results.json in DIR, for benchmarks/results, from which
    README's figures are made.
    """
    every: list[lines.Line] = []
    if files[0].suffix == ".json":
        if len(files) > 1:
            raise click.UsageError(f"FILE...: expected one {FILE} of `bench`, got {len(files)} files; see `compare`")
        run = results.load(files[0])
    else:
        runs = [run for file in files for run in lines.read(file)]
        run, every = lines.as_run(runs), [line for found in runs for line in found]
        if folder is not None:
            results.save(run, folder / FILE)
    tables = [table for table in (*report.details(run), lines.host(every), lines.tuned(every)) if table.rows]
    click.echo("\n\n".join((report.heading(run), *(table.markdown() for table in tables))))
    for line in (*run.conditions.get("warnings", ()), *report.absences(run), *report.complaints(run)):
        click.echo(line, err=True)
    if choices is not None:
        entries = lines.choices(every)
        if not entries:
            raise click.ClickException("--choices: these files have no measured choices (the step `candidates`)")
        cache.write(choices, entries)
        click.echo(f"{len(entries)} choices: {choices}", err=True)
