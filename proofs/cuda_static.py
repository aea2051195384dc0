"""Report registers, stack, spills and instructions of the compiled kernels of the CUDA extension. Nothing is run.

    python proofs/cuda_static.py [FILE] [--check | --update]

FILE is an extension _native_cuda*.so; the default is the installed one. Prints the table of docs/.

--update writes records/cuda_kernels.json (every instance) and records/cuda_kernels.md.

--check fails if kernels or architectures differ from the record, if a kernel has spills or a stack, and if it lost its
tensor cores. If the toolkit is that of the record, it also reports changed numbers of
registers.
"""

import collections
import ctypes
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import click
import cubin
from checkout import RECORDS
from cubin import span
from figures import table

RECORD = RECORDS / "cuda_kernels.json"
PAGE = RECORDS / "cuda_kernels.md"
_TYPES = {"BFloat16": "bf16", "Float16": "fp16", "float": "fp32"}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Spills are the bytes per thread of the spill instructions, each counted once."""

    kernel: str  # with its template arguments
    arch: int
    registers: int
    stack: int  # bytes of a thread
    spill_stores: int
    spill_loads: int
    tensor: dict[str, int]  # opcodes on tensor cores

    @property
    def key(self) -> str:
        return f"{self.kernel} sm_{self.arch}"

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


VALUES = tuple(field.name for field in fields(Row))[2:]


def short(symbol: str) -> str:
    """Return a kernel's mangled name as "dwconv_kernel<bf16, 7>"."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    address = demangle(symbol.encode(), None, None, None)
    if not address:
        return symbol
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    # In "void cnk::cuda::kernel<cnk::BFloat16, 7>(cnk::cuda::Params)" the last parentheses are the parameters.
    text = re.sub(r"\([^()]*\)$", "", text.replace("(anonymous namespace)::", ""))
    text = re.sub(r"^void |\b(?:cnk|cuda)::", "", text)
    return re.sub(r"\b(" + "|".join(_TYPES) + r")\b", lambda match: _TYPES[match[1]], text)


def rows_of(file: Path, arch: int) -> Iterator[Row]:
    """Yield the kernels of one cubin."""
    used = cubin.usage(file, arch)
    for symbol, text in cubin.sass(file).items():
        if symbol not in used:
            continue  # a function that kernels call, not a kernel
        opcodes = cubin.opcodes(text)
        yield Row(
            short(symbol),
            arch,
            used[symbol].registers,
            used[symbol].stack,
            cubin.moved(opcodes, "STL"),
            cubin.moved(opcodes, "LDL"),
            cubin.tensor(opcodes),
        )


def read_extension(file: Path) -> dict[str, Row]:
    """Return every kernel of an extension by key."""
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin.run_tool("cuobjdump", "-xelf", "all", file.resolve(), folder=Path(folder))
        for extracted in sorted(Path(folder).glob("*.cubin")):
            arch = int(re.search(r"\.sm_(\d+)[af]?\.cubin$", extracted.name)[1])
            for row in rows_of(extracted, arch):
                if row.key in rows:
                    raise RuntimeError(f"{file.name} has {row.key} twice")
                rows[row.key] = row
    if not rows:
        raise RuntimeError(f"{file} has no kernels for a GPU")
    return dict(sorted(rows.items()))


