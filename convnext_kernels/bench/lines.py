"""What `verify` measures: one JSON object a line, written at once, so that a run that is cut loses nothing.

Every line has "kind", "step" and "at", the seconds since the start. The first line of a run has the kind
"environment", the last one "end", unless the run was killed. The others are results: "check" (`results.Check`),
"record" (`results.Record`), "host", "timing" (`tuning.tune.Timing`), "choices" (what was chosen by it), "ceilings",
"failure" (an item that raised, hung or ended its process), "cut" (an item for which the time did not suffice) and
"step" (one for each step: how much of it was done, and why not all).
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convnext_kernels.bench.results import FAILED, WRONG, Check, Record, Run, plain
from convnext_kernels.bench.timing import Times

FORMAT = 1
FILE = "results.jsonl"

Line = dict[str, Any]


class Writer:
    """Appends lines to a file, and prints them if `echo`. OSError if the file cannot be written."""

    def __init__(self, file: Path, echo: bool) -> None:
        self.start, self.echo = time.monotonic(), echo
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if not whole:  # the last run was killed in the middle of a line
            os.write(self._file, b"\n")

    def __call__(self, kind: str, step: str, **values: object) -> Line:
        """Write one line and return it."""
        at = round(time.monotonic() - self.start, 3)
        line = {"kind": kind, "step": step, "at": at} | {name: plain(value) for name, value in values.items()}
        text = json.dumps(line)
        os.write(self._file, f"{text}\n".encode())  # no buffer: it survives even a SIGKILL
        if self.echo:
            print(text, file=sys.stdout, flush=True)
        return line

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read(file: Path) -> list[list[Line]]:
    """The runs in a file, each a list of lines. The last line of a run may be cut.

    Raises OSError if the file cannot be read and ValueError if it is no such file.
    """
    runs: list[list[Line]] = []
    damaged = 0
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            kind = line["kind"]
        except (ValueError, KeyError, TypeError):
            damaged = number
            continue
        if kind == "environment":
            if line.get("format") != FORMAT:
                raise ValueError(f"{file}:{number}: format {line.get('format')}, expected {FORMAT}")
            runs.append([])
        elif damaged or not runs:
            raise ValueError(f"{file}:{damaged or number}: not a line of `convnext-kernels verify`")
        damaged = 0
        runs[-1].append(line)
    if not runs:
        raise ValueError(f"{file}: no results of `convnext-kernels verify` in it")
    return runs


def _fields(line: Line) -> Line:
    return {name: value for name, value in line.items() if name not in ("kind", "step", "at")}


def _record(line: Line) -> Record:
    values = _fields(line)
    if values["times"] is not None:
        values["times"] = Times(tuple(map(tuple, values["times"]["rounds"])))
    if values["status"] == WRONG and values["error"] is None:  # written for NaN
        values["error"] = math.nan
    return Record(**values)


def _check(line: Line) -> Check:
    values = _fields(line)
    if values["status"] == WRONG and values["error"] is None:
        values["error"] = math.nan
    return Check(**values)


def median(times: Line) -> float:
    """Median of the times of a record's line, in milliseconds."""
    return Times(tuple(map(tuple, times["rounds"]))).median


def of_kind(lines: Iterable[Line], kind: str) -> list[Line]:
    """The lines of one kind."""
    return [line for line in lines if line["kind"] == kind]


def not_run(lines: Iterable[Line]) -> list[str]:
    """A sentence for each step that was not run or not completed, and for each failure."""
    lines = list(lines)
    steps = (f"{line['step']}: {line['reason']}" for line in of_kind(lines, "step") if line["reason"])
    failures = (f"{line['step']}: {line['item']}: {FAILED}: {line['reason']}" for line in of_kind(lines, "failure"))
    return [*steps, *failures]


def as_run(runs: list[list[Line]]) -> Run:
    """Several runs on one machine as one: of two results of the same case the later one counts.

    Raises ValueError if the runs were measured on different devices.
    """
    heads = [lines[0] for lines in runs]
    for head in heads[1:]:
        if head["name"] != heads[0]["name"]:
            raise ValueError(f"measured on {head['name']}, expected {heads[0]['name']}, as in the first run")
    lines = [line for run in runs for line in run]
    records = {(r.case, r.candidate): r for r in map(_record, of_kind(lines, "record"))}
    checks = {(c.op, c.what, c.dtype, c.backend): c for c in map(_check, of_kind(lines, "check"))}
    ceilings = of_kind(lines, "ceilings")
    head = heads[-1]
    return Run(
        head["machine"],
        head["conditions"],
        ceilings[-1]["ceilings"] if ceilings else {},
        head["device"],
        "verify",
        head["created"],
        sum(run[-1]["at"] for run in runs),
        all(run[-1]["kind"] == "end" and run[-1]["complete"] for run in runs),
        list(records.values()),
        list(checks.values()),
        not_run(lines),
    )
