"""How kernels' configurations and backends are chosen: data sheets, a cost model, timed choices and their cache."""

from convnext_kernels.tuning.cache import load
from convnext_kernels.tuning.cost import Candidate, Work, cublas_product, seconds
from convnext_kernels.tuning.gpus import GPUS, Gpu, for_arch, for_device, named
from convnext_kernels.tuning.pick import SETTINGS, forced, forcing, pick, predicted, remembered

__all__ = [
    "GPUS",
    "SETTINGS",
    "Candidate",
    "Gpu",
    "Work",
    "cublas_product",
    "for_arch",
    "for_device",
    "forced",
    "forcing",
    "load",
    "named",
    "pick",
    "predicted",
    "remembered",
    "seconds",
]
