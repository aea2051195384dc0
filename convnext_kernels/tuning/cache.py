"""Choices that were timed on this machine, kept between processes: one JSON file in the user's cache folder.

``CONVNEXT_KERNELS_CACHE`` names another folder. The key of an entry has everything that a time depends on (machine,
versions of this package, PyTorch and Triton, what is chosen, class of the problem): after an upgrade there are new
entries, and after a downgrade the old ones are found again. A file is never half written (a temporary file replaces it)
and a damaged file is rebuilt. Processes that write at the same time wait for each other and lose nothing. Where that is
not possible (filelock is not installed, the file system has no locks, the lock is held too long) the last one may win.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from convnext_kernels.tuning.gpus import Gpu
from convnext_kernels.version import __version__

ENVIRONMENT_VARIABLE = "CONVNEXT_KERNELS_CACHE"
FORMAT = 2
FILE = "choices.json"
LOCK_SECONDS = 10.0

_log = logging.getLogger("convnext_kernels")


def folder() -> Path:
    """The folder of the cache; it need not exist."""
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "convnext_kernels"


def shape_class(problem: tuple) -> str:
    """The class of a problem: its first element (the batch) rounded up to a power of two, the others unchanged."""
    if problem and isinstance(problem[0], int) and not isinstance(problem[0], bool):
        problem = (1 << max(0, problem[0] - 1).bit_length(), *problem[1:])
    return ",".join(str(part).removeprefix("torch.") for part in problem)


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def prefix(where: Gpu | str) -> str:
    """How the keys of this installation begin on a machine: a GPU, or what `cpus.machine` returns."""
    machine = where if isinstance(where, str) else where.machine
    return f"{machine}|{__version__}, torch {_version('torch')}, triton {_version('triton')}|"


def key(kernel: str, problem: tuple, where: Gpu | str) -> str:
    """The key of an entry."""
    return f"{prefix(where)}{kernel}|{shape_class(problem)}"


@functools.cache
def _warn_once(path: Path, reason: str) -> None:
    _log.warning("cache of kernel choices: %s %s", path, reason)


def parse(text: str) -> dict[str, str]:
    """Entries of a cache file, key to the candidate's name; none if another version of the package wrote it.

    Raises ValueError, KeyError, TypeError, AttributeError or RecursionError if it is damaged.
    """
    content = json.loads(text)
    if content["format"] != FORMAT:
        return {}
    entries = content["entries"]
    if not all(isinstance(part, str) for entry in entries.items() for part in entry):
        raise TypeError("an entry is not a string")
    return entries


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read(path: Path) -> dict[str, str]:
    """`parse` of a file; none, and one warning, if it is damaged or cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_once(path, f"cannot be read: {error.strerror}")
        return {}
    except _DAMAGE as error:
        _warn_once(path, f"is damaged and will be rebuilt: {type(error).__name__}: {error}")
        return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`, if that is possible: the write itself is atomic in any case."""
    try:
        import filelock
    except ModuleNotFoundError:
        yield
        return
    lock = filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a time-out (an OSError), or a file system without locks
        _warn_once(path, f"cannot be locked, it is written all the same: {error}")
    try:
        yield
    finally:
        lock.release()


def replace(path: Path, text: str) -> None:
    """Write a file in one step, so that a reader never sees half of it, even after an interruption. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write(path: Path, entries: Mapping[str, str]) -> None:
    """Merge `entries` into the file at `path`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = read(path) | dict(entries)
        replace(path, json.dumps({"format": FORMAT, "entries": merged}, indent=1, sort_keys=True) + "\n")


_generations = itertools.count(1)


class _Memory:
    """The copy of the file in this process, read once for each folder."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.entries: dict[str, str] = {}
        self.trial: Mapping[str, str] = {}  # come first, see `Trial`
        self.generation: int | None = None  # see `generation`; None: not known

    def load(self) -> dict[str, str]:
        path = folder() / FILE
        if path != self.path:
            self.path, self.entries = path, read(path)
        return self.entries


_memory = _Memory()
generation_if_known = functools.partial(getattr, _memory, "generation")  # or None; in C


def lookup(kernel: str, problem: tuple, where: Gpu | str) -> str | None:
    """Name of the candidate that was the fastest when they were timed, or None."""
    entries, trial = _memory.load(), _memory.trial
    if not entries and not trial:
        return None
    entry = key(kernel, problem, where)
    return trial.get(entry) or entries.get(entry)


def keep(entries: Mapping[str, str]) -> None:
    """Keep choices, for this process and on disk. If they cannot be written, one warning is logged: it is a cache."""
    _memory.load().update(entries)
    _memory.generation = next(_generations)
    path = folder() / FILE
    try:
        write(path, entries)
    except OSError as error:
        _warn_once(path, f"cannot be written: {error.strerror or error}")


def load(file: str | os.PathLike) -> dict[str, str]:
    """Add the choices of a file that `tune` wrote to the user's cache; returns them.

    Choices of other machines or versions are kept too; calls do not find them.

    Raises OSError if the file cannot be read, and ValueError if it is damaged or of another format.
    """
    try:
        entries = parse(Path(file).read_text(encoding="utf-8"))
    except _DAMAGE as error:
        raise ValueError(f"file: {file} is not a file of timed choices: {type(error).__name__}: {error}") from error
    if not entries:
        raise ValueError(f"file: {file} has no choices in format {FORMAT}")
    if not entries.items() <= _memory.load().items():
        keep(entries)
    return entries


class Trial:
    """Choices that are tried out: between `begin` and `end_trials` they come before all others, in every thread.

    Every trial has a generation of its own, so that what depends on the choices is prepared once for each trial.
    """

    def __init__(self, entries: Mapping[str, str]) -> None:
        self.entries, self.generation = entries, next(_generations)

    def begin(self) -> None:
        """Let these choices come first."""
        _memory.trial, _memory.generation = self.entries, self.generation


def end_trials() -> None:
    """Let no trial be in effect."""
    _memory.trial, _memory.generation = {}, None


def forget() -> None:
    """Drop this process's copy: the next lookup reads the file again."""
    _memory.path, _memory.generation = None, None


def generation() -> int:
    """Another number after every change of this process's copy: a choice made before may be another now.

    0 if nothing was timed.
    """
    if _memory.generation is None:
        _memory.generation = next(_generations) if _memory.load() else 0
    return _memory.generation


def size() -> int:
    """Number of entries in the file, of all versions and GPUs."""
    return len(read(folder() / FILE))
