"""``convnext-kernels completion``: shell completion of commands, options and names."""

import click
from click.shell_completion import get_completion_class

PROGRAM = "convnext-kernels"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script with which a shell completes commands, options and names.

    \b
    bash: save it in ~/.local/share/bash-completion/completions/convnext-kernels
    zsh:  save it as _convnext-kernels in a folder of $fpath
    fish: save it in ~/.config/fish/completions/convnext-kernels.fish
    """  # noqa: D301  click reads \b as "do not wrap"
    variable = f"_{PROGRAM.replace('-', '_').upper()}_COMPLETE"  # the name that click looks for
    click.echo(get_completion_class(shell)(ctx.find_root().command, {}, PROGRAM, variable).source())
