"""The whole ConvNeXt block by csrc/cpu/mlp.cpp; its gradient is that of mlp, then that of dwconv."""

from torch import Tensor

from convnext_kernels.backends.cpu import dwconv, mlp, mlp_native
from convnext_kernels.calls import BlockCall, BlocksCall

KEEPS_HIDDEN = True
KEEPS_ROUNDED = False


def forward(call: BlockCall, y: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    """Return x + the inverted bottleneck of the depthwise convolution of x, in one pass.

    `y` (like x, channels_last) and `hidden` (N, hidden, H, W) are filled for the gradient if they are given.
    """
    return mlp_native.run(call, call.x, (call.weight, call.bias, call.dilation), y, hidden, repeatable=True)


def sequence(call: BlocksCall) -> Tensor:
    """The result of the last of several blocks, which one call of the extension computes."""
    return mlp_native.run_blocks(call)


def backward(
    dout: Tensor, call: BlockCall, needs: list[bool], y: Tensor | None = None, hidden: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order."""
    if y is None:
        y = dwconv.forward(call.convolution)
    needs_dy = any(needs[:3])
    wanted = [needs_dy, False, *needs[3:]]
    gradients = mlp.backward(dout, call.mlp(y, None), wanted, hidden)
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    # The convolution kernel adds the gradient of the residual when it stores dx.
    return dwconv.backward(dy, call.convolution, needs[:3], residual=dout) + gradients
