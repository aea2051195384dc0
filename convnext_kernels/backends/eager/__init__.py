"""Reference backend: plain PyTorch, any device, any floating dtype. Every other backend is held against it."""

import torch

from convnext_kernels.spec import OpSpec

DEVICES = None  # all


def unavailable() -> str | None:
    """Eager runs wherever PyTorch does."""
    return None


def refuses(spec: OpSpec) -> str | None:
    """Eager serves every op on every device."""
    return None


def describe() -> str:
    """One line for ``convnext-kernels info``."""
    return f"PyTorch {torch.__version__} operators, forward and backward, any device and dtype"
