"""AblationCAM on the recorded head, against pytorch-grad-cam's own: the same numbers, and how many images are run."""

import gc

import numpy as np
import pytest
import torch
from networks import vit
from torch import nn

original = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed (extra: grad-cam)")
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from cfcam_gpu import accelerate
from cfcam_gpu.adapters.ablation import AblationCAM

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:invalid value")]


@pytest.fixture
def images(seed):
    return torch.randn(2, 3, 48, 40)


def to_map(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 2))


class Softmaxed:
    """A target of the user's own."""

    def __call__(self, output):
        return output.softmax(0)[2]


def compare(model, layers, images, targets, **options):
    expected = original.AblationCAM(model, layers, **options)(images, targets)
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    cam = AblationCAM(model, layers, **options)
    for _ in range(2):  # recorded, and then renewed
        rows.clear()
        found = cam(images, targets)
        # The scores' own rounding, by batch and by attention's fused path, is what is left of their small differences.
        np.testing.assert_allclose(found, expected, atol=1e-4)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules() if module not in layers)
    return sum(rows)


@pytest.mark.parametrize(
    "layers, options",
    [
        (["layer2.1.conv1", "layer3.0.conv1"], {"batch_size": 100}),
        (["layer4"], {"ratio_channels_to_ablate": 0.2, "batch_size": 7}),
    ],
)
def test_grids(resnet18, images, layers, options):
    targets, layers = [ClassifierOutputTarget(5), Softmaxed()], [resnet18.get_submodule(layer) for layer in layers]
    n_run = compare(resnet18, layers, images, targets, **options)
    assert n_run == (1 + len(layers)) * len(images)  # one pass, and one more for each layer


def test_data_parallel(resnet18, images):
    """Its forward calls the profiler, which leaves the numbers alone."""
    targets = [ClassifierOutputTarget(5), Softmaxed()]
    n_run = compare(nn.DataParallel(resnet18), [resnet18.layer3[1].conv1], images, targets, batch_size=64)
    assert n_run == 2 * len(images)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.ReLU()])
def test_smallest_values_of_any_sign(activation):
    model = nn.Sequential(nn.Conv2d(3, 9, 3), activation, nn.Conv2d(9, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(6, 4)).eval()
    compare(model, [model[1]], torch.randn(2, 3, 12, 12), None, batch_size=4)


def test_tokens():
    model = vit(32, layers=2)
    nn.init.normal_(model.heads.head.weight)  # torchvision's is zero
    options = {"reshape_transform": to_map, "ablation_layer": AblationLayerVit()}
    compare(model, [model.encoder.layers[1].ln_1], torch.randn(1, 3, 32, 32), None, **options)


def test_accelerate(resnet18, images):
    theirs = original.AblationCAM(resnet18, [resnet18.layer4], batch_size=64)
    expected = theirs(images, None)
    ours = accelerate(theirs)
    assert type(ours) is AblationCAM and isinstance(ours, original.AblationCAM) and accelerate(ours) is ours
    assert ours.batch_size == 64
    del theirs
    gc.collect()  # its hooks go with it
    np.testing.assert_allclose(ours(images, None), expected, atol=1e-4)
    del ours
    gc.collect()
    assert not resnet18.layer4._forward_hooks


class Own(AblationLayer):
    pass


def test_what_is_left_to_the_original(resnet18, images):
    small = images[:1]
    assert compare(resnet18, [resnet18.layer4], small, None, ablation_layer=Own()) >= 512
    dropout = nn.Sequential(nn.Conv2d(3, 8, 3), Values(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    assert compare(dropout, [dropout[0]], small, None) >= 8


class Values(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum().item() > -1e30 else x


class OwnLayer(AblationLayer):
    """An ablation layer of the user's own."""


def state(model):
    """All that a call may not leave changed."""
    return [(name, id(each), list(vars(each)), dict(each._forward_hooks)) for name, each in model.named_modules()]


@pytest.mark.parametrize("at", [1, 5])  # before the layer is replaced, and while it is
def test_the_model_after_an_error_in_the_originals_code(at, images):
    calls = []

    def failing(output):
        calls.append(output)
        if len(calls) == at:
            raise RuntimeError("the target's own")
        return output[2]

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    model[0].register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(RuntimeError, match="the target's own"):
        AblationCAM(model, [model[0]], ablation_layer=OwnLayer(), batch_size=4)(images, [failing, failing])
    assert state(model) == before
