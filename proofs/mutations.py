"""Break the code on purpose, one change at a time, and see that the everyday tests notice.

    python proofs/mutations.py [--quick] [--list] [-k TEXT] [--of cuda|cpu|triton|python] [--jobs N] [--json FILE]

A mutant is one plausible slip: a barrier left out, a mask, a bound, a stride, an eps, a stale cache. Its tests, a file
and an expression of pytest's everyday selection, must pass without it and fail with it, in its proof:

host    the CUDA kernels built for the CPU, as for a large GPU; then with the threads of a block in the other order,
        on a GPU so small that one block does everything
asan    the latter with the address and undefined-behaviour sanitizers, for accesses just beyond the end of something
ptx     nvcc's PTX, executed; for what the CPU build does not compile. Left out where nvcc or the emulator is missing
avx2    the CPU kernels, built for this instruction set alone; so does avx512bf16, where the machine has it
python  nothing is built: Python, and Triton's kernels in its interpreter

The sources are copied; nothing in the repository changes. Exit code 1 where a mutant survives.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
from checkout import ROOT
from mutants import SUBJECTS, Mutant, plugin, table
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests import cuda_host

SOURCES = ("CMakeLists.txt", "pyproject.toml", "convnext_kernels", "csrc", "tests")
# -O1: a mutant waits for the compiler longer than for its tests.
FAST = ("-DCMAKE_BUILD_TYPE=Mutant", "-DCMAKE_CXX_FLAGS_MUTANT=-O1")
# What is built, and with which options.
BUILDS = {
    "host": (cuda_host.TARGET, *FAST),
    "asan": (cuda_host.TARGET, "-DCMAKE_BUILD_TYPE=Mutant", "-DCNK_SANITIZE=address,undefined"),
    "avx2": ("_native", *FAST, "-DCNK_CPU_ISAS=avx2"),
    "avx512bf16": ("_native", *FAST, "-DCNK_CPU_ISAS=avx512;avx512bf16"),
}
FOUND = 99  # exit code of a process in which a sanitizer found something: none of pytest's own
SMALL_GPU = {"multiprocessors": 1, "shared_bytes": 65536, "grid_limit": 1}


@dataclass(frozen=True)
class Way:
    """One way to run tests."""

    name: str = ""
    order: str = "first-last"  # of a block's threads
    gpu: Mapping[str, int] = field(default_factory=dict)


OTHER = Way("last thread first, small GPU", "last-first", SMALL_GPU)
PROOFS = {
    "host": (Way(), OTHER),
    "asan": (OTHER,),
    "ptx": (Way(gpu={"executed": 80}),),
    "avx2": (Way(),),
    "avx512bf16": (Way(),),
    "python": (Way(),),
}


class Broken(RuntimeError):
    """What says nothing about the tests: a table that no longer fits the code, or code that does not compile."""


@dataclass(frozen=True)
class Outcome:
    """How the tests ended: `caught` is empty where all passed."""

    caught: str
    seconds: float
    broken: str = ""  # why nothing is known


def packaged() -> list[Path]:
    """The compiled CPU kernels of this checkout, or of the installed package."""
    folders = (Path(folder, "convnext_kernels") for folder in sys.path)
    return next((found for folder in folders if (found := [*folder.glob("_native.*.so")])), [])


def missing(proof: str) -> str:
    """Why a proof cannot be had here; empty when it can."""
    if proof == "python":
        return "" if packaged() else "the compiled CPU kernels are not there: pip install -e ."
    if lacking := cuda_host.missing_tools():
        return f"there is no {lacking}"
    if proof == "asan" and (lacking := [path.name for path in _preloaded() if not path.is_file()]):
        return f"the C++ compiler has no {', '.join(lacking)}"
    if proof == "ptx":
        found = subprocess.run([sys.executable, "-c", "import ptxemu"], capture_output=True).returncode == 0
        return "" if found and shutil.which("nvcc") else "needs nvcc and the module ptxemu"
    if proof.startswith("avx"):
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        wanted = {"avx2": "avx2", "avx512bf16": "avx512_bf16"}[proof]
        return "" if re.search(rf"\b{wanted}\b", flags) else f"this processor has no {proof}"
    return ""


def _preloaded() -> list[Path]:
    """What an interpreter that was not built with the sanitizers must load first; libstdc++ for its exceptions."""
    compiler = os.environ.get("CXX", "g++")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(Path(done.stdout.strip()))
    return libraries


def _copy_changed(source: str, target: str) -> None:
    """For `shutil.copytree`: leave alone what has the same time, so that nothing is built again."""
    if not os.path.exists(target) or os.stat(source).st_mtime_ns != os.stat(target).st_mtime_ns:
        shutil.copy2(source, target)


class Workshop:
    """A copy of the sources, and what is built from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        self.tree.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, self.tree / name)
        self.built: dict[str, Path] = {}  # extensions of the sources without a mutant

    @contextmanager
    def mutant(self, mutant: Mutant) -> Iterator[None]:
        """The sources with one change; afterwards they, and what was built of them, are as before."""
        file = self.tree / mutant.file
        text, times = file.read_text(encoding="utf-8"), file.stat()
        if (count := text.count(mutant.old)) != 1:
            raise Broken(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, not once")
        if mutant.proof in BUILDS:
            self.extension(mutant.proof)
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(text, encoding="utf-8")
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            if mutant.proof in BUILDS:
                kept, build = self.folder / f"{mutant.proof}.kept", self.folder / mutant.proof
                shutil.copytree(kept, build, dirs_exist_ok=True, copy_function=_copy_changed)
            shutil.rmtree(self.tree / "build", ignore_errors=True)  # PTX

    def extension(self, proof: str) -> Path:
        """Build the extension of the sources as they are. Raises Broken where they do not compile."""
        target, *options = BUILDS[proof]
        try:
            built = cuda_host.build(self.folder / proof, self.tree, *options, target=target)
        except RuntimeError as error:
            raise Broken(str(error)[-3000:]) from None
        if proof not in self.built:
            self.built[proof] = built
            shutil.copytree(self.folder / proof, self.folder / f"{proof}.kept")
        return built

    def outcome(self, proof: str, tests: tuple[str, ...], limit: float) -> Outcome:
        """Build the sources as they are and test them, in another way where the first one shows nothing."""
        began = time.perf_counter()
        extension = self.extension(proof) if proof in BUILDS else None
        native = [extension] if proof.startswith("avx") else packaged()
        for file in (self.tree / "convnext_kernels").glob("_native.*.so"):
            file.unlink()
        for file in native:
            (self.tree / "convnext_kernels" / file.name).symlink_to(file)
        # Tests of the thread order set it, and the GPU, themselves.
        for way in PROOFS[proof][:1] if "thread_order" in " ".join(tests) else PROOFS[proof]:
            if caught := self._run(proof, tests, extension, way, limit):
                return Outcome(caught + (f" ({way.name})" if way.name else ""), time.perf_counter() - began)
        return Outcome("", time.perf_counter() - began)

    def _run(self, proof: str, tests: tuple[str, ...], extension: Path | None, way: Way, limit: float) -> str:
        """How the tests noticed, empty where they passed."""
        paths = (str(self.tree), str(ROOT / "proofs"), os.environ.get("PYTHONPATH"))
        environment = os.environ | {
            # Empty: no CUDA kernels, and none are built.
            cuda_host.VARIABLE: str(extension) if proof in ("host", "asan") else "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            plugin.VARIABLE: json.dumps(way.gpu),
            "OMP_WAIT_POLICY": "passive",  # threads that wait must not take the core of the other job
            "TRITON_INTERPRET": "1" if proof == "python" else "0",
        }
        if proof.startswith("avx"):
            environment["CONVNEXT_KERNELS_CPU_ISA"] = proof
        if proof == "asan":
            environment |= {
                "LD_PRELOAD": " ".join(map(str, _preloaded())),
                "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:exitcode={FOUND}",
                "UBSAN_OPTIONS": f"exitcode={FOUND}",
            }
        # What the sanitizers write to the standard error goes past pytest.
        options = ("-x", "-q", "--tb=short", "--capture=sys", "-p", "no:cacheprovider", "-p", plugin.__name__)
        options += (f"--cuda-threads={way.order}",)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=self.tree,
                env=environment,
                timeout=limit,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired:
            return "time-out"
        return noticed(done.returncode, done.stdout, tests)


def noticed(code: int, output: str, tests: tuple[str, ...]) -> str:
    """How pytest's run ended: empty where all tests passed. Raises Broken where it says nothing about the code."""
    if code == 0:
        if " passed" not in output:
            raise Broken(f"pytest {' '.join(tests)}: all tests are skipped:\n{output[-2000:]}")
        return ""
    if code == FOUND:
        found = re.search(r"ERROR: AddressSanitizer: ([\w-]+)|runtime error: (.+?)(?:,|$)", output, re.M)
        return f"sanitizer: {found[1] or found[2]}" if found else "sanitizer"
    if code < 0:
        return f"crash: {signal.Signals(-code).name}"
    if code != 1:  # no tests, a wrong option, an error while they were collected
        raise Broken(f"pytest {' '.join(tests)} ended with {code}:\n{output[-2000:]}")
    if "deadlock" in output:
        return "deadlock"
    if found := re.search(r"PTXError: .*?: (.+)", output):
        return f"emulator: {found[1]}"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+(?:\[[^\s\]]+\]?)?)", output, re.M)
    return f"failed: {failed[1]}" if failed else "failed"


