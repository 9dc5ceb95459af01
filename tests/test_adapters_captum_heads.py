"""captum's methods that change a layer's activations: the same numbers, from the head of the network alone."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
pytest.importorskip("captum", reason="captum is not installed (extra: captum)")
import captum.attr as original
import networks

from cfcam_gpu.adapters import captum as adapter
from cfcam_gpu.head import Head

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def assert_same(actual, expected, tolerance=2e-6):
    """Fail unless attributions agree to the tolerance, scaled by max|expected|; and where that would say nothing."""
    assert type(actual) is type(expected)
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected):
            assert_same(ours, theirs, tolerance)
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.requires_grad == expected.requires_grad
    scale = expected.abs().max()
    assert scale > 0, "attributions of zeros agree with everything"
    assert (actual - expected).abs().max() <= tolerance * scale
    assert actual.argmax() == expected.argmax()


class Around(nn.Module):
    """A layer that the images and a second input go around, (B, 3, H, W) to (B, 6); also a layer of two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 5, stride=4), nn.Conv2d(8, 8, 3, padding=1)
        self.split, self.head = Split(), nn.Linear(8, 6)

    def forward(self, images, other=0.0, factor=1.0):
        x = self.second(self.first(images).tanh())
        one, two = self.split(x)
        return self.head((one.relu() * factor - two).exp().mean((2, 3))) + (images * other).mean((1, 2, 3))[:, None]


class Split(nn.Module):
    def forward(self, x):
        return x, x.sin()


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return networks.build("resnet18")


