"""Mutants of the CUDA kernels."""

from collections.abc import Iterator

from mutants import Mutant, parity, within


def _in(file: str, tests: tuple[str, ...], *mutants: Mutant) -> Iterator[Mutant]:
    return within(f"csrc/cuda/{file}", tests, "host", *mutants)


def _without(name: str, context: str, **fields: object) -> Mutant:
    """Return a mutant without the only barrier in `context`."""
    (found,) = (b for b in ("__syncthreads();", "__syncwarp();", "copies_wait();") if b in context)
    assert context.count(found) == 1, context
    return Mutant(name, context, context.replace(found, ";"), **fields)


def _parity(expression: str) -> tuple[str, ...]:
    return parity(f"cuda and {expression}")


def _dwconv(expression: str) -> tuple[str, ...]:
    return "tests/backends/cuda/test_dwconv.py", "-k", f"thread_order and ({expression})"


DWCONV, SMALL = _dwconv("3x3 or 7x7 or odd"), _dwconv("1x1 or 5x5 or odd or dilated")
# A barrier at the end of a loop, and a plan that is not the usual one, need the tests that force both.
ORDER_LAYERNORM = ("tests/backends/cuda/test_norms.py", "-k", "thread_order and (layernorm or downsample)")
ORDER_GRN = ("tests/backends/cuda/test_norms.py", "-k", "thread_order and grn")
ORDER_FUSED = ("tests/backends/cuda/test_mlp.py", "-k", "thread_order")
DWCONV_BLOCKS = _parity("dwconv and (n2-c100 or c40-7x5-k7d1-r4)")  # several chunks of channels, and tiles of a block
LAYERNORM = _parity("(layernorm or downsample) and (c17-7x5-k7d1-r4 or n2-c100 or n1-c24-33x57)")
GRN = _parity("grn and (c17-7x5-k7d1-r4 or n2-c100 or n1-c24-33x57)")
CUBLAS = _parity("(mlp or block) and (c384 or (drop and not float32))")
FUSED = _parity("mlp and (n2-c100 or n3-c40 or c17-7x5 or c16-13x14-k7d1-r4) and not float32")

