"""Gradients with normalisation statistics held constant: against autograd of networks that detach them themselves."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig
from cfcam_gpu.capture import HeadCapture

EPS = 1e-5


class Head(nn.Module):
    """A convolution with a tanh, then ``norm`` of its output or of what is pooled of it, then a linear layer."""

    def __init__(self, norm, pooled):
        super().__init__()
        self.conv, self.norm, self.pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()), norm, pooled
        self.out, self.norm_input = nn.Linear(8, 5), nn.Dropout(0)

    def forward(self, images):
        features = self.norm_input(self.conv(images))
        if self.pooled:
            return self.out(self.norm(features.mean((2, 3))))
        return self.out(self.norm(features).mean((2, 3)))


class By(nn.Module):
    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.parameters_ = function, nn.ParameterList(parameters)

    def forward(self, x):
        return self.function(x, *self.parameters_)


def _standard(x, axes, freeze=torch.Tensor.detach, deviation=lambda x, axes: x.var(axes, correction=0, keepdim=True)):
    return (x - x.mean(axes, keepdim=True)) * freeze((deviation(x, axes) + EPS).rsqrt())


def _grouped(x, weight, bias):
    rows = x.reshape(len(x), 4, -1)
    return _standard(rows, 2).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def _made_of(norm, frozen, n_weights, pooled):
    """A network with a norm, and the same with the statistics detached by hand; weights (8,) of the norm."""
    models = []
    for each in (norm, frozen):
        torch.manual_seed(0)
        weights = [torch.rand(8) + 0.5, torch.randn(8)][:n_weights]
        models.append(Head(By(each, *weights), pooled).double().to(DEVICE))
    return models


def rms(x, *weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt().detach() * (weight[0] if weight else 1)


def unit(x, axis=1):
    return x / x.norm(dim=axis, keepdim=True).detach()


LAYER = (lambda x, w, b: F.layer_norm(x, (8,), w, b), lambda x, w, b: _standard(x, (1,)) * w + b)
CHANNELS = lambda norm: lambda x, *p: norm(x.movedim(1, -1), *p).movedim(-1, 1)

NORMS = {
    "layer": (*LAYER, 2, True),
    "layer, plain": (lambda x: F.layer_norm(x, (8,)), lambda x: _standard(x, (1,)), 0, True),
    "layer, channels of a map": (
        CHANNELS(lambda x, w, b: F.layer_norm(x, (8,), w, b)),
        CHANNELS(lambda x, w, b: _standard(x, (3,)) * w + b),
        *(2, False),
    ),
    "layer, whole map": (
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: _standard(x, (1, 2, 3)),
        *(0, False),
    ),
    "group": (lambda x, w, b: F.group_norm(x, 4, w, b), _grouped, 2, False),
    "instance": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        lambda x, w, b: _standard(x, (2, 3)) * w[:, None, None] + b[:, None, None],
        *(2, False),
    ),
    "batch": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: _standard(x, (0, 2, 3)) * w[:, None, None] + b[:, None, None],
        *(2, False),
    ),
    "rms": (lambda x, w: F.rms_norm(x, (8,), w, EPS), rms, 1, True),
    "rms by hand": (lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS), rms, 0, True),
    "layer by hand": (
        lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, correction=0, keepdim=True) + EPS),
        lambda x: _standard(x, (1,)),
        *(0, True),
    ),
    "normalize": (F.normalize, unit, 0, True),
    "divided by a norm": (lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(EPS).expand_as(x), unit, 0, True),
    "divided by a power": (lambda x: x / x.pow(2).sum(1, keepdim=True).pow(0.5), unit, 0, True),
    "times a power": (lambda x: x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5, rms, 0, True),
    "times an inverse": (lambda x: x * (1 / x.norm(dim=1, keepdim=True).clamp_min(EPS)), unit, 0, True),
    "divided by the deviation of two": (
        lambda x: x / (torch.std_mean(x, 1, keepdim=True)[0] + EPS),
        lambda x: x / (x.std(1, keepdim=True) + EPS).detach(),
        *(0, True),
    ),
    "divided by a deviation": (
        lambda x: x / (x.std(1, keepdim=True) + EPS),
        lambda x: x / (x.std(1, keepdim=True) + EPS).detach(),
        *(0, True),
    ),
    "cosine": (
        lambda x: x + F.cosine_similarity(x, torch.arange(8.0, dtype=x.dtype, device=x.device)[None])[:, None],
        lambda x: x + (unit(x) * unit(torch.arange(8.0, dtype=x.dtype, device=x.device)[None])).sum(1, keepdim=True),
        *(0, True),
    ),
}

IMAGES = torch.rand(3, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("targets", [[0, 1, 2], [[0, 1], [1, 4], [2, 3]]], ids=["one class", "several"])
def test_gradients_are_those_of_detached_statistics(name, targets):
    model, by_hand = _made_of(*NORMS[name])
    capture = {
        which: HeadCapture(model, [model.conv], frozen_norms=which)(IMAGES, targets, several=True)
        for which in (True, False)
    }
    expected = HeadCapture(by_hand, [by_hand.conv])(IMAGES, targets, several=True)
    torch.testing.assert_close(capture[True].outputs, expected.outputs)
    torch.testing.assert_close(capture[True].gradients, expected.gradients)
    difference = (capture[False].gradients[0] - expected.gradients[0]).abs().max()
    assert difference > 1e-3 * expected.gradients[0].abs().max(), "the case shows nothing"


def test_what_is_no_normalisation_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.batch = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.batch.running_var.uniform_(0.5, 2)

        def forward(self, images):
            features = self.batch(self.conv(images)).exp()
            share = features / features.sum(1, keepdim=True) + features / torch.std_mean(features, 1, keepdim=True)[1]
            return (share * features.sqrt()).mean((2, 3)) / 8**0.5 + features.norm(dim=(2, 3))

    torch.manual_seed(0)
    model = Model().double().eval().to(DEVICE)
    frozen, plain = (
        HeadCapture(model, [model.conv], frozen_norms=which)(IMAGES, [0, 1, 2]).gradients[0] for which in (True, False)
    )
    assert torch.equal(frozen, plain)


def test_the_sum_is_the_score():
    """Of a linear head behind a normalisation, the weighted channels sum up to the score, and without the rule to 0."""
    model, _ = _made_of(*NORMS["layer, plain"])
    with torch.no_grad():
        model.out.bias.zero_()
    for frozen in (True, False):
        found = HeadCapture(model, [model.conv], frozen_norms=frozen)(IMAGES, [0, 1, 2])
        sums = (found.gradients[0] * found.activations[0]).sum((1, 2, 3))
        score = found.outputs.diagonal()
        torch.testing.assert_close(sums, score if frozen else torch.zeros_like(score), rtol=0, atol=1e-2)


def test_half_precision_keeps_its_dtype():
    model = _made_of(*NORMS["layer"])[0].bfloat16()
    single = copy.deepcopy(model).float()
    found, expected = (
        HeadCapture(each, [each.conv], frozen_norms=True)(IMAGES.to(each.out.weight.dtype), [0, 1, 2]).gradients[0]
        for each in (model, single)
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_maps_of_a_network_that_normalises_its_pooled_features():
    """An object whose features are those that its class asks for: the plain gradient does not see it, this one does."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.norm, self.out = nn.Conv2d(3, 3, 1), nn.LayerNorm(3), nn.Linear(3, 3)
            with torch.no_grad():
                self.features.weight.copy_(torch.eye(3)[:, :, None, None]), self.features.bias.zero_()
                self.out.weight.copy_(torch.eye(3)), self.out.bias.zero_()

        def forward(self, images):
            return self.out(self.norm(self.features(images).mean((2, 3))))

    model = Model().eval()
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, 2:4, 2:4] = 100  # the object, of class 0
    image[0, 1, 6:, 6:] = 2  # a trace of class 1
    options = {"affinity_power": 0.0, "dominant_percentile": 0.0}
    cam = CFCAM(model, [model.features], guide_layer=None, config=CFCAMConfig(**options))
    maps = cam.maps(image, [0])[0]
    assert maps.argmax().item() in (18, 19, 26, 27) and maps[2:4, 2:4].sum() > 0.99 * maps.sum()
    plain = CFCAM(model, [model.features], guide_layer=None, config=CFCAMConfig(**options, frozen_norms=False))
    grid = (plain.explain(image, [0]).weights[0][:, None, None] * image[0]).sum(0)
    assert grid.sum().abs() < 1e-3 * grid.abs().sum() + 1e-6  # as much against as for


