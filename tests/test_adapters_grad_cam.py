"""pytorch-grad-cam's contract: the same numbers as its own classes, `CFCAM` inside it, and what it gets wrong."""

import gc
import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from captured import margin_targets
from compare import averaged
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: grad-cam)")
import networks
import pytorch_grad_cam as original
import ttach
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.metrics.arcc import ARCC
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, ClassifierOutputTarget

import cfcam_gpu
from cfcam_gpu import CFCAMConfig, accelerate, cf_cam
from cfcam_gpu.adapters import pytorch_grad_cam as adapter

TOLERANCE = 2e-6
"""Largest difference from the original's maps, which reach 1; on a CPU, where the order of addition is the same."""

METHODS = ("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM")


pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # the library's metrics
    pytest.mark.usefixtures("one_thread", "seed"),
]


def categories(*indices):
    return [ClassifierOutputTarget(index) for index in indices]


def assert_same(actual, expected, tolerance=TOLERANCE):
    """Fail unless the maps agree; fail as well where that says nothing, the expected maps being all zero or flat."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    assert actual.flags.c_contiguous
    error = np.abs(actual - expected).max()
    assert error <= tolerance, f"error {error:.3g}"
    assert expected.max() > 0.1, "maps of zeros agree with everything"
    shifted = np.roll(actual, actual.shape[-1] // 2, axis=-1)
    assert np.abs(shifted - expected).max() > 1e-2, "a shifted map must not pass"


def with_maps(cam, images):
    """Categories, one for each image, for which not all of ``cam``'s maps are zero, and the maps.

    The signed map of a random network is as likely negative everywhere as positive, for similar images at once.
    """
    for first in range(0, 1000, len(images)):
        targets = categories(*range(first, first + len(images)))
        maps = cam(images, targets)
        if maps.any():
            return targets, maps
    raise AssertionError("1000 classes without a map")


def swap_tokens(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def channels_first(grid):
    return grid.permute(0, 3, 1, 2)


# name -> (three layers from early to late, reshape_transform, height). densenet121's last layer is the one before
# norm5: the in-place ReLU after norm5 changes the original's activations, see the in-place test.
NETWORKS = {
    "resnet18": (["layer2.1", "layer3.1", "layer4.1"], None, 96),
    "densenet121": (["features.transition2", "features.denseblock3", "features.denseblock4"], None, 96),
    "vgg16": (["features.16", "features.23", "features.29"], None, 96),
    "mobilenet_v3_large": (["features.8", "features.12", "features.16"], None, 96),
    "swin_t": (["features.3", "features.5", "norm"], channels_first, 96),
    "vit": ([f"encoder.layers.encoder_layer_{index}.ln_1" for index in (1, 2, 3)], swap_tokens, 64),
}


def build(name):
    """A network with random weights, its layers, its reshape_transform and the height of its inputs."""
    layers, reshape_transform, height = NETWORKS[name]
    model = networks.vit(image_size=64) if name == "vit" else networks.build(name)
    # torchvision initialises ViT's head with zeros, which makes every map zero.
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, std=0.1)
    return model, [model.get_submodule(layer) for layer in layers], reshape_transform, height


@pytest.mark.parametrize("network", NETWORKS)
def test_the_originals_numbers(seed, network):
    """Every method; batch 3 with given targets and three layers; of two networks batch 1 with one, from the outputs."""
    model, layers, reshape_transform, height = build(network)
    calls = [(3, layers), *([(1, layers[-1:])] if network in ("resnet18", "vit") else [])]
    for method in METHODS:
        for batch, target_layers in calls:
            images = torch.rand(batch, 3, height, 64)
            slow = getattr(original, method)(model, target_layers, reshape_transform)
            fast = accelerate(slow)
            if batch == 1:
                targets, expected = None, slow(images, None)
            else:
                targets, expected = with_maps(slow, images)
            actual = fast(images, targets)
            # Of a single image's class the weights may all be negative, and the map zero in both.
            if batch == 1 and not expected.any():
                assert not actual.any()
                continue
            assert_same(actual, expected)
            np.testing.assert_allclose(fast.outputs.numpy(), slow.outputs.detach().numpy(), atol=1e-5)


@pytest.fixture
def images(seed):
    return torch.randn(2, 3, 96, 64)


class Small(nn.Sequential):
    """A small network with activations around zero, so that maps have both signs and tests compare at any seed."""

    def __init__(self, inplace=False):
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.Tanh(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
            nn.ReLU(inplace),
            nn.Conv2d(24, 8, 3),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(72, 5),
        )


@pytest.fixture
def small(seed):
    return Small().eval()


@pytest.mark.parametrize("method", METHODS)
def test_classes_by_themselves(small, images, method):
    """Our class constructed directly is the original's subclass, and equals it; float64 models too."""
    cls, theirs = getattr(adapter, method), getattr(original, method)
    with cls(small, [small[2]]) as cam:
        assert isinstance(cam, theirs) and isinstance(cam, BaseCAM)
        assert_same(cam(images, [1, 2]), theirs(small, [small[2]])(images, categories(1, 2)))
    assert_same(cam(input_tensor=images), theirs(small, [small[2]])(images, None))
    small.double()
    cam = cls(small, [small[2]])
    assert_same(cam(images.double()), theirs(small, [small[2]])(images.double(), None))
    assert cam.maps(images.double()).dtype == torch.float64


