"""captum's contract: the same numbers as its own LayerGradCam, `CFCAM` inside it, and where the original fails."""

import importlib
import logging
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from captured import margin_targets
from compare import assert_close, averaged
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
pytest.importorskip("captum", reason="captum is not installed (extra: captum)")
import captum.attr as original
import networks

from cfcam_gpu import CFCAMConfig, cf_cam, reference
from cfcam_gpu.adapters import captum as adapter

LAYERS = {
    "resnet18": ["layer2", "layer3", "layer4"],
    "densenet121": ["features.denseblock4"],
    "vgg16": ["features.28"],  # an in-place ReLU follows
    "mobilenet_v3_large": ["features.16"],
    "swin_t": ["features.5"],
}


pytestmark = pytest.mark.usefixtures("one_thread", "seed")


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96)


def assert_same(actual, expected, tolerance=2e-6):
    """Fail unless attributions agree to the tolerance, scaled by max|expected|; and where that would say nothing."""
    assert type(actual) is type(expected)
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected):
            assert_same(ours, theirs, tolerance)
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and not actual.requires_grad
    actual, expected = actual.double(), expected.detach().double()
    scale = expected.abs().max()
    assert scale > 0, "attributions of zeros agree with everything"
    assert (actual - expected).abs().max() <= tolerance * scale
    assert (actual.roll(1, -1) - expected).abs().max() > 1e3 * tolerance * scale, "a shifted answer must not pass"


@pytest.mark.parametrize("name", LAYERS)
def test_same_numbers(name):
    model = networks.build(name)
    for layer in LAYERS[name]:
        theirs = original.LayerGradCam(model, model.get_submodule(layer))
        ours = adapter.accelerate(theirs)
        for batch, target in ((1, 7), (3, [1, 2, 999])):
            batch_images = torch.rand(batch, 3, 64, 96)
            for options in ({}, {"relu_attributions": True, "attr_dim_summation": False}):
                expected = theirs.attribute(batch_images, target, **options)
                assert_same(ours.attribute(batch_images, target, **options), expected)


class Grid(nn.Module):
    """(B, 3, H, W), and optionally a second input and a factor, to (B, 5, 4)."""

    def __init__(self, inplace=False, kind=None):
        super().__init__()
        self.convolution = nn.Conv2d(3, 24, 3, stride=8)
        self.split = Split(kind)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(24, 20)

    def forward(self, x, other=None, factor=1.0):
        x = x if other is None else x + 2 * other
        first, second = self.split(self.convolution(x))
        return self.head((self.relu(first) + second * factor).tanh().mean((2, 3))).unflatten(1, (5, 4))


