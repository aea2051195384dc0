"""``convnext_kernels::layernorm``: LayerNorm, RMSNorm or SimpleNorm over the channels of (N, C, H, W)."""

from convnext_kernels.ops.compose import normalised
from convnext_kernels.ops.norm import define_norm

define_norm("layernorm", normalised, norms=True)
