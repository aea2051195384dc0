"""`graphed`: what can be tested without a GPU. `convnext-kernels verify` runs it on one (step "CUDA graphs")."""

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import graphs


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.eval()

    def forward(self, x, y=None):
        return {"sum": x * self.weight if y is None else x * self.weight + y}


X = torch.ones(2, 3)


@pytest.fixture
def captured(monkeypatch):
    """`Graphed` of a model, with a capture that a CPU can replay: it fills the same outputs each time."""

    def capture(model, inputs):
        outputs = model(*inputs)

        def replay():
            for name, value in model(*inputs).items():
                outputs[name].copy_(value)

        return outputs, replay

    monkeypatch.setattr(graphs, "_captured", capture)
    return lambda model, *inputs: graphs.Graphed(model, inputs)


def test_inputs_are_copied_and_outputs_are_new_tensors(captured):
    model = Model()
    with torch.inference_mode():
        graph = captured(model, X, X)
    first = graph(X, X)
    second = graph(5 * X.t().contiguous().t(), X)  # other strides
    assert torch.equal(first["sum"], 3 * X)
    assert torch.equal(second["sum"], 11 * X)
    model.weight.fill_(7)  # in place
    assert torch.equal(graph(X, X)["sum"], 8 * X)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ((X,), TypeError, "inputs: expected 2, as in the example, got 1"),
        ((X, X[:1]), ValueError, r"inputs\[1\]: expected \(2, 3\) torch.float32 on cpu.*got \(1, 3\)"),
        ((X.double(), X), ValueError, r"inputs\[0\]: expected .*float32.*got .*float64"),
        ((X.clone().requires_grad_(), X), ValueError, r"inputs\[0\]: requires a gradient"),
    ],
)
def test_other_inputs_are_refused(captured, inputs, error, words):
    graph = captured(Model(), X, X)
    with pytest.raises(error, match=words):
        graph(*inputs)


def test_wrong_arguments_are_refused(monkeypatch):
    for model, example, error, words in (
        (Model(), (), ValueError, "example: expected at least one tensor"),
        (Model().train(), X, ValueError, "training mode.*make_graphed_callables"),
        (Model().requires_grad_(), X, ValueError, r"model: its parameters require gradients.*torch.no_grad\(\)"),
    ):
        with pytest.raises(error, match=words):
            ck.graphed(model, example)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="CUDA graphs need a GPU"):
        ck.graphed(Model().requires_grad_(), X)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"example\[0\]: expected a tensor on a CUDA device, got cpu"):
        ck.graphed(Model(), X)
