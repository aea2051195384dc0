"""Whether this is a place to measure in: what was done for fairness, and what may spoil the figures."""

import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convnext_kernels.bench.timing import glibc, pinned, settle

BUSY = 0.1  # share of the machine's CPU time that others may use
STOLEN = 0.02  # share that the hypervisor may give to other machines
SLOW = 0.85  # of its best speed, below which the machine may not fall in more than a tenth of the cases
PROBE_SECONDS = 0.01


class Course:
    """What happened to the machine while candidates were timed."""

    def __init__(self) -> None:
        self.total = self.others = self.stolen = 0.0  # CPU seconds: of all CPUs, of other processes, of the hypervisor
        self.speeds: list[float] = []  # FLOP/s of a fixed loop of multiply-adds, case by case

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what others do inside. Subprocesses of this one count as others; none should run then."""
        import psutil

        before, own = psutil.cpu_times(), time.process_time()
        try:
            yield
        finally:
            after, own = psutil.cpu_times(), time.process_time() - own
            # Guests are part of user and nice; what a system does not know is absent.
            spent = {k: getattr(after, k) - getattr(before, k) for k in after._fields if not k.startswith("guest")}
            total, stolen = sum(spent.values()), spent.get("steal", 0.0)
            idle = spent["idle"] + spent.get("iowait", 0.0)
            self.total += total
            self.stolen += stolen
            self.others += max(0.0, total - idle - stolen - own)

    def probe(self) -> None:
        """Time the fixed loop, with the compiled extension only."""
        import torch

        from convnext_kernels.backends.cpu import native

        if not native.import_error():
            settle()  # another runtime's idle threads may still spin
            rate = native.extension().arithmetic_rate("fma_fp32", torch.get_num_threads(), PROBE_SECONDS)
            self.speeds.append(rate / torch.get_num_threads())  # cases may have numbers of their own

    def summary(self) -> dict[str, float]:
        """Shares of the CPU time for others and the hypervisor, and the speed of the slowest tenth of the cases."""
        found = {}
        if self.total:
            found |= {"others": self.others / self.total, "steal": self.stolen / self.total}
        if len(self.speeds) > 1:
            found["slowest"] = statistics.quantiles(self.speeds, n=10, method="inclusive")[0] / max(self.speeds)
        return found

    def warnings(self) -> list[str]:
        """A line for everything that spoils figures."""
        found, lines = self.summary(), []
        if found.get("others", 0) > BUSY:
            lines.append(f"during the run other processes used {found['others']:.0%} of the machine")
        if found.get("steal", 0) > STOLEN:
            lines.append(f"during the run the hypervisor gave {found['steal']:.0%} of the machine to others")
        if found.get("slowest", 1) < SLOW:
            lines.append(
                f"during the run the machine's own speed fell to {found['slowest']:.0%} of its best in a tenth of the "
                "cases (a fixed loop of multiply-adds before each)"
            )
        return lines


def _nvidia_smi() -> dict[str, str]:
    """Clocks, power limit and reasons for lower clocks, in nvidia-smi's own words; empty without it."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,clocks_event_reasons.active"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.splitlines()[0].split(",") if done.returncode == 0 and done.stdout else []
    return {name: value.strip() for name, value in zip(query.split(","), values, strict=False)}


def clocks(device: str) -> dict[str, object]:
    """Clocks and what governs them, as far as the system shows it."""
    if device == "cuda":
        return _nvidia_smi()
    import psutil

    found: dict[str, object] = {}
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    if frequency is not None:
        found["MHz"] = frequency.current
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        found["governor"] = governor.read_text().strip()
    return found


def collect(device: str) -> dict[str, object]:
    """Threads, pinning, allocator and clocks, and "warnings": a line for all that makes this a bad place."""
    import torch

    warnings = []
    with pinned() as (cpus, why_not):
        pass
    if why_not and not why_not.startswith("left to"):
        warnings.append(f"threads are not pinned: {why_not}")
    if glibc() is None:
        warnings.append("the C library is not glibc: page faults of large temporaries are counted, and hit eager most")
    idle = Course()
    with idle.watch():
        time.sleep(0.5)
    others = idle.others / idle.total if idle.total else 0.0
    if others > BUSY:
        warnings.append(f"at the start other processes used {others:.0%} of the machine")
    found = clocks(device)
    if found.get("governor", "performance") != "performance":
        warnings.append(f"the CPU's clock is governed by {found['governor']!r}, expected 'performance'")
    allocator = "glibc keeps freed memory (mallopt)" if glibc() else f"as {platform.system()} has it"
    return {
        "threads": torch.get_num_threads(),
        "pinned": cpus or None,
        "pinning": "each OpenMP thread on a core of its own while timed" if cpus else why_not,
        "allocator": "PyTorch's CUDA allocator" if device == "cuda" else allocator,
        "clocks": found,
        "course": {},
        "warnings": warnings,
    }
