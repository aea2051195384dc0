"""What dispatch and backends share: the names of the ops, the description of a call, the errors about backends."""

from typing import NamedTuple

import torch

OPS = ("dwconv", "dwconv3d", "layernorm", "grn", "mlp", "block", "downsample")


class BackendError(RuntimeError):
    """A backend that was requested by name does not exist or cannot serve the call; the message says why."""


class UnknownBackendError(BackendError, ValueError):
    """No backend has the requested name."""


class OpSpec(NamedTuple):
    """One op at one configuration. Hashable, so that `dispatch` can remember its choice.

    Sizes that change from call to call (batch, height, width) are left out on purpose: no backend
    refuses a call because of them. (A tuple and not a frozen dataclass: one is made at every call, and making it
    takes 0.7 us less.)
    """

    op: str  # a name of OPS
    device: str  # torch device type: "cpu", "cuda", ...
    dtype: torch.dtype  # of x and of the result
    compute_dtype: torch.dtype  # in which the matmuls and the convolution read their inputs; differs under autocast
    channels: int
    kernel_size: tuple[int, ...] = (0, 0)  # of the convolution: height, width, before these the depth; 0: none
    dilation: tuple[int, int] = (1, 1)
    stride: int = 1
    hidden: int = 0  # width of the hidden activations, or of the result of downsample; 0: neither
    grn: bool = False
    backward: bool = False
    norm: str = "layer"  # of the inverted bottleneck, as its activation: names of `variants`
    activation: str = "gelu"


class MlpParameters(NamedTuple):
    """Parameters of the inverted bottleneck under the official names; shapes as the ops accept them.

    Vectors may come in any shape with the right number of elements ((C,), (C, 1, 1), (1, 1, 1, 4C)...), the
    two pointwise weights as Linear (out, in) or as 1x1 convolution (out, in, 1, 1).
    """

    norm_weight: torch.Tensor  # (C,), or (N, C): AdaLayerNorm, where each sample has its own
    norm_bias: torch.Tensor | None  # like it; only LayerNorm has one
    pwconv1_weight: torch.Tensor
    pwconv1_bias: torch.Tensor | None
    pwconv2_weight: torch.Tensor
    pwconv2_bias: torch.Tensor | None
    gamma: torch.Tensor | None
    grn_weight: torch.Tensor | None
    grn_bias: torch.Tensor | None

    @property
    def adaptive(self) -> bool:
        """Whether each sample has a weight and a bias of LayerNorm."""
        return self.norm_weight.numel() != self.pwconv1_weight.shape[1]
