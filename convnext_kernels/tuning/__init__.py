"""What the kernels' configurations are chosen by: the GPUs' data sheets, a cost model, a cache of timed choices."""

from convnext_kernels.tuning.cost import Candidate, Work, library_product, seconds
from convnext_kernels.tuning.gpus import GPUS, Gpu, for_arch, for_device, named
from convnext_kernels.tuning.pick import forced, pick, remembered

__all__ = [
    "GPUS",
    "Candidate",
    "Gpu",
    "Work",
    "for_arch",
    "for_device",
    "forced",
    "library_product",
    "named",
    "pick",
    "remembered",
    "seconds",
]
