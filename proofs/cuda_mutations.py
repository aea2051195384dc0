"""Break the CUDA kernels on purpose, one change at a time, and see that the tests notice.

    python proofs/cuda_mutations.py [--quick] [--list] [-k TEXT] [--proof host|asan|ptx]

Each mutant lacks a barrier or a mask, has less shared memory than it uses, other strides or another bound. It must make
its tests fail in its proof:

host  the kernels built for the CPU: first as for a large GPU; then with the threads of a block in the other order, on
      a GPU so small that one block does everything
asan  the latter with the address and undefined-behaviour sanitizers, for accesses just beyond the end of something
ptx   nvcc's PTX, executed; for what the CPU build does not compile. Left out where nvcc or the emulator is missing

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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PATHS = (ROOT, Path(__file__).resolve().parent)
sys.path[:0] = map(str, PATHS)

from cuda_mutants import MUTANTS, Mutant  # noqa: E402

from tests import cuda_host  # noqa: E402

SOURCES = ("CMakeLists.txt", "csrc")
SECONDS = 120  # of the tests of one mutant, at most
# -O1: a mutant waits for the compiler longer than for its tests.
OPTIONS = {
    "host": ("-DCMAKE_BUILD_TYPE=Mutant", "-DCMAKE_CXX_FLAGS_MUTANT=-O1"),
    "asan": ("-DCMAKE_BUILD_TYPE=Mutant", "-DCNK_SANITIZE=address,undefined"),
}
FOUND = 99  # exit code of a process in which a sanitizer found something: none of pytest's own
SMALL_GPU = {"multiprocessors": 1, "shared_bytes": 65536, "grid_limit": 1}
VARIABLE = "CUDA_MUTATIONS_GPU"  # of the tests' processes


@dataclass(frozen=True)
class Way:
    """One way to run tests."""

    name: str
    order: str = "first-last"  # of a block's threads
    gpu: Mapping[str, int] = field(default_factory=dict)


OTHER = Way("last thread first, small GPU", "last-first", SMALL_GPU)
WAYS = {"host": (Way(""), OTHER), "asan": (OTHER,), "ptx": (Way("", gpu={"executed": 80}),)}


def pytest_sessionstart(session: Any) -> None:
    """In the tests' processes, which load this file as a plugin: plan for another GPU, or execute PTX."""
    from convnext_kernels.backends.cuda import native

    gpu = json.loads(os.environ.get(VARIABLE, "{}"))
    if arch := gpu.pop("executed", None):
        from tests.cuda.executed import executed

        execution = executed(arch)
        execution.__enter__()
        session.config.add_cleanup(lambda: execution.__exit__(None, None, None))
    elif gpu:
        native.extension().set_device(**gpu)


class Broken(RuntimeError):
    """What says nothing about the tests: a table that no longer fits the code, or code that does not compile."""


