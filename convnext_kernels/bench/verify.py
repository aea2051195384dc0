"""``verify``: numerics, host time, whole models and all candidates of this machine, the most telling first.

Needs only PyTorch: `main` is the command, also on a machine without click and rich. Results are lines of a file
(`lines`), which `convnext-kernels report` turns into tables.
"""

import argparse
import math
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from convnext_kernels import environment
from convnext_kernels.bench import checks, conditions, lines, report, steps, workers
from convnext_kernels.bench.results import FAILED, WRONG, is_ours, restored

REPORT = Path("convnext-kernels-report/verify")
HELP = (
    f"Check and time every kernel of this machine, the most telling first. Steps: {', '.join(steps.STEPS)}. Without "
    f"--minutes all of them run to their end: hours. Each result is appended to {lines.FILE} at once, so nothing is "
    "lost when the run is cut. `convnext-kernels report` makes tables of it. Fails if a kernel is wrong."
)

say = partial(print, flush=True)


@dataclass
class Verify:
    """One run."""

    device: str
    folder: Path
    minutes: float | None = None
    only: tuple[str, ...] = ()
    threads: int | None = None
    wrong: list[str] = field(default_factory=list)  # what shows a broken kernel, or a step that failed
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> int:
        """Run the steps; returns the exit code: 0, 1 (a kernel is wrong or a step failed), 128 + a signal's number."""
        start = time.monotonic()
        self.end = math.inf if self.minutes is None else start + 60 * self.minutes
        self.write = lines.Writer(self.folder / lines.FILE)
        # `tune` keeps its choices in the report's folder: a run shows what the package does, not what this user's does.
        self.cache = str((self.folder / "cache").resolve())
        worker = workers.Worker(self.device, self.cache, self.threads)
        code = 0
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        try:
            self._environment()
            for name in self._steps():
                self._step(name, worker)
        except (KeyboardInterrupt, SystemExit) as cut:
            code = cut.code if isinstance(cut, SystemExit) else 128 + signal.SIGINT
            self.wrong.append(f"cut by {signal.Signals(code - 128).name}")
        finally:
            worker.end()
            signal.signal(signal.SIGTERM, before)
        self.write("end", "", complete=not code, reason=self.wrong[-1] if code else "")
        self.write.close()
        taken, file = time.monotonic() - start, self.folder / lines.FILE
        say(f"{sum(self.counts.values())} results on {self.device} in {taken:.0f} s: {file}")
        return code or int(bool(self.wrong))

    def _steps(self) -> list[str]:
        return [name for name in steps.STEPS if not self.only or any(part in name for part in self.only)]

    def _environment(self) -> None:
        run = conditions.start(self.device, "verify")
        head = {"format": lines.FORMAT, "name": report.machine_name(run), "device": self.device, "created": run.created}
        machine, found = run.machine, run.conditions
        self.write("environment", "", **head, minutes=self.minutes, machine=machine, conditions=found)
        say(f"{head['name']}, PyTorch {machine['libraries']['torch']}, commit {machine['commit']}")
        for line in found["warnings"]:
            say(f"warning: {line}")
        if self.device == "cpu":
            self._not_run("environment", f"no kernel was run on a GPU: {machine['no_gpu_reason'] or '--device cpu'}")
        for line in checks.backends(self.device)[1]:
            self._not_run("environment", line)

    def _not_run(self, step: str, reason: str, **values: object) -> None:
        """Tell how much of a step was done, and why not all of it."""
        self.write("step", step, reason=reason, **values)
        if reason:
            say(f"not run: {step}: {reason}")

    def _step(self, name: str, worker: workers.Worker) -> None:
        # When it must be done: its share of the time that is left, compared with the steps after it.
        begun, names = time.monotonic(), self._steps()
        later = sum(steps.STEPS[n].share for n in names[names.index(name) :])
        end = begun + (self.end - begun) * steps.STEPS[name].share / later
        todo = steps.items(name, self.device)
        if not todo:
            self._not_run(name, f"skipped: nothing to do on the device {self.device}", done=0, of=0)
            return
        say(f"{name}:")
        if name == "precompile":
            done = workers.run_all(todo, self.device, self.cache, min(end, begun + steps.MOST_SECONDS))
        else:
            done = self._items(name, todo, worker, end)
        reason = ""
        if done < len(todo):
            reason = f"skipped: budget: {len(todo) - done} of {len(todo)}, from {todo[done].name}"
        self._not_run(name, reason, done=done, of=len(todo), seconds=round(time.monotonic() - begun, 1))

    def _items(self, name: str, todo: list[steps.Item], worker: workers.Worker, end: float) -> int:
        """Run items until `end`; returns how many were run."""
        for done, item in enumerate(todo):
            now = time.monotonic()
            if (left := end - now) <= 0:
                return done
            # An item that hangs must not take the time of all others. `tune` stops by itself, a little late.
            share = max(steps.ITEM_SHARE.get(name, 0.5) * left, steps.LEAST_SECONDS)
            limit = min(self.end - now, share, steps.MOST_SECONDS)
            self._item(worker, item, limit, min(left, 0.8 * limit))
        return len(todo)

    def _item(self, worker: workers.Worker, item: steps.Item, limit: float, seconds: float) -> None:
        worker.send(item, seconds)
        for kind, values in worker.results(limit):
            if kind == "cut" and self.minutes is None:
                kind = "failure"
            line = self.write(kind, item.step, **values)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if text := complaint(line):
                self.wrong.append(text)
                say(text)
            elif text := shown(line):
                say(text)


