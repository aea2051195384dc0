"""Strides: any dense, sliced or expanded input and gradient; results have the strides `torch.empty_like` gives."""

import pytest
import torch

from tests.operators import OPERATORS, check_forward, check_gradients, differentiable, expected_gradients, laid_out
from tests.shapes import KERNELS, TRITON, VOLUMES, Case, chosen, rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "v1": Case("every argument of V1", n=3, c=18, h=8, w=6, k=3, ratio=2),
    "v2": Case("every argument of V2", n=3, c=18, h=8, w=6, k=3, ratio=2, variant="v2"),
    "volume": Case("a volume", c=17, d=4, h=5, w=6, k=3, ops=VOLUMES),
}


# Each returns a tensor with t's values (or, for the expanded ones, some of them repeated) in other strides.
def last(t):
    return laid_out(t, torch.channels_last)


def padded(t):
    return torch.nn.functional.pad(t, (1, 2, 3, 1), value=torch.nan)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": last,
    "W outside of H": lambda t: t.mT.contiguous().mT,
    "C outermost": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second channel": lambda t: torch.repeat_interleave(t, 2, dim=1)[:, ::2],
    "every second channel, channels_last": lambda t: last(torch.repeat_interleave(t, 2, dim=1))[:, ::2],
    "window of an image": lambda t: padded(t)[..., 3:-1, 1:-2],
    "window, channels_last": lambda t: last(padded(t))[..., 3:-1, 1:-2],
    "some channels, channels_last": lambda t: last(torch.cat([t.new_full(t[:, :3].shape, torch.nan), t, t[:, :2]], 1))[
        :, 3:-2
    ],
    "with an offset": lambda t: torch.nn.functional.pad(t.flatten(), (3, 0))[3:].view(t.shape),
    "expanded samples": lambda t: t[:1].expand_as(t),
    "expanded channels": lambda t: t[:, :1].expand_as(t),
    "expanded pixels": lambda t: t[..., :1, :1].expand_as(t),
    "expanded scalar": lambda t: t.flatten()[0].expand_as(t),
}
ROWS = rows(OPERATORS, CASES)
DTYPES = (torch.float32, torch.bfloat16)


def everyday(op, case, layout, dtype, kernel):
    """Every layout of every op on each backend, in dtypes that alternate; instruction sets take turns.

    What a layout changes is the same code for each of the instruction sets: one takes all, the others an eighth each.
    In Triton's interpreter, which is slow, each op takes every second one.
    """
    row, number = [p.values for p in ROWS].index((op, case)), KERNELS.index(kernel)
    turn = row + [*LAYOUTS].index(layout)
    takes_all = kernel[0] != "cpu" or kernel[1] == "avx2"
    its_turn = turn % 2 == 0 if kernel == TRITON else takes_all or turn % 8 == number
    return its_turn and DTYPES.index(dtype) == (row + number) % 2


@chosen(everyday)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_input(op, case, layout, dtype, kernel):
    arguments = OPERATORS[op].arguments(CASES[case], dtype)
    arguments["x"] = LAYOUTS[layout](arguments["x"])
    if op not in ("dwconv", "dwconv3d"):
        # Expanded channels have no variance, and 1 / sqrt(1e-6) would show the last bit of their mean, not the layout.
        arguments["eps"] = 1.0
    y = check_forward(op, arguments, kernel, what=f"{op} of {layout}")
    if op == "downsample":
        assert y.is_contiguous(
            memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format
        )
    else:
        assert y.stride() == torch.empty_like(arguments["x"]).stride()


@pytest.mark.parametrize("op", OPERATORS)
def test_channels_last_with_an_offset(op, kernel):
    """Strides that 16-byte loads fit, at an address that they do not fit."""
    case = Case("channels in whole 16-byte loads", n=3, c=24, h=8, w=6, k=3, ratio=2)
    arguments = OPERATORS[op].arguments(case, torch.bfloat16)
    x = arguments["x"].movedim(1, -1)
    arguments["x"] = torch.nn.functional.pad(x.flatten(), (3, 0))[3:].view(x.shape).movedim(-1, 1)
    check_forward(op, arguments, kernel)


@pytest.mark.parametrize("op", OPERATORS)
def test_parameters_in_other_layouts(op, kernel):
    """Transposed matrices, sliced vectors, 1x1 convolutions for Linear, GRN's (1, 1, 1, 4C)."""
    arguments = OPERATORS[op].arguments(CASES["v2"], torch.float32)
    plain = OPERATORS[op].serve(kernel, **arguments)
    for name in differentiable(arguments):
        t = arguments[name]
        if name in ("x", "residual"):
            continue
        if t.dim() == 1:
            arguments[name] = torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0]
        elif t.dim() == 2:
            arguments[name] = t.t().contiguous().t()[:, :, None, None]
        else:
            arguments[name] = t.transpose(2, 3).contiguous().transpose(2, 3)
        if name.startswith("grn_"):
            arguments[name] = arguments[name].view(1, 1, 1, -1)
    torch.testing.assert_close(OPERATORS[op].serve(kernel, **arguments), plain)


def everyday_gradient(op, case, layout, backend):
    """Every layout in every op; one of each in Triton's interpreter."""
    row = [p.values for p in ROWS].index((op, case))
    return backend != TRITON or (2 * row + 1) % len(LAYOUTS) == [*LAYOUTS].index(layout)


@chosen(everyday_gradient)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_incoming_gradient(op, case, layout, backend):
    dy = LAYOUTS[layout](expected_gradients(op, CASES[case], torch.float32)[0])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = OPERATORS[op].arguments(CASES[case], torch.float32)
        arguments["x"] = laid_out(arguments["x"], memory_format)
        for name, gradient in check_gradients(op, arguments, dy, backend, what=f"{op}, dy {layout}").items():
            assert gradient.stride() == torch.empty_like(arguments[name]).stride(), name