def mutated(mutant: Mutant, csrc: Path) -> str:
    """The text of the mutant's file with its change."""
    text = (csrc / "cuda" / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise Broken(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, not once")
    return text.replace(mutant.old, mutant.new)


def missing(proof: str) -> str:
    """Why a proof cannot be had here; empty when it can."""
    if lacking := cuda_host.missing_tools():
        return f"there is no {lacking}"
    if proof == "asan" and (lacking := [path.name for path in _preloaded() if not path.is_file()]):
        return f"the C++ compiler has no {', '.join(lacking)}"
    if proof == "ptx":
        found = subprocess.run([sys.executable, "-c", "import ptxemu"], capture_output=True).returncode == 0
        return "" if found and shutil.which("nvcc") else "needs nvcc and the module ptxemu"
    return ""


def _preloaded() -> list[Path]:
    """What an interpreter that was not built with the sanitizers must load first; libstdc++ for its exceptions."""
    compiler = os.environ.get("CXX", "g++")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(Path(done.stdout.strip()))
    return libraries


@dataclass(frozen=True)
class Outcome:
    """How the tests ended: `caught` is empty where all passed."""

    caught: str
    seconds: float


def run_tests(proof: str, tests: tuple[str, ...], extension: Path, tree: Path, way: Way) -> str:
    """How the tests noticed, empty where they passed."""
    environment = os.environ | {
        cuda_host.VARIABLE: str(extension),
        "CONVNEXT_KERNELS_CUDA_SOURCES": str(tree),  # which tests/cuda/executed.py compiles
        "PYTHONPATH": os.pathsep.join(filter(None, (*map(str, PATHS), os.environ.get("PYTHONPATH")))),
        VARIABLE: json.dumps(way.gpu),
        "TRITON_INTERPRET": "0",
    }
    if proof == "asan":
        environment |= {
            "LD_PRELOAD": " ".join(map(str, _preloaded())),
            "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:exitcode={FOUND}",
            "UBSAN_OPTIONS": f"exitcode={FOUND}",
        }
    # What the sanitizers write to the standard error goes past pytest.
    options = ("-x", "-q", "--tb=short", "--capture=sys", "-p", "no:cacheprovider", "-p", Path(__file__).stem)
    options += (f"--cuda-threads={way.order}",)
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=SECONDS,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode == 0:
        if " passed" not in done.stdout:
            raise Broken(f"pytest {' '.join(tests)}: all tests are skipped:\n{done.stdout[-2000:]}")
        return ""
    if done.returncode == FOUND:
        found = re.search(r"ERROR: AddressSanitizer: ([\w-]+)|runtime error: (.+?)(?:,|$)", done.stdout, re.M)
        return f"sanitizer: {found[1] or found[2]}" if found else "sanitizer"
    if done.returncode < 0:
        return f"crash: {signal.Signals(-done.returncode).name}"
    if done.returncode != 1:  # no tests, a wrong option, an error while they were collected
        raise Broken(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    if "deadlock" in done.stdout:
        return "deadlock"
    if found := re.search(r"PTXError: .*?: (.+)", done.stdout):
        return f"emulator: {found[1]}"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(?:\w+\[)?([^\s\]]+)", done.stdout, re.M)
    return f"failed: {failed[1]}" if failed else "failed"


class Workshop:
    """A copy of the sources, and what is built from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        self.tree.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.tree / name)

    def extension(self, proof: str) -> Path:
        """The extension of the sources as they are now. Raises Broken where they do not compile."""
        kind = "asan" if proof == "asan" else "host"
        try:
            return cuda_host.build(self.folder / kind, self.tree, *OPTIONS[kind])
        except RuntimeError as error:
            raise Broken(str(error)[-3000:]) from None

    @contextmanager
    def mutant(self, mutant: Mutant) -> Iterator[None]:
        """The sources with one change."""
        file = self.tree / "csrc" / "cuda" / mutant.file
        before = file.read_text(encoding="utf-8")
        file.write_text(mutated(mutant, self.tree / "csrc"), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(before, encoding="utf-8")

    def outcome(self, proof: str, tests: tuple[str, ...]) -> Outcome:
        """Build the sources as they are and test them, in another way where the first one shows nothing."""
        began = time.perf_counter()
        extension = self.extension(proof)
        # Tests of the thread order set it, and the GPU, themselves.
        for way in WAYS[proof][:1] if "thread_order" in " ".join(tests) else WAYS[proof]:
            if caught := run_tests(proof, tests, extension, self.tree, way):
                return Outcome(caught + (f" ({way.name})" if way.name else ""), time.perf_counter() - began)
        return Outcome("", time.perf_counter() - began)


def chosen(text: str, quick: bool, proofs: tuple[str, ...]) -> list[Mutant]:
    """Mutants of the options, those of one proof and file next to each other."""
    found = [
        m for m in MUTANTS if (m.quick or not quick) and text in f"{m.name} {m.kind} {m.file}" and m.proof in proofs
    ]
    return sorted(found, key=lambda m: (list(OPTIONS | {"ptx": ()}).index(m.proof), m.file))


def controls(mutants: list[Mutant]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The tests of all mutants, which must pass without a change."""
    yield from dict.fromkeys((mutant.proof, mutant.tests) for mutant in mutants)


@click.command(help=__doc__.splitlines()[0])
@click.option("-k", "text", default="", help="Mutants whose name, kind or file holds this text only.")
@click.option("--quick", is_flag=True, help="One of each kind, in less than two minutes.")
@click.option("--list", "listing", is_flag=True, help="List them only.")
@click.option("--proof", "proofs", type=click.Choice([*WAYS]), multiple=True, help="May be repeated.")
def main(text: str, quick: bool, listing: bool, proofs: tuple[str, ...]) -> None:
    """Break, build, test and print."""
    mutants = chosen(text, quick, proofs or (*WAYS,))
    for mutant in mutants if listing else ():
        click.echo(f"{mutant.proof:5} {mutant.kind:8} {mutant.file:24} {mutant.name}")
    if listing:
        return
    for proof in dict.fromkeys(mutant.proof for mutant in mutants):
        if reason := missing(proof):
            click.echo(f"{proof} left out: {reason}", err=True)
            mutants = [mutant for mutant in mutants if mutant.proof != proof]
    shown = Table(title="CUDA kernels, broken on purpose")
    for name in ("mutant", "file", "proof", "noticed by", "s"):
        shown.add_column(name, justify="right" if name == "s" else "left")
    survivors = 0
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe nobody knows the width
    try:
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(Path(folder))
            for proof, tests in controls(mutants):
                if caught := (outcome := workshop.outcome(proof, tests)).caught:
                    raise Broken(f"the control fails, {proof} {' '.join(tests)}: {caught}")
                print(f"control {proof} {' '.join(tests)}: passed, {outcome.seconds:.0f} s", file=sys.stderr)
            for mutant in mutants:
                with workshop.mutant(mutant):
                    outcome = workshop.outcome(mutant.proof, mutant.tests)
                print(f"{mutant.name}: {outcome.caught or 'SURVIVED'}, {outcome.seconds:.0f} s", file=sys.stderr)
                survivors += not outcome.caught
                cells = (mutant.name, mutant.file, mutant.proof, outcome.caught or "SURVIVED", f"{outcome.seconds:.0f}")
                shown.add_row(*map(Text, cells), style=None if outcome.caught else "red")
    except Broken as error:
        raise click.ClickException(str(error)) from None
    console.print(shown, highlight=False)
    click.echo(f"{len(mutants)} mutants, {survivors} survived.")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
