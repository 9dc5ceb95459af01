"""Speed gates for a CPU: ratios measured in one run, with the variants interleaved.

    python -m pytest benchmarks/test_gates.py

What the clocks contain: for the end-to-end gates, ``cam.maps`` (forward, head backward, pipeline, maps at the input's
size) over the model's plain forward under ``torch.no_grad``, of one class of each image or of several; for the pipeline
gates, from activations and gradients to maps. Warm-up is outside. Two threads, and the compiled clustering: without it
the limits do not hold.
"""

import naive
import pytest
import torch
import torchvision

from cfcam_gpu import CFCAM, CFCAMConfig, bench, cf_cam

END_TO_END = {1: 1.15, 8: 1.1}
"""{batch: largest end-to-end time as a multiple of the plain forward pass}; the goals are 1.15 and 1.05."""

SEVERAL_CLASSES = {(1, 10): 1.25, (8, 10): 1.15, (1, 100): 2.0}
"""{(batch, classes of each image): largest time of one pass as a multiple of the plain forward pass}."""

VIDEO = 1.1
"""Largest time of a clip's map as a multiple of the plain forward pass of an R3D-18."""

TEN_CALLS_SPEEDUP = 8
"""Smallest speed-up of ten classes in one pass over ten calls of another library, or of an accelerated object of it."""

NAIVE_SPEEDUP = 40
"""Smallest speed-up of the pipeline over the authors' approach."""


@pytest.fixture
def against_forward(gate):
    """``against_forward(batch, at_most, **options)``: the gate of ``cam.maps`` over a ResNet-50's plain forward."""

    def run(batch, at_most, **options):
        torch.manual_seed(0)
        model = torchvision.models.resnet50(weights=None).eval()
        images = torch.randn(batch, 3, 224, 224)
        cam = CFCAM(model, [model.layer4[-1]])

        def forward():
            with torch.no_grad():
                model(images)

        gate(lambda: cam.maps(images, **options), forward, rounds=20 if batch == 1 else 15, at_most=at_most)

    return run


@pytest.mark.parametrize("batch", END_TO_END)
def test_end_to_end(against_forward, batch):
    against_forward(batch, END_TO_END[batch])


@pytest.mark.parametrize("batch, n_classes", SEVERAL_CLASSES)
def test_several_classes(against_forward, batch, n_classes):
    against_forward(batch, SEVERAL_CLASSES[batch, n_classes], top=n_classes)


def test_video(gate):
    torch.manual_seed(0)
    model = torchvision.models.video.r3d_18(weights=None).eval()
    clips = torch.randn(1, 3, 16, 112, 112)
    cam = CFCAM(model, [model.layer4])

    def forward():
        with torch.no_grad():
            model(clips)

    gate(lambda: cam.maps(clips), forward, rounds=10, at_most=VIDEO)


@pytest.mark.parametrize("peer", ["pytorch-grad-cam:accelerated", "torch-cam", "captum"])
def test_ten_classes_against_ten_calls(gate, peer):
    subject = bench.subject("resnet50")
    ten_calls, ours = (bench.PROVIDERS[name].build(subject) for name in (f"{peer}:ten calls", "cfcam:top10"))
    assert ours().shape == ten_calls().shape  # of one method each, compared by `cfcam bench`
    gate(ours, ten_calls, rounds=8, at_most=1 / TEN_CALLS_SPEEDUP)


@pytest.fixture
def last_layer():
    """Activations and gradients (1, 2048, 7, 7) like a ResNet-50's last layer: ReLU, channel scales spread out."""
    torch.manual_seed(0)
    activations = torch.randn(1, 2048, 7, 7).relu() * torch.rand(1, 2048, 1, 1)
    return activations, torch.randn(1, 2048, 7, 7) * 1e-3


def test_pipeline_against_the_authors_approach(gate, last_layer):
    activations, gradients = last_layer
    config = CFCAMConfig.paper()
    expected = naive.class_map(activations[0], gradients[0], (224, 224))
    maps = cf_cam(activations, gradients, (224, 224), config).maps
    torch.testing.assert_close(maps[0], expected, rtol=0, atol=1e-4)  # no agreement, no number

    gate(
        lambda: cf_cam(activations, gradients, (224, 224), config),
        lambda: naive.class_map(activations[0], gradients[0], (224, 224)),
        rounds=5,
        at_most=1 / NAIVE_SPEEDUP,
    )
