"""The command line ``convnext-kernels``: one file per command, imported when that command runs."""

import importlib
import sys
import traceback

import click

from convnext_kernels.spec import BackendError
from convnext_kernels.version import __version__

# Name and help line of every command: ``--help`` must not import the commands to list them.
COMMANDS = {
    "info": "Show versions, backends and the machine.",
    "demo": "Compare a model, eager against accelerated, on real photographs.",
    "bench": "Time this package against its peers, from single ops to whole models.",
    "plan": "Predict which kernels a model would run on a GPU, and their time.",
    "compare": "Show what moved between two runs of bench, beyond the noise.",
    "models": "Count the model family beside the papers' figures.",
    "roadmap": "Show every step from ResNet to ConvNeXt, counted and measured.",
    "verify": "Check every kernel against fp64 on this machine, then time them.",
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _Cli(click.Group):
    """A group that imports its commands late and reports every error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            if isinstance(error, click.ClickException):
                raise
            if isinstance(error, BackendError):
                raise click.ClickException(_one_line(error)) from error
            name = type(error).__name__
            raise click.ClickException(f"{name}: {_one_line(error)} (--debug shows the traceback)") from error

    def main(self, *args: object, **extra: object) -> None:
        """Run the command line and leave with 0, 1 (failure), 2 (wrong usage) or 130 (interrupted)."""
        extra["standalone_mode"] = False  # click's own mode prints usage errors as several lines
        try:
            code = super().main(*args, **extra)
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            code = error.exit_code
        except click.Abort:  # what click makes of Ctrl-C
            click.echo("Interrupted", err=True)
            code = 130
        sys.exit(code)


@click.group(cls=_Cli, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="convnext-kernels")
def main(debug: bool) -> None:
    """Fused kernels for ConvNeXt: what this machine offers, and what it gains."""
