"""The ConvNeXt block: `mlp` on the depthwise convolution of x, with x as the residual."""

from torch import Tensor

from convnext_kernels.backends.eager import dwconv, mlp
from convnext_kernels.calls import BlockCall

# The gradient computes everything again from the inputs, unless the op has kept it for another backend.
KEEPS_HIDDEN = False
KEEPS_ROUNDED = False


def forward(call: BlockCall, *kept: Tensor) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides.

    `kept` is filled for the gradient, as another backend keeps it: y (like x, channels_last) and the hidden
    (N, hidden, H, W); in the dtype of the matmuls also x and both pointwise weights, after y (`ops/block.py`).
    """
    convolved = dwconv.forward(call.convolution)
    if kept:
        values = [convolved]
        if len(kept) > 2:
            values += [call.x, call.p.pwconv1_weight.flatten(1), call.p.pwconv2_weight.flatten(1)]
        for tensor, value in zip(kept, values, strict=False):
            tensor.copy_(value)
        kept = kept[len(values) :]
    return mlp.forward(call.mlp(convolved, call.x), *kept)


def backward(dout: Tensor, call: BlockCall, needs: list[bool], *kept: Tensor) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order.

    `kept` is what `forward` filled, without x: `call.x` is that one. What is missing is computed again.
    """
    call = call._replace(x=call.x.to(dout.dtype))
    y = kept[0].to(dout.dtype) if kept else dwconv.forward(call.convolution)
    hidden = kept[-1] if len(kept) in (2, 4) else None
    needs_dy = any(needs[:3])
    gradients = mlp.backward(dout, call.mlp(y, None), [needs_dy, False, *needs[3:]], hidden)
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    convolution = dwconv.backward(dy, call.convolution, needs[:3])
    if needs[0]:
        convolution[0] = convolution[0].add_(dout)  # the gradient of the residual
    return convolution + gradients