class Split(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind or tuple

    def forward(self, x):
        return self.kind((x * 2, x - 1))


def pair(values):
    return namedtuple("Pair", "first second")(*values)


TARGETS = {
    "tuple": (2, 3),
    "list of tuples": [(2, 3), (0, 1)],
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", [tuple, list], ids=lambda kind: kind.__name__)
def test_targets_of_three_dimensions_and_tuples_of_tensors(images, target, kind):
    model = Grid(kind=kind)
    inputs = (images, torch.rand_like(images))
    for layer, to_input, n_results in ((model.split, False, 2), (model.convolution, True, 1), (model.relu, True, 1)):
        for call in (
            {"inputs": images},
            {"inputs": inputs, "additional_forward_args": 0.5},
            {"inputs": images, "additional_forward_args": (inputs[1], 2.0)},
        ):
            call.update(target=target, attribute_to_layer_input=to_input)
            expected = original.LayerGradCam(model, layer).attribute(**call)
            images.requires_grad_(False), inputs[1].requires_grad_(False)
            actual = adapter.LayerGradCam(model, layer).attribute(**call)
            assert_same(actual, expected)
            assert (len(actual) if isinstance(actual, tuple) else 1) == n_results
            assert not images.requires_grad and images.is_leaf
            ours = adapter.CFCAM(model, layer).attribute(**call)
            assert (len(ours) if isinstance(ours, tuple) else 1) == n_results


def test_named_tuples_stay_what_they_are(images):
    model = Grid(kind=pair)
    assert len(adapter.LayerGradCam(model, model.split).attribute(images, (0, 1))) == 2


@pytest.mark.parametrize(
    "target", [3, torch.tensor(3), torch.tensor([3]), [3, 5], torch.tensor([3, 5])], ids=lambda t: repr(t)
)
def test_targets_of_two_dimensions(resnet18, images, target):
    expected = original.LayerGradCam(resnet18, resnet18.layer3).attribute(images, target)
    assert_same(adapter.LayerGradCam(resnet18, resnet18.layer3).attribute(images, target), expected)


def test_no_target(resnet18, images):
    def forward(x):
        return resnet18(x)[:, 3]

    expected = original.LayerGradCam(forward, resnet18.layer3).attribute(images)
    assert_same(adapter.LayerGradCam(forward, resnet18.layer3).attribute(images), expected)


def test_layers_without_a_grid(resnet18, images):
    expected = original.LayerGradCam(resnet18, resnet18.fc).attribute(images, 3)
    torch.testing.assert_close(adapter.LayerGradCam(resnet18, resnet18.fc).attribute(images, 3), expected.detach())
    with pytest.raises(ValueError, match=r"\(B, C, h, w\), .* got \(2, 1000\)"):
        adapter.CFCAM(resnet18, resnet18.fc).attribute(images, 3)


@pytest.mark.parametrize("make", [adapter.LayerGradCam, adapter.CFCAM])
@pytest.mark.parametrize(
    "target, error", [(None, AssertionError), ([1], AssertionError), ((1, 2), Exception), (5000, Exception)]
)
def test_errors_are_the_originals(resnet18, images, make, target, error):
    with pytest.raises(error) as theirs:
        original.LayerGradCam(resnet18, resnet18.layer4).attribute(images, target)
    with pytest.raises(type(theirs.value)):
        make(resnet18, resnet18.layer4).attribute(images, target)


def test_a_layer_that_does_not_run(resnet18, images):
    for make in (original.LayerGradCam, adapter.LayerGradCam, adapter.CFCAM):
        with pytest.raises(AssertionError, match="did not obtain"):
            make(resnet18, nn.ReLU()).attribute(images, 3)


def saved_bytes(function):
    total = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
        function()
    return sum(total)


def test_the_trunk_has_no_graph(resnet18, images):
    theirs = original.LayerGradCam(resnet18, resnet18.layer4)
    ours = adapter.accelerate(theirs)
    assert saved_bytes(lambda: ours.attribute(images, 3)) < saved_bytes(lambda: theirs.attribute(images, 3)) / 2


@pytest.mark.parametrize("circumstance", ["frozen", "no_grad", "inference_mode", "compiled"])
def test_works_in_all_circumstances(resnet18, images, circumstance):
    expected = original.LayerGradCam(resnet18, resnet18.layer3).attribute(images, torch.tensor([1, 2]))
    model = resnet18
    if circumstance == "frozen":
        model.requires_grad_(False)
    if circumstance == "compiled":
        torch._dynamo.reset()
        model = torch.compile(resnet18, backend="eager")
        model(images)
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(circumstance, torch.enable_grad)
    with mode():
        ours = adapter.LayerGradCam(model, resnet18.layer3)
        assert_same(ours.attribute(images.clone(), torch.tensor([1, 2])), expected)
        assert torch.is_grad_enabled() == (circumstance not in ("no_grad", "inference_mode"))
        assert torch.is_inference_mode_enabled() == (circumstance == "inference_mode")
        if circumstance == "inference_mode":
            with pytest.raises(RuntimeError):
                original.LayerGradCam(model, resnet18.layer3).attribute(images.clone(), [1, 2])


def test_half_precision(resnet18, images):
    with torch.autocast("cpu", torch.bfloat16):
        expected = original.LayerGradCam(resnet18, resnet18.layer3).attribute(images, 3)
        actual = adapter.LayerGradCam(resnet18, resnet18.layer3).attribute(images, 3)
    assert_same(actual, expected)
    resnet18.bfloat16()
    for make in (adapter.LayerGradCam, adapter.CFCAM):
        actual = make(resnet18, resnet18.layer3).attribute(images.bfloat16(), 3)
        assert actual.dtype == torch.bfloat16 and actual.isfinite().all()


def test_in_place_behind_the_layer(images):
    plain, in_place = Grid(False), Grid(True)
    in_place.load_state_dict(plain.state_dict())
    expected = original.LayerGradCam(plain, plain.split).attribute(images, (1, 2))
    assert_same(adapter.LayerGradCam(in_place, in_place.split).attribute(images, (1, 2)), expected)


@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad])
def test_a_model_that_switches_autograd_itself(resnet18, images, block):
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(*list(resnet18.children())[:6])
            self.rest = nn.Sequential(*list(resnet18.children())[6:9], nn.Flatten(), resnet18.fc)

        def forward(self, x):
            with block():
                x = self.trunk(x)
            return self.rest(x)

    model = Switching().eval()
    expected = original.LayerGradCam(resnet18, resnet18.layer3).attribute(images, 3)
    assert_same(adapter.LayerGradCam(model, model.rest[0]).attribute(images, 3), expected)
    if block is torch.enable_grad:
        expected = original.LayerGradCam(model, model.trunk[5]).attribute(images, 3)
        actual = adapter.LayerGradCam(model, model.trunk[5]).attribute(images, 3)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{"device_ids": [0]}, {"grad_kwargs": {"create_graph": True}}, {"layer": "embed"}])
