"""The definition of each op: schema, argument checks, fake kernel, autograd and autocast. There are no kernels here.

Importing this package registers ``torch.ops.convnext_kernels.*``. Every op has one implementation for all devices,
which asks `dispatch` for a backend and calls the backend's file of the same name.
"""

from convnext_kernels.ops import block, downsample, dwconv, dwconv3d, dwconv3d_transposed, grn, layernorm, mlp

__all__ = ["block", "downsample", "dwconv", "dwconv3d", "dwconv3d_transposed", "grn", "layernorm", "mlp"]
