"""The least work of a case: floating-point operations and bytes, counted from the shapes.

FLOPs are 2 x the multiply-adds of convolutions and matmuls, without normalisation, GELU and sums, as in
`torch.utils.flop_counter`; a test compares these formulas with it. The ConvNeXt papers publish multiply-adds. Bytes are
the least traffic between memory and chip, with everything else kept on the chip: input and output activations once,
parameters once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The least work of one call. Fields without `flops` in their names count elements."""

    flops: int
    depthwise_flops: int  # part of `flops`
    x: int  # the input, which a backward pass reads again
    others: int  # other activations read and written
    parameters: int
    padding_flops: int = 0  # part of `depthwise_flops`: taps outside the image, which a kernel may skip

    def bytes(self, element: int) -> int:
        """Least bytes, with `element` bytes per element."""
        return element * (self.x + self.others + self.parameters)

    def training(self) -> "Work":
        """Forward and backward: the backward pass has two matmuls, dgrad and wgrad, for each of the forward pass.

        It writes the gradients of what the forward pass reads, reads the gradients of what that writes, and reads x
        again. Parameters are read twice and their gradients written.
        """
        activations = 2 * (self.x + self.others) + self.x
        return Work(
            3 * self.flops,
            3 * self.depthwise_flops,
            self.x,
            activations - self.x,
            3 * self.parameters,
            3 * self.padding_flops,
        )


def dwconv(n: int, c: int, size: int, kernel: int | tuple[int, int], stride: int = 1) -> Work:
    """Depthwise convolution with bias, "same" padding; taps outside the image are counted, as usual.

    `kernel`: one side, or height and width.
    """
    elements, outputs = n * size * size * c, -(-size // stride)
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel

    def inside(side: int) -> int:
        """Taps inside the image, along one side, of all outputs."""
        reach = side // 2
        return sum(min(i, reach) + 1 + min(size - 1 - i, reach) for i in range(0, size, stride))

    flops = 2 * n * c * outputs * outputs * height * width
    padding = flops - 2 * n * c * inside(height) * inside(width)
    return Work(flops, flops, elements, n * c * outputs * outputs, c * (height * width + 1), padding)


def dwconv3d(n: int, c: int, size: int, kernel: int) -> Work:
    """Depthwise convolution of a cube with a cubic kernel, bias, "same" padding."""
    elements, reach = n * c * size**3, kernel // 2
    inside = sum(min(i, reach) + 1 + min(size - 1 - i, reach) for i in range(size))
    flops = 2 * elements * kernel**3
    return Work(flops, flops, elements, elements, c * (kernel**3 + 1), flops - 2 * n * c * inside**3)


def layernorm(n: int, c: int, size: int) -> Work:
    """LayerNorm over the channels: no matmul, only memory traffic."""
    elements = n * size * size * c
    return Work(0, 0, elements, elements, 2 * c)


def mlp(n: int, c: int, size: int, grn: bool = False) -> Work:
    """LN -> Linear C to 4C -> GELU -> [GRN] -> Linear 4C to C -> gamma -> + residual, a separate tensor."""
    return _mlp(n * size * size * c, c, grn)


def _mlp(elements: int, c: int, grn: bool) -> Work:
    parameters = 2 * c + 4 * c * c + 4 * c + 4 * c * c + c + (8 * c if grn else c)
    return Work(16 * elements * c, 0, elements, 2 * elements, parameters)


def block(n: int, c: int, size: int, grn: bool = False, kernel: int = 7) -> Work:
    """The ConvNeXt block (arXiv 2201.03545, figure 4): x in, x out."""
    first, second = dwconv(n, c, size, kernel), mlp(n, c, size, grn)
    parameters = first.parameters + second.parameters
    return Work(first.flops + second.flops, first.flops, first.x, first.others, parameters, first.padding_flops)


def block1d(n: int, c: int, length: int, grn: bool = False, kernel: int = 7) -> Work:
    """The block over time: x (N, C, L) in, x out."""
    elements, reach = n * c * length, kernel // 2
    inside = sum(min(i, reach) + 1 + min(length - 1 - i, reach) for i in range(length))
    flops, second = 2 * elements * kernel, _mlp(elements, c, grn)
    parameters = c * (kernel + 1) + second.parameters
    return Work(flops + second.flops, flops, elements, elements, parameters, flops - 2 * n * c * inside)


def convnext(
    n: int, size: int, depths: tuple[int, ...], dims: tuple[int, ...], grn: bool = False, classes: int = 1000
) -> Work:
    """A whole ConvNeXt: 4x4 stem, stages with 2x2 downsampling between, head (arXiv 2201.03545, table 9)."""
    side = size // 4
    flops = 2 * n * side * side * dims[0] * 3 * 16
    parameters = dims[0] * (3 * 16 + 1) + 2 * dims[0]
    depthwise = padding = 0
    before = dims[0]
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            side //= 2
            flops += 2 * n * side * side * dim * before * 4
            parameters += 2 * before + dim * (before * 4 + 1)
        part = block(n, dim, side, grn)
        flops += depth * part.flops
        depthwise += depth * part.depthwise_flops
        padding += depth * part.padding_flops
        parameters += depth * part.parameters
        before = dim
    flops += 2 * n * before * classes
    parameters += 2 * before + classes * (before + 1)
    return Work(flops, depthwise, n * 3 * size * size, n * classes, parameters, padding)