def test_what_is_left_to_captum(resnet18, images, options):
    layer = resnet18.layer3
    model, target = resnet18, 3
    if "layer" in options:

        class Counting(nn.Module):
            def forward(self, x):
                return x.round().long()

        layer = Counting()
        model = nn.Sequential(layer, nn.Flatten())
        for make in (original.LayerGradCam, adapter.LayerGradCam):
            with pytest.raises(RuntimeError):
                make(model, layer).attribute(images, target)
        return
    grad_kwargs = options.get("grad_kwargs")
    results = []
    for make in (original.LayerGradCam, adapter.LayerGradCam, adapter.CFCAM):
        attribution = make(model, layer, options.get("device_ids"))
        results.append(attribution.attribute(images, target, grad_kwargs=grad_kwargs))
    assert torch.equal(results[0], results[1]) and results[1].requires_grad
    assert_same(results[2], adapter.CFCAM(model, layer).attribute(images, target))  # which needs no graph, nor devices


@pytest.mark.parametrize("block", [torch.no_grad, torch.enable_grad])
def test_cf_cam_where_captum_runs_the_model(resnet18, images, block):
    """Where the model switches autograd itself: the same guide and the same score."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(*list(resnet18.children())[:6])
            self.rest = nn.Sequential(*list(resnet18.children())[6:9], nn.Flatten(), resnet18.fc)

        def forward(self, x):
            with block():
                x = self.trunk(x)
            return self.rest(x)

    model, layer = Switching().eval(), resnet18.layer2 if block is torch.enable_grad else resnet18.layer3
    expected = adapter.CFCAM(resnet18, layer).attribute(images, [3, 5])
    attribution = adapter.CFCAM(model, layer)
    assert_close(attribution.attribute(images, [3, 5]), expected)
    assert attribution.guide_names == ["trunk.4" if block is torch.enable_grad else "trunk"]
    wrapped = adapter.CFCAM(nn.DataParallel(resnet18), layer)
    assert_close(wrapped.attribute(images, [3, 5]), expected)


def state(model):
    return [
        (name, module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


class Residual(nn.Module):
    """Branches around a layer, before it runs and after; ``own`` is what the first convolution returns."""

    def __init__(self, seen_as=None):
        super().__init__()
        self.stem, self.body, self.same = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Identity()
        self.act, self.mixed, self.head = nn.ReLU(inplace=True), nn.MultiheadAttention(6, 2, batch_first=True), Head()
        self.seen_as = seen_as

    def forward(self, x):
        own = self.stem(x)
        own = own if self.seen_as is None else self.seen_as(own)
        y = own.sin() + self.same(own) * self.body(own)
        y = self.act(y) * y + own
        tokens = y.flatten(2).transpose(1, 2)
        return self.head(tokens.square() + self.mixed(tokens, tokens, tokens, need_weights=False)[0])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, tokens):
        return self.linear(tokens.sigmoid().mean(1))


@pytest.mark.parametrize("seen_as", [None, lambda tensor: tensor.transpose(2, 3)])
@pytest.mark.parametrize("layer", ["stem", "body", "same", "act", "mixed", "head"])
@pytest.mark.parametrize("to_input", [False, True])
def test_what_goes_around_the_layer_counts(seed, layer, to_input, seen_as):
    """As in captum, whose gradient is that of the tensor, wherever the model takes it."""
    model = Residual(seen_as).double().eval()
    options = {"target": [1, 3], "attribute_to_layer_input": to_input}
    if layer == "mixed" and not to_input:
        options["grad_kwargs"] = {"allow_unused": True, "materialize_grads": True}
        model.mixed.register_forward_hook(lambda module, args, output: output[:1])
    for images in (torch.randn(2, 3, 12, 10).double(), torch.randn(2, 3, 12, 10).double().requires_grad_()):
        expected = original.LayerGradCam(model, model.get_submodule(layer)).attribute(images.clone(), **options)
        cam = adapter.LayerGradCam(model, model.get_submodule(layer))
        with torch.inference_mode():
            within = images.detach().clone()  # on which captum fails
        for taken in (images, within):
            found = cam.attribute(taken, **options)
            assert isinstance(found, tuple) == isinstance(expected, tuple)
            for ours, theirs in zip(*((each if isinstance(each, tuple) else (each,)) for each in (found, expected))):
                assert theirs.any()
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in (within, *model.buffers()))


def test_the_callers_own_tensor_as_the_layers_input(seed):
    """What the model made of it before the layer counts where it takes gradients, as in captum, which then leaves
    ``requires_grad`` on."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x):
            return self.head((x.sin() + self.conv(x)).mean((2, 3)))

    model, images = First().double().eval(), torch.randn(2, 3, 8, 8).double()
    slow, fast = original.LayerGradCam(model, model.conv), adapter.LayerGradCam(model, model.conv)
    found = []
    for requires in (False, True):
        expected = slow.attribute(images.clone().requires_grad_(requires), 2, attribute_to_layer_input=True)
        taken = images.clone().requires_grad_(requires)
        found.append(fast.attribute(taken, 2, attribute_to_layer_input=True))
        torch.testing.assert_close(found[-1], expected.detach(), rtol=1e-9, atol=1e-12)
        assert taken.requires_grad == requires and taken.grad is None
    assert not torch.allclose(*found)


