"""Break the code on purpose, one change at a time, and check that the everyday tests fail.

    python proofs/mutations.py [--quick] [--list] [-k REGEX] [--of cuda|cpu|triton|python] [--jobs N]

A mutant is one plausible mistake: a missing barrier, a wrong mask, bound, stride or eps, a stale cache. Its tests (a
file and an expression, from pytest's everyday selection) must pass without it and fail with it. Each mutant is built
and run in one of these ways ("proof"):

host        the CUDA kernels built for the CPU, as for a large GPU; then with the threads of a block in the other order,
            on a GPU so small that one block does everything
asan        the second run of "host" with the address and undefined-behaviour sanitizers, for accesses out of bounds
ptx         nvcc's PTX, executed, for code that the CPU build does not compile. Needs nvcc and the emulator
avx2        the CPU kernels, built for this instruction set only
avx512bf16  the same for AVX-512 BF16. Needs a machine that has it
python      nothing is built: Python, and Triton's kernels in its interpreter

Proofs that cannot run here are skipped. The sources are copied; nothing in the repository changes. The exit code is 1
if a mutant survives.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import click
from checkout import ROOT
from figures import table as lines_of
from mutants import SUBJECTS, Mutant, plugin, table

from tests import cuda_host

SOURCES = ("CMakeLists.txt", "pyproject.toml", "convnext_kernels", "csrc", "tests")
# -O1, because compiling a mutant takes longer than its tests.
FAST = ("-DCMAKE_BUILD_TYPE=Mutant", "-DCMAKE_CXX_FLAGS_MUTANT=-O1")
# What is built, and with which options.
BUILDS = {
    "host": (cuda_host.TARGET, *FAST),
    "asan": (cuda_host.TARGET, "-DCMAKE_BUILD_TYPE=Mutant", "-DCNK_SANITIZE=address,undefined"),
    "ptx": (cuda_host.TARGET, *FAST),  # it hands launches to the emulator
    "avx2": ("_native", *FAST, "-DCNK_CPU_ISAS=avx2"),
    "avx512bf16": ("_native", *FAST, "-DCNK_CPU_ISAS=avx512;avx512bf16"),
}
FEW = 8
FOUND = 99  # exit code of a process in which a sanitizer found something; pytest does not use it
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
    """The mutant says nothing about the tests: the table does not fit the code, or the code does not compile."""


@dataclass(frozen=True)
class Outcome:
    """How the tests ended: `caught` is empty where all passed."""

    caught: str
    seconds: float
    broken: str = ""  # why the outcome is unknown

    def __str__(self) -> str:
        return self.caught or (f"BROKEN: {self.broken}" if self.broken else "SURVIVED")


def packaged() -> list[Path]:
    """Return the compiled CPU kernels of this checkout, or of the installed package."""
    folders = (Path(folder, "convnext_kernels") for folder in sys.path)
    return next((found for folder in folders if (found := [*folder.glob("_native.*.so")])), [])


def missing(proof: str) -> str:
    """Return why a proof cannot run here; empty if it can."""
    if not proof.startswith("avx") and not packaged():  # the tests choose among all backends
        return "the CPU kernels are not compiled: run pip install -e ."
    if proof == "python":
        return ""
    if lacking := cuda_host.missing_tools():
        return f"{lacking} is missing"
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
    """Return the libraries to preload in a Python built without sanitizers; libstdc++ for C++ exceptions."""
    compiler = os.environ.get("CXX", "g++")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(Path(done.stdout.strip()))
    return libraries


def _copy_changed(source: str, target: str) -> None:
    """For `shutil.copytree`: skip files with the same time, so that nothing is built again."""
    if not os.path.exists(target) or os.stat(source).st_mtime_ns != os.stat(target).st_mtime_ns:
        shutil.copy2(source, target)


class Workshop:
    """A copy of the sources, and the extensions built from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        self.tree.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, self.tree / name)

    @contextmanager
    def mutant(self, mutant: Mutant) -> Iterator[None]:
        """Apply one change to the sources; afterwards restore them and the extensions built from them."""
        file = self.tree / mutant.file
        text, times = file.read_text(encoding="utf-8"), file.stat()
        if (count := text.count(mutant.old)) != 1:
            raise Broken(f"{mutant.name}: {mutant.old!r} is {count} times in {mutant.file}, expected once")
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
        """Build the extension from the current sources. Raises Broken if they do not compile."""
        target, *options = BUILDS[proof]
        try:
            built = cuda_host.build(self.folder / proof, self.tree, *options, target=target)
        except RuntimeError as error:
            raise Broken(str(error)[-3000:]) from None
        if not (kept := self.folder / f"{proof}.kept").exists():  # of the sources without a mutant
            shutil.copytree(self.folder / proof, kept)
        return built

    def outcome(self, proof: str, tests: tuple[str, ...], limit: float) -> Outcome:
        """Build the current sources and test them; if the tests pass, also in the proof's other way, if it has one."""
        began = time.perf_counter()
        extension = self.extension(proof) if proof in BUILDS else None
        native = [extension] if proof.startswith("avx") else packaged()
        for file in (self.tree / "convnext_kernels").glob("_native.*.so"):
            file.unlink()
        for file in native:
            (self.tree / "convnext_kernels" / file.name).symlink_to(file)
        # Tests of the thread order set the order and the GPU themselves.
        for way in PROOFS[proof][:1] if "thread_order" in " ".join(tests) else PROOFS[proof]:
            if caught := self._run(proof, tests, extension, way, limit):
                return Outcome(caught + (f" ({way.name})" if way.name else ""), time.perf_counter() - began)
        return Outcome("", time.perf_counter() - began)

    def _run(self, proof: str, tests: tuple[str, ...], extension: Path | None, way: Way, limit: float) -> str:
        """Return how the tests failed; empty if they passed."""
        paths = (str(self.tree), str(ROOT / "proofs"), os.environ.get("PYTHONPATH"))
        environment = os.environ | {
            # Empty: there are no CUDA kernels, and none are built.
            cuda_host.VARIABLE: str(extension) if proof in ("host", "asan", "ptx") else "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            plugin.VARIABLE: json.dumps(way.gpu),
            "OMP_WAIT_POLICY": "passive",  # waiting threads must not use the core of the other job
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
        # With --capture=sys the sanitizers' output to stderr is not captured by pytest.
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
    """Return how pytest's run failed; empty if all tests passed. Raises Broken if it says nothing about the code."""
    if code == 0:
        if " passed" not in output:
            raise Broken(f"pytest {' '.join(tests)}: all tests were skipped:\n{output[-2000:]}")
        return ""
    if code == FOUND:
        found = re.search(r"ERROR: AddressSanitizer: ([\w-]+)|runtime error: (.+?)(?:,|$)", output, re.M)
        return f"sanitizer: {found[1] or found[2]}" if found else "sanitizer"
    if code < 0:
        return f"crash: {signal.Signals(-code).name}"
    if code != 1:  # no tests, a wrong option, or an error during collection
        raise Broken(f"pytest {' '.join(tests)} ended with {code}:\n{output[-2000:]}")
    if "deadlock" in output:
        return "deadlock"
    if found := re.search(r"PTXError: .*?: (.+)", output):
        return f"emulator: {found[1]}"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+(?:\[[^\s\]]+\]?)?)", output, re.M)
    return f"failed: {failed[1]}" if failed else "failed"