def test_accelerate_keeps_the_object(small, images):
    slow = original.GradCAM(small, [small[2]], reshape_transform=torch.abs)
    slow.tta_transforms = ttach.Compose([ttach.VerticalFlip()])
    slow.note = "mine"
    slow(images, None)
    fast = accelerate(slow)
    assert type(fast) is adapter.GradCAM and isinstance(fast, type(slow)) and fast is not slow
    assert vars(fast).keys() == vars(slow).keys()
    for name in vars(slow).keys() - {"activations_and_grads", "outputs"}:
        assert getattr(fast, name) is getattr(slow, name), name
    assert torch.equal(fast.outputs, slow.outputs) and not fast.outputs.requires_grad
    assert accelerate(fast) is fast
    assert_same(fast(images, None), slow(images, None))
    hooks = fast.activations_and_grads
    for kept in ("activations", "gradients"):
        (ours,), (theirs,) = getattr(hooks, kept), getattr(slow.activations_and_grads, kept)
        assert torch.equal(ours, theirs)


def test_hooks_of_the_accelerated_object(small, images):
    """They cost the fast object nothing, stay in their order for the slow one, and go with it."""
    seen = []
    first = small[2].register_forward_hook(lambda *_: seen.append("first"))
    slow = original.GradCAM(small, [small[2]])
    small[2].register_forward_hook(lambda *_: seen.append("last"))
    order = list(small[2]._forward_hooks.items())
    fast = accelerate(slow)
    fast(images)
    assert seen == ["first", "last"], "the user's own hooks run"
    assert slow.activations_and_grads.activations == [], "the original's do not"
    assert list(small[2]._forward_hooks.items()) == order
    with pytest.raises(ValueError):
        fast(images, [1])
    assert list(small[2]._forward_hooks.items()) == order
    assert_same(slow(images, None), fast(images))
    first.remove()
    del slow
    gc.collect()
    assert len(small[2]._forward_hooks) == 1
    fast(images)
    del fast
    assert len(small[2]._forward_hooks) == 1


class Own(original.GradCAM):
    def get_cam_weights(self, *arguments):
        return -super().get_cam_weights(*arguments)


def with_attribute(cam, name, value):
    setattr(cam, name, value)
    return cam


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda *args: original.KPCA_CAM(*args), "its time is that of the model's forward pass"),
        (lambda *args: original.FEM(*args), "its time is that of the model's forward pass"),
        (lambda *args: original.FinerCAM(*args, base_method=original.EigenCAM), "which has no head-only backward"),
        (lambda *args: Own(*args), "only GradCAM, HiResCAM"),
        (lambda *args: with_attribute(original.GradCAM(*args), "detach", False), "detach is False"),
        (
            lambda *args: with_attribute(original.GradCAM(*args), "compute_input_gradient", True),
            "compute_input_gradient is True",
        ),
        (
            lambda *args: with_attribute(original.GradCAM(*args), "get_cam_weights", lambda *_: None),
            "the instance has its own get_cam_weights",
        ),
        (lambda model, layers: original.GradCAM(model, [nn.ReLU()]), "one of the modules of Small"),
    ],
)
def test_accelerate_leaves_the_rest_as_it_is(small, caplog, make, reason):
    cam = make(small, [small[2]])
    before = dict(vars(cam))
    with caplog.at_level(logging.WARNING, logger="cfcam_gpu"):
        assert accelerate(cam) is cam
    assert vars(cam) == before
    (line,) = caplog.messages
    assert line.startswith(f"accelerate: {type(cam).__name__} is left as it is: ") and reason in line


@pytest.mark.parametrize(
    "thing, name",
    [(object(), "builtins.object"), (None, "NoneType"), (nn.ReLU(), "ReLU"), (original.GradCAM, "class .*GradCAM")],
)
def test_accelerate_refuses_what_is_no_cam(thing, name):
    with pytest.raises(TypeError, match=f"pytorch-grad-cam, torch-cam or captum, got .*{name}"):
        accelerate(thing)


def test_our_own_core_class_is_no_cam_of_theirs(small):
    with pytest.raises(TypeError, match="got cfcam_gpu.cam.CFCAM"):
        accelerate(cfcam_gpu.CFCAM(small, [small[2]]))


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, cfcam_gpu\n"
        "sys.modules['pytorch_grad_cam'] = None\n"
        "try:\n    cfcam_gpu.accelerate(3)\nexcept TypeError as error:\n    print(error)\n"
        "print(sorted({'cv2', 'ttach', 'torchcam', 'captum'} & set(sys.modules)))\n"
        "try:\n    import cfcam_gpu.adapters.pytorch_grad_cam\nexcept ImportError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    dispatch, imported, missing = output.splitlines()
    assert "got builtins.int" in dispatch and imported == "[]"
    assert 'pip install "cfcam_gpu[grad-cam]"' in missing


# CF-CAM in the contract.


