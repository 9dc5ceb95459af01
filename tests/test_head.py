"""The part of a network behind a layer, against the whole network with the layer's output replaced."""

import logging
from collections import namedtuple

import pytest
import torch
from networks import build, vit, whole_network
from torch import nn
from torch.nn import functional as F

from cfcam_gpu.head import record_head

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def networks():
    small = vit(32, layers=2)
    yield "resnet18", lambda model: model.layer3, 64
    yield "densenet121", lambda model: model.features.denseblock3, 64
    yield "mobilenet_v3_small", lambda model: model.features[8], 64
    yield "swin_t", lambda model: model.features[5], 64
    yield small, lambda model: model.encoder.layers[0], 32
    yield small, lambda model: model.encoder.layers[1].ln_1, 32


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", [*networks()], ids=lambda network: str(network[0])[:12])
def test_any_activations(network, batch):
    name, of, size = network
    model = build(name) if isinstance(name, str) else name
    layer, images = of(model), torch.randn(batch, 3, size, size)
    before = torch.get_rng_state()
    head = record_head(model, layer, images)
    assert head.reason is None and torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(head.outputs, model(images)) and torch.equal(head(head.activations), head.outputs)
    for times in (1, 3):
        activations = head.activations.repeat_interleave(times, 0)
        activations = (activations + 0.3 * torch.randn_like(activations)).requires_grad_()
        expected = whole_network(model, layer, images.repeat_interleave(times, 0), activations)
        found = head(activations)
        assert found.shape == expected.shape == (batch * times, 1000)
        torch.testing.assert_close(found, expected)
        cotangent = torch.randn_like(found)
        pair = [torch.autograd.grad((each * cotangent).sum(), activations)[0] for each in (found, expected)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5 * pair[1].abs().max().item())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Skips(nn.Module):
    """A U-Net in small: what is before the layer goes around it."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        early = self.first(x).relu()
        late = F.interpolate(self.layer(early), x.shape[2:])
        return self.last(torch.cat([early, late], 1)).mean((2, 3))


@pytest.mark.parametrize("batch", [1, 3])
def test_what_goes_around_the_layer_is_kept(batch):
    model, images = Skips().eval(), torch.randn(batch, 3, 9, 9)
    head = record_head(model, model.layer, images)
    assert head.reason is None
    activations = torch.randn(2 * batch, 4, 4, 4)
    expected = whole_network(model, model.layer, images.repeat_interleave(2, 0), activations)
    torch.testing.assert_close(head(activations), expected)
    image = batch - 1
    torch.testing.assert_close(
        head(activations[:2], image), whole_network(model, model.layer, images[[image, image]], activations[:2])
    )
    others = torch.randn(batch, 3, 9, 9)
    renewed = head.renewed(model, others)
    expected = whole_network(model, model.layer, others.repeat_interleave(2, 0), activations)
    torch.testing.assert_close(renewed(activations), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_no_module_hands_out_is_not_found_again():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            around = x.sin()
            return self.layer(x) + around

    model, images = Around(), torch.randn(2, 3, 9, 9)
    head = record_head(model, model.layer, images)
    assert head.reason is None and head.renewed(model, images + 1) is None


def test_constants_are_computed_once():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Conv2d(3, 3, 3), nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            x, mask = self.layer(x), torch.zeros(4, 4)
            mask[1:3] = torch.arange(4.0).sin()  # written to
            x = x * mask.exp() + self.scale.exp()
            mask.add_(1)  # after it was read
            return (x * mask).mean((2, 3))

    model, images = Masked(), torch.randn(2, 3, 6, 6)
    head = record_head(model, model.layer, images)
    activations = torch.randn(4, 3, 4, 4)
    for _ in range(2):
        expected = whole_network(model, model.layer, images.repeat_interleave(2, 0), activations)
        torch.testing.assert_close(head(activations), expected)
        with torch.no_grad():
            model.scale.data.mul_(2)  # read anew, also where torch does not count the write
    ran = [str(step.function) for step in head._programs[0].steps]
    assert "aten.exp.default" in ran and "aten.sin.default" not in ran


def test_renewed():
    model, images, others = build("resnet18"), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    head = record_head(model, model.layer3, images)
    renewed = head.renewed(model, others)
    with torch.no_grad():
        assert torch.equal(renewed.outputs, model(others)) and torch.equal(head.outputs, model(images))
        model.fc.weight.mul_(2)  # read anew
        assert torch.equal(head(renewed.activations), model(others))
        one = head.renewed(model, others[:1])
        assert torch.equal(one.outputs, model(others[:1])) and torch.equal(one(one.activations), one.outputs)
    model.fc = nn.Linear(512, 1000)
    assert head.renewed(model, others) is None, "another head"


@pytest.mark.parametrize("to_input", [False, True])
def test_of_a_layers_input_and_tiled(to_input):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, images):
            return self.body(self.first(images).sin()).exp().mean(1) + images.mean(1)  # around the layer

    model, images = Around(), torch.randn(2, 3, 6, 6)
    head = record_head(model, model.body, images, to_input)
    changed = torch.randn(6, 4, 6, 6)
    with torch.no_grad():
        expected = (model.body(changed) if to_input else changed).exp().mean(1)
        tiled = expected + images.mean(1).repeat(3, 1, 1)
        torch.testing.assert_close(head(changed, tiled=True), tiled, rtol=0, atol=1e-6)
        of_each = expected + images.mean(1).repeat_interleave(3, 0)
        torch.testing.assert_close(head(changed), of_each, rtol=0, atol=1e-6)
    assert head.reason is None


@pytest.mark.parametrize("recorded", [True, False])
def test_behind_the_last_run_of_a_layer(recorded):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Tanh()

        def forward(self, x):
            x = self.act(self.second(self.act(self.first(x))))
            return (x * 2 if recorded or x.sum().item() > -1e30 else x).mean((2, 3))

    model, images = Shared(), torch.randn(2, 3, 9, 9)
    head = record_head(model, model.act, images, n_runs=2)
    assert (head.reason is None) == recorded and head.activations.shape == (2, 6, 5, 5)
    changed = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(head(changed), 2 * changed.mean((2, 3)))
    assert "more than once" in record_head(model, model.act, images).reason
    with pytest.raises(ValueError, match="must run 3 times in the forward pass .*, got 2"):
        record_head(model, model.act, images, n_runs=3)


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("to_input", [False, True])
def test_a_layer_that_returns_what_goes_around_it(layer, to_input):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Conv2d(3, 4, 3), layer

        def forward(self, images):
            x = self.first(images)
            return self.layer(x).sin() + x

    model, images, changed = Residual().eval(), torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    head = record_head(model, model.layer, images, to_input)
    with torch.no_grad():
        register = layer.register_forward_pre_hook if to_input else layer.register_forward_hook
        handle = register(lambda *_: changed.clone())
        expected = model(images)
        handle.remove()
        assert torch.equal(head(changed), expected)
    assert head.reason is None


Result = namedtuple("Result", "logits features scale")


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x, age, flag=True):
        features = self.body(x).relu_().mean((2, 3))
        return Result({"logits": self.fc(features) + age}, [features, None], torch.tensor(2.0))


def test_structured_outputs_several_inputs_and_what_is_changed_in_place():
    model, images, age = Structured().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 1)
    head = record_head(model, model.body, (images, age))
    assert head.reason is None and isinstance(head.outputs, Result)
    activations = torch.randn(4, 4, 6, 6)
    before = activations.clone()
    found = head(activations)
    assert torch.equal(activations, before)
    features = activations.relu().mean((2, 3))
    torch.testing.assert_close(found.features[0], features)
    torch.testing.assert_close(found.logits["logits"], model.fc(features) + age.repeat_interleave(2, 0))
    assert found.features[1] is None and found.scale == 2


class Branches(nn.Module):
    """Behind the layer, what cannot be run on its own."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 5)
        self.how = how
        self.register_buffer("seen", torch.zeros(4))
        if how == "training":
            self.norm.train()

    def forward(self, x):
        early = torch.zeros(len(x), 4)
        y = self.layer(x)
        y = self.layer(x + y.mean()) if self.how == "twice" else y
        y = y.mean((2, 3))
        if self.how == "values":
            y = y * y.sum().item()
        elif self.how == "array":
            y = y * torch.from_numpy(y.detach().numpy().max(1, keepdims=True))
        elif self.how == "list":
            y = y * y.amax(1, keepdim=True).tolist()[0][0]
        elif self.how == "masks":
            y = y + y[y > 0].sum()
        elif self.how == "random":
            y = F.dropout(y, training=True)
        elif self.how == "training":
            y = self.norm(y)
        elif self.how == "buffer":
            self.seen.add_(y.mean(0))
        elif self.how == "before":
            y = early.add_(y)
        elif self.how == "rows":
            y = y.relu() if len(x) % 2 else y
        return self.fc(y)


