"""The measurement of a case: check every candidate, then time those with right results."""

import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from convnext_kernels.bench import workloads
from convnext_kernels.bench.candidates import CANDIDATES, DTYPES, Call, Candidate, Prepared, quiet, tf32
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case
from convnext_kernels.bench.ceilings import Work, count
from convnext_kernels.bench.conditions import Course
from convnext_kernels.bench.numerics import PEER_SLACK, judge
from convnext_kernels.bench.results import (
    EAGER,
    FAILED,
    OK,
    UNAVAILABLE,
    WRONG,
    Record,
    Unavailable,
    is_ours,
)
from convnext_kernels.bench.tables import one_line
from convnext_kernels.bench.timing import Times, glibc, interleave, pinned, steady_allocator
from convnext_kernels.bench.workloads import Step
from convnext_kernels.spec import BackendError

ROUNDS = {QUICK: 3, STANDARD: 5, FULL: 9}


def prepare(case: Case, device: str) -> Prepared:
    """Build the modules and inputs of a case in its dtype, on `device`."""
    workload = case.build()
    dtype = torch.float32 if workload.autocast else DTYPES[case.dtype]
    layout = workload.channels_last
    eager, ours = (
        None if m is None else m.to(device, dtype).to(memory_format=layout) for m in (workload.eager, workload.ours)
    )
    inputs = tuple(
        x.to(device, dtype).contiguous(memory_format=layout) if x.is_floating_point() else x.to(device)
        for x in workload.inputs
    )
    moved = {"eager": eager, "ours": ours, "inputs": inputs}
    return Prepared(**vars(workload) | moved, case=case, device=device)


def results(call: Call) -> dict[str, Tensor]:
    """Outputs and, in training, gradients of one call, copied: candidates may reuse their memory."""
    with nullcontext() if isinstance(call, Step) else torch.inference_mode():
        y = call()
    found = y if isinstance(y, dict) else {"output": y}
    if isinstance(call, Step):
        found |= call.gradients()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def reference_results(prepared: Prepared) -> dict[str, Tensor]:
    """Results of an fp64 copy with exactly the weights and inputs of the dtype, so that only the arithmetic differs."""
    module = workloads.reference(prepared.eager)
    inputs = tuple(x.double().contiguous() if x.is_floating_point() else x for x in prepared.inputs)
    return results(prepared.call(module, inputs))