def complaint(line: lines.Line) -> str:
    """A sentence about a line that shows a broken kernel or step, "" for the others."""
    if line["kind"] == "failure":
        return f"{line['step']}: {line['item']}: {line['reason']}"
    ours = line["kind"] == "check" or (line["kind"] == "record" and is_ours(line["candidate"]))
    bad = ours and line["status"] in (WRONG, FAILED)
    return f"{line['case']}, {line['candidate']}: {line['status']}: {line['reason']}" if bad else ""


def shown(line: lines.Line) -> str:
    """What the user sees of a line; "" for results that are only counted."""
    if line["kind"] == "record":
        times = restored(line).times
        figure = line["reason"] or line["status"] if times is None else f"{times.median:.3g} ms"
        return f"  {line['case']}, {line['candidate']}: {figure}"
    if line["kind"] == "host":
        what = f"{line['what']} {line['direction']}, {line['candidate']}"
        return f"  {what}: {line['us']:.0f} us, {line['units']:.1f} units (ten torch.add of one element)"
    return f"  cut: {line['item']}: {line['reason']}" if line["kind"] == "cut" else ""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}\n")


def _step(text: str) -> str:
    if any(text in name for name in steps.STEPS):
        return text
    raise argparse.ArgumentTypeError(f"no step has {text!r} in its name; the steps are: {', '.join(steps.STEPS)}")


def _positive(kind: type, text: str) -> float:
    with suppress(ValueError):
        if (value := kind(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def main(arguments: list[str]) -> NoReturn:
    """Run the command and exit with 0, 1 (a kernel is wrong or a step failed), 2 (wrong usage) or 128 + a signal."""
    example = "Example: convnext-kernels verify --minutes 8"
    parser = _Parser("convnext-kernels verify", description=HELP, epilog=example)
    add = parser.add_argument
    add("--minutes", type=partial(_positive, float), metavar="N", help="stop after N minutes")
    add("--only", action="append", type=_step, metavar="STEP", default=[], help="only steps with this in their name")
    add("--threads", type=partial(_positive, int), metavar="N", help="CPU threads of PyTorch")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if PyTorch can use it")
    add("--report", type=Path, default=REPORT, metavar="DIR", help=f"folder for {lines.FILE}")
    options = parser.parse_args(arguments)
    gpus, reason = environment.gpus()
    if options.device == "cuda" and not gpus:
        parser.error(f"--device cuda: {reason}")
    file = options.report / lines.FILE
    try:
        options.report.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size:
            lines.read(file)
    except OSError as error:
        parser.error(f"--report {options.report}: cannot be written: {error.strerror}")
    except ValueError as error:
        parser.error(f"--report: lines cannot be added to this file, choose another folder: {error}")
    device = options.device or ("cuda" if gpus else "cpu")
    run = Verify(device, options.report, options.minutes, tuple(options.only), options.threads)
    code = run.run()
    print(verdict(run, code), file=sys.stderr if code else sys.stdout)
    sys.exit(code)


def verdict(run: Verify, code: int) -> str:
    """The last sentence for the user."""
    if code > 1:
        return f"Error: {run.wrong[-1]}; the results so far are kept"
    if run.wrong:
        return f"Error: {len(run.wrong)} results are wrong or failed; the first: {run.wrong[0]}"
    return f"No kernel is wrong. {run.counts.get('check', 0)} numerical checks passed."
