"""The networks of the ConvNeXt papers, built of this package's modules."""

from convnext_kernels.models.convnext import ConvNeXt, IsotropicConvNeXt, create_model, list_models

__all__ = ["ConvNeXt", "IsotropicConvNeXt", "create_model", "list_models"]
