"""``convnext_kernels::grn``: global response normalisation of (N, C, H, W), ConvNeXt V2."""

from convnext_kernels.ops.compose import response_normalised
from convnext_kernels.ops.norm import define_norm

define_norm("grn", response_normalised)
