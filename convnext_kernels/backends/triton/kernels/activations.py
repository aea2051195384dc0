"""The activations of `variants.ACTIVATIONS` and their derivatives, for use inside kernels; x is fp32. NaN stays NaN."""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.gelu import gelu, gelu_and_derivative


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def gated(x, inner, inner_slope):
    """(x * sigmoid(inner), its derivative), where inner is a function of x with the given derivative."""
    s = sigmoid(inner)
    return x * s, s + x * s * (1.0 - s) * inner_slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation's value."""
    if ACTIVATION == "gelu":
        value = gelu(x)
    else:
        value, _ = activate_and_derivative(x, ACTIVATION)
    return value


@triton.jit
def activate_and_derivative(x, ACTIVATION: tl.constexpr):
    """(value, derivative)."""
    if ACTIVATION == "gelu":
        value, derivative = gelu_and_derivative(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z); 2 sqrt(2 / pi) times 1, 0.044715 and 3 * 0.044715
        square = x * x
        inner = x * (1.5957691216057308 + 0.07135481282809582 * square)
        value, derivative = gated(x, inner, 1.5957691216057308 + 0.21406443848428745 * square)
    elif ACTIVATION == "quick_gelu":
        value, derivative = gated(x, 1.702 * x, 1.702)
    elif ACTIVATION == "silu":
        value, derivative = gated(x, x, 1.0)
    elif ACTIVATION == "mish":
        # tanh(log(1 + n)) = w / (w + 2) with n = e^x, w = n (n + 2)
        n = tl.exp2(tl.minimum(x, 28.0) * 1.4426950408889634)
        w = n * (n + 2.0)
        inverse = 1.0 / (w + 2.0)
        value = x * (w * inverse)
        derivative = w * inverse + x * (4.0 * n * (n + 1.0) * inverse * inverse)
    elif ACTIVATION == "relu":
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        derivative = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
        derivative = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "hardswish")
        gate = tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = x * (tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL) * 0.16666666666666666)
        derivative = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * 0.3333333333333333 + 0.5, 1.0))
    return value, derivative
