"""`torch.library.opcheck` with all its tests, for every op: schema, autograd registration, fake kernels, AOT."""

import pytest
import torch
from torch.library import opcheck

from convnext_kernels.ops import checks
from tests.operators import OPERATORS, laid_out, with_gradients
from tests.shapes import BOTTLENECK, VOLUMES, Case, chosen, rows

# opcheck looks at .grad of the copies it makes of x, which are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SMALL = {"n": 2, "c": 6, "h": 5, "w": 4, "k": 3, "ratio": 2}
CASES = {
    "v1": Case("V1", **SMALL),
    "v2": Case("V2", **SMALL, variant="v2"),
    "no bias, drop": Case("None for optional arguments", **SMALL, bias=False, drop=True),
    "rectangle": Case("stride 2, a rectangle, two dilations", **{**SMALL, "k": (3, 5)}, dilation=(1, 2), stride=2),
    "variant": Case("a norm without a bias, another activation", **SMALL, norm="simple", activation="silu"),
    "empty": Case("an empty batch", **{**SMALL, "n": 0}),
    "empty v2": Case("an empty batch in V2", **{**SMALL, "n": 0}, variant="v2"),
    "volume": Case("a volume", **SMALL, ops=VOLUMES),
    "volume, strided": Case("stride 2, no bias", **SMALL, stride=2, bias=False, ops=VOLUMES),
    "volume, empty": Case("an empty batch of volumes", **{**SMALL, "n": 0}, ops=VOLUMES),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: laid_out(t, torch.channels_last),
    "permuted": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced": lambda t: torch.repeat_interleave(t, 2, dim=-1)[..., ::2],
}
ROWS = rows(OPERATORS, CASES)


def everyday(op, case, layout, grad=True):
    """The layouts take turns, one for every row. What inference is checked for, training is too."""
    turn = [p.values for p in ROWS].index((op, case))
    return grad and [*LAYOUTS].index(layout) == turn % 4


def positional(op: str, arguments: dict) -> list:
    """Put the arguments of the public function in the order of the op's schema."""
    extra = {"eps": 1e-6, "grn_eps": 1e-6, "memory": "balanced", "backend": "auto"}
    schema = getattr(torch.ops.convnext_kernels, op).default._schema
    names = [a.name for a in schema.arguments]
    if op in ("dwconv", "block"):
        arguments = dict(arguments)
        arguments["dilation_h"], arguments["dilation_w"] = checks.pair("dilation", arguments.pop("dilation"))
    assert set(arguments) <= set(names)
    return [(arguments | {k: v for k, v in extra.items() if k not in arguments}).get(name) for name in names]


@chosen(everyday)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_opcheck(op, case, layout, grad):
    arguments = OPERATORS[op].arguments(CASES[case], torch.float32)
    arguments["x"] = LAYOUTS[layout](arguments["x"])
    if grad:
        arguments = with_gradients(arguments)
    opcheck(getattr(torch.ops.convnext_kernels, op).default, positional(op, arguments))


@pytest.mark.parametrize("op", BOTTLENECK)
def test_opcheck_with_a_norm_for_each_sample(op):
    arguments = OPERATORS[op].arguments(CASES["v1"], torch.float32)
    arguments |= {name: torch.randn(arguments["x"].shape[:2]) for name in ("norm_weight", "norm_bias")}
    opcheck(getattr(torch.ops.convnext_kernels, op).default, positional(op, arguments | {"memory": "nothing"}))


@chosen(lambda op, case, layout: everyday(op, case, layout))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_opcheck_of_the_gradient(op, case, layout):
    arguments = OPERATORS[op].arguments(CASES[case], torch.float32)
    arguments["x"] = LAYOUTS[layout](arguments["x"])
    forward = getattr(torch.ops.convnext_kernels, op).default
    backward = getattr(torch.ops.convnext_kernels, f"{op}_backward").default
    values = dict(zip([a.name for a in forward._schema.arguments], positional(op, arguments), strict=True))
    inputs = [a.name for a in forward._schema.arguments if "Tensor" in str(a.type) and a.name != "drop_scale"]
    needs = [isinstance(values[name], torch.Tensor) for name in inputs]
    dy = torch.randn(OPERATORS[op].reference(**arguments).shape) if CASES[case].n else OPERATORS[op].call(**arguments)
    values |= {"dy": LAYOUTS[layout](dy), "dout": LAYOUTS[layout](dy), "saved": [], "needs": needs}
    opcheck(backward, [values[a.name] for a in backward._schema.arguments])
