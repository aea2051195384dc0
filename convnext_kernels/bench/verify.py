"""``verify``: every kernel of this machine against fp64. Needs only PyTorch.

`convnext_kernels.cli.verify` is the command with all options, a progress bar and the benchmark. `main` is the same
checks as plain text, for a machine without click and rich.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from convnext_kernels import environment
from convnext_kernels.bench import checks, report, terminal
from convnext_kernels.bench.cases import STANDARD
from convnext_kernels.bench.conditions import start
from convnext_kernels.bench.results import FAILED, FILE, WRONG, Check, Run, save

DTYPES = ("fp32", "bf16", "fp16")
REPORT = Path("convnext-kernels-report/verify")
SECONDS = 10  # between two lines of progress


def _gpu_kernels_not_run(device: str) -> list[str]:
    """A line that says which kernels are not run, and why."""
    found, reason = environment.gpus()
    if not found:
        return [f"no kernel was run on a GPU: {reason}"]
    if device == "cpu":
        return ["no kernel was run on a GPU, because of --device cpu"]
    return ["no kernel was run on the CPU: `convnext-kernels verify --device cpu` does that"]


def count(device: str) -> int:
    """How many times `check` calls `on_case`."""
    return checks.count(device, DTYPES)


def check(run: Run, folder: Path, on_case: Callable[[str], None]) -> None:
    """Check every kernel and add the results to `run`, which is saved at the end or when interrupted.

    ``on_case(what)`` is called after every case.
    """
    contexts, missing = checks.backends(run.device)
    run.not_run = _gpu_kernels_not_run(run.device) + missing
    try:
        for found in checks.run(run.device, DTYPES, contexts, on_case):
            run.checks.append(found)
    finally:
        save(run, folder / FILE)


def bad(found: list[Check]) -> list[Check]:
    """The checks that show a broken kernel."""
    return [c for c in found if c.status in (WRONG, FAILED)]


def complaints(run: Run) -> list[str]:
    """A line for each of the first broken kernels."""
    return [f"{c.op} {c.what} {c.dtype} on {c.backend}: {c.status}: {c.reason}" for c in bad(run.checks)[:20]]


def verdict(run: Run) -> tuple[bool, str]:
    """Whether all checks passed, and a sentence that says so."""
    broken = bad(run.checks)
    if broken:
        return False, f"{len(broken)} of {len(run.checks)} numerical checks failed: {broken[0].reason}"
    return True, f"{sum(c.error is not None for c in run.checks)} numerical checks passed on {run.device}."


def _table(run: Run) -> str:
    rows = [terminal.NUMERICS, *report.check_rows(run)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: list[str]) -> None:
    """Run the checks, print them as plain text and exit with 0, 1 (a kernel is wrong) or 2 (wrong usage)."""
    parser = argparse.ArgumentParser(
        "convnext-kernels verify",
        description="Check every kernel of every backend on this machine against fp64.",
        epilog="This is verify without click and rich. With them it has more options and runs the benchmark.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if PyTorch can use it, else cpu")
    parser.add_argument(
        "--report", type=Path, default=REPORT, metavar="DIR", help="folder for results.json and report.html"
    )
    options = parser.parse_args(arguments)
    gpus, reason = environment.gpus()
    if options.device == "cuda" and not gpus:
        parser.error(f"--device cuda: {reason}")
    device = options.device or ("cuda" if gpus else "cpu")
    try:
        options.report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--report {options.report}: cannot be written: {error.strerror}")

    run = start(device, STANDARD)
    for name, value in environment.rows(run.machine):
        print(f"{name}: {value}")
    total, done, printed = count(device), 0, time.monotonic()

    def on_case(what: str) -> None:
        nonlocal done, printed
        done += 1
        if time.monotonic() - printed > SECONDS:
            printed = time.monotonic()
            print(f"{done} of {total}: {what}", file=sys.stderr, flush=True)

    try:
        check(run, options.report, on_case)
    except KeyboardInterrupt:
        print(f"Interrupted after {done} of {total} cases, results: {options.report / FILE}", file=sys.stderr)
        sys.exit(130)
    run.complete = True
    save(run, options.report / FILE)
    print(_table(run))
    print(*complaints(run), sep="\n", end="\n" if bad(run.checks) else "")
    for line in [*run.not_run, "the benchmark, which needs click and rich: pip install click rich"]:
        print(f"not run: {line}")
    print(report.write_if_possible(run, options.report))
    passed, sentence = verdict(run)
    print(sentence if passed else f"Error: {sentence}", file=sys.stdout if passed else sys.stderr)
    sys.exit(not passed)