def saved_bytes(step: Step) -> int:
    """Bytes kept between forward and backward; each storage counts once, parameters do not count."""
    parameters = {p.untyped_storage().data_ptr() for p in step.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step.forward()
    del y  # not earlier: a freed storage's address may be used again and be missed in the count
    return sum(kept.values())


def peak_growth(call: Callable[[], object], device: str) -> int | None:
    """Bytes by which the memory of this process grows while `call` runs: on a GPU, what PyTorch's allocator holds.

    On a CPU it is the resident memory, after freed memory was returned to the system; None on others than Linux.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    gc.collect()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)
    reset.write_text("5")  # the peak begins at what is resident now
    now, _ = _resident(status)
    call()
    return _resident(status)[1] - now


def _resident(status: Path) -> tuple[int, int]:
    """Bytes that are resident now, and the most since the peak was reset."""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status.read_text(), re.MULTILINE))
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a candidate that raised."""
    if isinstance(error, Unavailable | BackendError | torch.OutOfMemoryError):
        return UNAVAILABLE, one_line(error)
    return FAILED, f"{type(error).__name__}: {one_line(error)}"


def record_of(case: Case) -> Callable[..., Record]:
    """Return `Record` with the fields of `case` filled in; the candidate and the fields after it are left."""
    return partial(Record, case.name, case.group, case.what, case.batch, case.dtype, case.direction)


@dataclass
class Session:
    """The settings that all cases of a run share, and the case that is open."""

    device: str
    mode: str
    course: Course = field(default_factory=Course)
    candidates: tuple[Candidate, ...] = CANDIDATES
    opened: "Opened | None" = None
    settings: ExitStack = field(default_factory=ExitStack)  # of the open case

    def wanted(self, case: Case) -> list[Candidate]:
        """The candidates of a case, available or not."""
        return [candidate for candidate in self.candidates if candidate.wanted(case, self.mode)]

    def measure(self, case: Case, on_step: Callable[[str], None] = lambda _: None, timed: bool = True) -> list[Record]:
        """Check a case and time it; returns a record for each candidate, in which errors are recorded, not raised."""
        names = [candidate.name for candidate in self.wanted(case)]
        try:
            on_step("fp64 reference")
            opened = self.open(case)
            for name in names:
                on_step(name)
                opened.check(name)
            if timed:
                on_step("timing")
                opened.time()
            return [opened.records[name] for name in names]
        except Exception as error:  # the case itself cannot be built: a missing library, too little memory
            return [record_of(case)(name, *failure(error)) for name in names]
        finally:
            self.close()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Pin the threads and watch the machine inside; other runtimes must have started their threads before."""
        gc.collect()  # what earlier cases left
        with pinned() if self.device == "cpu" else nullcontext(), self.course.watch():
            yield

    def open(self, case: Case) -> "Opened":
        """Build a case, with the settings that all of its candidates share, or return it if it is open already."""
        if self.opened is None or self.opened.case != case:
            self.close()
            torch.backends.cudnn.benchmark = True
            self.settings.enter_context(tf32(case.dtype == "tf32"))
            self.settings.enter_context(steady_allocator())
            self.opened = Opened(self, case)
        return self.opened

    def close(self) -> None:
        """Close the case that is open."""
        self.opened = None
        self.settings.close()
        if "torch._dynamo" in sys.modules:  # the guards of what was compiled for this case would slow down the next
            torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class Opened:
    """A case whose modules are built: checks candidates by name, and takes the times of those with right results."""

    def __init__(self, session: Session, case: Case) -> None:
        self.session, self.case = session, case
        self.records: dict[str, Record] = {}
        self.calls: dict[str, Call] = {}  # of candidates with right results
        self.prepared = prepare(case, session.device)
        self.reference = reference_results(self.prepared)
        self._candidates = {candidate.name: candidate for candidate in session.wanted(case)}
        self._standard: dict[str, Tensor] | None = None  # eager's results, if they are right

    @cached_property
    def _work(self) -> Work:
        work = count(self.prepared.eager, self.prepared.inputs)
        return work.training() if self.case.trains else work

    def check(self, name: str) -> Record:
        """Build a candidate and check its results, after those of eager."""
        if name != EAGER and EAGER in self._candidates:
            self.check(EAGER)
        if name not in self.records:
            self.records[name] = self._check(self._candidates[name])
        return self.records[name]

    def _check(self, candidate: Candidate) -> Record:
        name, record = candidate.name, partial(record_of(self.case), candidate.name)
        dtype, slack = DTYPES[self.case.dtype], 1 if is_ours(name) else PEER_SLACK
        try:
            call = candidate.build(self.prepared)
            found = results(call)
            judged = self.reference, self._standard, found, dtype
            judgement = judge(*judged, slack=slack, garbage=self.prepared.garbage)
        except Exception as error:
            return record(*failure(error))
        if judgement.within:
            self.calls[name] = call
            if name == EAGER:
                self._standard = found
        status = OK if judgement.within else WRONG
        return record(status, judgement.reason, error=judgement.error, allowed_error=judgement.allowed)

    def time(self, *names: str) -> None:
        """Time the candidates `names`, or all with right results, in turn."""
        session = self.session
        calls = {name: self.calls[name] for name in names or self.calls}
        if calls:
            form = {"rounds": ROUNDS[session.mode], "bursts": True, "training": self.case.trains}
            with quiet(), session.timing():
                times = interleave(calls, device=session.device, **form)
            for name in calls:
                self.add_times(name, times[name])

    def add_times(self, name: str, times: Times) -> Record:
        """Add times to the record of a candidate, and everything computed from them."""
        call, work, element = self.calls[name], self._work, DTYPES[self.case.dtype].itemsize
        self.records[name] = replace(
            self.records[name],
            times=times,
            flops=work.flops,
            vector_flops=work.vector_flops,
            bytes=work.bytes(element),
            saved_bytes=saved_bytes(call) if isinstance(call, Step) else None,
        )
        return self.records[name]
