"""What PyTorch calls differently from version to version, and the private names that this package needs.

Nothing else in the package uses a private function or class of `torch`, so a new PyTorch is mended here. The gate
`versions` (CONTRIBUTING.md) runs the oldest and the intermediate versions, the everyday tests the newest.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import _broadcast_to_and_flatten as broadcast_to_and_flatten
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "OP_TAGS",
    "SETTINGS",
    "TRACED",
    "TorchDispatchMode",
    "apply_of",
    "below_autograd",
    "broadcast_to_and_flatten",
    "current_stream",
    "data_ptr",
    "empty_strided_cpu",
    "exporting",
    "forward_mode_active",
    "functional_rules",
    "plain",
    "same_facts",
    "suggest_memory_format",
    "tf32_allowed",
    "transforms",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "version",
    "watched",
    "without_autocast_key",
]

TRACED = (FakeTensor, FunctionalTensor)  # torch.export replaces plain tensors by these

below_autograd = torch._C._AutoDispatchBelowAutograd  # a context in which operators skip autograd
data_ptr, version = torch._C.TensorBase.data_ptr, torch._C.TensorBase._version  # descriptors
# (size, stride, dtype) -> tensor: what inductor's code calls, past the dispatcher.
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
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


# PyTorch 2.6 has no flag for `torch.export`; `_is_compiling_flag` is the same there, except with strict=True, where
# neither is set. `torch.compiler.is_exporting` is true under `torch.compile` as well in 2.7 to 2.11.
_EXPORTING = "_is_exporting_flag" if hasattr(torch.compiler, "_is_exporting_flag") else "_is_compiling_flag"


def exporting() -> bool:
    """Whether `torch.export` is tracing, also for `torch.onnx.export(dynamo=True)`; False under `torch.compile`."""
    return getattr(torch.compiler, _EXPORTING)


@contextmanager
def functional_rules(namespace: str, rules: Mapping[str, Callable]) -> Iterator[None]:
    """Let compilers see, inside a ``with`` block, what ``rules[op](mode, op, types, arguments)`` calls, not the op."""
    library = torch.library.Library(namespace, "FRAGMENT")
    try:
        for name, rule in rules.items():
            torch.library.register_torch_dispatch(f"{namespace}::{name}", FunctionalTensorMode, rule, lib=library)
        yield
    finally:
        library._destroy()


def forward_mode_active() -> bool:
    """Whether forward-mode AD is running."""
    return forward_ad._current_level >= 0


def transforms() -> list[str]:
    """The names of the running transforms of `torch.func`, the outermost first: "Grad", "Vmap", "Jvp", ..."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack()]


def plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch's dispatcher would call the kernel of an op for the CPU or a GPU with just these tensors.

    That is so without subclasses, modes, transforms, autocast, lazy negation (`torch.Tensor.is_neg`) and tracers.
    Autograd is not considered.
    """
    if torch._C._len_torch_dispatch_stack() or transforms_active() or forward_mode_active() or torch.jit.is_tracing():
        return False
    for t in tensors:
        if type(t) not in _PLAIN or t.layout is not torch.strided or t.is_neg() or t.is_conj():
            return False
        if t.device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(t.device.type):
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(t):  # also after the transform has ended
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def current_stream(device: int) -> int:
    """The address of the current stream of a GPU, without the object around it, which takes 1 us."""
    return torch._C._cuda_getCurrentRawStream(device)


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` for where no transform is active, which it looks for at every argument."""
    return super(torch.autograd.Function, function).apply


def watched() -> bool:
    """Whether somebody wants to see the calls of operators: a profiler or a `torch.overrides.TorchFunctionMode`."""
    return torch._C._autograd._profiler_enabled() or torch._C._len_torch_function_stack() > 0


# What `watched`, `forward_mode_active` and the look for process groups depend on, see `calls.SETTINGS`.
SETTINGS = (
    torch._C._autograd._profiler_enabled,
    torch._C._len_torch_function_stack,
    functools.partial(vars(forward_ad).get, "_current_level"),
    *([torch.distributed.is_initialized] if torch.distributed.is_available() else []),
)


def same_facts(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function that says whether as many other tensors are like these to PyTorch's dispatcher and to a kernel.

    It compares types, sizes, strides, dtypes, devices, `requires_grad` and the dispatch keys, with those that modes,
    transforms and autocast add in this thread. These are the guards of `torch.compile`: 1 us for 13 tensors, in Python
    8 us. False if the same tensor is passed twice.
    """
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def without_autocast_key(device: str) -> object:
    """A context in which operators skip autocast for `device` ("cpu" or "cuda"): for a kernel of autocast itself."""
    key = torch._C.DispatchKey.AutocastCUDA if device == "cuda" else torch._C.DispatchKey.AutocastCPU
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


_REDUCED = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


def exact_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.mm` that adds partial sums in fp32, whatever `torch.backends.cuda.matmul` allows for 16 bits."""
    name, settings = _REDUCED.get(a.dtype), torch.backends.cuda.matmul
    if not a.is_cuda or name is None or not getattr(settings, name):
        return torch.mm(a, b)
    setattr(settings, name, False)
    try:
        return torch.mm(a, b)
    finally:
        setattr(settings, name, True)
