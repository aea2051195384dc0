"""Compile every Triton kernel without a GPU, and report registers, spills and instructions. Nothing is run.

    python proofs/triton_static.py [--quick] [--case TEXT] [--check | --update]

Without an option it prints a table.

--update writes records/triton_kernels.json (every compiled kernel) and records/triton_kernels.md (a line for each
kernel and family of architectures). With --case it adds the kernels of these cases to the record.

--check fails if a kernel is worse than the recorded one: it spills more, exceeds a limit, loses its tensor cores, or
fits fewer times on a multiprocessor. A kernel that is not in the record must not spill.

With TRITON_CACHE_DIR a second run is fast.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import triton_cases
from checkout import RECORDS
from compile_only import Launch, compile_only
from cubin import ARCHS, TENSOR_MEMORY_COLUMNS, Statics, analyse, limits, span
from figures import table
from triton.runtime.cache import get_cache_manager
from triton_cases import COMPILED, Case

from convnext_kernels import tuning

RECORD = RECORDS / "triton_kernels.json"
PAGE = RECORDS / "triton_kernels.md"
QUICK_ARCHS = (80, 90)
PLANS = ("mlp_forward", "mlp_backward")  # whose candidates have choices of their own
WORST = 12  # the number of spilling kernels that the page names
SMALLEST = 16  # instructions: a stub that does nothing has fewer
STATICS_FILE = "statics.json"  # next to the kernel in Triton's cache
# tl.dot with 16-bit inputs, or with fp32 inputs that may be rounded to TF32, must use tensor cores.
MATRIX = re.compile(r"tt\.dot [^:\n]*(inputPrecision = (tf32|bf16)|: tensor<[^>]*x(bf16|f16)>)")


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    arch: int
    specialisation: str
    matrix: bool  # whether it has products that must use tensor cores
    seconds: float | None  # of compiling
    statics: Statics
    case: str  # one that launches it

    @property
    def key(self) -> str:
        """A name that is the same for every version of the kernels."""
        return f"sm_{self.arch} {self.kernel} [{self.specialisation}]"


def _row(launch: Launch, case: Case) -> Row:
    """Read the cubin, or the cached result of reading it."""
    cache = get_cache_manager(launch.hash)
    sources = (Path(__file__).parent / "cubin.py").read_bytes()
    name = f"{hashlib.sha256(sources).hexdigest()[:16]}-{STATICS_FILE}"
    if (path := cache.get_file(name)) is not None:
        statics = Statics(**json.loads(Path(path).read_text(encoding="utf-8")))
    else:
        statics = analyse(launch.cubin, launch.kernel, launch.arch, launch.warps, launch.shared, launch.tensor_memory)
        cache.put(json.dumps(asdict(statics)), name, binary=False)
    matrix = bool(MATRIX.search(launch.ttir))
    return Row(launch.kernel, launch.arch, launch.specialisation, matrix, launch.seconds, statics, str(case))


def compile_case(task: tuple[int, Case, bool]) -> tuple[list[Row], str | None]:
    """Return rows of the kernels that one case launches on one architecture, and the error, if any."""
    arch, case, every = task
    launches: dict[str, Launch] = {}
    plan = turn = 0
    plans = turns = 1

    def choose(
        kernel: str, problem: tuple, candidates: Sequence[tuning.Candidate], gpu: tuning.Gpu
    ) -> tuning.Candidate | None:
        nonlocal plans, turns
        if kernel in PLANS:
            plans = max(plans, len(candidates))
            return candidates[plan]
        turns = max(turns, len(candidates))
        return candidates[min(turn, len(candidates) - 1)]

    try:
        with compile_only(arch) as recorded:
            triton_cases.run(case)
            while every and plan < plans:
                with tuning.forced(choose):
                    triton_cases.run(case)
                turn = (turn + 1) % turns
                plan += turn == 0
            launches = {launch.hash: launch for launch in recorded}
        return [_row(launch, case) for launch in launches.values()], None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [], f"sm_{arch} {case}: {reason:.400}"


def compile_all(tasks: list[tuple[int, Case, bool]], jobs: int) -> tuple[dict[str, Row], list[str]]:
    """Run `compile_case` in `jobs` processes; return rows by key, and the failures."""
    rows: dict[str, Row] = {}
    failures = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(compile_case, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            found, failure = future.result()
            failures += [failure] if failure else []
            for row in found:
                if row.key not in rows or row.case < rows[row.key].case:  # the same case in every run
                    rows[row.key] = row
    return dict(sorted(rows.items())), sorted(failures)


def wrong(row: Row) -> list[str]:
    """Return what no kernel may do, independent of the record."""
    found, statics, limit = [], row.statics, limits(row.arch)
    if statics.shared > limit.shared_cta_bytes:
        found.append(f"{statics.shared} bytes of shared memory, limit {limit.shared_cta_bytes}")
    if statics.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{statics.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}")
    if statics.instructions < SMALLEST:
        found.append(f"an empty stub of {statics.instructions} instructions")
    if row.matrix and not statics.tensor:
        found.append("matrix products without tensor cores")
    if statics.ctas == 0:
        found.append("does not fit on a multiprocessor")
    return found


def worse(row: Row, before: Row) -> list[str]:
    """Return in what `row` is worse than the recorded one."""
    found, now, then = [], row.statics, before.statics
    for what in ("stack", "spill_stores", "spill_loads"):
        if getattr(now, what) > getattr(then, what):
            found.append(f"{what.replace('_', ' ')} {getattr(now, what)} bytes, recorded {getattr(then, what)}")
    if then.tensor and not now.tensor:
        found.append(f"no tensor-core instruction, recorded {', '.join(then.tensor)}")
    if now.ctas < then.ctas:
        found.append(f"{now.ctas} CTAs per multiprocessor, recorded {then.ctas}")
    return found


def check(rows: dict[str, Row], recorded: dict[str, Row]) -> tuple[list[str], list[str]]:
    """Return lines of failed checks, and lines that only inform."""
    failures, notes = [], []
    for key, row in rows.items():
        found = wrong(row)
        if key in recorded:
            found += worse(row, recorded[key])
        else:
            notes.append(f"not recorded yet: {key}")
            if row.statics.spill_stores or row.statics.spill_loads:
                found.append(f"new, and spills {row.statics.spill_stores} + {row.statics.spill_loads} bytes")
        failures += [f"{key}: {reason}" for reason in found]
    return failures, notes


def read(file: Path) -> dict[str, Row]:
    """Return the recorded rows by key; none if there is no file."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for kernel, variants in content["kernels"].items():
        for specialisation, compiled in variants.items():
            for arch, (matrix, seconds, case, *numbers) in compiled.items():
                statics = Statics(*numbers)
                rows.append(Row(kernel, int(arch), specialisation, matrix, seconds, statics, content["cases"][case]))
    return {row.key: row for row in rows}