class Line:
    """The mutants that wait. A worker stays with a proof while it has mutants, since each builds it for itself."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.left = {proof: [m for m in mutants if m.proof == proof] for proof in PROOFS}
        self.lock = threading.Lock()
        self.working: Counter[str] = Counter()
        self.controls: dict[tuple[str, tuple[str, ...]], Outcome] = {}  # of tests without a mutant

    def next(self, last: str) -> Mutant | None:
        """A mutant of the proof `last`, else of the one with the most left for each worker there."""
        with self.lock:
            self.working[last] -= 1
            waiting = [proof for proof, mutants in self.left.items() if mutants]
            if not waiting:
                return None
            share = {proof: len(self.left[proof]) / (1 + self.working[proof]) for proof in waiting}
            proof = last if last in waiting else max(share, key=share.__getitem__)
            self.working[proof] += 1
            return self.left[proof].pop(0)

    def limit(self, workshop: Workshop, mutant: Mutant) -> float:
        """Seconds for the mutant's tests, many times what they take without it; Broken where they fail then."""
        key = mutant.proof, mutant.tests
        if key not in self.controls:
            self.controls[key] = workshop.outcome(*key, limit=3600)
            print(f"control {mutant.proof} {' '.join(mutant.tests)}: {self.controls[key]}", file=sys.stderr)
        if caught := self.controls[key].caught:
            raise Broken(f"the tests fail without a mutant: {caught}")
        return 120 + 10 * self.controls[key].seconds


