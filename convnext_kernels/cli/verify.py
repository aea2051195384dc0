"""``convnext-kernels verify``: check and time every kernel of this machine, the most telling first."""

import click

from convnext_kernels.bench import verify


@click.command("verify", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Check and time every kernel. The options are read by `verify.main`, which runs without click too."""
    verify.main(list(arguments))
