"""Mutants of the CPU kernels (csrc/cpu) and of their bindings."""

from collections.abc import Iterator

from mutants import Mutant, parity, within


def _in(file: str, tests: tuple[str, ...], *mutants: Mutant, isa: str = "avx2") -> Iterator[Mutant]:
    return within(f"csrc/{file}", tests, isa, *mutants)


def _parity(expression: str, isa: str = "avx2") -> tuple[str, ...]:
    return parity(f"cpu-{isa} and {expression}")


DWCONV, DWCONV_GRADIENTS = _parity("dwconv and forward"), _parity("dwconv and gradients")
LAYERNORM, LAYERNORM_GRADIENTS = _parity("layernorm and forward"), _parity("layernorm and gradients")
GRN, GRN_GRADIENTS = _parity("grn and forward"), _parity("grn and gradients")
MLP, MLP_GRADIENTS = _parity("mlp and forward"), _parity("mlp and gradients")
DOWNSAMPLE, DOWNSAMPLE_GRADIENTS = _parity("downsample and forward"), _parity("downsample and gradients")
# the rows of tests/shapes.py with other norms and activations
VARIANTS = _parity("mlp and forward and (rms or simple)")
BF16 = _parity("mlp and forward", "avx512bf16")
CHANGED = (
    "tests/backends/test_stale_weights.py",
    "-k",
    "cpu and one_parameter and (data_mul or data_swap or element_in_place)",
)