REASONS = {
    "values": "depends on the values",
    "array": "takes values out of a tensor, by numpy",
    "list": "takes values out of a tensor, by tolist",
    "masks": "depends on the values",
    "random": "is random",
    "training": "statistics of the batch",
    "twice": "more than once",
    "buffer": "changes a tensor",
    "before": "changes a tensor",
    "rows": "depend on the number of images",
}


@pytest.mark.parametrize("how", REASONS)
def test_otherwise_the_whole_network_runs(how, caplog):
    model, images = Branches(how), torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.INFO, "cfcam_gpu"):
        head = record_head(model, model.layer, images)
    assert REASONS[how] in head.reason and head.reason in caplog.text
    activations = torch.randn(4, 4, 6, 6)
    torch.manual_seed(0)
    found = head(activations)
    torch.manual_seed(0)
    if how == "rows":
        assert found.shape == (4, 5)
    else:
        torch.testing.assert_close(
            found, whole_network(model, model.layer, images.repeat_interleave(2, 0), activations)
        )
    assert not model.layer._forward_hooks


def test_bad_arguments():
    model, images = Skips().eval(), torch.randn(2, 3, 9, 9)
    head = record_head(model, model.layer, images)
    for activations, message in (
        (torch.randn(3, 4, 4, 4), r"must have shape \(n \* 2, 4, 4, 4\), got \(3, 4, 4, 4\)"),
        (torch.randn(2, 4, 5, 4), "must have shape"),
        (torch.randn(0, 4, 4, 4), "must have shape"),
        (torch.randn(2, 4, 4, 4).double(), "must be torch.float32 on cpu, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            head(activations)
    with pytest.raises(ValueError, match="must run in the forward pass"):
        record_head(model, nn.Identity(), images)
    argmax = nn.Sequential(nn.Conv2d(3, 4, 3), Argmax())
    with pytest.raises(TypeError, match="floating-point tensor"):
        record_head(argmax, argmax[1], images)
    assert not any(module._forward_hooks for module in argmax)


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)
