"""What the kernels of layernorm.py and layernorm_wide.py share."""

import triton
import triton.language as tl

COUNTS = ["pixels", "tiles", "total", "height", "width"]  # vary from call to call: kernels are not recompiled for them


@triton.jit
def patch_order(p, height, width, PATCH: tl.constexpr):
    """The row of pixel p of its sample in the order of PATCH x PATCH patches, and whether a whole patch contains it."""
    h, w = p // width, p % width
    patch = (h // PATCH) * (width // PATCH) + w // PATCH
    row = (patch * PATCH + h % PATCH) * PATCH + w % PATCH
    return row, (h < height // PATCH * PATCH) & (w < width // PATCH * PATCH)
