"""`tune` of the Triton backend: kernels are compiled ahead, and every candidate is launched, here as PTX."""

import sys

import torch

import convnext_kernels as ck
from convnext_kernels.bench.timing import Times
from convnext_kernels.tuning import cache


def test_every_candidate_is_compiled_ahead_and_launched(emulate, monkeypatch, tmp_path):
    import triton

    from convnext_kernels.backends.triton import launch

    module = sys.modules["convnext_kernels.tuning.tune"]
    launched, compiled, candidates = [], [], {}
    run = launch._Launch.run

    def spy(self, *arguments):
        launched.append((self.kernel.__name__, *self.options.items()))
        return run(self, *arguments)

    def times(functions, device):
        for name, function in functions.items():
            launched.clear()
            function()
            candidates[name] = list(launched)
        # two products win, so that their kernels are chosen, too
        return {name: Times(((0.5 if name == "gemm" else len(functions) - i,),)) for i, name in enumerate(functions)}

    monkeypatch.setattr(module, "_times", times)
    monkeypatch.setattr(launch._Launch, "run", spy)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    cache.forget()
    block = ck.FusedConvNeXtBlock(16, kernel_size=3, backend="triton", dtype=torch.bfloat16)
    x = torch.randn(1, 16, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    try:
        with emulate(90), triton.knobs.compilation.scope():
            block(x).sum().backward()  # what is compiled before
            triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(cache_hit)
            report = ck.tune(block, x, training=True)
    finally:
        cache.forget()
    assert not any(t.error for t in report.timings), report
    assert compiled
    assert all(compiled)
    assert all(launches for name, launches in candidates.items() if name not in ("cublas", "eager", "library"))
    plans = {t.plan.partition(":")[0] for t in report.timings if ", " not in t.plan and t.backend == "triton"}
    products = {"mlp_expand", "mlp_project", "mlp_hidden_gradient", "mlp_input_gradient", "mlp_weight_gradient"}
    assert plans == {"dwconv_forward", "mlp_forward", "dwconv_weight", "mlp_backward", *products}
    assert {"fused-m128-h64-w4", "gemm", "cublas", "64x64-k32-s2", "64x64-k64-s2", "library"} <= candidates.keys()
    assert [(row.phase, row.backend) for row in report.rows] == [("backward", "triton"), ("forward", "triton")]
    assert report.choices.keys() == cache.read(tmp_path / "cache" / cache.FILE).keys()
    assert len(report.choices) == len(plans)
