"""Reference backend: plain PyTorch, any device, any floating dtype. Every other backend is compared with it."""

import torch

from convnext_kernels.spec import OpSpec

DEVICES = None  # all


def unavailable() -> str | None:
    """None: eager runs wherever PyTorch runs."""
    return None


def refuses(spec: OpSpec) -> str | None:
    """None: eager serves every op on every device."""
    return None


def describe() -> str:
    """One line for ``convnext-kernels info``."""
    return f"PyTorch {torch.__version__} operators, forward and backward, any device and dtype"