def test_the_callers_graph_is_left_alone():
    """Hooks are gone behind the backward: who keeps a graph and differentiates it again has the plain gradient."""
    from cfcam_gpu.frozen_norms import frozen_norms

    x = torch.randn(2, 8, requires_grad=True)
    score = F.layer_norm(x, (8,))[:, 0].sum()
    (plain,) = torch.autograd.grad(score, x, retain_graph=True)
    with frozen_norms([score]):
        (frozen,) = torch.autograd.grad(score, x, retain_graph=True)
    (after,) = torch.autograd.grad(score, x)
    assert torch.equal(plain, after) and not torch.allclose(plain, frozen)


CONFIG, CLASSES = CFCAMConfig(affinity_power=0.0, dominant_percentile=0.0), [0, 1, 3]


@pytest.fixture
def normalised():
    """A network whose maps depend on the rule, images, and the signed sums (3, 5, 5) that `CFCAM` makes its maps of."""
    model = _made_of(*NORMS["layer"])[0].float().eval()
    images = IMAGES.float()
    found = CFCAM(model, [model.conv], guide_layer=None, config=CONFIG).explain(images, CLASSES)
    with torch.no_grad():
        sums = torch.einsum("bc,bchw->bhw", found.weights, model.conv(images))
    plain = CFCAM(model, [model.conv], guide_layer=None, config=replace(CONFIG, frozen_norms=False))
    assert (plain.explain(images, CLASSES).weights - found.weights).abs().max() > 0.01
    return model, images, sums


