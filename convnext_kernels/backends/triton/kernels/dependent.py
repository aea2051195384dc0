"""Programmatic dependent launch (sm_90 and newer): a kernel's programs start while the kernel before still runs.

Without it they start when the kernel before has ended: launching and scheduling are not hidden. Every kernel with a
parameter PDL calls `wait_for_previous` before anything else, so it reads and writes nothing before the kernel before
has ended and its results can be seen. Only then it lets the next kernel start: so that one waits for all kernels before
it.

Kernels call it by its name, as all device functions: inductor (`inline_kernels`) does not find them through a module.
"""

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: triton.language.constexpr):
    """Wait for the kernels before, then let the next kernel start, which waits for this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
