"""Weights may change between two calls in many ways; a backend that keeps packed weights must see every one.

After each change the block must give, bit for bit, what a fresh block with the same weights gives.
"""

import copy
import functools
import gc

import pytest
import torch
from torch.autograd.forward_ad import dual_level
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels import (
    DepthwiseConv2d,
    FusedConvNeXtBlock,
    GlobalResponseNorm,
    LayerNorm2d,
    calls,
    list_backends,
    use_backend,
)
from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.mlp_native import timed_phases
from convnext_kernels.nn import FusedSequential, PatchDownsample2d
from convnext_kernels.tuning import forced
from tests.operators import OPERATORS, gradients
from tests.shapes import TRITON, Case, chosen
from tests.tolerance import randomize_

DIM = 24
PARAMETERS = {
    use_grn: [name for name, _ in FusedConvNeXtBlock(1, use_grn=use_grn).named_parameters()]
    for use_grn in (False, True)
}
ROWS = [(use_grn, name) for use_grn, names in PARAMETERS.items() for name in names]


def in_place(p):
    with torch.no_grad():
        p.mul_(-1.5)


def one_element_in_place(p):
    with torch.no_grad():
        p.view(-1)[-1] += 3


def data_swap(p):
    p.data = p.data * -1.5


def data_mul(p):
    """In place through .data, or through memory that NumPy shares: PyTorch's version counter does not move."""
    p.data.mul_(-1.5)


def one_element_of_data(p):
    """What FSDP's all-gather does where the allocator gives it the same memory again."""
    p.data.view(-1)[-1] += 3


def new_parameter(p):
    return torch.nn.Parameter(p.detach() * -1.5)


CHANGES = [in_place, one_element_in_place, data_swap, data_mul, one_element_of_data, new_parameter]


def fresh(block):
    """The same weights at other addresses, never seen by any cache."""
    clone = copy.deepcopy(block)
    options = {"kernel_size": block.dwconv.kernel_size[0], "use_grn": block.grn is not None, "backend": block.backend}
    other = FusedConvNeXtBlock(DIM, **options, dtype=block.norm.weight.dtype)
    other.load_state_dict(clone.state_dict())
    return other


def everyday(use_grn, name, change, dtype, backend):
    """Every change of every parameter where weights are packed, on the CPU; elsewhere each of them once."""
    row, number = ROWS.index((use_grn, name)), CHANGES.index(change)
    once = row % len(CHANGES) == number and backend != TRITON
    return (backend[0] == "cpu" or once) and dtype == (torch.float32, torch.bfloat16)[row % 2]


not_interpreted = chosen(lambda backend: backend != TRITON)  # tens of calls, and Triton's backend packs nothing


@chosen(everyday)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("use_grn", "name"), ROWS)
def test_change_of_one_parameter(use_grn, name, change, dtype, backend):
    block = randomize_(FusedConvNeXtBlock(DIM, use_grn=use_grn, kernel_size=3, backend=backend, dtype=dtype))
    x = torch.randn(2, DIM, 7, 6).to(dtype, memory_format=torch.channels_last)  # what the CPU's extension repeats
    with torch.no_grad():
        before = block(x)
        assert torch.equal(block(x), before)
    if (other := change(block.get_parameter(name))) is not None:
        path, _, last = name.rpartition(".")
        setattr(block.get_submodule(path), last, other)
    with torch.no_grad():
        after, expected = block(x), fresh(block)(x)
    assert not torch.equal(expected, before), "the change does not show, so the test sees nothing"
    assert torch.equal(after, expected), f"{name}: stale after {change.__name__}"