def chosen(subjects: tuple[str, ...], text: str, quick: bool) -> dict[Mutant, str]:
    """Return the mutants that the options select and their subjects, ordered by file."""
    found = {m: subject for subject in subjects for m in table(subject)}
    return {
        m: subject
        for m, subject in sorted(found.items(), key=lambda item: item[0].file)
        if (m.quick or not quick) and re.search(text, f"{m.name} {m.file} {m.proof}")
    }


def work(mutants: list[Mutant]) -> Iterator[tuple[Mutant, Outcome]]:
    """Apply, build and test mutants of one proof. Their tests run without a mutant first, to know that they pass."""
    controls: dict[tuple[str, ...], Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for mutant in mutants:
            try:
                if mutant.tests not in controls:
                    controls[mutant.tests] = workshop.outcome(mutant.proof, mutant.tests, limit=3600)
                if caught := controls[mutant.tests].caught:
                    raise Broken(f"the tests fail without a mutant: {caught}")
                with workshop.mutant(mutant):
                    limit = 120 + 10 * controls[mutant.tests].seconds
                    outcome = workshop.outcome(mutant.proof, mutant.tests, limit)
            except Broken as error:
                outcome = Outcome("", 0, str(error))
            print(f"{mutant.file}: {mutant.name}: {outcome}", file=sys.stderr)
            yield mutant, outcome


def report(subjects: dict[Mutant, str], outcomes: dict[Mutant, Outcome]) -> Iterator[str]:
    """Yield the table of all outcomes, in the order of the mutants' tables, and a line for each subject."""
    found = {m: outcomes[m] for m in subjects if m in outcomes}
    rows = ((m.name, m.file, m.proof, str(o), f"{o.seconds:.0f}") for m, o in found.items())
    yield from lines_of(("mutant", "file", "proof", "caught by", "s"), rows)
    for subject in dict.fromkeys(subjects.values()):
        of = [m for m, name in subjects.items() if name == subject]
        ended = [found[m] for m in of if m in found]
        caught, broken = sum(bool(o.caught) for o in ended), sum(bool(o.broken) for o in ended)
        counts = f"{caught} caught, {len(ended) - caught - broken} survived, {broken} broken"
        yield f"{subject}: {len(of)} mutants, {counts}, {len(of) - len(ended)} skipped"


@click.command(help=__doc__.splitlines()[0])
@click.option("--of", "subjects", type=click.Choice(SUBJECTS), multiple=True, help="May be repeated.")
@click.option("-k", "text", default="", help="A regular expression for name, file, proof.")
@click.option("--quick", is_flag=True, help="One of Triton's kernels, one of Python.")
@click.option("--list", "listing", is_flag=True, help="Only list the mutants.")
@click.option("--jobs", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True)
def main(subjects: tuple[str, ...], text: str, quick: bool, listing: bool, jobs: int) -> None:
    """Apply, build, test and print."""
    began = time.perf_counter()
    found = chosen(subjects or SUBJECTS, text, quick)
    if listing:
        for mutant, subject in found.items():
            click.echo(f"{subject:6} {mutant.proof:10} {mutant.file:48} {mutant.name}")
        return
    mutants = list(found)
    for proof in dict.fromkeys(mutant.proof for mutant in mutants):
        if reason := missing(proof):
            click.echo(f"{proof}: skipped: {reason}", err=True)
            mutants = [mutant for mutant in mutants if mutant.proof != proof]
    # For each worker's compiler; cuda_host.build passes it on.
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(max(1, (os.cpu_count() or 1) // jobs)))
    parts = []
    for proof in PROOFS:  # each part builds its own extension, so few mutants stay together
        of = [mutant for mutant in mutants if mutant.proof == proof]
        parts += [of[i::jobs] for i in range(jobs)] if len(of) > FEW else [of]
    with ThreadPoolExecutor(jobs) as workers:  # the largest parts first
        parts = sorted(filter(None, parts), key=len, reverse=True)
        outcomes = dict(chain(*workers.map(lambda part: list(work(part)), parts)))
    click.echo("\n".join(report(found, outcomes)))
    used = os.times()
    cores = (used.children_user + used.children_system) / 60
    click.echo(f"{(time.perf_counter() - began) / 60:.1f} minutes, {jobs} at a time; {cores:.1f} minutes of one core")
    sys.exit(any(not outcome.caught for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
