"""torch-cam's contract: the same numbers as its own extractors, `CFCAM` inside it, and where the original fails."""

import importlib
import logging
import subprocess
import sys

import pytest
import torch
from captured import margin_targets
from compare import assert_close, averaged
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
pytest.importorskip("torchcam", reason="torch-cam is not installed (extra: torchcam)")
import networks
import torchcam.methods as original

from cfcam_gpu import CFCAMConfig, cf_cam
from cfcam_gpu.adapters import torchcam as adapter

METHODS = ("GradCAM", "XGradCAM", "LayerCAM")
LAYERS = {
    "resnet18": ["layer2", "layer3", "layer4"],
    "vgg16": ["features.16", "features.23", "features.30"],
    "mobilenet_v3_large": ["features.6", "features.12", "features.16"],
    "swin_t": ["features.1", "features.3", "features.5"],
}


pytestmark = pytest.mark.usefixtures("one_thread", "seed")


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96)


def build(name):
    options = {"reshape_transform": lambda grid: grid.permute(0, 3, 1, 2)} if name == "swin_t" else {}
    return networks.build(name), options


def assert_same(actual, expected, tolerance=2e-6):
    """Fail unless maps agree to the tolerance, scaled by max|expected|; fail as well where that would say nothing."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
        ours, theirs = ours.double(), theirs.double()
        scale = theirs.abs().max()
        assert scale > 0, "maps of zeros agree with everything"
        assert (ours - theirs).abs().max() <= tolerance * scale
        assert (ours.roll(1, -1) - theirs).abs().max() > 1e3 * tolerance * scale, "a shifted map must not pass"


def run(cam, images, classes, normalized=False, relu=False):
    cam._relu = relu  # the sign is kept, so that no map of random weights is all zero
    return cam(classes, cam.model(images), normalized)


@pytest.mark.parametrize("name", LAYERS)
def test_same_numbers(name):
    model, options = build(name)
    cases = [(1, LAYERS[name][-1]), (3, LAYERS[name])]
    if name == "resnet18":
        cases += [(1, LAYERS[name]), (3, LAYERS[name][1])]
    for batch, layers in cases:
        batch_images = torch.rand(batch, 3, 64, 96)
        classes = 7 if batch == 1 else [1, 2, 999]
        for method in METHODS:
            with getattr(original, method)(model, layers, **options) as cam:
                expected = run(cam, batch_images, classes)
                by_default = run(cam, batch_images, classes, normalized=True, relu=True)
                cam = adapter.accelerate(cam)
                assert_same(run(cam, batch_images, classes), expected)
                for ours, theirs in zip(run(cam, batch_images, classes, normalized=True, relu=True), by_default):
                    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
            with getattr(adapter, method)(model, layers, **options) as cam:
                assert_same(run(cam, batch_images, classes), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def saved_bytes(function):
    total = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
        function()
    return sum(total)


def test_the_trunk_has_no_graph(resnet18, images):
    cam = original.GradCAM(resnet18, "layer4")
    before = saved_bytes(lambda: resnet18(images))
    cam = adapter.accelerate(cam)
    with cam._hooks_off():
        assert saved_bytes(lambda: resnet18(images)) == before
    assert saved_bytes(lambda: resnet18(images)) < before / 20
    scores = resnet18(images)
    with pytest.raises(RuntimeError, match="ran without autograd.*disable_hooks"):
        scores.sum().backward()
    assert all(parameter.grad is None for parameter in resnet18.layer3.parameters())


@pytest.mark.parametrize("reason", ["an input", "train mode", "disabled"])
def test_the_trunk_keeps_its_graph_for_who_needs_it(resnet18, images, reason):
    cam = adapter.GradCAM(resnet18, "layer4")
    if reason == "an input":
        images.requires_grad_()
    elif reason == "train mode":
        resnet18.train()
    else:
        cam.disable_hooks()
    scores = resnet18(images)
    if reason != "disabled":
        assert cam([1, 2], scores, retain_graph=True)[0].shape == (2, 2, 3)
    scores.sum().backward()
    assert resnet18.conv1.weight.grad.any()
    assert (images.grad is not None) == (reason == "an input")


def test_accelerate_keeps_the_object(resnet18, images, caplog):
    for method in METHODS:
        cam = getattr(original, method)(resnet18, ["layer3", resnet18.layer4], enable_hooks=False)
        cam.note = "kept"
        fast = adapter.accelerate(cam)
        assert fast is cam and isinstance(fast, getattr(original, method)) and adapter.accelerate(fast) is fast
        assert fast.note == "kept" and not fast._hooks_enabled and repr(fast) == repr(cam)
        assert fast.target_names == ["layer3", "layer4"] and len(resnet18.layer4._forward_hooks) == 2
        fast.enable_hooks()
        scores = resnet18(images)
        assert fast.fuse_cams(fast(3, scores)).shape == (2, 4, 6)
        fast.reset_hooks()
        with pytest.raises(AssertionError, match="forwarded"):
            fast(3, scores)
        fast.remove_hooks()
        assert not resnet18.layer4._forward_hooks and not resnet18._forward_hooks and not resnet18._forward_pre_hooks
    removed = original.GradCAM(resnet18, "layer4")
    removed.remove_hooks()
    assert not adapter.accelerate(removed).hook_handles
    assert not caplog.records


def test_accelerate_leaves_the_rest(resnet18, caplog):
    class Own(original.GradCAM):
        pass

    caplog.set_level(logging.INFO, logger="cfcam_gpu")
    reasons = {
        original.CAM: "it costs the forward pass alone",
        Own: "only GradCAM, ",
    }
    for make, reason in reasons.items():
        cam = make(resnet18, "layer4")
        content = dict(vars(cam))
        caplog.clear()
        assert adapter.accelerate(cam) is cam and type(cam) is make and vars(cam) == content
        assert f"accelerate: {make.__name__} is left as it is: " in caplog.text and reason in caplog.text
    for other in (resnet18, None, original.GradCAM):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            adapter.accelerate(other)


@pytest.mark.parametrize("base", [original.GradCAM, original.GradCAMpp, original.LayerCAM])
def test_wrappers_run_on_an_accelerated_base(resnet18, images, base):
    for wrapper, layers in ((original.FinerCAM, "layer3"), (original.RefineCAM, ["layer3", "layer4"])):
        with wrapper(resnet18, layers, base_method=base) as cam:
            expected = cam([1, 2], resnet18(images), normalized=False)
            assert adapter.accelerate(cam) is cam and type(cam.base_cam) is adapter.ACCELERATED[base]
            for actual, map_of_theirs in zip(cam([1, 2], resnet18(images), normalized=False), expected, strict=True):
                torch.testing.assert_close(actual, map_of_theirs)
        assert not any(module._forward_hooks for module in resnet18.modules())


def test_cf_cam_in_a_wrapper(resnet18, images):
    with original.RefineCAM(resnet18, ["layer3", "layer4"], base_method=adapter.CFCAM) as cam:
        assert cam([1, 2], resnet18(images))[0].shape == (2, 8, 12)  # on the grid of layer2, the guide


@pytest.mark.parametrize("circumstance", ["frozen", "no_grad", "inference_mode", "compiled"])
def test_works_where_the_original_fails(resnet18, images, circumstance):
    with original.GradCAM(resnet18, "layer3") as cam:
        expected = run(cam, images, [1, 2])
    model = resnet18
    if circumstance == "frozen":
        model.requires_grad_(False)
    if circumstance == "compiled":
        model = torch.compile(resnet18, backend="eager")
        model(images)
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(circumstance, torch.enable_grad)
    with mode(), original.GradCAM(model, resnet18.layer3) as cam:
        with pytest.raises((RuntimeError, AssertionError), match="not connected|need to be forwarded"):
            run(cam, images, [1, 2])
        cam = adapter.accelerate(cam)
        assert_same(run(cam, images.clone(), [1, 2]), expected)
        assert torch.is_grad_enabled() == (circumstance not in ("no_grad", "inference_mode"))
        assert torch.is_inference_mode_enabled() == (circumstance == "inference_mode")


def test_hooks_that_are_compiled_work_as_the_originals(resnet18, images):
    with original.GradCAM(resnet18, "layer3") as cam:
        expected = run(cam, images, [1, 2])
    torch._dynamo.reset()  # code compiled for another model of this class would run without its hooks
    resnet18.compile(backend="eager")
    with adapter.GradCAM(resnet18, "layer3") as cam:
        assert_same(run(cam, images, [1, 2]), expected)


def test_half_precision(resnet18, images):
    with original.GradCAM(resnet18, "layer3") as cam:
        # Of the class with the largest signed map: the small remainder of large terms is mostly rounding.
        scores, cam._relu = resnet18(images), False
        maps = [cam([index, index], scores, False, retain_graph=True)[0] for index in range(40)]
        best = max(range(40), key=lambda index: maps[index].abs().max())
        expected, classes = maps[best], [best, best]
        fast = adapter.accelerate(cam)
        with torch.autocast("cpu", torch.bfloat16):
            maps = run(fast, images, classes)
    assert (maps[0] - expected).abs().max() < 0.1 * expected.abs().max()
    assert maps[0].dtype == torch.bfloat16 and maps[0].isfinite().all()
    with original.GradCAM(resnet18, "layer3") as cam, torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(cam, images, classes)[0], maps[0])
    resnet18.bfloat16()
    for make in (adapter.GradCAM, adapter.XGradCAM, adapter.LayerCAM, adapter.GradCAMpp, adapter.CFCAM):
        with make(resnet18, "layer3") as cam:
            maps = cam([1, 2], resnet18(images.bfloat16()))
        assert maps[0].dtype == torch.bfloat16 and maps[0].isfinite().all()


class Head(nn.Sequential):
    """A convolution, a ReLU behind the target layer, and a classifier."""

    def __init__(self, inplace):
        super().__init__(
            nn.Conv2d(3, 24, 3, stride=4), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
        )


def test_in_place_behind_the_layer(images):
    plain, in_place = Head(False).eval(), Head(True).eval()
    in_place.load_state_dict(plain.state_dict())
    expected = run(original.GradCAM(plain, "0"), images, [1, 2])
    with original.GradCAM(in_place, "0") as cam:
        theirs = run(cam, images, [1, 2])[0]
        assert (theirs - expected[0]).abs().max() > 1e-3 * expected[0].abs().max(), "the original's fault"
        assert_same(run(adapter.accelerate(cam), images, [1, 2]), expected)


def test_a_layer_that_returns_the_input(images):
    model = nn.Sequential(nn.Identity(), *Head(True)).eval()
    copy = images.clone()
    with adapter.GradCAM(model, "0") as cam:
        assert cam([1, 2], model(images))[0].shape == (2, 64, 96)
    assert not images.requires_grad and images.is_leaf and torch.equal(images, copy)


@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad])
def test_a_model_that_switches_autograd_itself(images, block):
    class Switching(Head):
        def forward(self, x):
            with block():
                x = self[0](x)
            for layer in list(self)[1:]:
                x = layer(x)
            return x

    model = Switching(False).eval()
    expected = run(original.GradCAM(plain_twin(model), "0"), images, [1, 2])
    with adapter.GradCAM(model, "0") as cam:
        for _ in range(2):
            assert_same(run(cam, images, [1, 2]), expected)
        assert torch.is_grad_enabled()


def plain_twin(model):
    twin = Head(False).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def state(model):
    return [
        (name, module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


def test_state_is_as_before(resnet18, images):
    resnet18.layer1.train()
    resnet18.conv1.weight.requires_grad_(False)
    resnet18.fc.weight.grad = torch.ones_like(resnet18.fc.weight)
    before = state(resnet18)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with adapter.GradCAM(resnet18, ["layer3", "layer4"]) as first, adapter.CFCAM(resnet18, "layer2") as second:
        hooked = state(resnet18)
        scores = resnet18(images)
        assert torch.is_grad_enabled()
        first([1, 2], scores, retain_graph=True)
        second([1, 2], scores)
        assert state(resnet18) == hooked
        for bad in (torch.zeros(2, 5, 64, 64), torch.zeros(2, 3, 64, 64, dtype=torch.float64)):
            with pytest.raises(RuntimeError):
                resnet18(bad)
            assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled() == fast_path
        resnet18.fc, fc = nn.Linear(7, 2), resnet18.fc  # fails behind the layers
        with pytest.raises(RuntimeError), torch.no_grad():
            resnet18(images)
        resnet18.fc = fc
        assert torch.is_grad_enabled() and state(resnet18) == hooked
        assert first([1, 2], resnet18(images))[0].isfinite().all(), "usable after an error"
    assert state(resnet18) == before and (resnet18.fc.weight.grad == 1).all()


def test_an_interrupt_is_undone(resnet18, images):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with adapter.GradCAM(resnet18, "layer4"):
        handle = resnet18.layer2.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            resnet18(images)
        handle.remove()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["GradCAM", "CFCAM"])
def test_errors_are_the_originals(resnet18, images, method):
    make = getattr(adapter, method)
    for target, error in ((["layer9"], ValueError), (nn.ReLU(), ValueError), (3, TypeError)):
        with pytest.raises(error):
            make(resnet18, target)
    with make(resnet18, "layer4") as cam:
        with pytest.raises(AssertionError, match="forwarded"):
            cam(1, None)
        scores = resnet18(images)
        for arguments in ((-1, scores), ([1], scores), ([1, -2], scores), (1, None), (None, scores)):
            with pytest.raises(ValueError):
                cam(*arguments)
        with pytest.raises(ValueError, match="scalar"):
            cam(scores=scores, targets=lambda row: row)
        with pytest.raises(RuntimeError, match="not connected"):
            cam(1, torch.rand(2, 10, requires_grad=True))
        cam(1, scores, retain_graph=True)
        cam(2, scores)
        with pytest.raises(RuntimeError):
            cam(1, scores)


def test_callable_targets(resnet18, images):
    targets = [lambda row: row[3] - row[4], lambda row: row[5]]
    with original.GradCAM(resnet18, "layer3") as cam:
        cam._relu = False
        expected = cam(scores=resnet18(images), targets=targets, normalized=False)
        assert_same(adapter.accelerate(cam)(scores=resnet18(images), targets=targets, normalized=False), expected)


def test_the_layer_is_found(resnet18):
    shape = (3, 64, 64)
    with adapter.CFCAM(resnet18, input_shape=shape) as cam, original.GradCAM(resnet18, None, shape) as other:
        assert cam.target_names == other.target_names


@pytest.mark.parametrize("config", [None, CFCAMConfig.paper()])
def test_cf_cam(resnet18, images, config):
    # In double precision: rounding may move a pair of channels across eps, and the reference is in float64.
    resnet18, images, layers = resnet18.double(), images.double(), ["layer3", "layer4"]
    with adapter.CFCAM(resnet18, layers, config=config) as cam:
        classes = classes_with_maps(cam, images)
        maps = cam(classes, resnet18(images))
        captured = list(zip(cam.hook_a, cam.hook_g))
        config = config or CFCAMConfig()
        assert cam.guide_names == (["layer2", "layer3"] if config.averages else layers)
        targets = margin_targets(classes, config)
        again = cam.compute_cams(scores=resnet18(images), targets=targets)
    with original.GradCAM(resnet18, layers) as theirs:
        theirs(scores=resnet18(images), targets=targets)
        for ours, expected in zip(captured, zip(theirs.hook_a, theirs.hook_g)):
            for pair in zip(ours, expected):
                assert_close(*pair)
    with original.GradCAM(resnet18, ["layer2", "layer3"]) as theirs:
        resnet18(images)
        guides = theirs.hook_a if config.averages else [activations for activations, _ in captured]
    for (activations, gradients), guide, heatmap, targeted in zip(captured, guides, maps, again):
        weights = cf_cam(activations, gradients, None, config, backend="reference").weights
        signed = (weights[:, :, None, None] * activations.double()).sum(1)
        grid = torch.from_numpy(averaged(signed, guide, config)).relu()
        assert (grid.amax((1, 2)) > 0).all(), "maps of zeros agree with everything"
        grid -= grid.amin((1, 2), True)
        assert_close(heatmap, grid / (grid.amax((1, 2), True) + 1e-8))
        assert heatmap.dtype == torch.float64
        assert_close(heatmap, targeted)


def classes_with_maps(cam, images):
    """One class for each of two images, different ones, for which every layer's map is positive somewhere.

    The signed maps of a random network are as likely negative as positive, so a map can honestly be zero: between a
    fifth and a half of a network's classes have no positive value at one of two layers. Of 500, all is out of reach.
    """
    scores, found = cam.model(images), [None, None]
    for index in range(500):
        grids = cam([index, 500 + index], scores, normalized=False, retain_graph=True)
        positive = torch.stack([grid.amax((1, 2)) > 0 for grid in grids]).all(0)
        for image, candidate in enumerate((index, 500 + index)):
            if found[image] is None and positive[image]:
                found[image] = candidate
        if None not in found:
            return found
    raise AssertionError("500 classes without a positive map")


def weighted_terms(cam):
    """The terms of torch-cam's sums, float64 (N, C, h, w) a layer, of the weights in their own dtype."""
    for weights, activations in zip(cam.weights, cam.hook_a):
        weights = weights.detach().double()
        yield activations.double() * (weights if weights.ndim == 4 else weights[:, :, None, None])