def _tensor(statics: Statics) -> str:
    return ", ".join(statics.tensor) or "-"


HEADER = ("kernel", "sm", "variants", "registers", "spill B", "shared KB", "CTAs/SM", "SASS", "FFMA %", "tensor", "s")


def summary(rows: Iterable[Row], families: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield a line for each kernel and architecture, or family of them (8.x), as ranges over its specialisations."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        kind = row.arch // 10 if families else row.arch
        groups.setdefault((row.kernel.removesuffix("_kernel"), kind), []).append(row)
    for (kernel, _), members in sorted(groups.items()):
        statics = [row.statics for row in members]
        seconds = [row.seconds for row in members if row.seconds is not None]
        archs = sorted({row.arch for row in members})
        limit = min(limits(arch).shared_cta_bytes for arch in archs)
        yield (
            kernel,
            span(archs),
            str(len({row.specialisation for row in members})),
            span(s.registers for s in statics),
            span(s.spill_stores + s.spill_loads for s in statics),
            span((s.shared / 1024 for s in statics), "{:.1f}") + f" of {limit // 1024}",
            span(s.ctas for s in statics),
            span(s.instructions for s in statics),
            span(100 * s.ffma for s in statics),
            ", ".join(sorted({_tensor(s) for s in statics})),
            span(seconds, "{:.1f}") if seconds else "?",
        )


def page(rows: dict[str, Row]) -> str:
    """Return the text of records/triton_kernels.md."""
    spilling = [row for row in rows.values() if row.statics.spill_stores or row.statics.spill_loads]
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row.arch for row in rows.values()}))
    lines = [
        "# Triton kernels, compiled",
        "",
        "Written by `python proofs/triton_static.py --update`; every kernel is in `triton_kernels.json`.",
        f"Compiled by Triton {importlib.metadata.version('triton')} for {archs}",
        "with the shipped configurations, and read from the cubins: nothing here was run on a GPU. Ranges are over",
        "the variants (channels, dtypes, configurations) and the architectures of a line. Spill: bytes per thread,",
        "stores and loads, each instruction counted once. Shared KB: of one CTA, and its limit. CTAs/SM: how many fit",
        "on a multiprocessor. s: seconds to compile a variant, on a machine that also did other work.",
        "",
        f"{len(rows)} compiled kernels; {len(spilling)} of them spill{':' if spilling else '.'}",
        "",
    ]
    worst = sorted(spilling, key=lambda row: row.statics.spill_stores + row.statics.spill_loads, reverse=True)
    lines += [
        f"- sm_{row.arch} {row.kernel}, {row.case}: {row.statics.spill_stores} + {row.statics.spill_loads} bytes"
        for row in worst[:WORST]
    ]
    lines += [""] if spilling else []
    return "\n".join(lines + table(HEADER, summary(rows.values(), families=True))) + "\n"