def chosen(subjects: tuple[str, ...], text: str, quick: bool) -> dict[Mutant, str]:
    """Mutants of the options and their subjects, those of one file next to each other."""
    found = {m: subject for subject in subjects for m in table(subject)}
    return {
        m: subject
        for m, subject in sorted(found.items(), key=lambda item: item[0].file)
        if (m.quick or not quick) and text in f"{m.name} {m.kind} {m.file} {m.proof}"
    }


def work(line: Line, folder: Path, notes: "Notes") -> None:
    """Break, build and test until no mutant is left."""
    workshop, last = Workshop(folder), ""
    while mutant := line.next(last):
        last = mutant.proof
        try:
            limit = line.limit(workshop, mutant)
            with workshop.mutant(mutant):
                notes.add(mutant, workshop.outcome(mutant.proof, mutant.tests, limit))
        except Broken as error:
            notes.add(mutant, Outcome("", 0, str(error)))


class Notes:
    """What became of each mutant; written as soon as it is known."""

    def __init__(self, subjects: dict[Mutant, str], file: Path | None) -> None:
        self.subjects, self.file, self.outcomes = subjects, file, dict[Mutant, Outcome]()
        self.lock = threading.Lock()

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes[mutant] = outcome
            print(f"{mutant.file}: {mutant.name}: {self.word(outcome)}, {outcome.seconds:.0f} s", file=sys.stderr)
            if self.file:
                rows = [
                    {
                        "subject": self.subjects[m],
                        **{name: getattr(m, name) for name in ("file", "name", "kind", "proof", "tests")},
                        "caught": o.caught,
                        "broken": o.broken,
                        "seconds": round(o.seconds, 1),
                    }
                    for m, o in self.outcomes.items()
                ]
                self.file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def word(outcome: Outcome) -> str:
        """What the table says of it."""
        return outcome.caught or (f"BROKEN: {outcome.broken}" if outcome.broken else "SURVIVED")

    def table(self) -> Table:
        """All of them, in the order of the tables."""
        shown = Table(title="Broken on purpose")
        for name in ("mutant", "file", "proof", "noticed by", "s"):
            shown.add_column(name, justify="right" if name == "s" else "left")
        for mutant in filter(self.outcomes.__contains__, self.subjects):
            outcome = self.outcomes[mutant]
            cells = (mutant.name, mutant.file, mutant.proof, self.word(outcome), f"{outcome.seconds:.0f}")
            shown.add_row(*map(Text, cells), style=None if outcome.caught else "red")
        return shown

    def summary(self) -> Iterator[str]:
        """A line for each subject."""
        for subject in dict.fromkeys(self.subjects.values()):
            of = [m for m, name in self.subjects.items() if name == subject]
            outcomes = [self.outcomes[m] for m in of if m in self.outcomes]
            caught, broken = sum(bool(o.caught) for o in outcomes), sum(bool(o.broken) for o in outcomes)
            left_out = f", {len(of) - len(outcomes)} left out" if len(of) > len(outcomes) else ""
            survived = len(outcomes) - caught - broken
            yield f"{subject}: {len(of)} mutants, {caught} caught, {survived} survived, {broken} broken{left_out}"


