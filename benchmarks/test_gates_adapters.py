"""Speed gates of the adapters on a CPU: accelerated objects against the originals, interleaved in one run.

    python -m pytest benchmarks/test_gates_adapters.py -s

What the clocks contain: one call of the CAM object, from the input to NumPy maps at the input's size: forward,
backward (through the head only, against the whole network) and maps. The outputs are compared first. Warm-up is
outside. Two threads.
"""

import numpy as np
import pytest
import torch
import torchvision

from cfcam_gpu import accelerate

GRAD_CAM_SPEEDUP = 2.2
"""Smallest speed-up of the accelerated GradCAM over pytorch-grad-cam's."""


@pytest.mark.parametrize("batch", [1, 8])
def test_grad_cam(gate, batch):
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: grad-cam)")
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    targets = [grad_cam.utils.model_targets.ClassifierOutputTarget(index) for index in range(batch)]
    slow = grad_cam.GradCAM(model, [model.layer4[-1]])
    fast = accelerate(slow)
    expected = slow(images, targets)
    assert expected.max() > 0.9
    np.testing.assert_allclose(fast(images, targets), expected, rtol=0, atol=2e-6)  # no agreement, no number

    rounds = 20 if batch == 1 else 8
    gate(lambda: fast(images, targets), lambda: slow(images, targets), rounds, at_most=1 / GRAD_CAM_SPEEDUP)
