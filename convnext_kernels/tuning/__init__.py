"""How the kernels' configurations are chosen: the GPUs' data sheets, a cost model, a cache of timed choices."""

from convnext_kernels.tuning.cost import Candidate, Work, cublas_product, seconds
from convnext_kernels.tuning.gpus import GPUS, Gpu, for_arch, for_device, named
from convnext_kernels.tuning.pick import forced, forcing, pick, remembered

__all__ = [
    "GPUS",
    "Candidate",
    "Gpu",
    "Work",
    "cublas_product",
    "for_arch",
    "for_device",
    "forced",
    "forcing",
    "named",
    "pick",
    "remembered",
    "seconds",
]