def test_cf_cam_in_the_originals_pipeline(resnet18, images):
    """`CFCAM` equals the original's base class fed with CF-CAM's weights."""

    class Theirs(BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return cf_cam(torch.from_numpy(activations), torch.from_numpy(grads), config=config).weights.numpy()

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
            arguments = input_tensor, target_layer, targets, activations, grads, eigen_smooth
            return averaged(super().get_cam_image(*arguments), activations, config)

    # That library knows of no other layer, nor of a margin.
    layers, plain = [resnet18.layer3[-1], resnet18.layer4[-1]], CFCAMConfig(margin_temperature=0.0)
    for config in (plain, CFCAMConfig.paper()):
        targets, expected = with_maps(Theirs(resnet18, layers), images)
        cam = adapter.CFCAM(resnet18, layers, guide_layer=None, config=config)
        # The balance divides two sums, each with its own rounding.
        assert_same(cam(images, targets), expected, 1e-5)
        np.testing.assert_allclose(cam.outputs.numpy(), resnet18(images).detach().numpy(), atol=1e-5)
    hooks = cam.activations_and_grads
    arrays = [tensors[0].numpy() for tensors in (hooks.activations, hooks.gradients)]
    weights = cam.get_cam_weights(images, layers[0], None, *arrays)
    assert weights.shape == (2, 256) and weights.dtype == np.float32 and weights.any()
    # The package's own class has the same contract. Its sums are added in another order: in double precision, because
    # a map that is the small remainder of large terms would be stretched with its rounding.
    resnet18, images = resnet18.double(), images.double()
    for config in (plain, CFCAMConfig.paper()):
        targets, expected = with_maps(Theirs(resnet18, layers), images)
        ours = cfcam_gpu.CFCAM(resnet18, layers, guide_layer=None, config=config)
        assert_same(ours(images, targets), expected, 1e-5)


def test_cf_cam_with_its_guides_and_margins(resnet18, images):
    """Indices, None and ``ClassifierOutputTarget`` are classes; the guides are those of the package's own class."""
    resnet18, images = resnet18.double(), images.double()
    layers = [resnet18.layer3[-1], resnet18.layer4[-1]]
    ours, cam = cfcam_gpu.CFCAM(resnet18, layers), adapter.CFCAM(resnet18, layers)
    assert cam.guide_names is None
    # Of a random network the maps may all be zero, even where both speak of the top class: as in `with_maps`.
    classes = next(pair for pair in zip(range(0, 1000, 2), range(1, 1000, 2)) if ours(images, pair).any())
    expected = ours(images, classes)
    assert_same(cam(images, categories(*classes)), expected, 1e-5)
    assert cam.guide_names == ours.guide_names == ["layer2", "layer3"]
    assert_same(cam(images, list(classes)), expected, 1e-5)
    np.testing.assert_allclose(cam(images), ours(images), rtol=0, atol=1e-5)
    by_formula = cam(images, margin_targets(classes, cam.config))
    assert_same(by_formula, expected, 1e-5)
    assert np.abs(cam(images, margin_targets(classes, CFCAMConfig.paper())) - expected).max() > 1e-3


def test_cf_cam_of_several_classes(resnet18, images):
    """Whatever is the package's own; that library's methods take one target an image, and say so."""
    resnet18, images = resnet18.double(), images.double()
    layers, classes = [resnet18.layer3[-1], resnet18.layer4[-1]], torch.randint(1000, (2, 12))
    cam, expected = adapter.CFCAM(resnet18, layers), cfcam_gpu.CFCAM(resnet18, layers)(images, classes)
    assert expected.shape == (2, 12, *images.shape[2:]) and expected.any()
    for targets in (classes, classes.tolist(), [categories(*row) for row in classes.tolist()]):
        assert_same(cam(images, targets), expected, 2e-6)
    cam.batch_size = 1
    assert_same(cam(images, classes), expected, 2e-6)
    with pytest.raises(ValueError, match="eigen_smooth takes one target per image, got several"):
        cam(images, classes, eigen_smooth=True)
    for refused in (
        lambda: cam(images, classes, aug_smooth=True),
        lambda: adapter.GradCAM(resnet18, layers)(images, classes),
    ):
        with pytest.raises(ValueError, match=r"targets must have shape \(2,\), got \(2, 12\)"):
            refused()


def test_cf_cam_options(small, images):
    with pytest.raises(TypeError, match="config must be a CFCAMConfig"):
        adapter.CFCAM(small, [small[2]], config="paper")
    with pytest.raises(ValueError, match="backend must be one of"):
        adapter.CFCAM(small, [small[2]], backend="cuda")
    expected = adapter.CFCAM(small, [small[2]])(images)
    for options in ({"backend": "reference"}, {"backend": "torch", "clustering": "sklearn"}):
        assert_same(adapter.CFCAM(small, [small[2]], **options)(images), expected, 1e-5)
    small.double()
    assert_same(adapter.CFCAM(small, [small[2]])(images.double()), expected, 1e-5)


def test_meta_methods_and_metrics(small, images):
    """RefineCAM, FinerCAM, SESS, ARCC, ROAD with the fast classes, against the same with the slow ones."""
    layers, targets = [small[0], small[2]], categories(1, 2)
    for meta, theirs, options in (
        (original.RefineCAM, original.GradCAMPlusPlus, {}),
        (original.FinerCAM, original.GradCAM, {}),
        (original.SESS, original.GradCAM, {"scales": [64, 80]}),
    ):
        for chosen in (targets, None):
            slow = meta(small, layers, base_method=theirs, **options)
            expected, accelerated = slow(images, chosen), adapter.accelerate(slow)
            assert accelerated is not slow and isinstance(accelerated, meta)
            for fast in (meta(small, layers, base_method=getattr(adapter, theirs.__name__), **options), accelerated):
                # RefineCAM multiplies the maps and divides by the product's maximum; SESS resizes by cv2 on top.
                assert_same(fast(images, chosen), expected, 1e-5)
            assert meta(small, layers, base_method=adapter.CFCAM, **options)(images, chosen).any()
        assert original.RefineCAM(small, layers, base_method=adapter.CFCAM, config=CFCAMConfig.paper())(images).any()
    slow, fast = original.GradCAM(small, layers), adapter.GradCAM(small, layers)
    for metric in (ROADCombined([20, 40]), DropInConfidence()):
        assert np.isfinite(metric(images, adapter.CFCAM(small, layers)(images), targets, small)).all()
    scores = []
    for cam in (slow, fast, adapter.CFCAM(small, layers)):
        torch.manual_seed(0)  # ROAD adds noise
        scores.append(ARCC(cam, [20, 40])(images, cam(images, targets), targets, small))
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)
    assert scores[2].shape == (2,) and np.isfinite(scores[2]).all()


