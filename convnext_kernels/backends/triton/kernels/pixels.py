"""What kernels that walk over rows of pixels share."""

import triton
import triton.language as tl

COUNTS = ["pixels", "tiles", "total", "height", "width"]  # vary from call to call: kernels are not recompiled for them


@triton.jit
def offsets(n, p, c, stride_n, stride_p, stride_c):
    """Offsets (P, C) of elements; int64, since one sample alone may pass 2^31."""
    return n.to(tl.int64) * stride_n + (p.to(tl.int64) * stride_p)[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@triton.jit
def patch_order(p, height, width, PATCH: tl.constexpr):
    """The row of pixel p of its sample in the order of PATCH x PATCH patches, and whether a whole patch contains it."""
    h, w = p // width, p % width
    patch = (h // PATCH) * (width // PATCH) + w // PATCH
    row = (patch * PATCH + h % PATCH) * PATCH + w % PATCH
    return row, (h < height // PATCH * PATCH) & (w < width // PATCH * PATCH)