CALLS = {
    "as it comes": {},
    "batches, trapezoids": {"internal_batch_size": 5, "method": "riemann_trapezoid", "n_steps": 7},
    "of the layer's input": {"attribute_to_layer_input": True, "n_steps": 6},
    "baselines": {"baselines": torch.rand(2, 3, 64, 48), "n_steps": 6, "target": [1, 998]},
    "with delta": {"return_convergence_delta": True, "n_steps": 6, "target": torch.tensor([4, 5])},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("layer", ["layer3", "layer4.1.conv1", "avgpool"])
def test_integrated_gradients(resnet, layer, call):
    theirs = original.LayerIntegratedGradients(resnet, resnet.get_submodule(layer))
    ours = adapter.accelerate(theirs)
    assert type(ours) is not type(theirs) and isinstance(ours, original.LayerIntegratedGradients)
    call = {"target": 3, "n_steps": 9, **call}
    for images in (torch.rand(2, 3, 64, 48), torch.rand(2, 3, 64, 48)):
        actual, expected = ours.attribute(images, **call), theirs.attribute(images, **call)
        if "return_convergence_delta" in call:  # a sum of all attributions that nearly cancels the scores' difference
            (actual, delta), (expected, expected_delta) = actual, expected
            torch.testing.assert_close(delta, expected_delta, rtol=0, atol=1e-5 * float(expected.abs().sum()))
        assert_same(actual, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())


@pytest.mark.parametrize("name", ["swin_t", "densenet121", "mobilenet_v3_small"])
def test_integrated_gradients_of_other_networks(name):
    model = networks.build(name)
    layer = {"swin_t": "features.5", "densenet121": "features.denseblock4", "mobilenet_v3_small": "features.11"}[name]
    theirs = original.LayerIntegratedGradients(model, model.get_submodule(layer), multiply_by_inputs=False)
    ours, images = adapter.accelerate(theirs), torch.rand(3, 3, 64, 64)
    call = {"target": [1, 2, 3], "n_steps": 5, "internal_batch_size": 3}
    assert_same(ours.attribute(images, **call), theirs.attribute(images, **call))


@pytest.mark.parametrize("to_input", [False, True])
def test_what_goes_around_the_layer(to_input):
    model, images = Around(), torch.rand(2, 3, 24, 20)
    for further in (torch.rand(2, 3, 1, 1), (torch.rand(2, 3, 1, 1), 0.5)):
        call = {"target": 2, "additional_forward_args": further, "attribute_to_layer_input": to_input}
        for cls in (original.LayerIntegratedGradients, original.LayerFeatureAblation):
            theirs = cls(model, model.second)
            assert_same(adapter.accelerate(theirs).attribute(images, **call), theirs.attribute(images, **call))


@pytest.mark.parametrize("perturbations", [1, 3])
@pytest.mark.parametrize("layer", ["layer4.0.conv1", "avgpool"])
def test_ablation_and_permutation(resnet, layer, perturbations):
    images, layer = torch.rand(2, 3, 32, 32), resnet.get_submodule(layer)
    channels = (torch.arange(512) // 40).view(1, 512, 1, 1)
    call = {"target": 7, "layer_mask": channels, "perturbations_per_eval": perturbations}
    theirs = original.LayerFeatureAblation(resnet, layer)
    ours = adapter.accelerate(theirs)
    for baselines in (None, 0.25):
        expected = theirs.attribute(images, layer_baselines=baselines, **call)
        assert_same(ours.attribute(images, layer_baselines=baselines, **call), expected)
    call["target"] = None  # captum 0.9.0 selects twice, and fails with a target
    theirs = original.LayerFeaturePermutation(nn.Sequential(resnet, Select(7)), layer)
    ours = adapter.accelerate(theirs)
    torch.manual_seed(5)
    expected, after = theirs.attribute(images, **call), torch.rand(1)
    torch.manual_seed(5)
    actual = ours.attribute(images, **call)
    assert_same(actual, expected)
    assert torch.equal(torch.rand(1), after), "the same random numbers"


class Select(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, outputs):
        return outputs[:, self.index]


@pytest.mark.parametrize("stdevs", [0.0, 0.1])
def test_gradient_shap(resnet, stdevs):
    images, baselines = torch.rand(2, 3, 32, 32), torch.rand(3, 3, 32, 32)
    theirs = original.LayerGradientShap(resnet, resnet.layer3)
    ours = adapter.accelerate(theirs)
    results = []
    for each in (theirs, ours):
        torch.manual_seed(1)
        np.random.seed(1)
        results.append(each.attribute(images, baselines, n_samples=4, stdevs=stdevs, target=2))
    assert_same(results[1], results[0], tolerance=4e-6)  # convolutions of other batches


def test_noise_tunnel(resnet):
    images = torch.rand(2, 3, 32, 32)
    theirs = original.NoiseTunnel(original.LayerIntegratedGradients(resnet, resnet.layer4))
    ours = adapter.accelerate(theirs)
    assert type(ours.attribution_method) is not type(theirs.attribution_method)
    for kind in ("smoothgrad", "vargrad"):
        call = {"nt_type": kind, "nt_samples": 5, "nt_samples_batch_size": 2, "target": 3, "n_steps": 4, "stdevs": 0.3}
        torch.manual_seed(2)
        expected = theirs.attribute(images, **call)
        torch.manual_seed(2)
        assert_same(ours.attribute(images, **call), expected, tolerance=1e-5 if kind == "vargrad" else 2e-6)
    left = original.NoiseTunnel(original.LayerConductance(resnet, resnet.layer4))
    assert adapter.accelerate(left) is left


@pytest.mark.parametrize("method", adapter.REASONS, ids=lambda method: method.__name__)
def test_left_alone_and_said_so(resnet, method, caplog):
    theirs = method(resnet, resnet.layer4)
    with caplog.at_level(logging.WARNING, logger="cfcam_gpu"):
        assert adapter.accelerate(theirs) is theirs
    assert adapter.REASONS[method] in caplog.text


def test_every_layer_attribution_of_captum_is_in_a_table():
    layers = {cls for cls in vars(original).values() if isinstance(cls, type) and cls.__name__.startswith("Layer")}
    assert layers - {original.LayerAttribution} <= {*adapter.ACCELERATED, *adapter.REASONS}


def test_the_trunk_runs_no_oftener_than_it_must(resnet):
    runs = Counter()
    handle = resnet.layer1.register_forward_hook(lambda *_: runs.update(["trunk"]))
    try:
        ours = adapter.accelerate(original.LayerIntegratedGradients(resnet, resnet.layer4))
        for expected in (5, 2, 2):  # recorded, with one, two and three images; then the images and the baselines
            runs.clear()
            ours.attribute(torch.rand(1, 3, 32, 32), target=3, internal_batch_size=4)
            assert runs["trunk"] <= expected
    finally:
        handle.remove()


@pytest.mark.parametrize("cls", [original.LayerIntegratedGradients, original.LayerFeatureAblation])
def test_out_of_memory_halves_the_block(resnet, cls, monkeypatch, caplog):
    images, layer = torch.rand(2, 3, 32, 32), resnet.avgpool
    channels = (torch.arange(512) // 40).view(1, 512, 1, 1)
    more = {"n_steps": 7} if cls is original.LayerIntegratedGradients else {"layer_mask": channels}
    more = more if "n_steps" in more else {**more, "perturbations_per_eval": 6}
    call = {"target": [3, 4] if "n_steps" in more else 3, **more}
    theirs = cls(resnet, layer)
    expected, run = theirs.attribute(images, **call), Head.__call__
    seen = []

    def limited(self, activations, *args, **kwargs):
        seen.append(len(activations))
        if len(activations) > 5:
            raise torch.OutOfMemoryError
        return run(self, activations, *args, **kwargs)

    monkeypatch.setattr(Head, "__call__", limited)
    with caplog.at_level(logging.WARNING, logger="cfcam_gpu"):
        assert_same(adapter.accelerate(theirs).attribute(images, **call), expected)
    assert "out of memory, goes on with batches of" in caplog.text and min(seen) >= 2


def refused():
    dropout = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    yield "in training", dropout.train(), dropout[0]
    network = Around()
    yield "two tensors", network, network.split
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    yield "a function", lambda x: plain(x), plain[0]


@pytest.mark.parametrize(("model", "layer"), [pytest.param(*each, id=name) for name, *each in refused()])
def test_captums_own_code_where_the_head_cannot_run(model, layer):
    images, call = torch.rand(2, 3, 16, 16), {"target": 1, "n_steps": 4}
    theirs = original.LayerIntegratedGradients(model, layer)
    ours = adapter.accelerate(theirs)
    for _ in range(2):
        torch.manual_seed(3)
        expected, after = theirs.attribute(images, **call), torch.rand(1)
        torch.manual_seed(3)
        actual = ours.attribute(images, **call)
        assert torch.equal(torch.rand(1), after), "the same random numbers"
        assert_same(actual, expected)


def test_captums_own_errors(resnet):
    ours = adapter.accelerate(original.LayerIntegratedGradients(resnet, resnet.layer4))
    with pytest.raises(AssertionError, match="Target not provided when necessary"):
        ours.attribute(torch.rand(1, 3, 32, 32), n_steps=3)
    with pytest.raises((AssertionError, IndexError)):
        ours.attribute(torch.rand(1, 3, 32, 32), target=1000, n_steps=3)
    assert ours.attribute(torch.rand(1, 3, 32, 32), target=1, n_steps=3).isfinite().all(), "usable after an error"
    assert not any(module._forward_hooks for module in resnet.modules())
