"""K classes an image in one pass: each as if it were alone, whatever the model, the backend and the configuration."""

import logging
import math

import numpy as np
import pytest
import torch
from compare import assert_close, stretch_of_map
from device import DEVICE, launched
from problems import activations_like
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig, cf_cam
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.layers import find_target_layer
from cfcam_gpu.models import load_model

CLOSE = 2e-6
"""Of the maps' maximum, which is 1."""


def assert_same_maps(actual, expected, close=CLOSE):
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max() <= close


def assert_each_as_if_alone(cam, images, classes, call="maps", close=CLOSE):
    """That row k of the classes (B, K) is the map of class k of each image; returns the maps."""
    function = getattr(cam, call)
    maps = function(images, classes)
    assert maps.shape[:2] == classes.shape and torch.equal(cam.classes, classes)
    for k, column in enumerate(classes.T):
        assert_same_maps(maps[:, k], function(images, column), close)
    return maps


# Random networks run in double precision: their own rounding differs with the number of classes, and would be stretched
# with the map.


@pytest.fixture
def resnet18(resnet18):
    return resnet18.double()


@pytest.fixture
def images(seed):
    return torch.rand(3, 3, 96, 64, dtype=torch.float64)


@pytest.fixture
def classes(seed):
    return torch.randint(1000, (3, 12))


@pytest.mark.parametrize(
    "config", [CFCAMConfig(), CFCAMConfig.paper(), CFCAMConfig.stable(), CFCAMConfig(margin_temperature=0.0)]
)
def test_each_class_as_if_alone(resnet18, images, classes, config):
    cam = CFCAM(resnet18, [resnet18.layer4[-1]], config=config)
    maps = assert_each_as_if_alone(cam, images, classes)
    assert maps.shape == (3, 12, 96, 64)
    assert config == CFCAMConfig.paper() or maps.std(1).max() > 1e-3, "the classes differ"
    assert_same_maps(
        CFCAM(resnet18, [resnet18.layer4[-1]], config=config)(images, classes.tolist()), cam(images, classes)
    )


@pytest.mark.parametrize(
    "how", ["several layers", "channels last", "bfloat16", "float16", "inner layer", "chunks", "__call__"]
)
def test_each_class_as_if_alone_in_other_ways(resnet18, images, classes, how, monkeypatch):
    layers = [resnet18.layer4[-1]]
    if how == "several layers":
        layers.insert(0, resnet18.layer3[-1])
    elif how == "inner layer":
        layers = [resnet18.layer3[0].conv1]
    elif how == "channels last":
        resnet18, images = (each.to(memory_format=torch.channels_last) for each in (resnet18, images))
    elif how in ("bfloat16", "float16"):
        resnet18, images = (each.to(getattr(torch, how)) for each in (resnet18, images))
    elif how == "chunks":  # two classes at once
        monkeypatch.setattr("cfcam_gpu.capture.HEAD_BYTES_ON_CPU", 2 * 3 * 512 * 3 * 2 * 8)
        monkeypatch.setattr("cfcam_gpu.torch_backend.MAP_BYTES_ON_CPU", 1)
    cam = CFCAM(resnet18, layers)
    # Of half precision the gradients' own rounding is stretched with the map; of double precision nothing is.
    close = 2e-3 if how in ("bfloat16", "float16") else CLOSE
    assert_each_as_if_alone(cam, images, classes, how if how == "__call__" else "maps", close)


def test_trained_network():
    for package in ("efficientnet_lite_pytorch", "skimage", "PIL"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: test)")
    from PIL import Image
    from skimage.data import chelsea

    loaded = load_model("demo")
    images = loaded.preprocess(Image.fromarray(chelsea()))[None]
    cam = CFCAM(loaded.model, [find_target_layer(loaded.model, images)[1]])
    assert cam.maps(images, top=10).amax() == 1
    assert_each_as_if_alone(cam, images, cam.classes, close=1e-5)  # its float32 rounds by the processor