@pytest.mark.parametrize(
    "method, dtype", [*((method, torch.float32) for method in METHODS), ("LayerCAM", torch.bfloat16)]
)
def test_the_device_path(resnet18, images, device_path, method, dtype):
    """A launch of the sum's kernel a layer, and torch-cam's numbers; its signed sums may cancel, so that the error is
    measured against the terms that were added."""
    resnet18, images = resnet18.to(device_path.device, dtype), images[:, :, :, :64].to(device_path.device, dtype)
    layers, rounding = ["layer3", "layer4"], 0 if dtype == torch.float32 else 2**-8
    with getattr(original, method)(resnet18, layers) as cam:
        by_theirs = run(cam, images, [1, 2])
        cam = adapter.accelerate(cam)
        get_weights = cam._get_weights
        cam._get_weights = lambda *args, **kwargs: vars(cam).setdefault("weights", get_weights(*args, **kwargs))
        device_path.launched.clear()
        maps = run(cam, images, [1, 2])
        assert device_path.launched == ["weighted_sum_kernel"] * 2
        for ours, theirs, terms in zip(maps, by_theirs, weighted_terms(cam)):
            assert ours.shape == theirs.shape and ours.dtype == dtype and ours.device == theirs.device
            exact, size = terms.nansum(1), terms.abs().nansum(1)
            assert (ours.double() - exact).abs().le(1e-6 * size + rounding * exact.abs()).all()
            assert (ours.double() - theirs.double()).abs().le((1e-6 + 4 * rounding) * size).all()
            assert ours.any() and ours.isfinite().all() and (ours[0] != ours[1]).any()
        for relu in (True, False):
            grids = run(cam, images, [1, 2], relu=relu)
            for ours, grid, signed in zip(run(cam, images, [1, 2], True, relu), grids, maps):
                assert torch.equal(grid, signed.relu() if relu else signed)
                if dtype == torch.float32:
                    assert torch.equal(ours, cam._normalize(grid))
                assert ours.dtype == dtype and 0 <= ours.min() and ours.max() <= 1
        resnet18.double()
        device_path.launched.clear()
        del cam.weights
        assert run(cam, images.double(), [1, 2])[0].dtype == torch.float64 and not device_path.launched


