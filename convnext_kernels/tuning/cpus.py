"""What a time depends on beside the call, on a CPU."""

import functools
import platform
from pathlib import Path


@functools.cache
def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def machine(isa: str, threads: int) -> str:
    """What timed choices are kept for: the processor, the instruction set in use and PyTorch's number of threads."""
    return f"{cpu_name()}, {isa}, {threads} threads"