def write(rows: dict[str, Row]) -> None:
    """Record `rows` in records/: a line for each kernel, in it by specialisation and architecture."""
    cases = sorted({row.case for row in rows.values()})
    kernels: dict[str, dict[str, dict[str, list]]] = {}
    for row in sorted(rows.values(), key=lambda row: (row.kernel, row.specialisation, row.arch)):
        values = [int(row.matrix), row.seconds, cases.index(row.case), *asdict(row.statics).values()]
        kernels.setdefault(row.kernel, {}).setdefault(row.specialisation, {})[str(row.arch)] = values
    lines = [f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in kernels.items()]
    head = {
        "triton": importlib.metadata.version("triton"),
        "values": ["matrix", "seconds", "case", *Statics.__dataclass_fields__],
        "cases": cases,
    }
    text = json.dumps(head)[:-1] + ', "kernels": {\n' + ",\n".join(lines) + "\n}}\n"
    RECORD.write_text(text, encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", is_flag=True, help=f"Only architectures {QUICK_ARCHS} and a few shapes.")
@click.option("--arch", "archs", type=click.Choice([str(a) for a in ARCHS]), multiple=True, help="May be repeated.")
@click.option("--case", "texts", multiple=True, help="Only cases whose name contains it. May be repeated.")
@click.option("--candidates", is_flag=True, help="Also the configurations that the cost model does not choose.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Compiling processes.")
@click.option("--check", "checking", is_flag=True, help="Fail if a kernel is worse than the recorded one.")
@click.option("--update", is_flag=True, help="Write records/triton_kernels.json and records/triton_kernels.md.")
def main(
    quick: bool,
    archs: tuple[str, ...],
    texts: tuple[str, ...],
    candidates: bool,
    jobs: int,
    checking: bool,
    update: bool,
) -> None:
    """Compile, print, and check or record."""
    if update and (quick or archs or checking):
        raise click.UsageError("--update records everything: it excludes --quick, --arch and --check")
    chosen = [int(a) for a in archs] or list(QUICK_ARCHS if quick else ARCHS)
    cases = [case for case in COMPILED if case.quick or not quick]
    cases = [case for case in cases if not texts or any(text in str(case) for text in texts)]
    # Architecture last, so that neighbours in the queue never compile the same kernel at the same time.
    tasks = [(arch, case, candidates) for case in cases for arch in chosen]
    rows, failures = compile_all(tasks, jobs)
    click.echo("\n".join(table(HEADER, summary(rows.values()))))
    if checking:
        worse_lines, notes = check(rows, read(RECORD))
        failures += worse_lines
        for note in notes[:5]:
            click.echo(note)
        click.echo(f"{len(notes)} of {len(rows)} kernels are not recorded yet; --update records them.")
    else:
        failures += [f"{row.key}: {reason}" for row in rows.values() for reason in wrong(row)]
    if update and not failures:
        write(read(RECORD) | rows if texts else rows)
    for line in failures:
        click.echo(f"wrong: {line}", err=True)
    click.echo(f"{len(rows)} kernels compiled from {len(tasks)} cases, {len(failures)} failures; nothing was run.")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
