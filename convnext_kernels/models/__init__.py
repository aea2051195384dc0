"""The networks of the ConvNeXt papers, built from this package's modules."""

from convnext_kernels.models.convnext import ConvNeXt, IsotropicConvNeXt, create_model, list_models
from convnext_kernels.models.weights import FORMATS, export_weights, load_weights, read_state_dict

__all__ = [
    "FORMATS",
    "ConvNeXt",
    "IsotropicConvNeXt",
    "create_model",
    "export_weights",
    "list_models",
    "load_weights",
    "read_state_dict",
]