@not_interpreted
@pytest.mark.parametrize("name", ["pwconv1.weight", "pwconv2.weight", "dwconv.weight"])
def test_single_elements_of_large_matrices(name, backend):
    """Too large for a checksum of samples: the version counter tells."""
    with torch.no_grad():
        block = randomize_(FusedConvNeXtBlock(256, backend=backend))
        x = torch.randn(1, 256, 3, 3).to(memory_format=torch.channels_last)  # what the CPU's extension repeats
        p = block.get_parameter(name)
        for i in range(0, p.numel(), p.numel() // 13 + 1):
            block(x)
            p.view(-1)[i] += 100
            other = FusedConvNeXtBlock(256, backend=backend)
            other.load_state_dict(block.state_dict())
            assert torch.equal(block(x), other(x)), f"{name}: stale after a write to element {i}"


@not_interpreted
def test_reused_addresses(backend):
    """Blocks come and go; the allocator and `id` give the next one the places of the last."""
    x = torch.randn(1, DIM, 5, 5)
    seen = set()
    reused = 0
    for seed in range(50):
        block = randomize_(FusedConvNeXtBlock(DIM, kernel_size=3, backend=backend), seed)
        address = (id(block.pwconv1.weight), block.pwconv1.weight.data_ptr())
        reused += address in seen
        seen.add(address)
        with torch.no_grad():
            y = block(x)
            with use_backend("eager"):
                block.backend = "auto"
                assert_close(y, block(x), rtol=1e-4, atol=1e-4)
        del block
    assert reused, "no address came twice, so the test saw nothing"


@not_interpreted
def test_parameters_of_inference_mode(backend):
    """Inference tensors have no version counter at all: the samples tell."""
    with torch.inference_mode():
        block = randomize_(FusedConvNeXtBlock(DIM, backend=backend))
        x = torch.randn(2, DIM, 7, 6)
        before = block(x)
        for name in PARAMETERS[False]:
            block.get_parameter(name).mul_(-1.5)
            after = block(x)
            assert not torch.equal(after, before), name
            assert torch.equal(after, fresh(block)(x)), f"{name}: stale in inference mode"
            before = after


@not_interpreted
def test_layers(backend):
    """The single layers too, where a backend packs their weights, and several blocks in one call."""
    x = torch.randn(2, DIM, 7, 6).to(memory_format=torch.channels_last)  # what the CPU's extension repeats
    modules = [layer(DIM, backend=backend) for layer in (DepthwiseConv2d, LayerNorm2d, GlobalResponseNorm)]
    if backend == "cpu":  # the others pack nothing
        blocks = [FusedConvNeXtBlock(DIM, kernel_size=3, backend=backend) for _ in range(2)]
        modules += [PatchDownsample2d(DIM, 2 * DIM, backend=backend), FusedSequential(*blocks)]
    for module in modules:
        randomize_(module)
        with torch.no_grad():
            for name, p in module.named_parameters():
                for _ in range(2):
                    before = module(x)
                p.data.mul_(-1.5)
                after = module(x)
                assert not torch.equal(after, before), name
                assert torch.equal(after, copy.deepcopy(module)(x)), name


OPTIONS = [
    ("dwconv", {"dilation": 2}),
    ("mlp", {"eps": 0.5}),
    ("mlp", {"grn_eps": 0.5}),
    ("mlp", {"activation": "relu"}),
    ("mlp", {"norm": "rms", "norm_bias": None}),
    ("block", {"dilation": 2}),
    ("downsample", {"eps": 0.5}),
]


@not_interpreted
@pytest.mark.parametrize(("op", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_the_same_weights_with_another_option(op, options, backend):
    operator = OPERATORS[op]
    case = Case("a rest of channels in V2", n=1, c=17, variant="v2")
    arguments = operator.arguments(case, torch.float32)
    dy = torch.randn_like(operator.reference(**arguments))
    for changed in (arguments, arguments | options):
        assert_close(operator.serve(backend, **changed), operator.serve("eager", **changed), rtol=1e-4, atol=1e-4)
        actual, expected = (
            gradients(functools.partial(operator.serve, name), changed, dy)["x"] for name in (backend, "eager")
        )
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_are_let_go():
    """A deleted model does not leave its packed weights behind."""
    import resource
    import sys

    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in kilobytes on Linux only")
    x = torch.randn(1, 256, 2, 2)

    def use():
        with torch.no_grad():
            FusedConvNeXtBlock(256, kernel_size=3)(x)  # 2 MB of weights

    for _ in range(5):
        use()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        use()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 40, f"{grown:.0f} MB more after 60 blocks of 2 MB"


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


SETTINGS = {
    "backend": lambda: use_backend("eager"),
    "instruction set": lambda: native.use_isa(native.supported_isas()[0]),
    "phases": timed_phases,
    "choices": lambda: forced(lambda *_: None),
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "function mode": _Mode,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "forward mode": dual_level,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_repeated_call_sees_settings(setting, monkeypatch):
    """The extension serves a call like an earlier one only while all that the call depends on is what it was."""
    if not list_backends()["cpu"].available:
        pytest.skip(list_backends()["cpu"].reason)
    block, x = FusedConvNeXtBlock(8), torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
    served = []

    def repeat(op, arguments):
        result = of_extension(op, arguments)
        served.append(result is not None)
        return result

    with torch.no_grad():
        block(x)
        block(x)
        of_extension = calls.repeat
        monkeypatch.setattr(calls, "repeat", repeat)
        block(x)
        with SETTINGS[setting]():
            block(x)
        block(x)
    assert served[0]
    assert not any(served[1:-1])
    assert served[-1]
