"""Threads, forks and worker processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, gradients
from tests.shapes import Case
from tests.tolerance import randomize_

DIM = 40
DETERMINISM = [
    Case("a group of rows for every thread, and one that is not full", n=3, c=40, h=21, w=19, drop=True),
    Case("sums over images; fewer rows than threads times a unit", n=2, c=24, h=5, w=7, variant="v2"),
]


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(request):
    """Forks, workers and thread counts are matters of kernels that run in this process's threads."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and ("triton", None) in callspec.params.values():
        pytest.skip(
            "Triton's kernels run on a GPU; what stands in for it here is its interpreter, one thread of Python"
        )


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_eight_threads_share_one_block(use_grn, kernel):
    block = randomize_(FusedConvNeXtBlock(DIM, use_grn=use_grn, backend=kernel))
    inputs = [torch.randn(2, DIM, 9 + i, 8) for i in range(8)]
    with torch.no_grad():
        expected = [randomize_(FusedConvNeXtBlock(DIM, use_grn=use_grn, backend=kernel))(x) for x in inputs]
    start = threading.Barrier(8)

    def work(x, y):
        start.wait(timeout=120)
        with torch.no_grad():
            for _ in range(20):
                torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, inputs, expected, timeout=120))


@pytest.mark.parametrize("case", DETERMINISM, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_gradients_are_the_same_bits_for_any_number_of_threads(op, dtype, case, kernel):
    if kernel != "cpu":
        pytest.skip("the promise of the CPU backend; elsewhere PyTorch's own products on the CPU decide")
    operator = OPERATORS[op]
    arguments = operator.arguments(case, dtype)
    dy = torch.randn(operator.reference(**arguments).shape).to(dtype)
    torch.set_num_threads(1)
    alone = gradients(lambda **a: operator.serve(kernel, **a), arguments, dy)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        together = gradients(lambda **a: operator.serve(kernel, **a), arguments, dy)
        for name, gradient in together.items():
            assert torch.equal(gradient, alone[name]), f"{name} on {threads} threads"


def test_interrupted_calls(run_python):
    """Ctrl-C, forty times: it is raised after the call it met, the next call is right, nobody waits for ever.

    "threads" is for a forked child, which has lost OpenMP's: a pool that the parent started must not be waited for.
    """
    out = run_python("""
import os, signal, sys, warnings
import numpy
import torch
import convnext_kernels as ck
from convnext_kernels.backends.cpu import native
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks of multi-threaded processes
torch.set_num_threads(3)
torch.manual_seed(0)
x = torch.randn(1, 96, 40, 40).contiguous(memory_format=torch.channels_last)
blocks = {
    runtime: ck.FusedConvNeXtBlock(96, layer_scale_init_value=1.0, use_grn=runtime == "threads", backend="cpu")
    for runtime in ("openmp", "threads")
}

def run(runtime):
    block = blocks[runtime]
    with torch.no_grad():
        expected = block(x).numpy()
        assert native.extension().parallel_runtime() == runtime
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        interrupted = calls = 0
        while interrupted < 40:
            calls += 1
            assert calls < 100_000, "no interrupt arrives"
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-5 * (calls % 200))
                y = block(x)
            except KeyboardInterrupt:
                interrupted += 1
                y = None
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            # compared by NumPy: in a forked child no parallel loop of PyTorch's comes back
            assert numpy.array_equal((block(x) if y is None else y).numpy(), expected)
    return expected

run("openmp")
with torch.no_grad():
    before = blocks["threads"](x).numpy()
child = os.fork()
if child == 0:
    try:
        os._exit(0 if numpy.allclose(run("threads"), before, rtol=1e-4, atol=1e-5) else 1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert numpy.allclose(blocks["threads"](x).detach().numpy(), before, rtol=1e-4, atol=1e-5)
print("ok")
""")
    assert out.strip() == "ok"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_block(run_python):
    """At the peak no more than input, output, packed weights and 4 MB a thread: the hidden alone would be 96 MB."""
    out = run_python("""
from pathlib import Path
import torch
import convnext_kernels as ck
torch.set_num_threads(4)

def resident(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

def image(dim, side):
    return torch.zeros(1, dim, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last) + 1

def block(dim):
    return ck.FusedConvNeXtBlock(dim, use_grn=dtype == torch.float32, backend="cpu").to(dtype)

for dtype in (torch.float32, torch.bfloat16):
    with torch.inference_mode():
        block(8)(image(8, 64))  # whatever is loaded and started once
        large, x = block(96), image(96, 250)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        y = large(x)
        peak = resident("VmHWM") - before
    weights = 4 * 2 * 4 * 96 * 96 + 4 * 49 * 96  # fp32, the largest they are packed to
    allowed = y.numel() * y.element_size() + weights + 4 * 4 * 2**20
    slack = 2**19  # stacks of the threads, pages of the allocator
    print(peak <= allowed + slack or f"peak {peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f}")
""")
    assert out.split() == ["True", "True"], out
