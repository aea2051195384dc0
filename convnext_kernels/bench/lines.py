"""What `verify` measures: one JSON object a line, written at once, so that a run that is cut loses nothing.

Every line has "kind", "step" and "at", the seconds since the start. The first line of a run has the kind
"environment", the last one "end", unless the run was killed. The others are results: "check" and "record"
(`results.Record`), "host", "timing" (`tuning.tune.Timing`), "choices" (what was chosen by it), "ceilings",
"failure" (an item that raised, hung or ended its process), "cut" (an item for which the time did not suffice) and
"step" (one for each step: how much of it was done, and why not all).
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convnext_kernels.bench.results import EAGER, FAILED, Run, plain, restored
from convnext_kernels.bench.tables import Table, number, optional, speedup

FORMAT = 2
FILE = "results.jsonl"

Line = dict[str, Any]


class Writer:
    """Appends lines to a file. OSError if it cannot be written."""

    def __init__(self, file: Path) -> None:
        self.start = time.monotonic()
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
        self._file = file.open("ab", buffering=0)  # no buffer: a line survives even a SIGKILL
        if not whole:  # the last run was killed in the middle of a line
            self._file.write(b"\n")

    def __call__(self, kind: str, step: str, **values: object) -> Line:
        """Write one line and return it."""
        line = {"kind": kind, "step": step, "at": round(time.monotonic() - self.start, 3), **plain(values)}
        self._file.write(f"{json.dumps(line)}\n".encode())
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(file: Path) -> list[list[Line]]:
    """The runs in a file, each a list of lines. The last line of a run may be cut.

    Raises OSError if the file cannot be read and ValueError if it is no such file.
    """
    runs: list[list[Line]] = []
    damaged = 0
    for row, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            kind = line["kind"]
        except (ValueError, KeyError, TypeError):
            damaged = row
            continue
        if kind == "environment":
            if line.get("format") != FORMAT:
                raise ValueError(f"{file}:{row}: format {line.get('format')}, expected {FORMAT}")
            runs.append([])
        elif damaged or not runs:
            raise ValueError(f"{file}:{damaged or row}: not a line of `convnext-kernels verify`")
        damaged = 0
        runs[-1].append(line)
    if not runs:
        raise ValueError(f"{file}: no results of `convnext-kernels verify` in it")
    return runs


def of_kind(lines: Iterable[Line], kind: str) -> list[Line]:
    """The lines of one kind."""
    return [line for line in lines if line["kind"] == kind]


def as_run(runs: list[list[Line]]) -> Run:
    """Several runs on one machine as one: of two results of the same case the later one counts.

    Raises ValueError if the runs were measured on different devices.
    """
    heads, lines = [run[0] for run in runs], [line for run in runs for line in run]
    for head in heads:
        if head["name"] != heads[0]["name"]:
            raise ValueError(f"measured on {head['name']}, expected {heads[0]['name']}, as in the first run")
    not_run = [f"{line['step']}: {line['reason']}" for line in of_kind(lines, "step") if line["reason"]]
    not_run += [f"{line['step']}: {line['item']}: {FAILED}: {line['reason']}" for line in of_kind(lines, "failure")]
    records, checks = (
        list({(r.case, r.candidate): r for r in map(restored, of_kind(lines, kind))}.values())
        for kind in ("record", "check")
    )
    return Run(
        **{name: heads[-1][name] for name in ("machine", "conditions", "device", "created")},
        ceilings=[{}, *(line["ceilings"] for line in of_kind(lines, "ceilings"))][-1],
        mode="verify",
        seconds=sum(run[-1]["at"] for run in runs),
        complete=all(run[-1]["kind"] == "end" and run[-1]["complete"] for run in runs),
        records=records,
        checks=checks,
        not_run=not_run,
    )


def host(lines: Iterable[Line]) -> Table:
    """Host time of a call, in microseconds and in units of ten ``torch.add`` of one element."""
    rows = [
        (line["what"], line["direction"], line["candidate"], number(line["us"]), number(line["units"]))
        for line in of_kind(lines, "host")
    ]
    return Table("Host time", ("call", "direction", "candidate", "us", "units"), rows)


def tuned(lines: Iterable[Line]) -> Table:
    """The fastest candidate of every call that was tuned, compared with eager."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in of_kind(lines, "timing"):
        shape = "x".join(map(str, line["shape"]))
        what = " ".join(part for part in (line["op"], line.get("variant"), shape, line.get("dtype")) if part)
        found.setdefault((what, line["phase"]), []).append(line)
    rows = []
    for key, timings in found.items():
        timed = sorted((t for t in timings if t["median"] is not None), key=lambda t: t["median"])
        if not timed:
            rows.append((*key, str(len(timings)), "-", "-", "-", timings[0]["error"]))
            continue
        best, fastest = timed[0], timed[0]["median"] * 1e3
        eager = next((t["median"] * 1e3 for t in timed if t["backend"] == EAGER), None)
        against = "-" if eager is None else speedup(eager / fastest, EAGER)
        plan = f"{best['backend']} {best['plan']}".strip()
        rows.append((*key, str(len(timings)), optional(eager), number(fastest), against, plan))
    columns = ("call", "phase", "candidates", "eager, ms", "fastest, ms", "compared", "fastest candidate")
    return Table("Tuned calls", columns, rows)


def choices(lines: Iterable[Line]) -> dict[str, str]:
    """What `tune` chose: the entries of a file of measured choices."""
    return {key: name for line in of_kind(lines, "choices") for key, name in line["choices"].items()}