def test_finer_cam_fills_no_gradients(small, images):
    expected = original.FinerCAM(small, [small[2]])(images)
    assert small[9].weight.grad is not None
    small.zero_grad()
    assert_same(original.FinerCAM(small, [small[2]], base_method=adapter.GradCAM)(images), expected)
    assert all(parameter.grad is None for parameter in small.parameters())


# The path on a device. Tolerance: the order of a kernel's sums is its own, and the maps stretch what rounding leaves.
DEVICE_TOLERANCE = 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_device_path(small, images, device_path, method):
    """The sums and the scaling are launches of the two kernels, one each a layer, and the numbers the original's."""
    small, images = small.to(device_path.device), images[:, :, :48, :32].to(device_path.device)
    for layers in ([small[2]], [small[0], small[2]]):
        slow = getattr(original, method)(small, layers)
        fast = accelerate(slow)
        expected = slow(images, categories(1, 2))
        device_path.launched.clear()
        assert_same(fast(images, categories(1, 2)), expected, DEVICE_TOLERANCE)
        once_a_layer = {"weighted_sum_kernel": len(layers), "resize_normalize_kernel": len(layers)}
        assert Counter(device_path.launched) == once_a_layer
        per_layer = slow.compute_cam_per_layer(images, categories(1, 2), False)
        for ours, theirs in zip(fast.compute_cam_per_layer(images, categories(1, 2)), per_layer):
            assert_same(ours, np.ascontiguousarray(theirs), DEVICE_TOLERANCE)


@pytest.mark.filterwarnings("ignore:HiResCAM's faithfulness")
def test_the_rest_of_the_device_path(small, images, device_path):
    """The six views of ``aug_smooth`` are one batch; what the kernels do not sum, they scale; what they do not take is
    left to torch; half precision goes in as it is."""
    small, images = small.to(device_path.device), images[:, :, :48, :32].to(device_path.device)
    slow = original.GradCAM(small, [small[2]])
    fast = accelerate(slow)
    assert fast.maps(images).device.type == device_path.device
    smoothed = slow(images, None, aug_smooth=True)
    device_path.launched.clear()
    assert_same(fast(images, None, aug_smooth=True), smoothed, DEVICE_TOLERANCE)
    assert device_path.launched == ["weighted_sum_kernel", "resize_normalize_kernel"]
    eigen = slow(images, None, eigen_smooth=True)
    device_path.launched.clear()
    assert_same(fast(images, None, eigen_smooth=True), eigen, 1e-4)
    assert device_path.launched == ["resize_normalize_kernel"]
    expected = slow(images, None)
    small.half() if device_path.device == "cuda" else small.bfloat16()
    half = images.to(small[0].weight.dtype)
    device_path.launched.clear()
    maps = fast(half)
    assert device_path.launched == ["weighted_sum_kernel", "resize_normalize_kernel"]
    assert maps.max() > 0.99 and np.median(np.abs(maps - expected)) < 0.05
    small.double()
    device_path.launched.clear()
    assert fast.maps(images.double()).dtype == torch.float64 and not device_path.launched