def test_transformer(images):
    timm = pytest.importorskip("timm", reason="timm is not installed (extra: test)")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()
    cam = CFCAM(model, [model.blocks[-1].norm1], lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    images, classes = images[:2, :, :64], torch.tensor([[0, 5, 999], [3, 3, 7]])
    model.double()
    maps = assert_each_as_if_alone(cam, images, classes)
    assert torch.equal(maps[1, 0], maps[1, 1]), "a class may be asked for twice"


def test_top(resnet18, images):
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    maps = cam.maps(images, top=4)
    assert torch.equal(cam.classes, cam.outputs.sort(dim=1, descending=True, stable=True).indices[:, :4])
    assert_same_maps(maps, cam.maps(images, cam.classes))
    assert_same_maps(maps[:, 0], cam.maps(images))
    assert torch.equal(cam.classes, cam.outputs.argmax(1)), "of one class an image (B,)"
    assert cam.maps(images, top=1).shape == (3, 1, 96, 64)


def test_forms_of_targets(resnet18, images, classes):
    cam = CFCAM(resnet18, [resnet18.layer4[-1]], config=CFCAMConfig(margin_temperature=0.0))
    maps = cam.maps(images, classes)
    for form in (
        classes.int(),
        classes.tolist(),
        classes.numpy(),
        list(classes.numpy()),
        tuple(map(tuple, classes.tolist())),
    ):
        assert torch.equal(cam.maps(images, form), maps)
    calls = [[lambda output, k=k: output[k] for k in row] for row in classes.tolist()]
    assert_same_maps(cam.maps(images, calls), maps)
    assert cam.classes is None


def test_one_forward_one_trunk(resnet18, images, classes):
    """Whatever K is: the model runs once, and the layer's gradients are all that comes back."""
    runs = []
    handle = resnet18.conv1.register_forward_hook(lambda *_: runs.append(1))
    CFCAM(resnet18, [resnet18.layer4[-1]]).maps(images, classes)
    handle.remove()
    assert len(runs) == 1


class Doubled(torch.autograd.Function):
    """Twice its input; its backward looks at its values, which a batched backward cannot."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if float(gradient.abs().sum()) >= 0 else None


class Refusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 24, 3, stride=4)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return Doubled.apply(self.head(self.layer(x)))


def test_heads_that_take_one_class_at_a_time(images, caplog):
    model = Refusing().double().eval()
    cam, classes = CFCAM(model, [model.layer]), torch.tensor([[0, 3, 6]] * 3)
    with caplog.at_level(logging.WARNING, "cfcam_gpu"):
        maps = cam.maps(images, classes)
        cam.maps(images, classes)
    assert model.runs == 2, "no second forward"
    assert len(caplog.records) == 1 and "one backward a class" in caplog.text
    for k in range(3):
        assert_same_maps(maps[:, k], cam.maps(images, classes[:, k]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"targets": [[1, 2], [3, 4], [5]]}, ValueError, r"as many targets for each image: 2 at \[0\], got 1 at \[2\]"),
        ({"targets": [[1, 2], 3, [4, 5]]}, TypeError, r"all lists or none, got int at \[1\]"),
        ({"targets": [[], [], []]}, ValueError, "at least one target per image"),
        (
            {"targets": torch.zeros(3, 0, dtype=torch.long)},
            ValueError,
            r"at least one target per image, got shape \(3, 0\)",
        ),
        ({"targets": torch.zeros(3, 2)}, TypeError, "integer tensor, got torch.float32"),
        ({"targets": np.zeros((3, 2))}, TypeError, "integer array, got float64"),
        ({"targets": torch.zeros(2, 2, dtype=torch.long)}, ValueError, r"shape \(3,\) or \(3, K\), got \(2, 2\)"),
        ({"targets": torch.zeros(3, 1, 1, dtype=torch.long)}, ValueError, r"shape \(3,\) or \(3, K\), got \(3, 1, 1\)"),
        ({"targets": np.array(3)}, ValueError, r"shape \(3,\) or \(3, K\), got \(\)"),
        ({"targets": torch.eye(3, dtype=torch.long)}, ValueError, r"class indices, got zeros and ones \(3, 3\)"),
        ({"targets": [[0, 1, 1, 0]] * 3}, ValueError, r"class indices, got zeros and ones \(3, 4\)"),
        ({"targets": [[0, 1000]] * 3}, ValueError, r"class indices in \[0, 1000\), got 1000"),
        ({"targets": [[0, 1.5]] * 3}, TypeError, r"targets\[0\] must be all class indices .* got float at \[1\]"),
        ({"targets": [[0, abs]] * 3}, TypeError, r"targets\[0\] must be all class indices or all callables"),
        (
            {"targets": [[lambda output: output[0], lambda output: output[1].detach()]] * 3},
            ValueError,
            r"targets\[0\]\[1\] must return a score that a gradient flows back from",
        ),
        ({"targets": [[lambda output: output]] * 3}, ValueError, r"targets\[0\]\[0\] must return a one-element tensor"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"top": 1001}, ValueError, "top must be at most the model's 1000 classes, got 1001"),
        ({"top": 2.0}, TypeError, "top must be None or a number of classes, got float"),
        ({"top": True}, TypeError, "top must be None or a number of classes, got bool"),
        ({"top": 2, "targets": [1, 2, 3]}, ValueError, "targets must be None"),
    ],
)
def test_bad_targets(resnet18, images, arguments, error, message):
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    with pytest.raises(error, match=message):
        cam.maps(images, **arguments)
    assert not any(module._forward_hooks for module in resnet18.modules())
    assert cam.maps(images, top=2).isfinite().all(), "usable after an error"


def test_other_captures_take_one_target_an_image(resnet18, images, classes):
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), got \(3, 12\)"):
        HeadCapture(resnet18, [resnet18.layer4])(images, classes)


# On activations and gradients.


@pytest.fixture
def problem(seed):
    activations = activations_like((2, 48, 6, 5), dead=0.3)
    gradients, guide = torch.randn(2, 17, 48, 6, 5) * 1e-3, activations_like((2, 20, 9, 8))
    return activations.to(DEVICE), gradients.to(DEVICE), guide.to(DEVICE)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize(
    "config, guided",
    # With a range, as by default, a program has one class; without, sixteen.
    [
        (CFCAMConfig(), True),
        (CFCAMConfig(affinity_range=math.inf), True),
        (CFCAMConfig(), False),
        (CFCAMConfig.paper(), False),
    ],
)
def test_of_gradients(problem, backend, config, guided):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    activations, gradients, guide = problem
    guide = guide if guided else None
    if backend != "torch":
        gradients = gradients[:, :3] if backend == "reference" else gradients
    result = cf_cam(activations, gradients, (31, 24), config, backend, guide=guide)
    expected = cf_cam(activations, gradients, (31, 24), config, "reference", guide=guide)
    assert result.maps.shape == (*gradients.shape[:2], 31, 24) and result.weights.shape == gradients.shape[:3]
    assert torch.equal(result.labels, expected.labels)
    for k in (0, gradients.shape[1] - 1):
        one = cf_cam(activations, gradients[:, k], (31, 24), config, backend, guide=guide)
        assert torch.equal(result.labels, one.labels) and torch.equal(result.eps, one.eps)
        assert_close(result.weights[:, k], one.weights)
        for image in range(2):
            features = None if guide is None else guide[image]
            weights = expected.weights[image, k]
            stretch = stretch_of_map(activations[image], weights, (31, 24), config, features)
            assert_close(result.maps[image, k], expected.maps[image, k], stretch=stretch)
            # 2e-6; the interpreter's matrix products of K classes and of one are summed in other orders.
            assert_close(
                result.maps[image, k], one.maps[image], stretch=(0.4 if backend == "triton" else 0.2) * stretch
            )


def test_launches_do_not_grow_with_the_classes(problem, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    activations, gradients, guide = problem
    names = launched(monkeypatch, run=False)
    for n_classes in (1, 2, 17):
        cf_cam(activations, gradients[:, :n_classes], backend="triton", check_finite=False, guide=guide)
        assert len(names) == 13 and names.count("pool_gradients_kernel") == 1
        names.clear()


def test_any_strides(problem):
    activations, gradients, guide = problem
    expected = cf_cam(activations, gradients, guide=guide).maps
    turned = gradients.transpose(0, 1).contiguous().transpose(0, 1)
    last = gradients.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for other in (turned, last, gradients.double().float()):
        assert_close(cf_cam(activations, other, guide=guide).maps, expected)


def test_bad_gradients(problem):
    activations, gradients, _ = problem
    for bad in (gradients[:1], gradients[:, :0], gradients[:, :, :5], gradients[None]):
        with pytest.raises(ValueError, match=r"of K classes an image they are \(B, K, C, ...\)"):
            cf_cam(activations, bad)
    gradients[1, 3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="gradients must be finite, got 1 NaN"):
        cf_cam(activations, gradients)
