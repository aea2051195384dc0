"""What PyTorch calls differently from version to version, and the private names that this package needs.

Nothing else in the package uses a private function or class of `torch`, so a new PyTorch is mended here. The gate
`versions` (CONTRIBUTING.md) runs the oldest and the intermediate versions, the everyday tests the newest.
"""

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import _broadcast_to_and_flatten as broadcast_to_and_flatten
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "OP_TAGS",
    "TRACED",
    "TorchDispatchMode",
    "below_autograd",
    "broadcast_to_and_flatten",
    "forward_mode_active",
    "suggest_memory_format",
    "tf32_allowed",
    "transforms",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "without_autocast_key",
]

TRACED = (FakeTensor, FunctionalTensor)  # torch.export replaces plain tensors by these

below_autograd = torch._C._AutoDispatchBelowAutograd  # a context in which operators skip autograd
suggest_memory_format = torch._prims_common.suggest_memory_format
transforms_active = torch._C._are_functorch_transforms_active  # whether a transform of `torch.func` is running

# Tags of every op. Inductor must pass tensors with the strides of the traced ones: saved tensors of a backward op are
# channels_last. Without the second tag 2.6 makes them contiguous; versions that know a stricter tag keep all strides.
OP_TAGS = (
    torch.Tag.pt2_compliant_tag,
    *(() if hasattr(torch.Tag, "needs_exact_strides") else (torch.Tag.needs_fixed_stride_order,)),
)

# PyTorch 2.9 brought `fp32_precision`. Once that was set, reading `allow_tf32` raises RuntimeError; it shows in
# `fp32_precision` what was set by either name.
_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def tf32_allowed() -> bool:
    """Whether matmuls of fp32 tensors on a GPU may round to TF32."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if _HAS_FP32_PRECISION else matmul.allow_tf32


def forward_mode_active() -> bool:
    """Whether forward-mode AD is running."""
    return forward_ad._current_level >= 0


def transforms() -> list[str]:
    """The names of the running transforms of `torch.func`, the outermost first: "Grad", "Vmap", "Jvp", ..."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack()]


def without_autocast_key(device: str) -> object:
    """A context in which operators skip autocast for `device` ("cpu" or "cuda"): for a kernel of autocast itself."""
    key = torch._C.DispatchKey.AutocastCUDA if device == "cuda" else torch._C.DispatchKey.AutocastCPU
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))