@click.command(help=__doc__.splitlines()[0])
@click.option("--of", "subjects", type=click.Choice(SUBJECTS), multiple=True, help="May be repeated.")
@click.option("-k", "text", default="", help="Mutants whose name, kind, file or proof holds this text only.")
@click.option("--quick", is_flag=True, help="A few of each subject.")
@click.option("--list", "listing", is_flag=True, help="List them only.")
@click.option("--jobs", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the outcomes to a file.")
def main(subjects: tuple[str, ...], text: str, quick: bool, listing: bool, jobs: int, file: Path | None) -> None:
    """Break, build, test and print."""
    began = time.perf_counter()
    found = chosen(subjects or SUBJECTS, text, quick)
    if listing:
        for mutant, subject in found.items():
            click.echo(f"{subject:6} {mutant.proof:10} {mutant.kind:8} {mutant.file:48} {mutant.name}")
        return
    mutants = list(found)
    for proof in dict.fromkeys(mutant.proof for mutant in mutants):
        if reason := missing(proof):
            click.echo(f"{proof} left out: {reason}", err=True)
            mutants = [mutant for mutant in mutants if mutant.proof != proof]
    # Of each worker's compiler: cuda_host.build passes it on.
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(max(1, (os.cpu_count() or 1) // jobs)))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe nobody knows the width
    line, notes = Line(mutants), Notes(found, file)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as workers:
        tasks = [workers.submit(work, line, Path(folder, str(i)), notes) for i in range(jobs)]
    console.print(notes.table(), highlight=False)
    for text in notes.summary():
        click.echo(text)
    used = os.times()
    cores = (used.children_user + used.children_system) / 60
    click.echo(f"{(time.perf_counter() - began) / 60:.1f} minutes, {jobs} at a time; {cores:.1f} minutes of one core")
    for task in tasks:
        task.result()
    sys.exit(any(not outcome.caught for outcome in notes.outcomes.values()))


if __name__ == "__main__":
    main()
