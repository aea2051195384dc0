"""The command line ``convnext-kernels``: one file per command, imported when that command runs."""

import importlib
import sys
import traceback

import click

from convnext_kernels.bench.tables import one_line
from convnext_kernels.spec import BackendError
from convnext_kernels.version import __version__

# Group, command, arguments of an example, help line: the front page must not import the commands to list them.
GROUPS = {
    "Look": {
        "info": ("--json", "Show versions, backends and the machine."),
        "models": ("convnext_base", "Count parameters and FLOPs of the models."),
        "roadmap": ("--regime resnet50", "Show every step from ResNet to ConvNeXt."),
        "plan": ("--gpu H100 --batch 8", "Predict kernels and time of a model on a GPU."),
    },
    "Run and measure": {
        "demo": ("--model convnext_tiny", "Compare eager and accelerated on photographs."),
        "verify": ("--minutes 8", "Check and time every kernel of this machine."),
        "report": ("results.jsonl", "Print every figure of verify or bench."),
        "bench": ("--quick", "Time this package against its peers."),
        "compare": ("A.json B.json", "Show what changed between two runs of bench."),
    },
    "Set up": {
        "tune": ("--model convnext_tiny", "Time every kernel of a model and keep the fastest."),
    },
}
EXPECTED = (BackendError, OSError, ValueError)  # say what the user can change
DEMO = ("torchvision", "timm", "safetensors", "PIL", "numpy", "sklearn", "skimage", "psutil", "jinja2")  # its modules
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class _Cli(click.Group):
    """A group that imports a command only when it is used, and reports every error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"{__name__}.{name}").command
        command.epilog = f"Example: convnext-kernels {name} {COMMANDS[name][0]}"
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(f"{name} {example}") for name, (example, _) in COMMANDS.items())
        for group, commands in GROUPS.items():
            with formatter.section(group):
                rows = [(f"{name} {example}".ljust(width), line) for name, (example, line) in commands.items()]
                formatter.write_dl(rows)
        click.Command.format_options(self, ctx, formatter)

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
            text = one_line(error, 1000)
            if isinstance(error, ModuleNotFoundError) and error.name in DEMO:
                text = f'{error.name} is not installed: pip install "convnext-kernels[demo]"'
            elif not isinstance(error, EXPECTED):
                text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
            raise click.ClickException(text) from error

    def main(self, *args: object, **extra: object) -> None:
        """Run the command line and exit with 0, 1 (failure), 2 (wrong usage) or 130 (interrupted)."""
        extra["standalone_mode"] = False  # click's own mode prints usage errors as several lines
        try:
            code = super().main(*args, **extra)
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            code = error.exit_code
        except click.Abort:  # raised by click for Ctrl-C
            click.echo("Interrupted", err=True)
            code = 130
        sys.exit(code)


@click.group(
    cls=_Cli,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="convnext-kernels")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Fused kernels for ConvNeXt. Commands are listed with an example each."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