MUTANTS = [
    *_in(
        "dwconv/dwconv.cu",
        DWCONV,
        _without(
            "weights of the next channels overwrite those in use",
            "__syncthreads();  // the tiles before no longer read these weights",
            tests=DWCONV_BLOCKS,
        ),
        _without("a tile is read before it is there", "s.plane, tile);\n          __syncthreads();"),
        Mutant(
            "weights beyond the last channel are read",
            "k < kChannels && c + k < p.s.c; ++k)",
            "k < kChannels; ++k)",
            proof="asan",
            tests=SMALL,
        ),
    ),
    *_in(
        "dwconv/dwconv_tile.h",
        DWCONV,
        Mutant(
            "a row below the image is staged",
            "last = end < h.count ? end : h.count;",
            "last = end < h.count + 1 ? end : h.count + 1;",
            proof="asan",
        ),
    ),
    *_in(
        "dwconv/dwconv_wgrad.cu",
        DWCONV,
        _without(
            "the next tile overwrites the one in use", "__syncthreads();  // the tile before no longer uses this memory"
        ),
        Mutant(
            "no room for the sums of the last thread",
            "int64_t(p.splits) * tasks * values",
            "(int64_t(p.splits) * tasks - 1) * values",
            proof="asan",
            tests=SMALL,
        ),
    ),
    *_in(
        "layernorm/layernorm.cu",
        LAYERNORM,
        _without("a tile is stored before it is there", "= from[slot + j];\n    }\n    __syncthreads();"),
    ),
    *_in(
        "layernorm/layernorm_rows.h",
        LAYERNORM,
        _without(
            "the warps' sums are read before they are there",
            "__syncthreads();\n  const int first = int(threadIdx.x) / lanes",
            tests=ORDER_LAYERNORM,
        ),
        Mutant(
            "rows and columns of a patch are exchanged",
            "(patch * patches.side + h.remainder) * patches.side + w.remainder",
            "(patch * patches.side + w.remainder) * patches.side + h.remainder",
        ),
    ),
    *_in(
        "layernorm/layernorm_columns.h",
        LAYERNORM,
        Mutant(
            "channels beyond the last are summed",
            "to[k] = first + k * warps < c ? widen(*x) : 0.0f;",
            "to[k] = widen(*x);",
            proof="asan",
        ),
    ),
    *_in(
        "layernorm/layernorm_backward.cu",
        LAYERNORM,
        _without(
            "sums are read before they are there",
            "__syncthreads();\n  for (int i = int(threadIdx.x); i < c;",
            tests=ORDER_LAYERNORM,
        ),
        Mutant(
            "no room for the last sum",
            "(5 * kNormThreads / kWarpSize + sums)",
            "(5 * kNormThreads / kWarpSize + sums - 1)",
            proof="asan",
            tests=ORDER_LAYERNORM,
        ),
    ),
    *_in(
        "reduce.cu",
        LAYERNORM,
        _without(
            "the next columns' sums overwrite those in use",
            "group * p.a.length + c);\n    }\n    __syncthreads();",
            tests=("tests/backends/cuda/test_norms.py", "-k", "partial_sums"),
        ),
    ),
    *_in(
        "grn.cu",
        GRN,
        _without(
            "the next tile's sums overwrite those in use",
            "out[at.tile * p.t.c + at.channel + c] = sum;\n  }\n  __syncthreads();",
            tests=ORDER_GRN,
        ),
    ),
    *_in(
        "mlp/mlp_pointwise.cu",
        CUBLAS,
        _without(
            "the next tile overwrites the one that is stored",
            "out_base + c * out.stride_c);\n        }\n      }\n      __syncthreads();",
        ),
    ),
    *_in(
        "mlp/mlp_pointwise.cu",
        ("tests/backends/cuda/test_norms.py", "-k", "activations"),
        Mutant(
            "activations store beyond the last element",
            "if (first + kPack <= p.count) {\n        float value[kPack];",
            "if (first < p.count) {\n        float value[kPack];",
            proof="asan",
        ),
    ),
    *_in(
        "activations.h",
        ("tests/backends/cuda/test_norms.py", "-k", "activations"),
        Mutant("the gate's slope lacks the cubic term", "fmaf(x * x, 3.0f * Inner::kCubic, ", "(0.0f + "),
    ),
    *_in(
        "layernorm/layernorm_rows.h",
        ("tests/backends/cuda/test_norms.py", "-k", "thread_order and simple"),
        Mutant("SimpleNorm has the biased variance", "positive * (float(c) / float(c - 1))", "positive"),
    ),
    *_in(
        "mlp/mlp_fused.cu",
        FUSED,
        _without(
            "a chunk is read before it is there",
            "__syncthreads();  // this chunk has arrived, and no thread reads the one before",
        ),
        Mutant(
            "hidden units of pixels beyond the last are stored", "if (pixel >= p.a.pixels) continue;", "", proof="asan"
        ),
    ),
    *_in(
        "mlp/mlp_fused_fp32.cu",
        ORDER_FUSED,
        _without("W2 is read before it is there", "__syncthreads();  // W2 has arrived, and no thread reads W1"),
    ),
    *_in(
        "mma.h",
        _parity("mlp and c16-7x5-k7d1-r4-v1 and bfloat16 and forward"),  # 16-byte copies need rows of 8 elements
        Mutant("nobody waits for the copies", 'asm volatile("cp.async.wait_all;" : : : "memory");', "", proof="ptx"),
        Mutant("copies fill nothing with zeros", '"r"(inside ? 16 : 0)', '"r"(16)', proof="ptx"),
        Mutant("bf16 is multiplied as fp16", "row.col.f32.bf16.bf16.f32", "row.col.f32.f16.f16.f32", proof="ptx"),
    ),
    *_in(
        "element.h",
        _parity("mlp and c17-7x5-k7d1-r2 and bfloat16 and forward"),
        Mutant(
            "the elements of a pair are exchanged",
            'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));',
            'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(first), "f"(second));',
            proof="ptx",
        ),
    ),
]
