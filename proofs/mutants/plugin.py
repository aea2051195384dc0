"""A pytest plugin for the processes of mutations.py: plan for another GPU, or execute PTX."""

import json
import os
from typing import Any

VARIABLE = "MUTATIONS_GPU"


def pytest_sessionstart(session: Any) -> None:
    from convnext_kernels.backends.cuda import native

    gpu = json.loads(os.environ.get(VARIABLE, "{}"))
    if arch := gpu.pop("executed", None):
        from tests.backends.cuda.executed import executed

        execution = executed(arch)
        execution.__enter__()
        session.config.add_cleanup(lambda: execution.__exit__(None, None, None))
    elif gpu:
        native.extension().set_device(**gpu)
