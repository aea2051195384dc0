"""The changes of mutations.py: a table for each subject. Every old text must be exactly once in its file."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

SUBJECTS = ("cuda", "cpu", "triton", "python")


@dataclass(frozen=True)
class Mutant:
    """One change, and the tests that must fail with it."""

    name: str
    old: str
    new: str
    proof: str = ""  # how it is built and run: a name of mutations.PROOFS
    quick: bool = False
    file: str = ""  # from the root of the repository
    tests: tuple[str, ...] = ()  # pytest's arguments


def within(file: str, tests: tuple[str, ...], proof: str, *mutants: Mutant) -> Iterator[Mutant]:
    """Yield mutants of one file, with `tests` and `proof` for those that have none."""
    yield from (replace(m, file=file, tests=m.tests or tests, proof=m.proof or proof) for m in mutants)


def parity(expression: str) -> tuple[str, ...]:
    """Return pytest's arguments for the parity tests of some ops, backends or cases."""
    return "tests/ops/test_parity.py", "-k", expression


def table(subject: str) -> list[Mutant]:
    """Return all mutants of a subject."""
    return importlib.import_module(f"mutants.{subject}").MUTANTS
