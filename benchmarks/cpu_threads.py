"""The block under the circumstances that threads meet, on this CPU.

    python benchmarks/cpu_threads.py [--dtype fp32|bf16] [--rounds 30]

Each circumstance runs in a process of its own, because OpenMP reads affinity and environment when it starts: 1 thread;
one for each CPU; twice as many threads as CPUs; one for each CPU beside a process that keeps one CPU busy; the default
on a single CPU (as under ``taskset``); one for each CPU with OpenMP's threads pinned. Prints the median (minimum) ms of
our block and of eager PyTorch, in turn, and ours relative to one thread for each CPU. Linux only.
"""

import json
import os
import subprocess
import sys

import click

CASES = ((1, 96, 56), (1, 768, 7), (8, 384, 14))  # N, C, H = W


def measure(threads: int | None, dtype: str, rounds: int) -> None:
    """Time every case in this process and print JSON."""
    import torch

    from convnext_kernels import use_backend
    from convnext_kernels.bench import workloads
    from convnext_kernels.bench.candidates import DTYPES
    from convnext_kernels.bench.timing import interleave, steady_allocator

    if threads is not None:
        torch.set_num_threads(threads)
    found, form = [], {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    with steady_allocator(), use_backend("cpu"):
        for n, c, size in CASES:
            block = workloads.op("block", n, c, size, size, False)
            eager, ours, x = (each.to(**form) for each in (block.eager, block.ours, *block.inputs))
            calls = {"eager": lambda m=eager, x=x: m(x), "ours": lambda m=ours, x=x: m(x)}
            times = interleave(calls, rounds=rounds, bursts=True)
            found.append({name: (t.median, t.minimum) for name, t in times.items()})
    print(json.dumps(found))


def run(threads: int | None, dtype: str, rounds: int, cpus: set[int], pinned: bool = False) -> list[dict]:
    """Run `measure` in a new process that may use `cpus`."""
    places = {"GOMP_CPU_AFFINITY": " ".join(map(str, sorted(cpus)))} if pinned else {}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([threads, dtype, rounds])],
        env=os.environ | places,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@click.command()
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Rounds of each case.")
@click.option("--child", hidden=True)
def main(dtype: str, rounds: int, child: str | None) -> None:
    """Time the block with few, all and too many threads, pinned, beside a neighbour, and on one CPU."""
    if child is not None:
        measure(*json.loads(child))
        return
    cpus = os.sched_getaffinity(0)
    number, one = len(cpus), {min(cpus)}
    circumstances = {
        f"{number} threads": (number, dtype, rounds, cpus),
        "1 thread": (1, dtype, rounds, cpus),
        f"{2 * number} threads": (2 * number, dtype, rounds, cpus),
        f"{number} threads, a busy neighbour": (number, dtype, rounds, cpus),
        "default, on one CPU": (None, dtype, rounds, one),
        f"{number} threads, OpenMP pinned": (number, dtype, rounds, cpus, True),
    }
    names = [f"C {c}, batch {n}" for n, c, _ in CASES]
    print(f"{dtype}, {number} CPUs; ours / eager in ms, median (minimum); ours / ours with {number} threads\n")
    print(f"| | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    first = None
    for name, arguments in circumstances.items():
        busy = None
        if name.endswith("neighbour"):
            loop = [sys.executable, "-c", "while True: pass"]
            busy = subprocess.Popen(loop, preexec_fn=lambda: os.sched_setaffinity(0, one))
        try:
            times = run(*arguments)
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
        first, cells = first or times, []
        for cell, base in zip(times, first, strict=True):
            ours, eager = ("{:.2f} ({:.2f})".format(*cell[who]) for who in ("ours", "eager"))
            cells.append(f"{ours} / {eager}; {cell['ours'][0] / base['ours'][0]:.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
