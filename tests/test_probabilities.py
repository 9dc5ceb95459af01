"""What a model's outputs are, told from their values and from how they were computed."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cfcam_gpu import probabilities as prob

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Head(nn.Module):
    def __init__(self, end, dtype=torch.float32, n_classes=5):
        super().__init__()
        self.linear, self.end = nn.Linear(7, n_classes, dtype=dtype), end

    def forward(self, x):
        return self.end(self.linear(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 5, 1000])
def test_a_softmax_is_found_by_its_values(seed, dtype, n_classes):
    logits = 4 * torch.randn(3, n_classes)
    assert prob.ending_of(logits.softmax(1).to(dtype)) == "softmax"
    assert prob.ending_of(logits.to(dtype).softmax(1)) == "softmax"
    exponentials = logits.double().exp()
    assert prob.ending_of((exponentials / exponentials.sum(1, keepdim=True)).to(dtype)) == "softmax"
    assert prob.ending_of(logits.to(dtype)) is None
    assert prob.ending_of(logits.log_softmax(1).to(dtype)) is None
    some = logits.softmax(1).double()
    some[-1, 0] += 0.3  # of one image the outputs do not sum to 1
    assert prob.ending_of(some.to(dtype)) is None


@pytest.mark.parametrize("n_classes", [1, 4])
def test_a_sigmoid_is_found_by_the_operation(seed, n_classes):
    logits = torch.rand(3, n_classes, requires_grad=True)
    assert prob.ending_of(logits.sigmoid()) == "sigmoid"
    assert prob.ending_of(logits.sigmoid()[:, :, None, None].flatten(1).clone()) == "sigmoid"
    assert prob.ending_of(logits * 0.9) is None  # in [0, 1] as well
    assert prob.ending_of(logits.detach()) is None
    assert prob.ending_of(logits.new_ones(3, 1)) is None  # one class alone always sums to 1


@pytest.mark.parametrize("end, name", [(nn.Softmax(1), "softmax"), (nn.Sigmoid(), "sigmoid"), (nn.Identity(), None)])
def test_the_latest_pass_is_looked_at_and_no_hook_stays(seed, end, name):
    model = Head(end)
    with pytest.raises(ZeroDivisionError), prob.looking(model) as ending:
        assert ending.name is None
        model(torch.randn(1, 7))
        assert ending.name == name
        raise ZeroDivisionError
    assert not model._forward_hooks


def test_outputs_that_are_no_scores_are_passed_over():
    model = nn.Identity()
    with prob.looking(model) as ending:
        for outputs in (torch.ones(1), torch.ones(1, 2, dtype=torch.long), {"logits": torch.ones(1, 2)}, (), None):
            model(outputs)
    assert ending.name is None


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("end, name", [(nn.Softmax(1), "softmax"), (nn.Sigmoid(), "sigmoid")])
def test_logits_come_back(seed, dtype, end, name):
    model, x = Head(end, dtype), torch.randn(3, 7, dtype=dtype)
    expected, before = model.linear(x), model(x)
    with pytest.raises(ZeroDivisionError), prob.give_logits(model, name):
        found = model(x)
        raise ZeroDivisionError
    assert torch.allclose(prob.probabilities(found, name == "sigmoid"), before.float(), atol=1e-6)
    shift = (found - expected).detach()
    assert torch.allclose(shift, shift[:, :1].expand_as(shift) if name == "softmax" else shift * 0, atol=1e-4)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_model_that_was_made_to_give_logits_still_has_its_ending(seed, name):
    model, x = Head(nn.Softmax(1) if name == "softmax" else nn.Sigmoid()), torch.randn(3, 7)
    with prob.give_logits(model, name):
        pass
    once = model(x)
    assert prob.ending_of(once) is None
    for other in (model, pickle.loads(pickle.dumps(model))):  # as a worker has it
        with prob.looking(other) as ending:
            other(x)
        assert ending.name == name
        with prob.give_logits(other, ending.name):
            pass
        assert torch.equal(other(x), once)


@pytest.mark.parametrize("name, outputs", [("softmax", [1.0, 0, 0]), ("sigmoid", [1.0, 0, 1])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_probabilities_give_finite_logits_and_gradients(name, outputs, dtype):
    model = nn.Identity()
    with prob.give_logits(model, name):
        pass
    outputs = torch.tensor([outputs], dtype=dtype, requires_grad=True)
    found = model(outputs)
    found.sum().backward()
    assert found.isfinite().all() and not outputs.grad.isnan().any()
    assert (found[0, 0] > found[0, 1] + 20).item()


def test_probabilities():
    logits = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float16)
    assert prob.probabilities(logits, False).sum().item() == pytest.approx(1, abs=1e-6)
    assert prob.probabilities(logits, True)[0, 0].item() == 0.5
    assert prob.probabilities(torch.tensor([[-2.0]]), False).item() == pytest.approx(0.1192, abs=1e-4)


def test_a_config_that_says_multilabel():
    model = nn.Identity()
    assert not prob.says_multilabel(model)
    for kind, expected in (("multi_label_classification", True), ("single_label_classification", False), (None, False)):
        model.config = SimpleNamespace(problem_type=kind)
        assert prob.says_multilabel(model) is expected
        model.config = {"problem_type": kind}
        assert prob.says_multilabel(model) is expected
