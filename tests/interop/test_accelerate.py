"""What holds for every library: same results, same parameters, hooks, copies, and the way back."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations

import convnext_kernels as ck
from convnext_kernels import dispatch
from convnext_kernels.interop.adapter import Adapter
from tests.interop.helpers import (
    MODELS,
    assert_close,
    assert_same,
    backends_asked_for,
    fused_calls,
    gradients,
    images,
    logits,
    saved_and_loaded,
)
from tests.operators import op_calls
from tests.shapes import chosen

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
one_model = pytest.mark.parametrize("model", [MODELS["timm-v1"]], ids=["timm-v1"])


def in_turn(model, number):
    """Two or three of the ten models for each of four ways to do something."""
    return [*MODELS.values()].index(model) % 4 == number


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


def block_of(model, description):
    return model.get_submodule(description.block)


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32, channels_last"])
def test_logits_and_gradients(model, dtype):
    original = model.make(dtype=dtype)
    x = images(dtype=dtype)
    if dtype == torch.float32:
        original, x = (t.to(memory_format=torch.channels_last) for t in (original, x))
    accelerated = ck.accelerate(copy.deepcopy(original))
    calls = fused_calls(lambda: logits(accelerated, x))
    assert calls == {"block": 4, "downsample": model.downsamplings, "layernorm": model.norms}
    assert_same(accelerated, original, x, dtype)


@every_model
def test_drop_path_draws_the_same_masks(model):
    original = model.make(drop=0.5).train()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images(n=8)
    assert fused_calls(lambda: logits(accelerated, x))["block"] == 4
    assert_same(accelerated, original, x)
    assert not torch.allclose(logits(accelerated, x), logits(accelerated.eval(), x)), "nothing was dropped"


@every_model
def test_autocast(model):
    """Same dtypes and masks, and bf16's accuracy."""
    original = model.make(drop=0.5, dtype=torch.float32).train()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images(dtype=torch.float32)
    outputs = {original: [], accelerated: []}
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(lambda: logits(accelerated, x))["block"] == 4
        for m, found in outputs.items():
            block_of(m, model).register_forward_hook(lambda _, args, y, found=found: found.append(y))
            torch.manual_seed(3)
            found.append(logits(m, x))
    for actual, expected in zip(outputs[accelerated], outputs[original], strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


@every_model
def test_in_place_and_restore(model):
    m = model.make()
    before, keys, parameters = classes(m), list(m.state_dict()), list(m.parameters())
    attributes = {name: set(vars(module)) for name, module in m.named_modules()}
    x = images()
    expected = logits(m, x)
    assert ck.accelerate(m) is m
    assert list(m.state_dict()) == keys
    assert all(a is b for a, b in zip(m.parameters(), parameters, strict=True))
    changed = [name for name, kind in classes(m).items() if kind is not before[name]]
    replaced = [name for name in changed if isinstance(m.get_submodule(name), Adapter)]
    assert len(replaced) == 4 + model.downsamplings + model.norms
    assert all(before[name] is torch.nn.Sequential for name in set(changed) - set(replaced))
    assert all(isinstance(m.get_submodule(name), before[name]) for name in changed)
    assert ck.restore(m) is m
    assert classes(m) == before
    assert {name: set(vars(module)) for name, module in m.named_modules()} == attributes
    assert not fused_calls(lambda: logits(m, x))
    assert torch.equal(logits(m, x), expected)
    ck.restore(m)  # a second time changes nothing


COPIES = [copy.deepcopy, saved_and_loaded]


@chosen(lambda model, copy_of: in_turn(model, 2 * COPIES.index(copy_of)))
@every_model
@pytest.mark.parametrize("copy_of", COPIES)
def test_copies(model, copy_of):
    m = ck.accelerate(model.make(), backend="eager")
    twin = copy_of(m)
    x = images()
    assert classes(twin) == classes(m)
    assert torch.equal(logits(twin, x), logits(m, x))
    assert backends_asked_for(lambda: logits(twin, x)) == {"eager"}
    with torch.no_grad():  # the copy reads its own parameters
        expected = logits(m, x)
        for p in block_of(twin, model).parameters():
            p.mul_(2)
        assert not torch.allclose(logits(twin, x), expected)
        assert torch.equal(logits(m, x), expected)
    ck.restore(twin)
    assert not fused_calls(lambda: logits(twin, x))
    assert fused_calls(lambda: logits(m, x))["block"] == 4


def test_pickle_in_a_fresh_process(tmp_path, run_python):
    """There, no library is imported when the classes are made anew."""
    x = images()
    expected = []
    for library in ("official-v1", "timm-v2"):
        m = ck.accelerate(MODELS[library].make())
        torch.save((m, x, m(x)), tmp_path / f"{library}.pt")
        expected.append(f"{library} True {[name for name, *_ in op_calls(lambda m=m: m(x))]}")
    printed = run_python(
        f"""
import torch
from pathlib import Path
loaded = [torch.load(Path({str(tmp_path)!r}) / f"{{line.split()[0]}}.pt", weights_only=False) for line in {expected!r}]
from tests.operators import op_calls
for line, (m, x, y) in zip({expected!r}, loaded):
    print(line.split()[0], torch.equal(m(x), y), [name for name, *_ in op_calls(lambda: m(x))])
"""
    )
    assert printed.splitlines() == expected


HOOKS = [
    nn.Module.register_forward_hook,
    nn.Module.register_forward_pre_hook,
    nn.Module.register_full_backward_hook,
    nn.Module.register_full_backward_pre_hook,
]


@chosen(lambda model, register: in_turn(model, HOOKS.index(register)))
@every_model
@pytest.mark.parametrize("register", HOOKS, ids=lambda f: f.__name__)
def test_hooks_on_an_inner_module_fire(model, register):
    """And those on the block itself, which need no other forward."""
    m = ck.accelerate(model.make())
    x = images()
    expected = logits(m, x)
    for inner, fused in (("", 4), (model.linear, 3)):
        fired = []
        hook = lambda *_, fired=fired: fired.append(1) and None  # noqa: E731
        handle = register(block_of(m, model).get_submodule(inner), hook)
        gradients(m, x)
        assert fired
        assert fused_calls(lambda: logits(m, x))["block"] == fused
        assert_close(logits(m, x), expected, torch.float64)
        (row,) = [r for r in ck.acceleration_report(m).rows if r.name == model.block]
        assert ("runs the original forward for now: a hook is registered on its" in row.reason) == bool(inner)
        handle.remove()
    assert fused_calls(lambda: logits(m, x))["block"] == 4


class LoRALinear(nn.Linear):
    """What parameter-efficient tuning puts in the place of a Linear."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)


@chosen(lambda model: in_turn(model, 0))
@every_model
def test_parametrised_weights_are_served(model):
    original = model.make()
    parametrizations.weight_norm(block_of(original, model).get_submodule(model.linear))
    accelerated = ck.accelerate(copy.deepcopy(original))
    later = ck.accelerate(model.make())
    parametrizations.weight_norm(block_of(later, model).get_submodule(model.linear))
    x = images()
    for m in (accelerated, later):
        assert fused_calls(lambda m=m: logits(m, x))["block"] == 4
        assert_same(m, original, x)


@pytest.mark.parametrize("name", ["torchvision", "timm-v1", "transformers-v1"])
def test_mixed_dtypes_fall_back(name):
    """Norms are often kept in fp32; PyTorch's CPU LayerNorm takes that, and so must the accelerated model."""
    original = MODELS[name].make(dtype=torch.bfloat16)
    for m in original.modules():
        if isinstance(m, nn.LayerNorm):
            m.float()
    # the last norm of a classifier sees one pixel, and PyTorch then refuses what it accepts above
    block = block_of(original, MODELS[name])
    y = torch.randn(2, 8, 6, 6).bfloat16()
    expected = block(y)
    ck.accelerate(original)
    assert not fused_calls(lambda: block(y))
    assert torch.equal(block(y), expected)


@one_model
def test_inputs_that_are_not_served_meet_the_original_forward(model):
    original = block_of(model.make(), model)
    block = ck.accelerate(copy.deepcopy(original))
    for x in (torch.randn(8, 6, 6).double(), torch.randn(2, 9, 6, 6).double(), torch.ones(2, 8, 6, 6).long()):
        messages = []
        for m in (original, block):
            with pytest.raises(RuntimeError) as info:
                m(x)
            messages.append(str(info.value))
        assert messages[0] == messages[1]
    empty = torch.randn(0, 8, 6, 6).double()
    assert block(empty).shape == original(empty).shape == empty.shape


@chosen(lambda model: model is MODELS["official-v2"])
@every_model
def test_compile_without_graph_breaks(model, fresh_compiler):
    """One graph for all batch and image sizes, also where reasons to fall back are found while it is traced."""
    m = ck.accelerate(model.make(dtype=torch.float32))
    plain = logits(m, images(dtype=torch.float32))
    block_of(m, model).get_submodule(model.linear).__class__ = LoRALinear
    assert not torch.allclose(logits(m, images(dtype=torch.float32)), plain)
    (row,) = [r for r in ck.acceleration_report(m).rows if r.name == model.block]
    assert "a pointwise layer is a LoRALinear" in row.reason
    gelus = [act for act in m.modules() if "GELU" in type(act).__name__]
    gelus[-1].register_forward_hook(lambda module, args, y: 2 * y)  # of the last block
    assert fused_calls(lambda: logits(m, images(dtype=torch.float32)))["block"] == 2
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    # All sizes differ, also from the numbers of channels: compiled code takes equal ones to be always equal.
    for n, size in ((5, 96), (7, 160)):
        x = images(n, size, torch.float32)
        expected, actual = gradients(m, x), gradients(compiled, x)
        for name, gradient in actual.items():
            assert_close(gradient, expected[name.removeprefix("_orig_mod.")], torch.float32, name)
        frames.add(counter.frame_count)
    assert len(frames) == 1, "compiled again for another size"


@one_model
def test_twice_changes_the_backend_only(model):
    m = ck.accelerate(model.make())
    before = classes(m)
    for backend in ("auto", "eager", "auto"):
        ck.accelerate(m, backend=backend)
        assert classes(m) == before
        assert backends_asked_for(lambda: logits(m, images())) == {backend}


@every_model
def test_meta_tensors(model):
    """Shapes without computing: 16-bit norms and stochastic depth ask about autocast, which does not know "meta"."""
    with torch.device("meta"):
        m = model.build(0.5).half().train()
    x = images(dtype=torch.float16).to("meta")
    expected = logits(m, x)
    ck.accelerate(m)
    actual = []
    assert fused_calls(lambda: actual.append(logits(m, x)))["block"] == 4
    assert actual[0].is_meta
    assert actual[0].shape == expected.shape
    assert actual[0].dtype == expected.dtype


@one_model
def test_errors_come_before_any_change(model, monkeypatch):
    m = model.make()
    before = classes(m)
    for function in (ck.accelerate, ck.restore, ck.acceleration_report):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
            function({})
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'cuda-magic', expected one of auto, "):
        ck.accelerate(m, backend="cuda-magic")
    with pytest.raises(TypeError, match="backend: expected the name of a backend"):
        ck.accelerate(m, backend=None)
    status = {"eager": dispatch.BackendStatus("eager", False, "it has a day off", "")}
    monkeypatch.setattr(dispatch, "list_backends", lambda: status)
    with pytest.raises(ck.BackendError, match="backend: 'eager' is not available: it has a day off"):
        ck.accelerate(m, backend="eager")
    assert classes(m) == before


@one_model
def test_what_other_tools_changed(model):
    """Classes and forwards that someone else replaced are neither overridden nor half undone."""

    class Renamed(type(block_of(model.make(), model))):
        def forward(self, x):
            return super().forward(x) + 1

    m = model.make()
    blocks = [stage.blocks[0] for stage in m.stages]
    blocks[0].__class__ = Renamed
    blocks[1].forward = lambda x: x
    nn.utils.parametrize.register_parametrization(blocks[2], "gamma", nn.Identity())
    ck.accelerate(m)
    reasons = {r.name: r.reason for r in ck.acceleration_report(m).rows if r.kind == "block"}
    assert reasons == {
        "stages.0.blocks.0": "Renamed overrides the forward of ConvNeXtBlock",
        "stages.1.blocks.0": "its forward was replaced",
        "stages.2.blocks.0": "one of its parameters is parametrised, which depends on the module's class",
        "stages.3.blocks.0": "fused block, backend auto",
    }

    m = ck.accelerate(model.make())
    block = block_of(m, model)
    expected = logits(m, images())
    nn.utils.parametrize.register_parametrization(block, "gamma", nn.Identity())
    assert fused_calls(lambda: logits(m, images()))["block"] == 4
    assert_close(logits(m, images()), expected, torch.float64)
    with pytest.raises(RuntimeError, match=r"changed stages\.0\.blocks\.0 after accelerate \(its class, to"):
        ck.restore(m)
    assert fused_calls(lambda: logits(m, images()))["block"] == 4
    nn.utils.parametrize.remove_parametrizations(block, "gamma")
    ck.restore(m)
    assert not fused_calls(lambda: logits(m, images()))
