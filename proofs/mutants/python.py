"""Mutants of the Python layer: ops, dispatch, modules, interop, and the backends' own Python."""

from collections.abc import Iterator

from mutants import Mutant, parity, within


def _in(file: str, tests: tuple[str, ...], *mutants: Mutant) -> Iterator[Mutant]:
    return within(f"convnext_kernels/{file}", tests, "python", *mutants)


AUTOCAST = ("tests/ops/test_autocast.py", "-k", "eager or dtypes or fp64")
STALE = ("tests/backends/test_stale_weights.py", "-k", "cpu and (single or layers or inference or option) or let_go")
LAYOUTS = ("tests/ops/test_layouts.py", "-k", "cpu-avx2")
MODULES = ("tests/nn", "-k", "not triton and not cuda")
ACCELERATE = (
    "tests/interop/test_accelerate.py",
    "-k",
    "torchvision and (hooks_on_an_inner or restore or mixed_dtypes) or timm-v1 and forward_pre_hook",
)

MUTANTS = [
    *_in(
        "ops/registration.py",
        ("tests/ops/test_registration.py", "-k", "gradient and dwconv"),
        Mutant(
            "fake gradients are contiguous",
            "return [torch.empty_like(t) for t, needed",
            "return [t.new_empty(t.shape) for t, needed",
        ),
        Mutant(
            "vmap takes the first dimension whatever was asked",
            "leaf.select(dim, i)",
            "leaf.select(0, i)",
            tests=("tests/training/test_steps.py", "-k", "func_on_every_op and eager"),
        ),
    ),
    *_in(
        "ops/compose.py",
        ("tests/deployment/test_export.py", "-k", "overflow"),
        Mutant(
            "exported sums of squares are in fp16", "torch.float32 if x.dtype.itemsize == 2 else x.dtype", "x.dtype"
        ),
    ),
    *_in(
        "exporting.py",
        ("tests/deployment/test_export.py", "-k", "ends_with_its_block"),
        Mutant("ops are kept after keep_ops", "_kept = before", "_kept = True"),
        Mutant(
            "a block is traced into",
            "return proxy.tracer.create_proxy",
            "return None and proxy.tracer.create_proxy",
            tests=("tests/deployment/test_fx.py", "-k", "own_modules"),
        ),
    ),
    *_in(
        "ops/depthwise.py",
        ("tests/ops/test_gradients.py", "-k", "keeps_the_backend"),
        Mutant(
            "the gradient's backend is looked up late",
            "ctx.backend = dispatch.requested_backend(inputs[-1])",
            "ctx.backend = inputs[-1]",
            quick=True,
        ),
    ),
    *_in(
        "ops/norm.py",
        AUTOCAST,
        Mutant(
            "norms run in autocast's dtype", "cast_tensors(torch.float32, arguments)", "cast_tensors(dtype, arguments)"
        ),
        Mutant(
            "gradients of an empty batch are not zero",
            "[torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]",
            "gradients_like([x, weight, bias], needs)",
            tests=("tests/ops/test_empty_batch.py", "-k", "layernorm and eager"),
        ),
    ),
    *_in(
        "ops/mlp.py",
        AUTOCAST,
        Mutant(
            "the residual sum stays in bf16 although gamma is fp32",
            "x.to(torch.promote_types(x.dtype, gamma.dtype))",
            "x",
        ),
    ),
    *_in(
        "calls.py",
        parity("eager and downsample and forward and float32"),
        Mutant(
            "the result is contiguous whatever x is",
            "torch_versions.suggest_memory_format(x)",
            "torch.contiguous_format",
        ),
    ),
    *_in(
        "functional.py",
        ("tests/ops/test_memory.py", "-k", "inference"),
        Mutant("inference keeps what training wants", "torch.is_grad_enabled() and any(", "any("),
        Mutant(
            "all samples have the first one's scale",
            "torch.addcmul(_rows(shift), y, _rows(scale))",
            "torch.addcmul(_rows(shift), y, _rows(scale[:1]))",
            tests=("tests/ops/test_parts.py", "-k", "AdaLayerNorm and eager"),
        ),
    ),
    *_in(
        "dispatch.py",
        ("tests/test_dispatch.py",),
        Mutant(
            "the environment goes before use_backend",
            "if ambient is not None:",
            "if ambient is not None and not os.environ.get(ENVIRONMENT_VARIABLE):",
        ),
        Mutant(
            "auto takes a backend that refuses",
            "backend.unavailable() or backend.refuses(spec)",
            "backend.unavailable()",
        ),
    ),
    *_in(
        "dispatch.py",
        ("tests/tuning/test_tune.py",),
        Mutant("a new choice waits for the next process", "(generation, torch.get_num_threads())", "requested"),
    ),
    *_in(
        "tuning/tune.py",
        ("tests/tuning/test_tune.py",),
        Mutant("the slowest is kept", "best = min(seconds,", "best = max(seconds,"),
        Mutant("a trial goes on", "cache.end_trials()", "pass"),
    ),
    *_in(
        "nn/layers.py",
        MODULES,
        Mutant(
            "a dilated convolution is padded for none",
            '"padding": tuple(step * (side - 1) // 2 for',
            '"padding": tuple((side - 1) // 2 for',
        ),
    ),
    *_in(
        "nn/block.py",
        MODULES,
        Mutant(
            "gamma is there when its first value is zero", "layer_scale_init_value > 0", "layer_scale_init_value >= 0"
        ),
        Mutant(
            "drop path is on in inference",
            "dropping = drop_path.drop_prob and drop_path.training",
            "dropping = bool(drop_path.train().drop_prob)",
        ),
    ),
    *_in(
        "interop/structure.py",
        ACCELERATE,
        Mutant(
            "hooks before an inner forward are not seen",
            "module._forward_hooks or module._forward_pre_hooks or module._backward_hooks",
            "module._forward_hooks or module._backward_hooks",
        ),
        Mutant(
            "the tanh approximation passes for GELU",
            '"tanh": "gelu_tanh"',
            '"tanh": "gelu"',
            tests=("tests/interop/test_blocks.py", "-k", "tanh"),
        ),
        Mutant("mixed dtypes are served", "return not mixed or autocasting(x)", "return True"),
    ),
    *_in(
        "interop/block.py",
        ("tests/interop/test_accelerate.py", "-k", "torchvision and (logits or masks)"),
        Mutant("drop path is never on", "or not drop_path.training:", "or drop_path.training:"),
    ),
    *_in(
        "interop/timm.py",
        ("tests/interop/test_libraries.py", "-k", "dropout"),
        Mutant("dropout in training is overlooked", "(dropout.training and dropout.p > 0)", "dropout.p > 1"),
    ),
    *_in(
        "nn/sequential.py",
        ("tests/nn/test_sequential.py", "-k", "cpu and a_change or hooks"),
        Mutant("hooks in a stage are not called", "if any(self.hooks):", "if False:"),
        Mutant("changed options in a stage are not seen", "and values == self.values", ""),
        Mutant("replaced weights in a stage are not seen", "all(map(is_, objects, self.objects))", "True"),
    ),
    *_in(
        "backends/cpu/packed.py",
        STALE,
        Mutant("in-place changes of single elements are not seen", "None if t.is_inference() else t._version", "None"),
        Mutant("writes through .data are not seen", "entry.regions.checksum() == entry.checksum", "True"),
        Mutant(
            "the fast look at the parameters leaves their versions out",
            "self.addresses, _versions(self.tensors)",
            "self.addresses, []",
        ),
    ),
    *_in(
        "backends/cpu/mlp_native.py",
        parity("cpu-avx2 and block and forward and float32"),
        Mutant(
            "packed with one eps, used with another",
            "(isa, configuration), pack, known, variant, launch)",
            "(isa, configuration[:3]), pack, known, variant, launch)",
            tests=STALE,
        ),
    ),
    *_in(
        "backends/cpu/layout.py",
        LAYOUTS,
        Mutant("what is not contiguous is transposed as if it were", "if not x.is_contiguous():", "if False:"),
    ),
    *_in(
        "backends/cpu/dwconv.py",
        parity("cpu-avx2 and dwconv and gradients"),
        Mutant("flipped weights pass for the others", "dilation, stride, flipped)", "dilation, stride)"),
    ),
    *_in(
        "backends/cpu/downsample.py",
        parity("cpu-avx2 and downsample and gradients and float32"),
        Mutant("pixels in no patch have no zero", "written.zero_()", "pass"),
    ),
]
