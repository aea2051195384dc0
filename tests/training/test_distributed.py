"""DistributedDataParallel and FSDP2 with two processes and gloo, against one process and the whole batch."""

import copy
import warnings
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from convnext_kernels import FusedConvNeXtBlock, accelerate, restore
from convnext_kernels.interop.block import BlockAdapter
from convnext_kernels.models import ConvNeXt
from tests.interop.helpers import fused_calls
from tests.tolerance import randomize_
from tests.training.pairs import MODELS, loss_of, pair, pictures

WORLD, STEPS = 2, 2

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch was built without gloo", allow_module_level=True)


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


def _same_gradients(sharded: nn.Module, plain: nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


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
            with ddp.no_sync() if part + 1 < accumulate else nullcontext():
                (loss_of(ddp, mine) / accumulate).backward()
        theirs.step()
        optimizer.step()
        _same_on_all(nn.utils.parameters_to_vector(ours.parameters()).detach())
    assert fused_calls(lambda: loss_of(ddp, mine))["block"] > 1
    _close(_state(ours), _state(plain), start, 2e-3)


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if module is not model and isinstance(module, (BlockAdapter, FusedConvNeXtBlock)):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


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
        loss_of(plain, whole).backward()
        loss_of(sharded, mine).backward()
        theirs.step()
        optimizer.step()
    assert fused_calls(lambda: loss_of(sharded, mine))["block"] > 1
    full = StateDictOptions(full_state_dict=True)
    _close(get_model_state_dict(sharded, options=full), _state(plain), start, 2e-3)
    # The first weights come back into the shards.
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # reshard=False leaves them whole, and what is whole takes no shards
    set_model_state_dict(sharded, dict(start), options=full)
    twin.load_state_dict(start)
    torch.testing.assert_close(loss_of(sharded, mine), loss_of(twin, mine))


def _fsdp_mixed_precision(rank: int) -> None:
    plain, ours = _pair("V1", "auto")
    sharded = _shard(ours, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    mine, whole = _part(rank, 0)
    loss_of(plain, whole).backward()
    loss_of(sharded, mine).backward()
    assert all(p.grad.dtype == torch.float32 for p in sharded.parameters())
    _same_gradients(sharded, plain, 0.1)


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
    assert fused_calls(lambda: loss_of(sharded, mine))["block"] == 4
    loss_of(plain, whole).backward()
    loss_of(sharded, mine).backward()
    _same_gradients(sharded, plain, 1e-4)
    restore(sharded)
    assert type(sharded.features[1][0]) is before
    assert not fused_calls(lambda: loss_of(sharded, mine))


CHECKS = (
    (_ddp, ("V2", "min", {"gradient_as_bucket_view": True}, 3)),
    (_ddp, ("torchvision", "balanced", {"static_graph": True}, 1)),
    (_fsdp, ("V1", "auto", True)),
    (_fsdp, ("V2", "min", False)),
    (_fsdp_mixed_precision, ()),
    (_accelerate_after_sharding, ()),
)


def _process(rank: int, folder: str) -> None:
    """All checks in one pair of processes: starting them takes longer than most checks."""
    warnings.simplefilter("error")
    # PyTorch's own, of the default device of collectives on objects and of checkpoints without files.
    warnings.filterwarnings("ignore", "No device id is provided|.*is deprecated", module="torch")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timeout
    )
    for check, arguments in CHECKS:
        check(rank, *arguments)
    dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path):
    """A failure shows the traceback of the process and, in it, the check."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=WORLD)