@pytest.mark.parametrize("make", [adapter.LayerGradCam, adapter.CFCAM])
def test_state_is_as_before(resnet18, images, make):
    resnet18.layer1.train()
    resnet18.conv1.weight.requires_grad_(False)
    resnet18.fc.weight.grad = torch.ones_like(resnet18.fc.weight)
    before = state(resnet18)
    attribution = make(resnet18, resnet18.layer3)
    attribution.attribute(images, 3)
    for bad in ((torch.zeros(2, 5, 64, 64), 3), (images, "cat"), (images, None)):
        with pytest.raises((RuntimeError, AssertionError)):
            attribution.attribute(*bad)
        assert state(resnet18) == before and torch.is_grad_enabled()
    resnet18.fc, fc = nn.Linear(7, 2), resnet18.fc  # fails behind the layer
    with pytest.raises(RuntimeError):
        attribution.attribute(images, 3)
    resnet18.fc = fc
    assert state(resnet18) == before and (resnet18.fc.weight.grad == 1).all() and torch.is_grad_enabled()
    assert not images.requires_grad


@pytest.mark.parametrize("config", [None, CFCAMConfig.paper()])
def test_cf_cam(resnet18, images, config):
    # In double precision: rounding may move a pair of channels across eps, and the reference is in float64.
    resnet18, images = resnet18.double(), images.double()
    attribution = adapter.CFCAM(resnet18, resnet18.layer3, config=config)
    config = config or CFCAMConfig()
    assert isinstance(attribution, original.LayerAttribution)
    assert attribution.attribute.__wrapped__ is adapter.CFCAM.attribute.__wrapped__
    signed = attribution.attribute(images, [3, 5])
    assert attribution.guide_names == (["layer2"] if config.averages else None)

    def score(x):
        return torch.stack([target(row) for target, row in zip(margin_targets([3, 5], config), resnet18(x))])

    layer = original.LayerGradientXActivation(score, resnet18.layer3, multiply_by_inputs=False)
    gradients = layer.attribute(images).detach()
    activations = original.LayerActivation(resnet18, resnet18.layer3).attribute(images).detach()
    guide = original.LayerActivation(resnet18, resnet18.layer2).attribute(images).detach()
    weights = cf_cam(activations, gradients, None, config, backend="reference").weights[:, :, None, None]
    terms = weights * activations.double()
    assert signed.shape == (2, 1, *(guide if config.averages else activations).shape[2:]) and signed.any()
    assert_close(signed[:, 0], averaged(terms.sum(1), guide, config))
    assert torch.equal(attribution.attribute(images, [3, 5], relu_attributions=True), signed.relu())
    each = attribution.attribute(images, [3, 5], attr_dim_summation=False)
    assert_close(each.sum(1, keepdim=True), signed)
    # The channels are scaled as their sum is, so that they add up to it.
    total = terms.sum(1)
    balanced = [reference.balance(grid.numpy(), guide.shape[2:], config) for grid in total]
    balanced = torch.from_numpy(np.stack(balanced))
    factors = torch.where(total < 0, balanced / total, 1)
    for channel in (0, 100):
        expected = [
            reference.average_alike_cells(
                (of_image[channel] * factor).numpy(), features.numpy(), config, whole=whole.numpy()
            )
            for of_image, factor, features, whole in zip(terms, factors, guide, balanced)
        ]
        assert_close(each[:, channel], np.stack(expected))
    assert attribution.interpolate(signed, (64, 96), "bilinear").shape == (2, 1, 64, 96)


