"""The contract of each op: schema, argument checks, fake kernel, autograd and autocast. No kernels live here.

Importing this package registers ``torch.ops.convnext_kernels.*``. Every op has one entry for all devices; it
asks the planner for a backend and calls that backend's file of the same name.
"""

from convnext_kernels.ops import block, downsample, dwconv, grn, layernorm, mlp

__all__ = ["block", "downsample", "dwconv", "grn", "layernorm", "mlp"]
