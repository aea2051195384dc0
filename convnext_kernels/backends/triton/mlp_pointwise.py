"""The steps of the bottleneck between the matmuls of cuBLAS; each kernel reads and writes its data once.

h = act(u), and its gradient; out = residual + s * gamma * z; s * dout. fp32 uses this plan: on the fp32 lanes cuBLAS
is near the peak, and it obeys torch's TF32 switches.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate, activate_and_derivative
from convnext_kernels.backends.triton.kernels.mlp_tiles import load_vector, store_output
from convnext_kernels.backends.triton.kernels.pixels import offsets


@triton.jit(do_not_specialize=["elements"])
def activation_kernel(u_ptr, h_ptr, elements, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """Compute h = act(u), element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, activate(u, ACTIVATION).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["elements"])
def activation_bwd_kernel(dh_ptr, u_ptr, du_ptr, elements, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """Compute du = dh * act'(u), element by element; du may be dh."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    _, derivative = activate_and_derivative(u, ACTIVATION)
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(du_ptr + at, (dh * derivative).to(du_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts_stride", "pixels", "tiles", "sample_pixels"])
def mlp_output_kernel(
    z_ptr,  # (parts, N * HW, C) dense, summed in this order
    parts_stride,
    bias_ptr,
    gamma_ptr,
    drop_scale_ptr,
    residual_ptr,
    out_ptr,
    rounded_ptr,  # as in `mlp_project_kernel`
    pixels,
    tiles,
    sample_pixels,
    stride_rn,
    stride_rp,
    stride_rc,
    stride_on,
    stride_op,
    stride_oc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute out = residual + s * gamma * (z + bias); one program: BLOCK_P pixels of one sample, BLOCK_C channels."""
    columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // columns
    n = tile // tiles
    p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = p < pixels
    where = z_ptr + (n.to(tl.int64) * pixels + p)[:, None] * C + c[None, :]
    mask = inside[:, None] & (c < C)[None, :]
    z = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        z += tl.load(where + part * parts_stride, mask=mask, other=0.0).to(tl.float32)
    parameters = (bias_ptr, gamma_ptr, drop_scale_ptr)
    residual = (residual_ptr, stride_rn, stride_rp, stride_rc)
    out = (out_ptr, rounded_ptr, stride_on, stride_op, stride_oc)
    store_output(z, parameters, residual, out, n, p, c, inside, sample_pixels, C)


@triton.jit(do_not_specialize=["pixels", "tiles", "sample_pixels"])
def scaled_gradient_kernel(
    dout_ptr,
    gamma_ptr,
    drop_scale_ptr,
    d_ptr,  # (N * HW, C) dense: s * dout
    dz_ptr,  # the same for s * gamma * dout, or None
    pixels,
    tiles,
    sample_pixels,
    stride_n,
    stride_p,
    stride_c,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The incoming gradient as the matmuls read it; one program: BLOCK_P pixels of one sample, BLOCK_C channels."""
    columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // columns
    n = tile // tiles
    p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels)[:, None] & (c < C)[None, :]
    d = tl.load(dout_ptr + offsets(n, p, c, stride_n, stride_p, stride_c), mask=mask, other=0.0).to(tl.float32)
    if drop_scale_ptr is not None:
        d *= load_vector(drop_scale_ptr, n + p // sample_pixels, p < pixels)[:, None]
    where = (n.to(tl.int64) * pixels + p)[:, None] * C + c[None, :]
    tl.store(d_ptr + where, d.to(d_ptr.dtype.element_ty), mask=mask)
    if dz_ptr is not None:
        dz = d * load_vector(gamma_ptr, c, c < C)[None, :]
        tl.store(dz_ptr + where, dz.to(dz_ptr.dtype.element_ty), mask=mask)
