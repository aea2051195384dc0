"""The ConvNeXt block: y = depthwise convolution of x, then the inverted bottleneck of y with x as the residual.

That is two launches if mlp is one kernel. y is written in channels_last for any layout of x, so that mlp reads rows;
nothing is permuted. The first two arguments are the backend's modules of these two ops.
"""

from types import ModuleType

import torch
from torch import Tensor

from convnext_kernels.calls import BlockCall, BlocksCall


def forward(
    dwconv: ModuleType,
    mlp: ModuleType,
    call: BlockCall,
    y: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides.

    `y` (like x, channels_last) and `hidden` (N, hidden, H, W) are filled for the gradient if they are given.
    """
    x = call.x
    if y is None:
        y = torch.empty_like(x, memory_format=torch.channels_last)
    dwconv.forward(call.convolution, out=y)
    return mlp.forward(call.mlp(y, x), hidden, like=x)


def sequence(dwconv: ModuleType, mlp: ModuleType, call: BlocksCall) -> Tensor:
    """The result of the last of several blocks."""
    x = call.x
    for i in range(len(call.blocks)):
        x = forward(dwconv, mlp, call.block(i, x))
    return x


def backward(
    dwconv: ModuleType,
    mlp: ModuleType,
    dout: Tensor,
    call: BlockCall,
    needs: list[bool],
    y: Tensor | None = None,
    hidden: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order."""
    x = call.x
    if y is None:
        y = torch.empty_like(x, memory_format=torch.channels_last)
        dwconv.forward(call.convolution, out=y)
    needs_dy = any(needs[:3])
    wanted = [needs_dy, False, *needs[3:]]
    gradients = mlp.backward(dout, call.mlp(y, None), wanted, hidden)
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    convolution = []
    if needs[0]:
        # The convolution kernel adds the gradient of the residual when it stores dx.
        convolution.append(dwconv.input_gradient(dy, call.convolution, residual=dout))
    if needs[1] or needs[2]:
        dw, db = dwconv.parameter_gradients(dy, call.convolution, needs[1], needs[2])
        convolution += [g for g, needed in zip((dw, db), needs[1:3], strict=True) if needed]
    return convolution + gradients