def test_the_device_path(resnet18, images, device_path):
    """The sum is one launch of the kernel and the numbers are captum's; its signed sums may cancel, so that the error
    is measured against the terms that were added."""
    resnet18, images = resnet18.to(device_path.device), images.to(device_path.device)
    theirs = original.LayerGradCam(resnet18, resnet18.layer3)
    ours = adapter.accelerate(theirs)
    for dtype, rounding in ((torch.float32, 0), (torch.bfloat16, 2**-8)):
        resnet18, images = resnet18.to(dtype), images.to(dtype)
        terms = theirs.attribute(images, [3, 5], attr_dim_summation=False).detach().double()
        device_path.launched.clear()
        actual = ours.attribute(images, [3, 5])
        assert device_path.launched == ["weighted_sum_kernel"]
        assert actual.shape == (2, 1, 4, 6) and actual.dtype == dtype and actual.device == images.device
        error = (actual.double() - terms.sum(1, keepdim=True)).abs()
        # A product of half precision was rounded once in captum's terms, not in ours; the sum is rounded once in ours.
        assert (error <= (1e-6 + rounding) * terms.abs().sum(1, keepdim=True)).all()
        assert actual.count_nonzero() == actual.numel() and (actual[0] != actual[1]).any()
        assert torch.equal(ours.attribute(images, [3, 5], relu_attributions=True), actual.relu())
    device_path.launched.clear()
    resnet18.double()
    expected = theirs.attribute(images.double(), 3)
    assert_same(ours.attribute(images.double(), 3), expected)
    assert not device_path.launched, "float64 is left to torch"


