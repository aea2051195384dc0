"""`convnext-kernels verify` without a GPU: the Triton backend's part of it, on a driver that is no GPU's.

    python proofs/verify_dry_run.py nothing --minutes 1       # launches nothing: numerics are wrong, all else runs
    python proofs/verify_dry_run.py emulator --minutes 1      # executes PTX; needs an emulating driver on the path

The other arguments are those of `verify`. Checks and candidates have small shapes here, models are bf16 as on a GPU.
TRITON_INTERPRET must not be set.
"""

import os
import sys

from checkout import ROOT  # noqa: F401  puts this checkout first on the path

from convnext_kernels.bench import checks, steps, verify

# The processes that `verify` starts import this file too, so the driver is theirs as well.
os.environ.setdefault("CONVNEXT_KERNELS_BACKEND", "triton")
DRIVER = os.environ.setdefault("CNK_DRY_RUN_DRIVER", sys.argv[1] if len(sys.argv) > 1 else "")
if DRIVER == "nothing":
    from host_time import Driver
    from triton.runtime import driver as drivers

    drivers.set_active(Driver(90))
elif DRIVER == "emulator":
    import triton_ptxemu

    triton_ptxemu.install(arch=90)
else:
    sys.exit(__doc__)

steps.DTYPE["cpu"] = "bf16"

if __name__ == "__main__":
    checks.WIDE, checks.SHAPES = (), ((1, 8, 5, 7), (1, 40, 7, 5))
    steps.SIDE = 32
    verify.main(["--device", "cpu", *sys.argv[2:]])
