"""Conditions of a measurement: what was done for a fair comparison, and warnings about unreliable figures."""

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from convnext_kernels import environment
from convnext_kernels.backends.cpu import native
from convnext_kernels.bench.results import Run
from convnext_kernels.bench.timing import glibc, pinned, settle

BUSY = 0.1  # share of the machine's CPU time that others may use
STOLEN = 0.02  # share that the hypervisor may give to other machines
SLOW = 0.85  # share of its best speed that the machine must keep in nine of ten cases
PROBE_SECONDS = 0.01


class Course:
    """State of the machine while candidates were timed."""

    def __init__(self) -> None:
        self.total = self.others = self.stolen = 0.0  # CPU seconds: of all CPUs, of other processes, of the hypervisor
        self.speeds: list[float] = []  # FLOP/s of a fixed loop of multiply-adds, case by case

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the CPU time of other processes, subprocesses included, inside the context."""
        try:
            import psutil
        except ModuleNotFoundError:  # then `collect` says that the load is unknown
            yield
            return
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

    def probe(self) -> None:
        """Time the fixed loop; without the compiled extension nothing is measured."""
        if not native.import_error():
            settle()  # idle threads of another runtime may still be spinning
            rate = native.extension().arithmetic_rate("fma_fp32", torch.get_num_threads(), PROBE_SECONDS)
            self.speeds.append(rate / torch.get_num_threads())  # a case may set its own number of threads

    def summary(self) -> dict[str, float]:
        """Shares of CPU time of other processes and of the hypervisor, and the speed in the slowest cases."""
        found = {}
        if self.total:
            found |= {"others": self.others / self.total, "steal": self.stolen / self.total}
        if len(self.speeds) > 1:
            found["slowest"] = statistics.quantiles(self.speeds, n=10, method="inclusive")[0] / max(self.speeds)
        return found

    def warnings(self) -> list[str]:
        """A line for every disturbance that makes figures unreliable."""
        found = self.summary()
        others, stolen = found.get("others", 0), found.get("steal", 0)
        slowest = found.get("slowest", 1)
        disturbances = {
            f"during the run other processes used {others:.0%} of the CPU time": others > BUSY,
            f"during the run the hypervisor gave {stolen:.0%} of the CPU time to other machines": stolen > STOLEN,
            f"in a tenth of the cases the machine ran at {slowest:.0%} of its best speed or less (from a fixed loop of "
            "multiply-adds before each case)": slowest < SLOW,
        }
        return [line for line, true in disturbances.items() if true]


def clocks(device: str) -> dict[str, object]:
    """Clocks and their governor (CPU), or clocks, power limit and reasons for lower clocks (GPU), if they are shown."""
    if device == "cuda":
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,clocks_event_reasons.active"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            values = map(str.strip, printed.partition("\n")[0].split(","))
            return dict(zip(query.split(","), values, strict=False))
        return {}
    found: dict[str, object] = {}
    with suppress(ImportError, AttributeError, OSError):
        import psutil

        found["MHz"] = psutil.cpu_freq().current
    with suppress(OSError):
        found["governor"] = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    return found


def collect(device: str) -> dict[str, object]:
    """Threads, pinning, allocator and clocks, and "warnings": a line for every condition that disturbs the figures."""
    with pinned() as (cpus, why_not):
        pass
    idle = Course()
    with idle.watch():
        time.sleep(0.5)
    others, kept, found = idle.summary().get("others", 0.0), glibc() is not None, clocks(device)
    governor = found.get("governor", "performance")
    disturbances = {
        f"threads are not pinned: {why_not}": why_not and not why_not.startswith("left to"),
        "the C library is not glibc: page faults of large temporaries count, and slow eager down most": not kept,
        "the load of the machine is unknown: psutil is not installed (pip install psutil)": not idle.total,
        f"at the start other processes used {others:.0%} of the CPU time": others > BUSY,
        f"the governor of the CPU clock is {governor!r}, expected 'performance'": governor != "performance",
    }
    allocator = "glibc keeps freed memory (mallopt)" if kept else f"default of {platform.system()}"
    return {
        "threads": torch.get_num_threads(),
        "pinning": "each OpenMP thread on its own core while timed" if cpus else why_not,
        "allocator": "PyTorch's CUDA allocator" if device == "cuda" else allocator,
        "clocks": found,
        "course": {},
        "warnings": [line for line, true in disturbances.items() if true],
    }


def start(device: str, mode: str) -> Run:
    """A run without records and without ceilings: the machine and the conditions now."""
    machine = environment.collect() | {"commit": environment.commit()}
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Run(machine, collect(device), {}, device, mode, created)
