"""The block under the circumstances that threads meet, on this CPU.

    python benchmarks/cpu_threads.py [--dtype fp32|bf16] [--rounds 30]

Each circumstance runs in a process of its own, because OpenMP reads affinity and environment when it starts: 1 thread;
one for each CPU; twice as many threads as CPUs; one for each CPU beside a process that keeps one CPU busy; the default
on a single CPU (as under ``taskset``); one for each CPU with OpenMP's threads pinned. Prints the median (minimum) ms of
our block and of eager PyTorch, in turn, and ours relative to one thread for each CPU. Linux only.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context

import click
import torch

from convnext_kernels import use_backend
from convnext_kernels.bench import workloads
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.tables import Table
from convnext_kernels.bench.timing import interleave, steady_allocator
from convnext_kernels.cli import options

CASES = ((1, 96, 56), (1, 768, 7), (8, 384, 14))  # N, C, H = W
BUSY, PINNED = ", a busy neighbour", ", OpenMP pinned"


def measure(threads: int | None, dtype: str, rounds: int) -> list[dict]:
    """Time every case in this process: the `Times` of each candidate."""
    torch.set_num_threads(threads or torch.get_num_threads())
    found, form = [], {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    with steady_allocator(), use_backend("cpu"):
        for n, c, size in CASES:
            block = workloads.op("block", n, c, size, size, False)
            eager, ours, x = (each.to(**form) for each in (block.eager, block.ours, *block.inputs))
            calls = {"eager": partial(eager, x), "ours": partial(ours, x)}
            found.append(interleave(calls, rounds=rounds, bursts=True))
    return found


def run(name: str, cpus: set[int], threads: int | None, dtype: str, rounds: int) -> list[dict]:
    """Run `measure` in a new process that may use `cpus`, under the circumstance `name`."""
    before, one = os.sched_getaffinity(0), {min(cpus)}
    with ExitStack() as stack:
        if name.endswith(PINNED):
            os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, sorted(cpus)))
            stack.callback(os.environ.pop, "GOMP_CPU_AFFINITY")
        if name.endswith(BUSY):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            os.sched_setaffinity(neighbour.pid, one)
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        os.sched_setaffinity(0, cpus)  # the new process inherits it
        stack.callback(os.sched_setaffinity, 0, before)
        pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        return pool.submit(measure, threads, dtype, rounds).result()


@click.command()
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@options.count("--rounds", 30, "Rounds of each case.")
def main(dtype: str, rounds: int) -> None:
    """Time the block with few, all and too many threads, pinned, beside a neighbour, and on one CPU."""
    cpus = os.sched_getaffinity(0)
    number, one = len(cpus), {min(cpus)}
    all_threads = f"{number} threads"
    circumstances = {
        all_threads: (cpus, number),
        "1 thread": (cpus, 1),
        f"{2 * number} threads": (cpus, 2 * number),
        all_threads + BUSY: (cpus, number),
        "default, on one CPU": (one, None),
        all_threads + PINNED: (cpus, number),
    }
    found = {name: run(name, *how, dtype, rounds) for name, how in circumstances.items()}
    rows = []
    for name, times in found.items():
        cells = []
        for case, base in zip(times, found[all_threads], strict=True):
            ours, eager = (f"{case[who].median:.2f} ({case[who].minimum:.2f})" for who in ("ours", "eager"))
            cells.append(f"{ours} / {eager}; {case['ours'].median / base['ours'].median:.2f}")
        rows.append((name, *cells))
    print(f"{dtype}, {number} CPUs; ours / eager in ms, median (minimum); ours / ours with {all_threads}\n")
    print(Table("", ("", *(f"C {c}, batch {n}" for n, c, _ in CASES)), rows).markdown())


if __name__ == "__main__":
    main()
