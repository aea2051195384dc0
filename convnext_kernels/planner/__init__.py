"""Which backend serves a call, and why."""

from convnext_kernels.planner.choose import (
    AUTO,
    ENVIRONMENT_VARIABLE,
    BackendStatus,
    check_name,
    choose,
    compiled_for_cuda,
    keeps,
    list_backends,
    requested_backend,
    use_backend,
)

__all__ = [
    "AUTO",
    "ENVIRONMENT_VARIABLE",
    "BackendStatus",
    "check_name",
    "choose",
    "compiled_for_cuda",
    "keeps",
    "list_backends",
    "requested_backend",
    "use_backend",
]