def test_pytorch_grad_cams_form(normalised):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    from cfcam_gpu.adapters import pytorch_grad_cam

    model, images, sums = normalised
    cam = pytorch_grad_cam.CFCAM(model, [model.conv], guide_layer=None, config=CONFIG)
    scaled = lambda maps: (maps - maps.amin((1, 2), True)) / (1e-7 + maps.amax((1, 2), True))
    expected = F.interpolate(scaled(sums.relu())[:, None], size=images.shape[2:], mode="bilinear")[:, 0]
    maps = torch.from_numpy(cam(images, CLASSES))
    torch.testing.assert_close(maps, scaled(expected).cpu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to_input", [False, True], ids=["own pass", "captum's pass"])
def test_captums_form(normalised, to_input):
    pytest.importorskip("captum", reason="captum is not installed")
    from cfcam_gpu.adapters import captum

    model, images, sums = normalised
    layer = model.norm_input if to_input else model.conv
    attribution = captum.CFCAM(model, layer, guide_layer=None, config=CONFIG)
    found = attribution.attribute(
        images, target=torch.tensor(CLASSES, device=DEVICE), attribute_to_layer_input=to_input
    )
    torch.testing.assert_close(found[:, 0], sums)


def test_torch_cams_form(normalised):
    pytest.importorskip("torchcam", reason="torch-cam is not installed")
    from cfcam_gpu.adapters import torchcam

    model, images, sums = normalised
    with torchcam.CFCAM(model, "conv", guide_layer=None, config=CONFIG) as cam:
        (found,) = cam(CLASSES, model(images), normalized=False)
    torch.testing.assert_close(found, sums.relu())