def test_cf_cam_on_the_device_path(small, images, device_path):
    """`CFCAM`, and the package's own class, equal the original's base class fed with CF-CAM's weights."""

    class Theirs(BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            tensors = (torch.from_numpy(array).to(device_path.device) for array in (activations, grads))
            return cf_cam(*tensors).weights.cpu().numpy()

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
            arguments = input_tensor, target_layer, targets, activations, grads, eigen_smooth
            return averaged(super().get_cam_image(*arguments), activations)

    small, images = small.to(device_path.device), images[:1, :, :32, :32].to(device_path.device)
    layers = [small[2]]
    expected = Theirs(small, layers)(images, categories(1))
    # That library knows of no other layer, nor of a margin.
    options = {"guide_layer": None, "config": CFCAMConfig(margin_temperature=0.0)}
    for cls in (adapter.CFCAM, cfcam_gpu.CFCAM):
        device_path.launched.clear()
        assert_same(cls(small, layers, **options)(images, categories(1)), expected, DEVICE_TOLERANCE)
        assert device_path.launched[-3:] == ["affinity_sum_kernel"] * 2 + ["resize_normalize_kernel"]
        device_path.launched.clear()
        assert_same(cls(small, layers, backend="torch", **options)(images, categories(1)), expected, 1e-4)
        assert not device_path.launched, "asked for torch, it stays with torch"


# Smoothing, batches, volumes.


@pytest.mark.parametrize("method", ["GradCAM", "LayerCAM"])  # weights of a channel, of a cell
def test_aug_smooth(resnet18, images, method):
    # In double precision: the network rounds differently in a batch of six views, and a map that is the small remainder
    # of large terms would be stretched with it. The last layer, where the map of the top class cannot be zero: its
    # signed values add up to the class's score.
    resnet18, images = resnet18.double(), images.double()
    layers = [resnet18.layer3[-1], resnet18.layer4[-1]]
    slow = getattr(original, method)(resnet18, layers)
    fast = accelerate(slow)
    chosen, _ = with_maps(slow, images)
    forwards = []
    resnet18.register_forward_hook(lambda *_: forwards.append(1))
    for targets in (chosen, None):
        actual = fast(images, targets, aug_smooth=True)
        assert forwards == [1], "the six views are one batch"
        assert_same(actual, slow(images, targets, aug_smooth=True), 1e-5)
        np.testing.assert_allclose(fast.outputs.numpy(), slow.outputs.detach().numpy(), atol=1e-4)
        forwards.clear()
    with pytest.raises(ValueError, match="expected 2, got 1"):
        fast(images, [1], aug_smooth=True)


def test_aug_smooth_with_other_views(small, images):
    """Views of another size go through the model one by one."""
    slow = original.GradCAM(small, [small[2]])
    slow.tta_transforms = ttach.Compose([ttach.Rotate90([0, 90])])
    assert_same(accelerate(slow)(images, None, aug_smooth=True), slow(images, None, aug_smooth=True), 1e-5)


@pytest.mark.filterwarnings("ignore:HiResCAM's faithfulness")
@pytest.mark.parametrize("method", ["GradCAM", "LayerCAM"])
def test_eigen_smooth(resnet18, images, method):
    """More channels than cells, and fewer: LAPACK takes different ways, the signs are the same."""
    for layers in ([resnet18.layer4[-1]], [resnet18.layer1[-1], resnet18.layer3[-1]]):
        slow = getattr(original, method)(resnet18, layers)
        assert_same(accelerate(slow)(images, None, eigen_smooth=True), slow(images, None, eigen_smooth=True), 1e-4)
    # In float64: the network rounds differently in a batch of six views, and where two singular values are close, a
    # last digit of float32 turns the component.
    resnet18.double()
    both = accelerate(slow)(images[:1].double(), None, aug_smooth=True, eigen_smooth=True)
    assert_same(both, slow(images[:1].double(), None, aug_smooth=True, eigen_smooth=True), 1e-4)


def test_hirescam_warns_of_eigen_smooth(small, images):
    with pytest.warns(UserWarning, match="guarantees do not hold"):
        adapter.HiResCAM(small, [small[2]])(images, eigen_smooth=True)


@pytest.mark.parametrize("method", ["CFCAM", "GradCAM"])
def test_batch_size(small, method):
    images = torch.randn(5, 3, 32, 32)
    cam = getattr(adapter, method)(small, [small[2]])
    sizes = []
    small.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for targets in (None, [0, 1, 2, 3, 4], categories(0, 1, 2, 3, 4)):
        cam.batch_size = None
        expected, outputs = cam(images, targets), cam.outputs
        cam.batch_size = 2
        sizes.clear()
        assert_same(cam(images, targets), expected, 1e-5)
        assert sizes == [2, 2, 1]
        torch.testing.assert_close(cam.outputs, outputs)
    with pytest.raises(ValueError, match="expected 5, got 4"):
        cam(images, [0, 1, 2, 3])


class Volumes(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1), nn.MaxPool3d(2), nn.Conv3d(6, 9, 3, padding=1), nn.Tanh(),
            nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(72, 4),
        )  # fmt: skip


def test_volumes(seed):
    """5-D inputs: GradCAM's and the others' numbers on (B, D, H, W), two layers of different sizes."""
    # Around zero, so that the first layer's maps have both signs.
    model, volumes = Volumes().eval(), torch.randn(2, 2, 8, 12, 10)
    for method in METHODS:
        slow = getattr(original, method)(model, [model[0], model[2]])
        fast = accelerate(slow)
        expected = slow(volumes, categories(1, 2))
        assert expected.shape == (2, 8, 12, 10)
        assert_same(fast(volumes, categories(1, 2)), expected, 1e-5)
    assert_same(fast(volumes, None, aug_smooth=True), slow(volumes, None, aug_smooth=True), 1e-5)
    assert adapter.CFCAM(model, [model[0]])(volumes).any()


