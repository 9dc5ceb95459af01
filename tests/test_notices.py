"""Warnings of calls that went well: training mode, and maps that are zero everywhere."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig, notices

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


def told(function):
    """The texts of the warnings of a call, each given at the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    for each in caught:
        assert each.category is UserWarning and each.filename == __file__
    return [str(each.message) for each in caught]


# Training mode


def classifier(*before, inside=()):
    layers = [nn.Conv2d(3, 8, 3), *before, nn.ReLU(), *inside, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def images(batch=2):
    return torch.randn(batch, 3, 12, 12)


class DropPath(nn.Identity):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


@pytest.mark.parametrize(
    "layers, message",
    [
        ([nn.BatchNorm2d(8)], "batch norm (1 layer) takes this batch's statistics and changes its running ones"),
        ([nn.Dropout2d(0.1)] * 1, "dropout (1 layer) is on, so that every call differs"),
        (
            [nn.BatchNorm2d(8), nn.SyncBatchNorm(8).eval(), nn.BatchNorm2d(8), DropPath(0.2)],
            "batch norm (2 layers) takes this batch's statistics and changes its running ones and dropout (1 layer) is"
            " on, so that every call differs",
        ),
    ],
)
def test_training_mode_is_said_once(layers, message):
    model = classifier(*layers)
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
        model[2].eval()
    cam = CFCAM(model, [model[0]], config=CFCAMConfig(affinity_power=0))
    said = [text for text in told(lambda: cam.maps(images())) if "training" in text]
    assert said == [f"Sequential is in training mode: {message}; call model.eval()"]
    assert not [text for text in told(lambda: cam(images())) if "training" in text]
    assert model.training


def test_training_mode_that_changes_nothing_is_not_said():
    model = classifier(nn.BatchNorm2d(8, track_running_stats=False), nn.Dropout(0.0), DropPath(0.0), nn.GroupNorm(2, 8))
    cam = CFCAM(model, [model[0]])
    assert not [text for text in told(lambda: cam.maps(images())) if "training" in text]
    normal = classifier(nn.BatchNorm2d(8)).eval()
    cam = CFCAM(normal, [normal[0]])
    assert not [text for text in told(lambda: cam.maps(images())) if "training" in text]
    normal[1].train()  # one part of it, later
    assert len([text for text in told(lambda: cam.maps(images())) if "training" in text]) == 1


# Zero maps


def against(n_classes=1):
    """A network in which everything speaks against every class."""
    model = classifier().eval()
    model[-1] = nn.Linear(8, n_classes)
    with torch.no_grad():
        model[-1].weight.abs_().neg_().sub_(0.1)
    return model


def test_zero_maps_are_said_once_with_the_image_and_the_reason():
    model = against()
    cam = CFCAM(model, [model[1]])
    score = lambda sign: lambda output: sign * output[0]
    targets = [score(-1), score(1), score(-1), score(1)]
    x = images(4)
    assert told(lambda: cam.maps(x, [score(-1)] * 4)) == []
    said = told(lambda: cam.maps(x, targets))
    assert said == [
        "maps are zero everywhere, of image 1, 3: nothing in the target layer speaks for the target: try another target"
        " or layer"
    ]
    assert told(lambda: cam.maps(x, targets)) == told(lambda: cam(x, targets)) == []
    assert len(told(lambda: CFCAM(model, [model[1]])(x, targets))) == 1, "once per object"


def test_of_several_targets_image_and_target_are_said():
    model = against(3)
    cam = CFCAM(model, [model[1]], config=CFCAMConfig(margin_temperature=0))
    (said,) = told(lambda: cam.maps(images(4), torch.tensor([[0, 1, 2]] * 4)))
    assert said.startswith("maps are zero everywhere, of (image, target) (0, 0), (0, 1), (0, 2), (1, 0), ")
    assert said.endswith("; and 4 more")


def test_a_layer_that_the_target_does_not_use():
    model = against()
    cam = CFCAM(model, [model[1]])
    said = told(lambda: cam.maps(images(), [lambda output: -output[0], lambda output: 0 * output[0]]))
    assert said == [f"maps are zero everywhere, of image 1: {notices.UNUSED}"]


def test_alike_cells_and_a_silent_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)).eval()
    with torch.no_grad():
        model[-1].weight.abs_().add_(0.1)
        model[0].bias.fill_(1)
        flat = torch.zeros(1, 3, 6, 6)
    assert told(lambda: CFCAM(model, [model[1]]).maps(flat, [0])) == [
        f"maps are zero everywhere, of image 0: {notices.ALIKE}"
    ]
    with torch.no_grad():
        model[0].bias.zero_()
    assert told(lambda: CFCAM(model, [model[0]]).maps(flat, [0])) == [
        f"maps are zero everywhere, of image 0: {notices.SILENT}"
    ]


class Copied:
    """An event of a copy that is done when it is told so."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done


def test_on_a_device_it_is_said_later_and_nothing_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = against()
    cam = CFCAM(model, [model[1]], config=CFCAMConfig())
    first, second = Copied(), Copied()
    cam._notices._pending += [
        notices._Pending(torch.tensor([1.0, 0.5]), first),
        notices._Pending(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), second),
    ]
    assert told(lambda: cam.outputs) == []
    first.done = True
    assert told(lambda: cam.outputs) == []
    second.done = True
    (said,) = told(lambda: cam.outputs)
    assert (
        said == f"maps of an earlier call are zero everywhere, of (image, target) (0, 0), (1, 1): {notices.ANY_REASON}"
    )
    assert not cam._notices._pending and told(lambda: cam.outputs) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    model, x = against().cuda(), images().cuda()
    cam = CFCAM(model, [model[1]])
    cam.maps(x, [0, 0])
    torch.cuda.synchronize()
    (said,) = told(lambda: cam.outputs)
    assert said.startswith("maps of an earlier call are zero everywhere, of image 0, 1: ")


def test_a_warning_that_is_an_error_leaves_the_model_alone():
    model = classifier(nn.Dropout(0.5))
    cam = CFCAM(model, [model[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="training mode"):
            cam.maps(images())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_look_at_the_maps_is_one_reduction():
    """Of a map that is not zero nothing more is computed."""
    seen = notices.Notices()
    layers = SimpleNamespace()  # looked at by nobody
    assert told(lambda: seen.of_zero_maps(torch.rand(2, 5, 5) + 0.1, layers, stacklevel=2)) == []
