"""Write the shipped choices of kernel configurations: those that the cost model makes.

    python proofs/update_defaults.py [--check]

The Triton launchers run on tensors without memory for the table of cases (triton_cases.py). The cost model answers
their calls of `tuning.pick`, and the answers are stored for each GPU. Nothing is compiled. --check writes nothing and
fails if a file is not what this script would write. Files with measured choices are not changed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import checkout  # noqa: F401
import click
import triton_cases
from compile_only import compile_only
from triton.runtime.jit import JITFunction

from convnext_kernels import tuning
from convnext_kernels.backends.triton import device
from convnext_kernels.tuning import defaults
from convnext_kernels.tuning.pick import predicted

FOLDER = Path(defaults.__file__).parent


def choices(gpu: tuning.Gpu) -> dict[str, str]:
    """Return the cost model's choice for every problem in the table of cases."""
    found: dict[str, str] = {}

    def choose(kernel: str, problem: tuple, candidates: Sequence[tuning.Candidate], _: tuning.Gpu) -> tuning.Candidate:
        chosen = predicted(candidates, gpu)
        found[defaults.key(kernel, problem)] = chosen.name
        return chosen

    # Otherwise the launchers' own caches would answer instead of `pick`.
    for plan in triton_cases.plans():
        plan.cache_clear()
    no_launch = mock.patch.object(JITFunction, "run")
    with compile_only(gpu.arch), no_launch, mock.patch.object(device, "gpu", return_value=gpu), tuning.forced(choose):
        for case in triton_cases.CASES:
            triton_cases.run(case)
    for plan in triton_cases.plans():
        plan.cache_clear()
    return dict(sorted(found.items()))


def text(gpu: tuning.Gpu) -> str:
    """Return the content of one file."""
    return json.dumps({"gpu": gpu.name, "basis": "predicted", "choices": choices(gpu)}, indent=1) + "\n"


def measured(file: Path) -> bool:
    """Whether the choices in this file were measured."""
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["basis"] != "predicted"


@click.command(help=__doc__.splitlines()[0])
@click.option("--check", is_flag=True, help="Write nothing, and fail if a file is not up to date.")
def main(check: bool) -> None:
    """Write or check the files of all GPUs that have one."""
    stale = []
    for name in defaults.SHIPPED:
        file = FOLDER / f"{name}.json"
        if measured(file):
            continue
        wanted = text(tuning.named(name))
        if file.is_file() and file.read_text(encoding="utf-8") == wanted:
            continue
        stale.append(name)
        if not check:
            file.write_text(wanted, encoding="utf-8")
    if check and stale:
        raise click.ClickException(
            f"defaults of {', '.join(stale)} are not up to date: run python proofs/update_defaults.py"
        )
    click.echo(f"{len(defaults.SHIPPED)} files of defaults, {len(stale)} {'stale' if check else 'written'}")


if __name__ == "__main__":
    main()
