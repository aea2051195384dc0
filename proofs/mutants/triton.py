"""Mutants of the Triton kernels and of the common code of the GPU backends, run in Triton's interpreter."""

from collections.abc import Iterator

from mutants import Mutant, parity, within


def _in(file: str, tests: tuple[str, ...], *mutants: Mutant) -> Iterator[Mutant]:
    return within(f"convnext_kernels/backends/{file}", tests, "python", *mutants)


def _parity(expression: str) -> tuple[str, ...]:
    return parity(f"triton and {expression}")


DWCONV, DWCONV_GRADIENTS = _parity("dwconv and forward"), _parity("dwconv and gradients")
LAYERNORM, LAYERNORM_GRADIENTS = _parity("layernorm and forward"), _parity("layernorm and gradients")
GRN, GRN_GRADIENTS = _parity("grn and forward"), _parity("grn and gradients")
MLP, MLP_GRADIENTS = _parity("mlp and forward"), _parity("mlp and gradients")
# the rows of tests/shapes.py with other norms and activations
_VARIANTS = "mlp and (rms or simple or mish or quick)"
VARIANTS_GRADIENTS = _parity(f"{_VARIANTS} and gradients")
DOWNSAMPLE = _parity("downsample and forward")

MUTANTS = [
    *_in(
        "triton/kernels/dwconv_forward.py",
        DWCONV,
        Mutant("columns left of the image are loaded", "both(inside, column >= -(FIRST + j))", "inside"),
        Mutant("a strip lacks the last row below it", "tl.minimum(end + P, own)", "tl.minimum(end + P - 1, own)"),
        Mutant(
            "the input gradient turns the weights in one direction only",
            "(KH - 1 - i // KW) * WEIGHT[1] + (KW - 1 - i % KW) * WEIGHT[2]",
            "(KH - 1 - i // KW) * WEIGHT[1] + (i % KW) * WEIGHT[2]",
            tests=DWCONV_GRADIENTS,
        ),
    ),
    *_in(
        "triton/launch.py",
        ("tests/backends/triton/test_launch.py",),
        Mutant("descriptors have no memory", "triton.set_allocator(_scratch)", "pass"),
    ),
    *_in(
        "triton/kernels/dependent.py",
        ("tests/backends/triton/test_launch.py",),
        Mutant("a kernel does not wait for the one before it", "gdc_wait()", "pass"),
    ),
    *_in(
        "triton/kernels/dwconv_rows.py",
        DWCONV,
        Mutant(
            "with stride 2 taps between the rows of dy are added",
            "low += odd",
            "low += 0 * odd",
            tests=DWCONV_GRADIENTS,
        ),
        Mutant(
            "the last kernel plane of a volume is left out",
            "(x_depth - 1) * UP - z * DOWN + 1, KD)",
            "(x_depth - 1) * UP - z * DOWN, KD)",
            tests=_parity("dwconv3d and forward"),
        ),
    ),
    *_in(
        "triton/kernels/dwconv_wgrad.py",
        _parity("dwconv3d and gradients"),
        Mutant("kernel planes write over one another", "out += kd * (KH * KW * C)", "out += 0 * kd"),
    ),
    *_in(
        "triton/kernels/dwconv_toeplitz.py",
        ("tests/backends/triton/test_dwconv_toeplitz.py",),
        Mutant(
            "the copies of the weights are moved the other way",
            "at - FIRST - shift + KW // 2",
            "at - FIRST + shift + KW // 2",
        ),
        Mutant(
            "rows above a group have the first kernel row instead of none",
            "tl.where((kh >= 0) & (kh < KH), kh, KH)",
            "tl.where(kh < KH, tl.maximum(kh, 0), KH)",
        ),
    ),
    *_in(
        "triton/dwconv_images.py",
        ("tests/ops/test_layouts.py", "-k", "triton and dwconv"),
        Mutant(
            "a result in other strides is not copied back",
            "return out if target.tensor is out else out.copy_(target.tensor)",
            "return out",
        ),
        Mutant(
            "neighbouring channels are loaded in twos from odd addresses",
            "aligned(image.tensor, 2 * image.tensor.element_size())",
            "True",
            tests=("tests/backends/triton/test_dwconv.py",),
        ),
    ),
    *_in(
        "triton/kernels/dwconv_lines.py",
        _parity("dwconv and forward and (1x11 or 11x1)"),
        Mutant("columns are read as rows", "step = width.to(tl.int64) * C", "step = C"),
    ),
    *_in(
        "triton/kernels/dwconv_lines.py",
        ("tests/backends/triton/test_dwconv.py", "-k", "pairs_of"),
        Mutant("the second channel gets the first's sums", "sums[v * K + k], c + v", "sums[k], c + v"),
    ),
    *_in(
        "triton/kernels/dwconv_wgrad.py",
        DWCONV_GRADIENTS,
        Mutant("rows that only the last kernel row meets are left out", "own - P + kh + R - 1)", "own - P + kh)"),
    ),
    *_in(
        "triton/layernorm.py",
        LAYERNORM,
        Mutant(
            "the variance counts channels beyond the last",
            "d = tl.where(inside, x - mean[:, None], 0.0)",
            "d = x - mean[:, None]",
            quick=True,
        ),
        Mutant(
            "the input gradient lacks its mean",
            "rstd * (g - along_mean - xhat * along_xhat)",
            "rstd * (g - xhat * along_xhat)",
            tests=LAYERNORM_GRADIENTS,
        ),
        Mutant(
            "samples are merged although patches end with each",
            "extent(source, out, merge=patch == 1 and not adaptive)",
            "extent(source, out)",
            tests=("tests/ops/test_layouts.py", "-k", "triton and downsample"),
        ),
    ),
    *_in(
        "triton/kernels/pixels.py",
        DOWNSAMPLE,
        Mutant(
            "rows and columns of a patch are swapped",
            "row = (patch * PATCH + h % PATCH) * PATCH + w % PATCH",
            "row = (patch * PATCH + w % PATCH) * PATCH + h % PATCH",
        ),
    ),
    *_in(
        "triton/reduce.py",
        LAYERNORM_GRADIENTS,
        Mutant(
            "the last part is forgotten",
            "for start in range(begin, end, BLOCK_P):",
            "for start in range(begin, end - 1, BLOCK_P):",
        ),
    ),
    *_in(
        "triton/grn.py",
        GRN,
        Mutant(
            "all samples share the first one's sums",
            "base = partials_ptr + n.to(tl.int64) * tiles * C",
            "base = partials_ptr",
        ),
        Mutant(
            "the gradient's mean is of padded channels",
            "s = tl.sum(norm, axis=0) / C + eps",
            "s = tl.sum(norm, axis=0) / BLOCK_C + eps",
            tests=GRN_GRADIENTS,
        ),
    ),
    *_in(
        "triton/kernels/mlp_fused.py",
        MLP,
        Mutant(
            "GRN's sums count pixels beyond the last",
            "tl.where(inside[:, None], square * square, 0.0)",
            "square * square",
        ),
        Mutant(
            "GELU is kept in the place of what enters it",
            "tl.store(where, u.to(compute)",
            "tl.store(where, activate(u, ACTIVATION).to(compute)",
            tests=("tests/backends/triton/test_products.py", "-k", "enters_the_activation"),
        ),
    ),
    *_in(
        "triton/kernels/mlp_gemm.py",
        MLP,
        Mutant("the variance is about the first channel", "/ C - deviation * deviation", "/ C"),
        Mutant(
            "all samples read the hidden of the first",
            "row = (n.to(tl.int64) * pixels + p)[:, None] * HIDDEN",
            "row = p.to(tl.int64)[:, None] * HIDDEN",
        ),
        Mutant(
            "through descriptors all samples read the hidden of the first",
            "tile_row = n * pixels + (tile % tiles) * BM",
            "tile_row = (tile % tiles) * BM",
            tests=("tests/backends/triton/test_products.py", "-k", "with_grn and tma"),
        ),
    ),
    *_in(
        "triton/kernels/mlp_backward.py",
        ("tests/backends/triton/test_products.py", "-k", "separate_kernels"),
        Mutant(
            "the weight gradient forgets the drop factor",
            "a.to(tl.float32) * load_vector(drop_scale_ptr, p // sample_pixels, inside)[None, :]",
            "a.to(tl.float32)",
        ),
    ),
    *_in(
        "triton/kernels/mlp_fused_backward.py",
        ("tests/backends/triton/test_products.py", "-k", "variants_with_the_hidden_on_chip and v2-layer"),
        Mutant("V2's pixels past the end have gradients", "du = tl.where(mask, du, 0.0)", "du += 0.0"),
        Mutant(
            "splits write over one another",
            "tl.program_id(1).to(tl.int64) * (C * HIDDEN)",
            "0",
            tests=("tests/backends/triton/test_products.py", "-k", "on_chip and recomputed and c40 and h64-p16"),
        ),
    ),
    *_in(
        "triton/kernels/block_fused.py",
        ("tests/backends/triton/test_block_fused.py", "-k", "every_candidate and tails and dtype0"),
        Mutant("taps left of the image are of the row above", "(left >= 0) & (left < width)", "(left < width)"),
    ),
    *_in(
        "triton/mlp_pointwise.py",
        MLP_GRADIENTS,
        Mutant("the products' gradient lacks gamma", "dz = d * load_vector(gamma_ptr, c, c < C)[None, :]", "dz = d"),
    ),
    *_in(
        "triton/kernels/activations.py",
        VARIANTS_GRADIENTS,
        Mutant("the gate's slope is left out", "s + x * s * (1.0 - s) * inner_slope", "s"),
    ),
    *_in(
        "triton/kernels/mlp_tiles.py",
        VARIANTS_GRADIENTS,
        Mutant("SimpleNorm has the biased variance", "variance = variance * (C / (C - 1))", "pass"),
    ),
    *_in(
        "gpu/downsample.py",
        DOWNSAMPLE,
        Mutant(
            "rows and columns of the kernel are swapped",
            "weight.detach().permute(0, 2, 3, 1)",
            "weight.detach().permute(0, 3, 2, 1)",
        ),
    ),
    *_in(
        "triton/kernels/mlp_weights.py",
        ("tests/backends/triton/test_weights.py",),
        Mutant("writes that PyTorch does not count are not seen", "tl.sum(hashes + ", "tl.sum("),
        Mutant(
            "folded weights do not follow the norm's bias",
            "hashes += _hashes(norm_bias_ptr, column, column < C, column, 1 << 30)",
            "hashes += 0",
        ),
    ),
    *_in(
        "triton/weights.py",
        ("tests/backends/triton/test_weights.py",),
        Mutant("only the first version is compared", "if entry.versions != versions:", "if not entry.versions:"),
        Mutant("storages are told apart by their addresses", "(*[s._cdata for s in storages], ", "("),
        Mutant("streams share copies", "entry is None or entry.stream != stream", "entry is None"),
    ),
]
