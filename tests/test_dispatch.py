"""Which backend serves: precedence, refusals, and where the settings end."""

import itertools
import sys
import threading
from contextlib import suppress
from types import ModuleType

import pytest
import torch

from convnext_kernels import BackendError, calls, dispatch, functional, list_backends, use_backend
from convnext_kernels import backends as package
from convnext_kernels.dispatch import choose, keeps
from convnext_kernels.spec import OPS, OpSpec

SPEC = OpSpec("dwconv", "cpu", torch.float32, torch.float32, 8, (7, 7))


def _clear():
    module = sys.modules["convnext_kernels.dispatch"]
    for cached in (package.get, package.op_module, module._able, module._log_skipped):
        cached.cache_clear()
    calls.forget()


@pytest.fixture
def make_backend(monkeypatch):
    """Register a backend for the length of a test, before or after the others."""
    _clear()

    def make(name, *, unavailable=None, refuses=None, first=True):
        module = ModuleType(f"convnext_kernels.backends.{name}")
        module.DEVICES = None
        module.unavailable = lambda: unavailable
        module.refuses = lambda spec: refuses(spec) if callable(refuses) else refuses
        module.describe = lambda: f"the test backend {name}"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for op in OPS:
            file = ModuleType(f"{module.__name__}.{op}")
            file.KEEPS_HIDDEN = file.KEEPS_ROUNDED = False
            monkeypatch.setitem(sys.modules, file.__name__, file)
        names = package.NAMES
        monkeypatch.setattr(package, "NAMES", (name, *names) if first else (*names, name))
        return module

    yield make
    monkeypatch.undo()
    _clear()


def chosen(backend="auto", spec=SPEC):
    return choose(spec, backend).__name__.split(".")[2]


def test_precedence(make_backend, monkeypatch):
    """Argument, then the innermost use_backend, then the environment, then auto."""
    for name in ("d", "c", "b", "a"):
        make_backend(name)
    assert chosen() == "a"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "b")
    assert chosen() == "b"
    with use_backend("c"):
        assert chosen() == "c"
        with use_backend("d"):
            assert chosen() == "d"
            assert chosen("eager") == "eager"
        assert chosen() == "c"
        with use_backend("auto"):
            assert chosen() == "a", "use_backend('auto') hides the environment"
    assert chosen() == "b"
    for value in ("", "auto"):
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
        assert chosen() == "a"


def test_auto_takes_the_first_that_can_serve(make_backend):
    make_backend("second", refuses=lambda spec: None)
    make_backend("first", refuses=lambda spec: "only 16 channels" if spec.channels != 16 else None)
    make_backend("missing", unavailable="no such machine")
    make_backend("elsewhere", refuses=lambda spec: pytest.fail("asked")).DEVICES = ("cuda",)
    assert chosen() == "second"
    assert chosen(spec=OpSpec("dwconv", "cpu", torch.float32, torch.float32, 16, (7, 7))) == "first"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"refuses": "only on Sundays"}, "only on Sundays"), ({"unavailable": "no library"}, "no library")],
)
def test_a_named_backend_that_cannot_serve_says_why(make_backend, options, reason, monkeypatch):
    make_backend("picky", **options)
    status = list_backends()["picky"]
    assert (status.available, status.reason) == (("refuses" in options), options.get("unavailable", ""))
    wanted = f"picky: {reason}|'picky' is not available: {reason}"
    with pytest.raises(BackendError, match=wanted):
        chosen("picky")
    with pytest.raises(BackendError, match=wanted), use_backend("picky"):
        chosen()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "picky")
    with pytest.raises(BackendError, match=wanted):
        functional.depthwise_conv2d(torch.randn(1, 2, 3, 3), torch.randn(2, 1, 3, 3))


@pytest.mark.parametrize("name", ["fpga", "", "Eager", "eager "])
def test_unknown_names(name, monkeypatch):
    with pytest.raises(BackendError, match=f"use_backend: unknown backend '{name}', expected one"), use_backend(name):
        pytest.fail("entered")
    with pytest.raises(BackendError, match=rf"backend: unknown backend '{name}'"):
        choose(SPEC, name)
    if name:
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
        with pytest.raises(BackendError, match=rf"CONVNEXT_KERNELS_BACKEND: unknown backend '{name}'"):
            choose(SPEC)