MUTANTS = [
    *_in(
        "cpu/dwconv_taps.h",
        DWCONV,
        Mutant(
            "with stride 2 the odd taps take the weights of others",
            "(k ? (g_.along.taps + 1) / 2 : 0)",
            "(k ? g_.along.taps / 2 : 0)",
        ),
        Mutant(
            "the last plane of a volume is not read",
            "(depth.half & scaled) || at >= depth.in)",
            "(depth.half & scaled) || at + 1 >= depth.in)",
            tests=_parity("dwconv3d and forward"),
        ),
    ),
    *_in(
        "cpu/dwconv.cpp",
        _parity("block and gradients"),
        Mutant(
            "the residual is read a register apart",
            "load_tap<PARTIAL>(residual + j * step",
            "load_tap<PARTIAL>(residual + j * kLanes",
        ),
        Mutant(
            "the taps of a narrow image are not transposed",
            "(tap - k + column * g.along.taps + row)",
            "tap",
            tests=DWCONV,
        ),
    ),
    *_in(
        "cpu/dwconv_wgrad.cpp",
        _parity("dwconv3d and gradients"),
        Mutant(
            "planes of x take one another's place in the scratch",
            "const int64_t slot = i % p.held;",
            "const int64_t slot = 0;",
        ),
    ),
    *_in(
        "cpu/dwconv_wgrad.cpp",
        DWCONV_GRADIENTS,
        Mutant(
            "the last kernel row is left out",
            "(p.across.in - 1 + p.reach_rows - row) / d + 1)",
            "(p.across.in - 1 + p.reach_rows - row) / d)",
        ),
    ),
    *_in(
        "cpu/layernorm.cpp",
        LAYERNORM_GRADIENTS,
        Mutant(
            "the gradient of every norm is LayerNorm's",
            "a.weight, a.weight, a.norm)",
            "a.weight, a.weight, Norm::kLayer)",
        ),
    ),
    *_in(
        "cpu/layernorm.h",
        LAYERNORM,
        Mutant(
            "the variance counts channels beyond the last", "(read(i, last) - mean) * norm.mask", "read(i, last) - mean"
        ),
        Mutant("SimpleNorm has the biased variance", "splat(count / (count - 1))", "splat(1)", tests=VARIANTS),
    ),
    *_in(
        "cpu/grn.cpp",
        GRN,
        Mutant("all images have the first one's factors", "a.scale + p / a.pixels * padded", "a.scale"),
    ),
    *_in(
        "cpu/grn.h",
        GRN_GRADIENTS,
        Mutant(
            "the gradient divides by the mean norm once, not twice",
            "float(channels) * inverse * inverse",
            "float(channels) * inverse",
        ),
        Mutant(
            "a channel of zeros has no finite gradient",
            "g == 0 ? Vec{} : change",
            "change",
            tests=("tests/ops/test_grn.py", "-k", "zeros and cpu"),
        ),
    ),
    *_in(
        "cpu/mlp.cpp",
        MLP,
        Mutant(
            "the drop factor is that of the tile's row", "drop_scale[(pixel + r) / image]", "drop_scale[pixel / image]"
        ),
        Mutant(
            "all samples have the first one's scale and shift",
            "if (a.norm_step) {",
            "if (false) {",
            tests=("tests/ops/test_parts.py", "-k", "AdaLayerNorm and cpu"),
        ),
        Mutant(
            "the hidden is kept after GELU",
            "kept + r * hidden, column, hidden, u);",
            "kept + r * hidden, column, hidden, gelu(u));",
            tests=MLP_GRADIENTS,
        ),
    ),
    *_in(
        "cpu/gemm/gemm_f32.h",
        MLP,
        Mutant(
            "a chunk of the sum replaces the one before", "acc[r.value][v.value] + load(sum)", "acc[r.value][v.value]"
        ),
        Mutant(
            "few rows take the even rows of bf16 weights twice",
            'asm("vpand %1, %0, %0" : "+x"(v) : "m"(kHigh))',
            'asm("vpshufb %1, %0, %0" : "+x"(v) : "m"(kLow))',
            tests=_parity("mlp and forward and bfloat16"),
        ),
    ),
    *_in(
        "cpu/gemm/gemm_bf16.h",
        BF16,
        Mutant("a block begins with the tile's first row", "steps * kTile + row % 16 * 64", "steps * kTile"),
        isa="avx512bf16",
    ),
    *_in(
        "cpu/mlp_backward.cpp",
        MLP_GRADIENTS,
        Mutant("gamma's gradient lacks the bias", "+ a.b2[c + r] * of_e[c + r]", ""),
        Mutant(
            "each group replaces the sums before",
            "first ? nullptr : dw1}",
            "nullptr}",
        ),
    ),
    *_in(
        "cpu/downsample.cpp",
        DOWNSAMPLE,
        Mutant(
            "rows and columns of a patch are exchanged",
            "(k / a.patch * a.w + k % a.patch)",
            "(k % a.patch * a.w + k / a.patch)",
        ),
    ),
    *_in(
        "cpu/downsample_backward.cpp",
        DOWNSAMPLE_GRADIENTS,
        Mutant("the weight's sums begin with what was there", "first > 0 ? a.dweight : nullptr}", "a.dweight}"),
    ),
    *_in(
        "cpu/gelu.h",
        MLP_GRADIENTS,
        Mutant("the slope takes the wrong tail", "x > 0 ? 1.0f - tail : tail", "x < 0 ? 1.0f - tail : tail"),
    ),
    *_in(
        "cpu/platform/parallel.h",
        LAYERNORM,
        Mutant(
            "rows that do not divide among the threads are left out",
            "units * (rank_ + 1) / size_ * grain",
            "units / size_ * (rank_ + 1) * grain",
        ),
    ),
    *_in(
        "bindings/forward.cpp",
        _parity("mlp and forward"),
        Mutant(
            "the hidden is kept in another dtype",
            "args.kept_dtype = dtype_of(problem.kept_dtype);",
            "args.kept_dtype = args.dtype;",
            tests=("tests/ops/test_autocast.py", "-k", "bottleneck and cpu-avx2"),
        ),
    ),
    *_in(
        "bindings/repeats.cpp",
        CHANGED,
        Mutant(
            "a repeated call is not asked for the addresses",
            "if (address(tensors[i]) != call.addresses[i]) return false;",
            "",
        ),
        Mutant(
            "a repeated call is not asked for the versions",
            "if (call.versions[i - 1] < 0) continue;",
            "continue;",
            tests=("tests/backends/test_stale_weights.py", "-k", "cpu and single"),
        ),
        Mutant(
            "a repeated call does not read the weights",
            "return call.regions.checksum() == call.checksum;",
            "return true;",
        ),
        Mutant(
            "a repeated call is not asked for the settings",
            "if (!likewise) continue;",
            "",
            tests=("tests/backends/test_stale_weights.py", "-k", "settings"),
        ),
    ),
]
