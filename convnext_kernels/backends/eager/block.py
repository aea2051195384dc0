"""The ConvNeXt block: `mlp` on the depthwise convolution of x, with x as the residual."""

from torch import Tensor

from convnext_kernels.backends.eager import dwconv, mlp
from convnext_kernels.calls import BlockCall

# The gradient computes everything again from the inputs, unless the op has kept it for another backend.
KEEPS_HIDDEN = False


def forward(call: BlockCall, y: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides.

    `y` (like x, channels_last) and `hidden` (N, hidden, H, W) are filled for the gradient if they are given.
    """
    convolved = dwconv.forward(call.convolution)
    if y is not None:
        y.copy_(convolved)
    return mlp.forward(call.mlp(convolved, call.x), hidden)


def backward(
    dout: Tensor, call: BlockCall, needs: list[bool], y: Tensor | None = None, hidden: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order.

    Without `y` and `hidden` the convolution and the hidden are computed again.
    """
    if y is None:
        y = dwconv.forward(call.convolution)
    needs_dy = any(needs[:3])
    gradients = mlp.backward(dout, call.mlp(y, None), [needs_dy, False, *needs[3:]], hidden)
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    convolution = dwconv.backward(dy, call.convolution, needs[:3])
    if needs[0]:
        convolution[0] = convolution[0].add_(dout)  # the gradient of the residual
    return convolution + gradients