def test_use_backend_ends_with_its_block_and_belongs_to_its_thread(make_backend):
    make_backend("stub", first=False)
    seen = []
    with suppress(ZeroDivisionError), use_backend("stub"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
        assert (dispatch.requested_backend(), seen) == ("stub", ["auto"])
        raise ZeroDivisionError
    assert dispatch.requested_backend() == "auto"


@pytest.mark.parametrize(
    ("device", "channels", "expected"),
    [
        ("cuda", 192, "min"),
        ("cuda", 200, "balanced"),
        ("cpu", 96, "balanced"),
        ("amx", 384, "min"),
        ("amx", 400, "balanced"),
    ],
)
def test_what_is_kept_by_default(make_backend, monkeypatch, device, channels, expected):
    make_backend("keeping")
    monkeypatch.setattr(package.get("cpu"), "has_tiles", lambda: device == "amx")
    sys.modules["convnext_kernels.backends.keeping.block"].KEEPS_HIDDEN = True
    spec = SPEC._replace(
        op="block", device=device.replace("amx", "cpu"), channels=channels, compute_dtype=torch.bfloat16
    )
    assert keeps(spec, "auto") == expected
    assert [keeps(spec, memory) for memory in ("min", "balanced", "nothing")] == ["min", "balanced", "nothing"]
    assert keeps(spec, "balanced", "eager") == "nothing", "it computes everything again"


@pytest.fixture
def unproven(monkeypatch):
    """The CPU backend is one that nobody has run on this kind of device."""
    if not list_backends()["cpu"].available:
        pytest.skip(list_backends()["cpu"].reason)
    module = sys.modules["convnext_kernels.dispatch"]
    monkeypatch.setattr(module, "_unproven", lambda name, device: name == "cpu")
    _clear()
    module._log_unproven.cache_clear()
    yield
    _clear()
    module._log_unproven.cache_clear()


TRIED = [
    SPEC._replace(dtype=torch.bfloat16, compute_dtype=torch.bfloat16, kernel_size=(3, 5), dilation=(2, 1), stride=2),
    OpSpec("layernorm", "cpu", torch.float16, torch.float16, 24),
    OpSpec("grn", "cpu", torch.float32, torch.float32, 24),
    OpSpec("mlp", "cpu", torch.bfloat16, torch.bfloat16, 24, hidden=96, grn=True, norm="simple", activation="mish"),
    OpSpec("block", "cpu", torch.float32, torch.bfloat16, 24, (7, 7), hidden=96),
    OpSpec("dwconv3d", "cpu", torch.float32, torch.float32, 24, (3, 5, 3), stride=2),
    OpSpec("downsample", "cpu", torch.float32, torch.float32, 24, (2, 2), hidden=48),
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("spec", TRIED, ids=lambda spec: f"{spec.op}-{spec.dtype}")
def test_an_unproven_backend_that_is_right_serves(unproven, spec, backward, caplog):
    assert choose(spec._replace(backward=backward)).__name__.startswith("convnext_kernels.backends.cpu.")
    assert "nobody has timed" in caplog.text


def one_thousandth_off(right):
    return lambda call: right(call) * 1.001


def failing(right):
    def fails(call):
        raise RuntimeError("no such instruction")

    return fails


@pytest.mark.parametrize(
    ("change", "words"), [(one_thousandth_off, "result 0 is off by"), (failing, "RuntimeError: no such instruction")]
)
def test_an_unproven_backend_that_is_wrong_does_not_serve(unproven, change, words, monkeypatch, caplog):
    from convnext_kernels.backends.cpu import layernorm

    monkeypatch.setattr(layernorm, "forward", change(layernorm.forward))
    spec = OpSpec("layernorm", "cpu", torch.float32, torch.float32, 24)
    assert choose(spec).__name__ == "convnext_kernels.backends.eager.layernorm"
    assert f"the check at first use failed: {words}" in caplog.text
    with pytest.raises(BackendError, match="check at first use failed"):
        choose(spec, "cpu")


def test_the_trial_takes_the_norm_and_the_activation_of_the_call(unproven, monkeypatch):
    """Another activation that is wrong is refused, and the right one serves."""
    from convnext_kernels.backends.cpu import mlp

    right = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda call: right(call._replace(activation="silu")))
    chosen = {}
    for norm, activation in itertools.product(("layer", "rms"), ("silu", "relu")):
        spec = OpSpec("mlp", "cpu", torch.float32, torch.float32, 24, hidden=96, norm=norm, activation=activation)
        chosen[norm, activation] = choose(spec).__name__.split(".")[2]
    assert chosen == {k: "cpu" if k[1] == "silu" else "eager" for k in chosen}


def test_the_trial_is_not_seen_by_the_caller(unproven):
    """In a trace, under autocast and modes: the check runs on real tensors, and the random state stays."""
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        traced = torch.compile(lambda x, w: functional.layer_norm2d(x, w, w), backend="eager", fullgraph=True)
        traced(torch.randn(1, 24, 5, 5, generator=torch.Generator().manual_seed(1)), torch.ones(24))
    assert torch.equal(torch.get_rng_state(), state)
