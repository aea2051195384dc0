"""The results of a benchmark run: records, and the JSON file that holds them."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from convnext_kernels.bench.timing import Times
from convnext_kernels.tuning import cache

FORMAT = 1
FILE = "results.json"
MODELS = ("model", "rival")  # the groups whose cases are whole models; rival: models that are no ConvNeXt
OURS = "convnext_kernels"  # the candidate that is this package
EAGER = "eager"  # PyTorch, channels_last


def is_ours(candidate: str) -> bool:
    """Whether a candidate is this package, with its default settings or, after a comma, with others."""
    return candidate.partition(", ")[0] == OURS


# Status of a candidate in a case. Only "ok" has times.
OK = "ok"
WRONG = "wrong"  # its error against fp64 is above the allowed one, so it is not timed
UNAVAILABLE = "unavailable"  # not installed, or without this dtype or direction; `reason` says which
FAILED = "failed"  # it raised; `reason` holds the message


class Unavailable(Exception):
    """Why a candidate or a case cannot run here."""


@dataclass(frozen=True)
class Record:
    """One candidate in one case. Fields that do not apply or could not be measured are None."""

    case: str  # unique: group/what-batch-dtype-direction, e.g. "block/V1-C96-56x56-b1-fp32-forward"
    group: str  # of cases.GROUPS, or another op
    what: str  # e.g. "V1 C96 56x56"
    batch: int
    dtype: str  # fp32, bf16, fp16, tf32
    direction: str  # as in cases.Case
    candidate: str
    status: str
    reason: str = ""  # why there are no times; empty if there are
    times: Times | None = None
    flops: int = 0  # of the case: 2 x multiply-adds of convolutions and matmuls; ceilings.py
    vector_flops: int | None = None  # part of `flops`: depthwise convolutions; None in older files
    bytes: int = 0  # of the case: the least traffic between memory and chip; ceilings.py
    error: float | None = None  # against fp64; numerics.py defines it
    allowed_error: float | None = None
    saved_bytes: int | None = None  # kept for the backward pass, without parameters (training)


Case = dict[str, Record]  # the records of one case, by candidate


@dataclass
class Run:
    """All records of one run, and how they were measured."""

    machine: dict[str, object]  # environment.collect(), with "commit"
    conditions: dict[str, object]  # conditions.py: threads, pinning, allocator, ...; "warnings": list of lines
    ceilings: dict[str, object]  # ceilings.py
    device: str  # cpu or cuda
    mode: str  # quick, standard or full
    created: str  # ISO 8601 with offset
    seconds: float = 0.0  # duration so far
    complete: bool = False  # False: interrupted, or still running
    records: list[Record] = field(default_factory=list)
    checks: list[Record] = field(default_factory=list)  # of kernels by `verify`; the candidates are backends
    not_run: list[str] = field(default_factory=list)  # verify: lines that say what could not run, and why

    def cases(self) -> dict[str, Case]:
        """Records by case, then by candidate, in the order they were measured."""
        found: dict[str, Case] = {}
        for record in self.records:
            found.setdefault(record.case, {})[record.candidate] = record
        return found


def ratio(case: Case, to: str | None = EAGER) -> float | None:
    """Speed-up: median of candidate `to` over the median of this package; None if either has no times."""
    ours, other = case.get(OURS), case.get(to)
    return other.times.median / ours.times.median if ours and other and ours.times and other.times else None


def best_peer(case: Case) -> str | None:
    """The fastest candidate other than this package, by the median."""
    peers = {name: r.times.median for name, r in case.items() if r.times and not is_ours(name)}
    return min(peers, key=peers.get, default=None)


def plain(value: object) -> object:
    """Turn dataclasses and tuples into what JSON has, and NaN and infinity, which it does not have, into None."""
    if isinstance(value, Times):  # the clock is not more precise than five digits
        return [[float(f"{call:.5g}") for call in calls] for calls in value.rounds]
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(run: Run, file: Path) -> None:
    """Write `run` as JSON with a line for each record to `file`; OSError if that fails."""
    text = json.dumps({"format": FORMAT, **plain(run)})
    cache.replace(file, text.replace('{"case":', '\n{"case":') + "\n")


def restored(values: dict) -> Record:
    """The record of values that were read; older files have others, too."""
    values = {field.name: values[field.name] for field in dataclasses.fields(Record) if field.name in values}
    if values["times"] is not None:
        values = values | {"times": Times(tuple(map(tuple, values["times"])))}
        values["times"].median  # noqa: B018  raises now instead of later
    if values["status"] == WRONG and values["error"] is None:  # written for NaN
        values = values | {"error": math.nan}
    return Record(**values)


def load(file: Path) -> Run:
    """Read a file of `save`. ValueError says what is wrong with its content; OSError if it cannot be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        for name in ("records", "checks"):
            values[name] = [restored(value) for value in values[name]]
        return Run(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a result file of `convnext-kernels bench`: {error}") from error
