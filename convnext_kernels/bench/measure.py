"""The measurement of a case: numerics of every candidate first, then times of those that were right."""

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convnext_kernels import planner
from convnext_kernels.bench import ceilings, workloads
from convnext_kernels.bench.candidates import CANDIDATES, DTYPES, Call, Candidate, Prepared, Step, quiet, tf32
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case
from convnext_kernels.bench.conditions import Course
from convnext_kernels.bench.numerics import PEER_SLACK, Judgement, judge, judge_eager, relative_errors
from convnext_kernels.bench.results import EAGER, FAILED, MODELS, OK, OURS, UNAVAILABLE, WRONG, Record, is_ours
from convnext_kernels.bench.timing import interleave, pinned, steady_allocator
from convnext_kernels.spec import OPS, BackendError, OpSpec

ROUNDS = {QUICK: 3, STANDARD: 5, FULL: 9}


def one_line(error: BaseException) -> str:
    """The message of an error as a line that fits a table."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{' '.join(text.split()):.300}"


def serving(case: Case, device: str) -> str:
    """The backends of this package that serve a case: of the forward and, where it is another, of the backward."""
    dtype = DTYPES[case.dtype]
    op = case.group if case.group in OPS else "block"
    hidden = 4 * case.channels if op in ("mlp", "block") else 0
    names = []
    for backward in {"forward": (False,), "training": (False, True)}.get(case.direction, (True,)):
        spec = OpSpec(op, device, dtype, dtype, case.channels, case.kernel_size, 1, hidden, case.grn, backward)
        try:
            names.append(planner.choose(spec).__name__.split(".")[2])
        except BackendError as error:
            names.append(one_line(error))
    return " + ".join(dict.fromkeys(names))


def _memory_missing(case: Case, device: str) -> str:
    """Why this machine is too small for `case`, or ""."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if case.memory <= free:
        return ""
    return f"needs about {case.memory / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def _nhwc(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def prepare(case: Case, device: str) -> tuple[Prepared, workloads.Workload]:
    """Build the modules and inputs of a case in its dtype, on `device`."""
    workload, dtype = case.build(), DTYPES[case.dtype]
    cast = [
        None if m is None else m.to(device, dtype).to(memory_format=torch.channels_last)
        for m in (workload.eager, workload.ours)
    ]
    inputs = tuple(_nhwc(x, device, dtype) for x in workload.inputs)
    return Prepared(case, cast[0], cast[1], inputs, device), workload


def results(call: Call) -> dict[str, Tensor]:
    """Outputs and, in training, gradients of one call, copied: candidates may reuse their memory."""
    with nullcontext() if isinstance(call, Step) else torch.inference_mode():
        y = call()
    found = y if isinstance(y, dict) else {"output": y}
    if isinstance(call, Step):
        found |= call.gradients()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def reference_results(prepared: Prepared) -> dict[str, Tensor]:
    """The same of an fp64 copy: the weights and inputs of the dtype exactly, so that only arithmetic differs."""
    module = workloads.reference(prepared.eager)
    inputs = tuple(x.double().contiguous() for x in prepared.inputs)
    return results(Step(module, inputs) if prepared.case.direction == "training" else lambda: module(*inputs))


def judge_beside(
    standard: dict[str, float] | None,
    errors: dict[str, float],
    dtype: torch.dtype,
    slack: float = 1,
    garbage: float | None = None,
) -> Judgement:
    """Judge `errors` by eager's; by the bound for garbage alone if there is no sound eager, or it is eager itself."""
    if standard and judge_eager(standard, dtype, garbage).within:
        return judge(standard, errors, dtype, slack)
    return judge_eager(errors, dtype, garbage)


def saved_bytes(step: Step) -> int:
    """Bytes kept between forward and backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in step.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step.forward()
    del y  # only now may a saved storage be freed, and its address be given to another one
    return sum(kept.values())


def launches(call: Call) -> int:
    """Kernels that one call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )


@dataclass
class Session:
    """What all cases of a run share."""

    device: str
    mode: str
    ceilings: dict[str, object]
    course: Course = field(default_factory=Course)
    candidates: tuple[Candidate, ...] = CANDIDATES
    garbage: float | None = None  # relative error from which eager is no standard; None: numerics.GARBAGE

    def wanted(self, case: Case) -> list[Candidate]:
        """The candidates that take part in a case, available or not."""
        return [c for c in self.candidates if c.wanted(case, self.mode) and (case.group != "rival" or c.name != OURS)]

    def measure(self, case: Case, on_step: Callable[[str], None] = lambda _: None) -> list[Record]:
        """Measure a case: a record for each candidate that takes part. Nothing that goes wrong in one is raised."""
        wanted = self.wanted(case)
        reason = _memory_missing(case, self.device)
        if reason:
            return [self._record(case, c.name, UNAVAILABLE, reason) for c in wanted]
        torch.backends.cudnn.benchmark = True
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(case.threads or threads)
            with tf32(case.dtype == "tf32"), steady_allocator():
                return self._measure(case, wanted, on_step)
        except Exception as error:  # building the case itself: a library missing, memory exhausted
            return [self._record(case, c.name, FAILED, one_line(error)) for c in wanted]
        finally:
            torch.set_num_threads(threads)
            if "torch._dynamo" in sys.modules:  # what was compiled for this case would slow the guards of the next
                torch._dynamo.reset()
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def prepare(self, case: Case) -> tuple[Prepared, workloads.Workload]:
        """Build what the candidates of a case start from."""
        return prepare(case, self.device)

    def reference(self, prepared: Prepared) -> dict[str, Tensor]:
        """What they are held against, in fp64."""
        return reference_results(prepared)

    def _record(self, case: Case, candidate: str, status: str, reason: str = "", **values: object) -> Record:
        return Record(
            case.name,
            case.group,
            case.what,
            case.batch,
            case.dtype,
            case.direction,
            candidate,
            status,
            reason,
            **values,
        )

    def _measure(self, case: Case, wanted: list[Candidate], on_step: Callable[[str], None]) -> list[Record]:
        on_step("fp64 reference")
        prepared, workload = self.prepare(case)
        reference = self.reference(prepared)
        records: dict[str, Record] = {}
        calls: dict[str, Call] = {}
        judged: dict[str, dict[str, object]] = {}
        standard: dict[str, float] = {}
        for candidate in wanted:
            on_step(candidate.name)
            name, missing = candidate.name, candidate.missing(prepared)
            if missing:
                records[name] = self._record(case, name, UNAVAILABLE, missing)
                continue
            try:
                call = candidate.build(prepared)
                errors = relative_errors(reference, results(call))
            except Exception as error:
                records[name] = self._record(case, name, FAILED, one_line(error))
                continue
            if name == EAGER:
                standard = errors
            slack = 1 if is_ours(name) else PEER_SLACK
            judgement = judge_beside(
                None if name == EAGER else standard, errors, DTYPES[case.dtype], slack, self.garbage
            )
            judged[name] = {"error": judgement.error, "allowed_error": judgement.allowed}
            if judgement.within:
                calls[name] = call
            else:
                reason = f"{judgement.tensor}: error {judgement.error:.2e}, allowed {judgement.allowed:.2e}"
                records[name] = self._record(case, name, WRONG, reason, **judged[name])
        times = self._time(case, calls, on_step)
        work = workload.work.training() if case.direction == "training" else workload.work
        element = DTYPES[case.dtype].itemsize
        for name, call in calls.items():
            median = times[name].median / 1e3
            # The ceilings are those of the run's threads.
            known = {} if case.threads else self.ceilings
            compute, memory = ceilings.shares(work, element, case.dtype, median, known)
            records[name] = self._record(
                case,
                name,
                OK,
                times=times[name],
                flops=work.flops,
                padding_flops=work.padding_flops,
                bytes=work.bytes(element),
                compute_share=compute,
                memory_share=memory,
                saved_bytes=saved_bytes(call) if isinstance(call, Step) else None,
                launches=launches(call) if self.device == "cuda" else None,
                backend=serving(case, self.device) if is_ours(name) else None,
                parameters=workload.work.parameters if case.group in MODELS else None,
                **judged[name],
            )
        return [records[candidate.name] for candidate in wanted]

    def _time(self, case: Case, calls: dict[str, Call], on_step: Callable[[str], None]) -> dict[str, object]:
        on_step("timing")
        if not calls:
            return {}
        self.course.probe()
        training = case.direction == "training"
        with quiet(), self.course.watch():
            for call in calls.values():  # other runtimes start their threads here, before ours are pinned
                with torch.enable_grad() if training else torch.inference_mode():
                    call()
            with pinned() if self.device == "cpu" else nullcontext():
                return interleave(
                    calls,
                    rounds=ROUNDS[self.mode],
                    bursts=True,
                    training=training,
                    device=self.device,
                )