def test_cf_cam_on_the_device_path(device_path):
    model = Head(False).eval().to(device_path.device)
    images = torch.randn(2, 3, 20, 20, device=device_path.device)
    for power, kernel in ((0.0, "weighted_sum_kernel"), (3.0, "affinity_sum_kernel")):
        config = CFCAMConfig(affinity_power=power)
        with adapter.CFCAM(model, "0", config=config) as cam:
            grid = cam([1, 2], model(images), normalized=False)[0]
            assert device_path.launched[-1] == kernel and "pairwise_distances_kernel" in device_path.launched
            (activations,), (gradients,) = cam.hook_a, cam.hook_g
        weights = cf_cam(activations, gradients, config=config).weights.double()
        terms = weights[:, :, None, None] * activations.double()
        assert grid.any()
        expected = torch.from_numpy(averaged(terms.sum(1), activations, config)).relu()
        assert (grid.double().cpu() - expected).abs().max() <= 2e-6 * terms.abs().sum(1).max()
    device_path.launched.clear()
    with adapter.CFCAM(model, "0", backend="torch") as cam:
        cam([1, 2], model(images))
    assert not device_path.launched, "asked for torch, it stays with torch"


def test_cf_cam_choices(resnet18):
    for options, error in (({"config": "paper"}, TypeError), ({"backend": "gpu"}, ValueError)):
        with pytest.raises(error):
            adapter.CFCAM(resnet18, "layer4", **options)
    assert not resnet18.layer4._forward_hooks