# What the original gets wrong.


def state(model):
    return [
        (name, module.training, dict(module._forward_hooks), dict(module._backward_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("method", ["CFCAM", "GradCAM"])
def test_nothing_is_left_behind(small, images, method):
    expected = getattr(adapter, method)(small, [small[2]])(images)
    small.train()
    small[3].eval()
    small[0].weight.requires_grad_(False)
    small[9].weight.grad = torch.ones_like(small[9].weight)
    before = state(small)
    with getattr(adapter, method)(small, [small[2]]) as cam:
        assert state(small) == before
        for smooth in ({}, {"aug_smooth": True}, {"eigen_smooth": True}):
            cam(images, **smooth)
            assert state(small) == before
        assert_same(cam(images), expected)  # in eval mode, without dropout
        for bad in (
            {"targets": [1]},
            {"targets": categories(1)},
            {"targets": [1, 5]},
            {"targets": [lambda output: 1 / 0] * 2},
            {"input_tensor": torch.zeros(0, 3, 64, 64)},
            {"input_tensor": torch.zeros(1, 3, 64, 64, dtype=torch.int64)},
        ):
            with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
                cam(**{"input_tensor": images, **bad})
            assert state(small) == before
    assert (small[9].weight.grad == 1).all()


def test_too_few_targets_are_an_error(small, images):
    """The original gives a map of zeros to the image without a target."""
    slow = original.GradCAM(small, [small[2]])
    maps = slow(images, categories(1))
    assert maps[0].any() and not maps[1].any()
    with pytest.raises(ValueError, match="expected 2, got 1"):
        accelerate(slow)(images, categories(1))


def test_errors_leave_the_with_block(small):
    """The original prints an IndexError and goes on."""
    with original.GradCAM(small, [small[2]]):
        raise IndexError
    for cam in (adapter.GradCAM(small, [small[2]]), adapter.CFCAM(small, [small[2]])):
        with pytest.raises(IndexError, match="mine"), cam:
            raise IndexError("mine")


def test_in_place_operations_after_the_layer(seed, images):
    """The original takes the activations as the ReLU after the layer has left them."""
    twin, in_place = Small().eval(), Small(inplace=True).eval()
    in_place.load_state_dict(twin.state_dict())
    for method in METHODS:
        cls, theirs = getattr(adapter, method), getattr(original, method)
        expected = theirs(twin, [twin[2]])(images, categories(1, 2))
        assert_same(cls(in_place, [in_place[2]])(images, categories(1, 2)), expected)
        if method == "GradCAM":
            wrong = theirs(in_place, [in_place[2]])(images, categories(1, 2))
            assert np.abs(wrong - expected).max() > 1e-2


@pytest.mark.parametrize("method", ["CFCAM", *METHODS])
def test_half_precision(small, images, method):
    expected = getattr(adapter, method)(small, [small[2]])(images, [1, 2])
    cam = getattr(adapter, method)(small, [small[2]])
    with torch.autocast("cpu", torch.bfloat16):
        autocast = cam(images, [1, 2])
        assert cam.outputs.dtype == torch.bfloat16
    small.bfloat16()
    bfloat16 = cam(images.bfloat16(), [1, 2])
    for maps in (autocast, bfloat16):
        assert maps.dtype == np.float32 and np.isfinite(maps).all() and maps.max() > 0.99
        # CF-CAM's clustering is no continuous function of the activations, and XGradCAM divides by sums that cancel.
        if method not in ("CFCAM", "XGradCAM"):
            assert np.median(np.abs(maps - expected)) < 0.05  # bfloat16 has 8 bits
    if method == "GradCAM":
        with pytest.raises(TypeError, match="BFloat16"):
            original.GradCAM(small, [small[2]])(images.bfloat16(), categories(1, 2))


def test_frozen_models_and_callers_without_grad(small, images):
    expected = original.GradCAM(small, [small[2]])(images, None)
    cams = adapter.GradCAM(small, [small[2]]), accelerate(original.GradCAM(small, [small[2]]))
    small.requires_grad_(False)
    for cam in cams:
        assert_same(cam(images), expected)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_same(cam(images), expected)
                assert_same(cam(images, aug_smooth=True), cam(images, None, aug_smooth=True))
    with pytest.raises((RuntimeError, AttributeError, IndexError)):
        original.GradCAM(small, [small[2]])(images, categories(1, 2))


def test_compiled_model(small, images):
    expected = original.GradCAM(small, [small[2]])(images, None)
    compiled = torch.compile(small, backend="eager")
    compiled(images)
    for layer in (small[2], compiled._orig_mod[2]):
        cam = adapter.GradCAM(compiled, [layer])
        assert_same(cam(images), expected)
        assert_same(accelerate(original.GradCAM(compiled, [layer]))(images), expected)
    compiled(images)


def test_layers_that_run_twice(seed, images, caplog):
    """Their last run counts, as everywhere in this package, and a line says so once."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 6, 3, stride=4), nn.Conv2d(6, 6, 3, padding=1), Head()

        def forward(self, x):
            return self.head(self.block(self.block(self.stem(x)).tanh()))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x):
            return x.sigmoid().mean((2, 3)) @ self.weight

    model = Twice().eval()
    cam = adapter.GradCAM(model, [model.block])
    with caplog.at_level(logging.WARNING, logger="cfcam_gpu"):
        cam(images)
        cam(images)
    assert caplog.messages == [
        "target layer 'block' runs 2 times in a forward pass: its last run is explained (pytorch-grad-cam explains"
        " its first)"
    ]


def test_other_targets_and_outputs(small, images):
    """Callables of the library, and a model that returns a dictionary."""
    targets = [ClassifierOutputReST(1), ClassifierOutputReST(3)]
    expected = original.GradCAM(small, [small[2]])(images, targets)
    assert_same(adapter.GradCAM(small, [small[2]])(images, targets), expected)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small

        def forward(self, x):
            return {"logits": self.model(x), "scale": 2.0}

    model = Wrapped().eval()
    cam = adapter.GradCAM(model, [small[2]])
    targets = [lambda output: output["logits"][1], lambda output: output["logits"][3]]
    expected = original.GradCAM(small, [small[2]])(images, categories(1, 3))
    assert_same(cam(images, targets), expected)
    cam.batch_size = 1
    assert_same(cam(images, targets), expected, 1e-5)
    assert cam.outputs["logits"].shape == (2, 5)
    cam(images, targets, aug_smooth=True)
    assert cam.outputs["logits"].shape == (2, 5)


# What the library takes, is taken, and paired as there.


class Then(nn.Module):
    """A network, and something done with what it returns."""

    def __init__(self, model, then):
        super().__init__()
        self.model, self.then = model, then

    def forward(self, x):
        return self.then(self.model(x))


def both(method, model, layers, transform=None):
    """The original's object, and ours: made directly, and from another of the original's."""
    slow = getattr(original, method)(model, layers, transform)
    fast = getattr(adapter, method)(model, layers, transform)
    return slow, (fast, accelerate(getattr(original, method)(model, layers, transform)))


AS_TARGETS = {
    "a generator": lambda targets: (target for target in targets),
    "an array": lambda targets: np.array(targets, dtype=object),
    "a view": lambda targets: dict(enumerate(targets)).values(),
    "modules": lambda targets: nn.ModuleList([Then(nn.Identity(), target) for target in targets]),
    "more than there are images": lambda targets: [*targets, *categories(0, 0)],
}


@pytest.mark.parametrize("name", AS_TARGETS)
def test_targets_in_other_containers(small, images, name):
    slow, ours = both("GradCAM", small.double(), [small[2]])
    expected = slow(images.double(), AS_TARGETS[name](categories(1, 2)))
    for cam in ours:
        assert_same(cam(images.double(), AS_TARGETS[name](categories(1, 2))), expected)
    assert adapter.CFCAM(small, [small[2]])(images.double(), AS_TARGETS[name](categories(1, 2))).any()
    for cam in ours:
        for wrong in ({1, 2}, "ab", range(2), {"a": 1, "b": 2}):
            with pytest.raises(TypeError, match="targets must be"):
                cam(images.double(), wrong)


def test_constants_among_the_scores(small, images):
    targets = [lambda output: 0.0, lambda output: output[3]]
    slow, ours = both("LayerCAM", small, [small[2]])
    for cam in ours:
        assert_same(cam(images, targets), slow(images, targets))
        with pytest.raises(ValueError, match="score must be differentiable"):
            cam(images, targets[:1] * 2)


PAIRED = {
    "a tuple of one image": (1, lambda y: (y, y.square()), categories(3)),
    "a list of one image": (1, lambda y: [y, y.square()], [lambda output: output[0, 2]]),
    "two outputs, two targets": (1, lambda y: (y, y.square()), [lambda o: o[0, 3], lambda o: o[0, 1]]),
    "two outputs of three images": (3, lambda y: (y, y.square()), [lambda o: o[:, 3].sum(), lambda o: o[1, 1]] * 2),
    "a list as long as the batch": (2, lambda y: [y, y.square()], [lambda o: o[:, 3].sum(), lambda o: o[1, 1]]),
    "two rows an image": (2, lambda y: torch.cat([y, y.square()]), categories(1, 2, 3)),
    "no rows": (1, lambda y: y[0], [lambda output: output]),
}


@pytest.mark.parametrize("name", PAIRED)
def test_outputs_are_paired_with_targets(small, name):
    """As ``zip`` in the original does it: rows, or what is in a tuple or a list."""
    batch, then, targets = PAIRED[name]
    model, images = Then(small.double(), then).eval(), torch.randn(batch, 3, 48, 40).double()
    slow, ours = both("GradCAMElementWise", model, [small[2]])
    for cam in ours:
        assert_same(cam(images, targets), slow(images, targets))
        assert_same(cam(images, targets, aug_smooth=True), slow(images, targets, aug_smooth=True), 1e-5)
        cam.batch_size = 5
        assert_same(cam(images, targets), slow(images, targets))


@pytest.mark.parametrize("then", [lambda y: y[:, None], lambda y: torch.cat([y, y.square()])])
@pytest.mark.parametrize("method", ["HiResCAM", "FinerCAM"])
def test_top_classes_of_other_rows(small, images, then, method):
    model, images = Then(small.double(), then).eval(), images.double()
    slow = getattr(original, method)(model, [small[2]])
    if method == "FinerCAM" and then(torch.zeros(2, 5)).ndim == 3:
        pytest.skip("the original takes rows of classes")
    fast = accelerate(slow)
    assert type(fast) is not type(slow)
    np.testing.assert_allclose(fast(images), slow(images, None), atol=TOLERANCE)
    if method == "HiResCAM":
        fast.batch_size = 1
        np.testing.assert_allclose(fast(images), slow(images, None), atol=TOLERANCE)
        smooth = {"targets": None, "aug_smooth": True}
        np.testing.assert_allclose(fast(images, **smooth), slow(images, **smooth), atol=1e-5)


def test_layers_that_run_two_views_at_once(small, images):
    """The activations have two rows for each image, and so have the original's maps."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small

        def forward(self, x):
            straight, flipped = self.model(torch.cat([x, x.flip(-1)])).chunk(2)
            return straight + flipped.square()

    model, images = Views().double().eval(), images.double()
    for method in METHODS:
        slow, ours = both(method, model, [small[2]])
        for options in ({}, {"aug_smooth": True}):
            expected = slow(images, categories(1, 2), **options)
            assert len(expected) == 4
            for cam in ours:
                for cam.batch_size in (None, 1):
                    assert_same(cam(images, categories(1, 2), **options), expected, 1e-5)
    with pytest.raises(ValueError, match="one row per image"):
        adapter.CFCAM(model, [small[2]])(images, categories(1, 2))


@pytest.mark.parametrize("container", [nn.Sequential, lambda *layers: nn.ModuleList(layers)])
def test_a_container_of_target_layers(small, images, container):
    slow, ours = both("GradCAMElementWise", small, container(small[0], small[2]))
    for cam in ours:
        assert_same(cam(images, categories(1, 2)), slow(images, categories(1, 2)))
    cams = adapter.CFCAM(small, container(small[0], small[2])), adapter.CFCAM(small, [small[0], small[2]])
    assert_same(cams[0](images, [1, 2]), cams[1](images, [1, 2]))


def test_layers_are_in_the_order_in_which_they_run(small, images):
    targets = categories(1, 2)
    slow, ours = both("GradCAM", small, [small[4], small[0], small[2]])
    slow(images, targets)
    per_layer, hooks = slow.compute_cam_per_layer(images, targets, False), slow.activations_and_grads
    tensors = [*hooks.activations, *hooks.gradients]
    for cam in ours:
        for found, expected in zip(cam.compute_cam_per_layer(images, targets), per_layer):
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        hooks = cam.activations_and_grads
        assert len(tensors) == 6
        assert all(map(torch.equal, [*hooks.activations, *hooks.gradients], tensors))


def test_only_true_is_true(small, images):
    slow, ours = both("GradCAM", small, [small[2]])
    for smooth in (1, "yes", np.True_):
        for cam in ours:
            assert_same(cam(images, categories(1, 2), smooth), slow(images, categories(1, 2), smooth))


def test_a_model_that_is_put_in_training_again(images):
    """The accelerated object takes the mode as it is, as the original does; alone, because batch norm is of a batch."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    model, images = model.double(), images.double()
    model(images)
    slow = original.GradCAM(model, [model[2]])
    fast = accelerate(slow)
    model.train()
    model[1].momentum = 0.0
    for smooth in (False, True):
        for fast.batch_size in (None, 1):
            assert_same(fast(images, categories(1, 2), smooth), slow(images, categories(1, 2), smooth), 1e-5)
    assert all(module.training for module in model.modules())


def test_activations_that_are_no_grid(images):
    """The original resizes channels and tokens as if they were an image."""
    model = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    model(images)
    slow = original.HiResCAM(model, [model[2]])
    assert slow(images, categories(1, 2)).any()
    with pytest.raises(ValueError, match=r"must return \(B, C, h, w\), got \(2, 8, 96\)"):
        accelerate(slow)(images, categories(1, 2))


def test_bad_constructions(small):
    for arguments, error in (
        ((small, []), ValueError),
        ((small, [nn.ReLU()]), ValueError),
        ((small, small[2]), TypeError),
        ((None, [small[2]]), TypeError),
        ((small, [small[2]], 3), TypeError),
    ):
        for cls in (adapter.CFCAM, adapter.GradCAM):
            with pytest.raises(error):
                cls(*arguments)
    assert not small[2]._forward_hooks


# Images so small that the last layer's grid is one cell: the library gives a flat map.


@pytest.mark.parametrize("name", METHODS)
def test_a_grid_of_one_cell(resnet18, name, seed):
    images, cls = torch.randn(2, 3, 32, 32), getattr(original, name)
    for layers in ([resnet18.layer4], [resnet18.layer3, resnet18.layer4]):
        for targets in (None, categories(3, 7)):
            expected = cls(resnet18, layers)(images, targets)
            found = accelerate(cls(resnet18, layers))(images, targets)
            assert found.shape == (2, 32, 32) and np.abs(found - expected).max() <= TOLERANCE
    assert adapter.CFCAM(resnet18, [resnet18.layer4])(images, None).shape == (2, 32, 32)
