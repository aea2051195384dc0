"""The ConvNeXt block: y = depthwise convolution of x, then the inverted bottleneck of y with x as the residual.

That is two launches if mlp is one kernel. y is written in channels_last for any layout of x, so that mlp reads rows;
nothing is permuted. The first two arguments are the backend's modules of these two ops.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from convnext_kernels.calls import BlockCall, BlocksCall


def forward(
    dwconv: ModuleType,
    mlp: ModuleType,
    call: BlockCall,
    *kept: Tensor,
) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides.

    `kept` is filled for the gradient: y (like x, channels_last) and the hidden (N, hidden, H, W); under autocast all in
    the dtype of the matmuls, and after y also x and both pointwise weights (`ops/block.py`).
    """
    x, y, rounded, weights = call.x, None, None, None
    if kept:
        y, *kept = kept
    else:  # in the dtype that the matmuls read it in
        y = torch.empty_like(x, dtype=call.compute_dtype, memory_format=torch.channels_last)
    dwconv.forward(call.convolution, out=y)
    if len(kept) > 1:
        rounded, *weights = kept[:3]
        kept = kept[3:]
        for cast, weight in zip(weights, (call.p.pwconv1_weight, call.p.pwconv2_weight), strict=True):
            cast.copy_(weight.detach().flatten(1))
    return mlp.forward(call.mlp(y, x), *kept[:1], like=x, rounded=rounded, weights=weights)


def sequence(block: Callable[[BlockCall], Tensor], call: BlocksCall) -> Tensor:
    """The result of the last of several blocks."""
    x = call.x
    for i in range(len(call.blocks)):
        x = block(call.block(i, x))
    return x


def backward(
    dwconv: ModuleType,
    mlp: ModuleType,
    dout: Tensor,
    call: BlockCall,
    needs: list[bool],
    *kept: Tensor,
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order; that of x in dout's dtype.

    `kept` is what `forward` filled, without x: `call.x` is that one.
    """
    x, weights = call.x, None
    if kept:
        y, *kept = kept
    else:
        y = torch.empty_like(x, dtype=call.compute_dtype, memory_format=torch.channels_last)
        dwconv.forward(call.convolution, out=y)
    if len(kept) > 1:
        weights, kept = kept[:2], kept[2:]
    needs_dy = any(needs[:3])
    wanted = [needs_dy, False, *needs[3:]]
    gradients = mlp.backward(dout, call.mlp(y, None), wanted, *kept[:1], weights=weights)
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
