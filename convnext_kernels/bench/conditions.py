"""Conditions of a measurement: what was done for a fair comparison, and warnings about unreliable figures."""

import datetime
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from convnext_kernels import environment
from convnext_kernels.bench.results import Run
from convnext_kernels.bench.timing import glibc, pinned

BUSY = 0.1  # share of the machine's CPU time that others may use
PSUTIL = importlib.util.find_spec("psutil") is not None
STOLEN = 0.02  # share that the hypervisor may give to other machines


class Course:
    """State of the machine while candidates were timed: CPU seconds of all CPUs, of other processes, of other machines.

    Nothing is known without psutil.
    """

    def __init__(self) -> None:
        self.total = self.others = self.stolen = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count inside the context; subprocesses are other processes."""
        if not PSUTIL:
            yield
            return
        import psutil

        before, own = psutil.cpu_times(), time.process_time()
        try:
            yield
        finally:
            after, own = psutil.cpu_times(), time.process_time() - own
            # Times of guests are part of user and nice. A system may lack some of the fields.
            spent = {k: getattr(after, k) - getattr(before, k) for k in after._fields if not k.startswith("guest")}
            total, stolen = sum(spent.values()), spent.get("steal", 0.0)
            idle = spent["idle"] + spent.get("iowait", 0.0)
            self.total += total
            self.stolen += stolen
            self.others += max(0.0, total - idle - stolen - own)

    def shares(self) -> dict[str, float]:
        """Shares of the CPU time: of other processes, and what the hypervisor gave to other machines."""
        return {"others": self.others / self.total, "steal": self.stolen / self.total} if self.total else {}

    def warnings(self) -> list[str]:
        """A line for every disturbance that makes figures unreliable."""
        found = self.shares()
        others, stolen = found.get("others", 0), found.get("steal", 0)
        disturbances = {
            f"during the run other processes used {others:.0%} of the CPU time": others > BUSY,
            f"during the run the hypervisor gave {stolen:.0%} of the CPU time to other machines": stolen > STOLEN,
        }
        return [line for line, true in disturbances.items() if true]


def start(device: str, mode: str) -> Run:
    """A run without records and without ceilings: the machine and the conditions now.

    Conditions: threads and pinning, and "warnings": a line for each that disturbs the figures.
    """
    with pinned() as (cpus, why_not):
        pass
    disturbances = {
        f"threads are not pinned: {why_not}": why_not and not why_not.startswith("left to"),
        "the load of the machine is unknown: psutil is not installed (pip install psutil)": not PSUTIL,
        "the C library is not glibc: page faults of large temporaries count, and slow eager down most": not glibc(),
    }
    conditions = {
        "threads": torch.get_num_threads(),
        "pinning": "each OpenMP thread on its own core while timed" if cpus else why_not,
        "warnings": [line for line, true in disturbances.items() if true],
    }
    machine = environment.collect() | {"commit": environment.commit()}
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Run(machine, conditions, {}, device, mode, created)