def test_cf_cam_on_the_device_path(images, device_path):
    model = Grid().to(device_path.device)
    images = images[:, :, :24, :48].to(device_path.device)
    for power, kernel in ((0.0, "weighted_sum_kernel"), (3.0, "affinity_sum_kernel")):
        attribution = adapter.CFCAM(model, model.convolution, config=CFCAMConfig(affinity_power=power))
        signed = attribution.attribute(images, (1, 2))
        assert device_path.launched[-1] == kernel and "pairwise_distances_kernel" in device_path.launched
        terms = attribution.attribute(images, (1, 2), attr_dim_summation=False).double()
        assert signed.shape == (2, 1, *terms.shape[2:]) and signed.any()
        error = (signed.double() - terms.sum(1, keepdim=True)).abs()
        assert (error <= 2e-6 * terms.abs().sum(1).amax((1, 2))[:, None, None, None]).all()
    device_path.launched.clear()
    adapter.CFCAM(model, model.convolution, backend="torch").attribute(images, (1, 2))
    assert not device_path.launched, "asked for torch, it stays with torch"


def test_cf_cam_choices(resnet18):
    for options, error in (({"config": "paper"}, TypeError), ({"backend": "gpu"}, ValueError)):
        with pytest.raises(error):
            adapter.CFCAM(resnet18, resnet18.layer4, **options)


def test_accelerate(resnet18, images, caplog):
    caplog.set_level(logging.INFO, logger="cfcam_gpu")
    theirs = original.LayerGradCam(resnet18, resnet18.layer3)
    theirs.note = "kept"
    fast = adapter.accelerate(theirs)
    assert isinstance(fast, original.LayerGradCam) and vars(fast) == vars(theirs) and fast is not theirs
    assert type(theirs) is original.LayerGradCam and adapter.accelerate(fast) is fast
    assert fast.get_name() == theirs.get_name()
    wrapped = type(fast).attribute.__wrapped__(fast, images, 3)
    assert torch.equal(wrapped, fast.attribute(images, 3)) and not caplog.records

    class Own(original.LayerGradCam):
        pass

    for make, reason in ((original.LayerActivation, "it is one forward pass already"), (Own, "only LayerGradCam, ")):
        attribution = make(resnet18, resnet18.layer3)
        content = dict(vars(attribution))
        caplog.clear()
        assert adapter.accelerate(attribution) is attribution and vars(attribution) == content
        assert f"accelerate: {make.__name__} is left as it is: {reason}" in caplog.text
    assert adapter.accelerate(saliency := original.Saliency(resnet18)) is saliency
    for other in (resnet18, None, original.LayerGradCam):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            adapter.accelerate(other)


def test_guided_grad_cam_takes_it_in(resnet18, images):
    guided = original.GuidedGradCam(resnet18, resnet18.layer3)
    expected = guided.attribute(images, 3)
    guided.grad_cam = adapter.accelerate(guided.grad_cam)
    torch.testing.assert_close(guided.attribute(images, 3), expected, rtol=1e-4, atol=1e-7)


def test_the_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.delitem(sys.modules, "cfcam_gpu.adapters.captum")
    with pytest.raises(ImportError, match=r'pip install "cfcam_gpu\[captum\]"'):
        importlib.import_module("cfcam_gpu.adapters.captum")
