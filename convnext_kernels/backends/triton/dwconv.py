"""Depthwise convolution, "same" padding, stride 1 or 2: y[n,c] = x[n,c] (*) weight[c] + bias[c], and its gradients.

x (N, C, H, W), weight (C, 1, KH, KW), both odd, bias (C,) or None; P = KH // 2, Q = KW // 2, (D, E) = dilation:

    y[n,c,h,w]   = bias[c] + sum_kh,kw weight[c,kh,kw] * x[n,c, h + (kh-P) D, w + (kw-Q) E]
    dx[n,c,h,w]  = sum_kh,kw weight[c,KH-1-kh,KW-1-kw] * dy[n,c, h + (kh-P) D, w + (kw-Q) E]   [+ residual]
    dw[c,kh,kw]  = sum_n,h,w dy[n,c,h,w] * x[n,c, h + (kh-P) D, w + (kw-Q) E],    db[c] = sum_n,h,w dy[n,c,h,w]

With stride 2, y[n,c,h,w] is what stands at (2h, 2w) here, and dy is between zeros. Volumes x (N, C, D, H, W) with
weight (C, 1, KD, KH, KW) have one more axis of this kind, without dilation.

Bytes per pixel with 16-bit elements: forward 4C (x read, y written), dx 4C (6C with a residual), dw and db together 4C
and the partial sums of at most a few hundred programs. For 7x7 the 49 multiply-adds of an output limit the time as much
as these bytes. Values are rounded to the compute dtype; multiplications and sums are in fp32 for every dtype.

Kernels: dwconv_forward.py, dwconv_rows.py, dwconv_wgrad.py, dwconv_lines.py for kernels of one row or one column, and
dwconv_toeplitz.py for large kernels on tensor cores. dwconv_plan.py chooses, dwconv_convolve.py and dwconv_gradients.py
launch. NHWC (channels_last) and NCHW tensors, also slices of samples, are read and written without a copy; other
strides are copied to channels_last first.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.triton.dwconv_convolve import convolve, packed_weight
from convnext_kernels.backends.triton.dwconv_gradients import parameter_gradients
from convnext_kernels.backends.triton.dwconv_problem import Call
from convnext_kernels.backends.triton.launch import prepared

__all__ = ["backward", "convolve", "forward", "input_gradient", "packed_weight", "parameter_gradients"]


@prepared
def forward(call: Call, out: Tensor | None = None) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is like x, or written to `out` in its dtype and strides."""
    if out is None:
        out = call.result()
    return convolve(call.x, call, call.bias, None, out, gradient=False)


def input_gradient(dy: Tensor, call: Call, residual: Tensor | None = None) -> Tensor:
    """Return dx = dy (*) flipped weight [+ residual], like x; with a residual in its dtype."""
    dx = torch.empty_like(call.x, dtype=None if residual is None else residual.dtype)
    return convolve(dy, call, None, residual, dx, gradient=True)


@prepared
def backward(dy: Tensor, call: Call, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    dx = dw = db = None
    if needs[0]:
        dx = input_gradient(dy, call)
    if needs[1] or needs[2]:
        dw, db = parameter_gradients(dy, call, needs[1], needs[2])
    return [gradient for gradient in (dx, dw, db) if gradient is not None]
