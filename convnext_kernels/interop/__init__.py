"""Accelerate models of torchvision, timm, transformers and the official ConvNeXt repositories in place."""

from convnext_kernels.interop.report import AccelerationReport, acceleration_report
from convnext_kernels.interop.swap import accelerate, restore

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "restore"]