def toolkit_of(file: Path) -> str:
    """Return the CUDA version that an extension was compiled with."""
    spec = importlib.util.spec_from_file_location(file.name.partition(".")[0], file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TOOLKIT


def installed() -> Path | None:
    """Return the extension of the installed package, or None."""
    spec = importlib.util.find_spec("convnext_kernels")
    folders = spec.submodule_search_locations if spec else ()
    return next((file for folder in folders for file in Path(folder).glob("_native_cuda.*")), None)


@dataclass(frozen=True)
class Record:
    """The content of records/cuda_kernels.json."""

    toolkit: str
    rows: dict[str, Row]


def read(file: Path) -> Record | None:
    """Return the record, or None."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        Row(kernel, int(arch), **dict(zip(content["values"], values, strict=True)))
        for kernel, compiled in content["kernels"].items()
        for arch, values in compiled.items()
    ]
    return Record(content["toolkit"], {row.key: row for row in sorted(rows, key=lambda row: row.key)})


def write(record: Record) -> None:
    """Write the record, one instance per line, and the page."""
    kernels: dict[str, dict[str, tuple]] = collections.defaultdict(dict)
    for row in sorted(record.rows.values(), key=lambda row: (row.kernel, row.arch)):
        kernels[row.kernel][str(row.arch)] = astuple(row)[2:]
    lines = [f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in kernels.items()]
    head = json.dumps({"toolkit": record.toolkit, "values": VALUES})[:-1]
    RECORD.write_text(head + ', "kernels": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def page(record: Record) -> str:
    """Return the text of records/cuda_kernels.md: registers by kernel and architecture, ranges over its instances."""
    rows = record.rows.values()
    archs = sorted({row.arch for row in rows})
    count = sum(bool(row.spills or row.stack) for row in rows)
    header = ("kernel", "instances", *(f"sm_{arch}" for arch in archs), "spills")
    lines = [
        "# CUDA kernels, compiled",
        "",
        f"Written by `python proofs/cuda_static.py --update` from the machine code of nvcc {record.toolkit}:",
        "registers of a thread, ranges over the instances of a kernel (dtypes, sizes); spills in bytes of a thread.",
        f"{len(rows)} compiled kernels, {count} of them with spills or a stack.",
        "",
    ]
    kernels = []
    for name, members in grouped(rows).items():
        by_arch = grouped(members, "arch")
        registers = (span(row.registers for row in by_arch[arch]) if arch in by_arch else "-" for arch in archs)
        instances = str(len({row.kernel for row in members}))
        kernels.append((name, instances, *registers, span(row.spills for row in members)))
    return "\n".join(lines + table(header, kernels)) + "\n"


def grouped(rows: Iterable[Row], by: str = "name") -> dict[str | int, list[Row]]:
    """Group rows by architecture, or by the name of the kernel without its template arguments."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.arch if by == "arch" else row.kernel.partition("<")[0]].append(row)
    return dict(sorted(groups.items()))


def spilling(rows: dict[str, Row]) -> list[str]:
    """Return the kernels with spills or a stack."""
    return [
        f"{row.key}: {row.stack} bytes of stack, spills of {row.spill_stores} + {row.spill_loads} bytes"
        for row in rows.values()
        if row.stack or row.spills
    ]


def check(rows: dict[str, Row], toolkit: str, recorded: Record) -> tuple[list[str], list[str]]:
    """Return the failures, and lines about what was checked."""
    failures = spilling(rows)
    failures += [f"{key}: not in the record" for key in rows if key not in recorded.rows]
    failures += [f"{key}: in the record, but not in the extension" for key in recorded.rows if key not in rows]
    both = [(rows[key], recorded.rows[key]) for key in rows if key in recorded.rows]
    for now, then in both:
        if then.tensor and not now.tensor:
            failures.append(f"{now.key}: no tensor-core instruction, recorded {', '.join(then.tensor)}")
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row.arch for row in rows.values()}))
    said = [f"the same kernels as recorded, no spills, no stack, tensor cores: {len(rows)} kernels on {archs}"]
    if toolkit == recorded.toolkit:
        changed = [
            f"{now.key}: {now.registers} registers, recorded {then.registers}"
            for now, then in both
            if now.registers != then.registers
        ]
        said += changed  # not a failure, but should be recorded; only spills fail
        said.append(f"registers as recorded: {len(both) - len(changed)} of {len(both)} kernels")
    else:
        said.append(f"registers not compared: compiled by CUDA {toolkit}, recorded from {recorded.toolkit}")
    return failures, said


@click.command(help=__doc__.splitlines()[0])
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--check", "checking", is_flag=True, help="Fail if kernels differ from the record or spill.")
@click.option("--update", is_flag=True, help="Write records/cuda_kernels.json and records/cuda_kernels.md.")
def main(file: Path | None, checking: bool, update: bool) -> None:
    """Read, print, and check or record."""
    if update and checking:
        raise click.UsageError("--update cannot be combined with --check")
    file = file or installed()
    if file is None:
        raise click.UsageError("the installed package has no CUDA extension: build it with CNK_CUDA=1 or pass a FILE")
    try:
        rows, toolkit = read_extension(file), toolkit_of(file)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(page(Record(toolkit, rows)), nl=False)
    failures, said = spilling(rows), [f"no spills, no stack: {len(rows)} kernels"]
    if checking:
        recorded = read(RECORD)
        if recorded is None:
            raise click.UsageError(f"{RECORD} does not exist: write it with --update")
        failures, said = check(rows, toolkit, recorded)
    if update and failures:
        click.echo("the record was not written, because of failures", err=True)
    elif update:
        write(Record(toolkit, rows))
    for line in failures:
        click.echo(f"wrong: {line}", err=True)
    for line in said:
        click.echo(f"checked: {line}")
    click.echo(f"{file.name} (CUDA {toolkit}): {len(failures)} failures; nothing was run.")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
