"""The ConvNeXt block: `mlp` on the depthwise convolution of x, with x as the residual."""

from torch import Tensor

from convnext_kernels.backends.eager import dwconv, mlp
from convnext_kernels.calls import BlockCall

KEEPS_HIDDEN = False  # the gradient computes everything again from the inputs


def forward(call: BlockCall) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides."""
    y = dwconv.forward(call.convolution)
    return mlp.forward(call.mlp(y, call.x))


def backward(dout: Tensor, call: BlockCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order.

    The forward pass keeps only x, so the convolution and the hidden are computed again.
    """
    y = dwconv.forward(call.convolution)
    needs_dy = any(needs[:3])
    gradients = mlp.backward(dout, call.mlp(y, None), [needs_dy, False, *needs[3:]])
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    convolution = dwconv.backward(dy, call.convolution, needs[:3])
    if needs[0]:
        convolution[0] = convolution[0].add_(dout)  # the gradient of the residual
    return convolution + gradients
