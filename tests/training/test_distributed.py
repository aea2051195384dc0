"""DistributedDataParallel and FSDP2 with two processes and gloo, against one process and the whole batch."""

import copy
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from convnext_kernels import FusedConvNeXtBlock, accelerate, restore, use_backend
from convnext_kernels.interop.block import BlockAdapter
from convnext_kernels.models import ConvNeXt
from tests.interop.helpers import fused_calls
from tests.tolerance import randomize_
from tests.training.pairs import MODELS, loss_of, pair, pictures

WORLD, STEPS, HANGS_AFTER = 2, 4, 180

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch was built without gloo", allow_module_level=True)


def _process(rank: int, tasks: Queue, answers: Queue) -> None:
    """Do what is asked for, each time in a group of its own, and answer with the traceback of what failed."""
    warnings.simplefilter("error")
    # PyTorch's own, of the default device of collectives on objects and of checkpoints without files.
    warnings.filterwarnings("ignore", "No device id is provided|.*is deprecated", module="torch")
    torch.set_num_threads(1)
    while task := tasks.get():
        folder, function, arguments = task
        try:
            rendezvous = f"file://{folder}/rendezvous"
            timeout = timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timeout)
            function(rank, *arguments)
            answers.put("")
        except BaseException:
            answers.put(f"process {rank}: {traceback.format_exc()}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Processes:
    """Two processes that wait for tasks: starting them takes longer than most tasks."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.tasks, self.answers = [context.Queue() for _ in range(WORLD)], context.Queue()
        self.processes = [
            context.Process(target=_process, args=(rank, self.tasks[rank], self.answers), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def run(self, folder: Path, function: Callable, arguments: tuple) -> None:
        task = (tempfile.mkdtemp(dir=folder), function, arguments)
        for tasks in self.tasks:
            tasks.put(task)
        deadline, missing = time.monotonic() + HANGS_AFTER, WORLD
        while missing:
            with suppress(queue.Empty):
                failure = self.answers.get(timeout=1)  # the first to fail tells why; the other may wait for it
                assert not failure, failure
                missing -= 1
            assert all(process.is_alive() for process in self.processes), "a process died"
            assert time.monotonic() < deadline, "the processes wait for each other"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Processes]]:
    """None until they are asked for, and anew where they failed."""
    running: list[Processes] = []
    yield running
    for each in running:
        each.end()


@pytest.fixture
def both(tmp_path: Path, processes: list[Processes]) -> Callable[..., None]:
    """Run a function in two processes of a group; fails as they fail, and where they hang."""

    def run(function: Callable, *arguments: Any) -> None:
        if not processes:
            processes.append(Processes())
        try:
            processes[0].run(tmp_path, function, arguments)
        except BaseException:
            processes.pop().end()
            raise

    return run


def _pair(name: str, memory: str) -> tuple[nn.Module, nn.Module]:
    """(the reference, ours): models of other libraries, or our own network with the eager backend as reference."""
    if name in MODELS:
        return pair(name, memory=memory)
    design = {"depths": (1, 2), "dims": (16, 32), "num_classes": 5, "use_grn": name == "V2"}
    return tuple(
        randomize_(ConvNeXt(**design, memory=memory, backend=backend)).train() for backend in ("eager", "auto")
    )


def _part(rank: int, step: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(this process's pictures, everybody's)."""
    x, y = pictures(batch=6, seed=step)
    return (x[rank::WORLD], y[rank::WORLD]), (x, y)


def _same_on_all(values: Tensor) -> None:
    gathered = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(gathered, values)
    assert torch.equal(gathered[0], gathered[1])


def _close(actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], tolerance: float) -> None:
    """Parameters after training, within `tolerance` of how far they went."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        way = (value - start[key]).abs().max().item()
        assert way > 0, f"{key} was not trained"
        error = (actual[key] - value).abs().max().item()
        assert error <= tolerance * way + 1e-6 * value.abs().max().item(), f"{key}: {error:.1e} off after {way:.1e}"


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def _ddp(rank: int, name: str, memory: str, options: dict, accumulate: int) -> None:
    plain, ours = _pair(name, memory)
    start = _state(plain)
    if rank == 1:  # rank 0's weights are everybody's
        for p in ours.parameters():
            p.data.mul_(1.5)
    ddp = DistributedDataParallel(ours, **options)
    theirs, optimizer = _optimizer(plain), _optimizer(ddp)
    for step in range(STEPS):
        theirs.zero_grad()
        optimizer.zero_grad()
        for part in range(accumulate):
            mine, whole = _part(rank, step * accumulate + part)
            (loss_of(plain, whole) / accumulate).backward()
            if part + 1 < accumulate:
                with ddp.no_sync():
                    (loss_of(ddp, mine) / accumulate).backward()
            else:
                (loss_of(ddp, mine) / accumulate).backward()
        theirs.step()
        optimizer.step()
        _same_on_all(nn.utils.parameters_to_vector(ours.parameters()).detach())
    assert fused_calls(lambda: loss_of(ddp, mine))["block"] > 1
    _close(_state(ours), _state(plain), start, 2e-3)


DDP = {
    "V1": ("V1", "auto", {}, 1),
    "V2, accumulated": ("V2", "min", {"gradient_as_bucket_view": True}, 3),
    "torchvision": ("torchvision", "balanced", {"static_graph": True}, 1),
    "timm V2": ("timm V2", "min", {"find_unused_parameters": True}, 1),
}


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
@pytest.mark.parametrize("case", DDP)
def test_distributed_data_parallel(both, case):
    both(_ddp, *DDP[case])


def _ddp_autocast(rank: int) -> None:
    plain, ours = _pair("V1", "auto")
    ddp = DistributedDataParallel(ours)
    mine, whole = _part(rank, 0)
    loss_of(plain, whole).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(ddp, mine)
    loss.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        _same_on_all(p.grad)
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert error < 0.1, f"{name}: {error:.1%}"


def test_distributed_data_parallel_under_autocast(both):
    both(_ddp_autocast)


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if module is not model and isinstance(module, (BlockAdapter, FusedConvNeXtBlock)):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _full(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def _mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return (total / WORLD).item()


def _fsdp(rank: int, name: str, memory: str, reshard: bool) -> None:
    plain, ours = _pair(name, memory)
    start, twin = _state(plain), copy.deepcopy(ours)
    sharded = _shard(ours, reshard_after_forward=reshard)
    assert any(p.to_local().numel() < p.numel() for p in sharded.parameters())
    theirs, optimizer = _optimizer(plain), _optimizer(sharded)
    for step in range(STEPS):
        mine, whole = _part(rank, step)
        theirs.zero_grad()
        optimizer.zero_grad()
        expected, loss = loss_of(plain, whole), loss_of(sharded, mine)
        assert abs(_mean(loss) - expected.item()) < 1e-3 * expected.item()
        expected.backward()
        loss.backward()
        theirs.step()
        optimizer.step()
    assert fused_calls(lambda: loss_of(sharded, mine))["block"] > 1
    trained = _full(sharded)
    _close(trained, _state(plain), start, 2e-3)
    # Out of the shards and back: an unsharded twin computes the same; the first weights come back into the shards.
    twin.load_state_dict(trained)
    torch.testing.assert_close(loss_of(sharded, mine), loss_of(twin, mine))
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # reshard=False leaves them whole, and what is whole takes no shards
    set_model_state_dict(sharded, dict(start), options=StateDictOptions(full_state_dict=True))
    twin.load_state_dict(start)
    torch.testing.assert_close(loss_of(sharded, mine), loss_of(twin, mine))


@pytest.mark.parametrize(
    ("name", "memory", "reshard"), [("V1", "auto", True), ("V2", "min", False), ("torchvision", "balanced", True)]
)
def test_fully_shard(both, name, memory, reshard):
    both(_fsdp, name, memory, reshard)


def _fsdp_mixed_precision(rank: int) -> None:
    plain, ours = _pair("V1", "auto")
    sharded = _shard(ours, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    mine, whole = _part(rank, 0)
    loss_of(plain, whole).backward()
    loss_of(sharded, mine).backward()
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
        assert error < 0.1, f"{name}: {error:.1%}"


def test_fully_shard_with_mixed_precision(both):
    both(_fsdp_mixed_precision)


def _one_element(rank: int) -> None:
    """What FSDP's all-gather does where the allocator gives it the same memory again: a write without a version."""
    block = randomize_(FusedConvNeXtBlock(64, kernel_size=3)).requires_grad_(False)
    x = torch.randn(1, 64, 4, 4)
    for index in (5, 1234, 2**12 + 7):
        block(x)
        version = block.pwconv1.weight._version
        with torch.autograd._unsafe_preserve_version_counter(block.pwconv1.weight):
            block.pwconv1.weight.view(-1)[index] += 3
        assert block.pwconv1.weight._version == version
        with use_backend("eager"):
            expected = block(x)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_follow_writes_without_a_version(both):
    both(_one_element)


def _accelerate_after_sharding(rank: int) -> None:
    """The other way round: sharded modules are replaced too, stay sharded, and go back to what they were."""
    plain, _ = pair("torchvision")
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(sharded.features[1][0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    before = type(sharded.features[1][0])
    accelerate(sharded)
    assert isinstance(sharded.features[1][0], BlockAdapter)
    assert isinstance(sharded.features[1][0], FSDPModule)
    assert isinstance(sharded.features[3][0], BlockAdapter)
    mine, whole = _part(rank, 0)
    assert fused_calls(lambda: loss_of(sharded, mine))["block"] == 3
    loss_of(plain, whole).backward()
    loss_of(sharded, mine).backward()
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"
    restore(sharded)
    assert type(sharded.features[1][0]) is before
    assert not fused_calls(lambda: loss_of(sharded, mine))


def test_accelerate_after_sharding(both):
    both(_accelerate_after_sharding)


def _division_by_zero(rank: int) -> None:
    rank / 0


def test_failures_of_the_processes_are_failures(both):
    """Last, for it ends them."""
    with pytest.raises(AssertionError, match=r"process [01]: (?s:.)*ZeroDivisionError"):
        both(_division_by_zero)
