"""Prepared launches, executed as PTX: later calls replay what the first one did, with other tensors."""

import os
import sys

import pytest
import torch

from convnext_kernels import calls, functional, tuning, use_backend
from convnext_kernels.backends.gpu import prepared
from convnext_kernels.backends.gpu.prepared import View
from convnext_kernels.ops import registration
from tests.operators import OPERATORS, check_forward, expected, expected_gradients, gradients, with_gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

CASE = Case("tails in pixels and channels", n=2, c=40, h=5, w=7)
V2 = Case("with GRN", n=2, c=24, h=5, w=7, variant="v2")


def block(**arguments):
    return functional.convnext_block(**arguments, backend="triton")


def check(arguments):
    return check_forward("block", arguments, "triton")


@pytest.fixture
def arguments():
    return OPERATORS["block"].arguments(CASE, torch.bfloat16)


@pytest.fixture
def addresses(monkeypatch):
    """Let the emulator take addresses, as the launchers of real drivers do; returns the number of such launches."""
    from convnext_kernels.backends.triton import launch

    seen, run = [], launch._Launch.run

    def by_address(self, *arguments):
        run(self, *arguments)
        emulated, pointers = self.launcher, [i for i, a in enumerate(self.arguments) if isinstance(a, View)]

        def launcher(*arguments):
            seen.append(self.kernel.__name__)
            tensors = [v for v in sys._getframe(1).f_locals.values() if isinstance(v, torch.Tensor)]
            arguments = list(arguments)
            for i in pointers:
                arguments[9 + i] = at(tensors, arguments[9 + i])
            emulated(*arguments)

        self.launcher = launcher

    def at(tensors, address):
        """A tensor of bytes that begins at an address of one of the tensors of the generated function."""
        for storage in (t.untyped_storage() for t in tensors):
            offset = address - storage.data_ptr()
            if 0 <= offset < storage.nbytes():
                return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (storage.nbytes() - offset,), (1,))
        raise AssertionError("an address outside of all tensors")

    monkeypatch.setattr(launch._Launch, "run", by_address)
    monkeypatch.setattr(launch, "_takes_addresses", lambda launcher: True)
    calls.forget()
    yield seen
    calls.forget()