def test_grad_cam_plus_plus_is_the_papers(resnet18, images):
    """torch-cam's alpha is never divided: its weights are sum g^2 relu(g). Ours are equation 19."""
    resnet18.double()
    images = images.double()
    with original.GradCAMpp(resnet18, "layer3") as cam, adapter.GradCAMpp(resnet18, "layer3") as ours:
        theirs = cam._get_weights([1, 2], 100 * resnet18(images))[0]
        weights = ours._get_weights([1, 2], 100 * resnet18(images))[0]
        a, g = cam.hook_a[0], cam.hook_g[0]
    torch.testing.assert_close(theirs, (g**2 * g.relu()).sum((2, 3)))
    denominator = 2 * g**2 + a.sum((2, 3), True) * g**3
    alpha = torch.where(g == 0, 0, g**2 / denominator)
    torch.testing.assert_close(weights, (alpha * g.relu()).sum((2, 3)))
    assert weights.any() and (weights / weights.max() - theirs / theirs.max()).abs().max() > 1e-2


def test_the_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcam"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchcam", None)
    monkeypatch.delitem(sys.modules, "cfcam_gpu.adapters.torchcam")
    with pytest.raises(ImportError, match=r'pip install "cfcam_gpu\[torchcam\]"'):
        importlib.import_module("cfcam_gpu.adapters.torchcam")


def test_the_library_is_imported_lazily():
    code = "import sys, cfcam_gpu, cfcam_gpu.adapters; sys.exit('torchcam' in sys.modules or 'captum' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