@pytest.mark.parametrize("case", [CASE, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_launches_by_address(case, dtype, emulate, addresses):
    """With temporaries that share one allocation: filled with NaN, so a part in use twice is seen."""
    arguments = OPERATORS["block"].arguments(case, dtype)
    dy, eager, reference = expected_gradients("block", case, dtype)
    with emulate(90):
        first = gradients(block, arguments, dy)
        assert not addresses
        again = gradients(block, arguments, dy)
        assert addresses
        assert_as_good_as_eager(block(**arguments), *expected("block", case, dtype))
    for name, gradient in again.items():
        assert torch.equal(gradient, first[name])
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name)


def test_nothing_of_the_first_tensors_is_remembered(emulate, arguments):
    """Other weights, and weights that change in place, also through ``.data`` and under autocast."""
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with emulate(90):
        for change in range(4):
            if change == 1:
                arguments = {k: v.flip(0) if k.endswith("weight") else v for k, v in arguments.items()}
            if change == 2:
                arguments["pwconv1_weight"].mul_(1.5)
            if change == 3:
                arguments["pwconv2_weight"].data.mul_(-1)
            with torch.autocast("cpu", torch.bfloat16):
                y = block(**arguments)
            exact = OPERATORS["block"].reference(**arguments)
            assert (y - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rounded_weights_are_kept(mode, emulate, addresses, arguments):
    """Under autocast, until they change; calls from a graph of `torch.compile` neither keep nor take any."""
    from convnext_kernels.backends.triton import weights

    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    w1, w2 = arguments["pwconv1_weight"], arguments["pwconv2_weight"]

    def call(function=block, **changed):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            return function(**arguments | changed)

    with emulate(90):
        call()
        for change in (lambda: w1.view(-1)[-1].add_(9), lambda: w2.data.mul_(-1)):
            change()
            expected = call(pwconv1_weight=w1.clone(), pwconv2_weight=w2.clone())
            for _ in range(2):
                assert torch.equal(call(), expected)
        (entry,) = [entry for key, entry in weights._entries.items() if w1.data_ptr() in key]
        entry.memory[: w1.numel()].zero_()
        assert not torch.equal(call(), expected), "nothing has changed, but the copies were written"
        before = len(weights._entries)
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(call(compiled), expected)
        assert torch.equal(call(compiled, pwconv1_weight=w1.clone()), expected)
        assert len(weights._entries) == before
        w1.mul_(1)
        assert torch.equal(call(), expected)


def test_folded_weights_are_kept(emulate, addresses, monkeypatch):
    """In a replayed call the kernels take their parts of the memory, of two dtypes, by address."""
    from convnext_kernels.backends.triton import mlp, weights
    from convnext_kernels.backends.triton.plans import mlp_plan

    tile = mlp_plan.tile_config(64, 64, 64, 4)
    project = {"tile": tile | {"GROUP": 1, "TMA": 0, "SPLIT": 1}}
    config = {"plan": "gemm", "expand": {"fold": True, "tile": tile | {"GROUP": 1}}, "project": project}
    monkeypatch.setattr(mlp, "forward_plan", lambda *_: tuning.Candidate("folded", config))
    case = Case("any", n=1, c=72, h=2, w=3, ratio=1)
    arguments = OPERATORS["block"].arguments(case, torch.bfloat16)
    names = "pwconv1_weight", "norm_weight", "norm_bias", "pwconv1_bias"
    with emulate(90), torch.no_grad():
        for name in (None, *names):
            if name is not None:
                arguments[name].data.mul_(-1.5)
            expected = block(**arguments | {n: arguments[n].clone() for n in names})
            for _ in range(3):
                assert torch.equal(block(**arguments), expected)
        assert addresses.count("fold_kernel") == addresses.count("mlp_folded_expand_kernel") > 10
        (entry,) = [entry for key, entry in weights._entries.items() if arguments[names[0]].data_ptr() in key]
        entry.memory[: 72 * 72].zero_()
        assert not torch.equal(block(**arguments), expected), "nothing has changed, but the weights were folded"


def test_tensors_at_other_addresses_and_strides(emulate, arguments):
    """A kernel compiled for pointers that are multiples of 16 bytes must not read others; the emulator faults."""
    x = arguments["x"].contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    with emulate(90):
        for image in (x, shifted, x.contiguous(), x):
            y = check(arguments | {"x": image})
            assert y.stride() == torch.empty_like(image).stride()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(emulate, arguments):
    """A child replays what its parent has prepared, and prepares more."""
    with emulate(90):
        expected = block(**arguments)
        other = arguments | {"x": arguments["x"][:1]}
        child = os.fork()
        if child == 0:
            same = torch.equal(block(**arguments), expected) and torch.equal(block(**other)[0], expected[0])
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_two_forward_passes_keep_their_own(emulate, addresses, arguments, monkeypatch):
    """What a replayed forward pass keeps belongs to it: two of them, then both backward passes."""
    replays, replayed = [], registration.replayed

    def watched(inputs, backend, direction):
        result = replayed(inputs, backend, direction)
        replays.append((direction, result is not NotImplemented))
        return result

    def balanced(**arguments):
        return block(**arguments, memory="balanced")

    monkeypatch.setattr(registration, "replayed", watched)
    samples = [arguments | {"x": arguments["x"] * scale} for scale in (1, -2)]
    dy = torch.ones_like(arguments["x"])
    with emulate(90):
        expected = [gradients(balanced, sample, dy) for sample in samples]
        replays.clear()
        samples = [with_gradients(sample) for sample in samples]
        results = [balanced(**sample) for sample in samples]
        found = [torch.autograd.grad(y, sample["x"], dy)[0] for y, sample in zip(results, samples, strict=True)]
    assert replays[:2] == [("forward", True)] * 2
    assert all(torch.equal(dx, gradient["x"]) for dx, gradient in zip(found, expected, strict=True))


def test_replay_skips_the_op(emulate, addresses, arguments, monkeypatch):
    """Nothing but the tensors may differ from a call before: the device's driver, TF32, plans, hooks on launches."""
    from convnext_kernels.backends.triton import launch

    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    op, ran = registration._ops["block"], []
    monkeypatch.setitem(registration._ops, "block", op._replace(run=lambda *a: ran.append(1) or op.run(*a)))
    with torch.no_grad(), emulate(90):
        for _ in range(2):  # the second call replays, from the third on without the op
            block(**arguments)
        ran.clear()
        check(arguments)
        other = arguments | {"pwconv1_weight": arguments["pwconv1_weight"] * 2}
        check(other)
        assert not ran

        with monkeypatch.context() as changed:
            changed.setattr(prepared, "tf32_allowed", lambda: True)
            block(**arguments)
        with monkeypatch.context() as changed:
            changed.setattr(prepared.cache, "generation", lambda: 12345)
            block(**arguments)
        with tuning.forced(lambda *_: None):
            block(**arguments)
        with monkeypatch.context() as changed:
            changed.setattr(launch, "_hooked", lambda: True)
            check(arguments)
        with emulate(80):
            check(arguments)
        assert len(ran) == 5
        with use_backend("eager"):
            functional.convnext_block(**arguments)
        assert len(ran) == 6
