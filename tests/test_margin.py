"""The margin as the score: its gradient is autograd's of the closed form, and what it does not depend on."""

import pytest
import torch
from captured import margins
from compare import assert_close

from cfcam_gpu import CFCAM
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.targets import margin_cotangent


@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("temperature", [0.1, 1.5, 7.0])
def test_the_gradient_of_the_closed_form(n_classes, temperature, seed):
    logits = (10 * torch.randn(4, n_classes, dtype=torch.float64)).requires_grad_()
    classes = torch.randint(n_classes, (4,))
    (expected,) = torch.autograd.grad(margins(logits, classes, temperature).sum(), logits)
    assert_close(margin_cotangent(logits.detach(), classes, temperature), expected, torch.float64)


def test_shifted_and_scaled_logits(seed):
    logits, classes = torch.randn(5, 20, dtype=torch.float64), torch.randint(20, (5,))
    expected = margin_cotangent(logits, classes, 1.5)
    assert_close(margin_cotangent(1e-3 * logits + 50, classes, 1.5), expected, stretch=1e-3)
    assert_close(expected.sum(1) + 1, torch.ones(5))  # nothing speaks for a shift


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38, -7.0])
def test_equal_logits(value):
    found = margin_cotangent(torch.full((1, 5), value), torch.tensor([2]), 1.5)
    assert_close(found, torch.tensor([[-0.25, -0.25, 1, -0.25, -0.25]]))


def test_classes_that_are_ruled_out(seed):
    """A model that has a logit of minus infinity for some classes has the margin of the others."""
    logits = torch.randn(3, 12, dtype=torch.float64)
    masked, left = logits.clone(), [1, 2, 5, 7, 8]
    masked[:, [index for index in range(12) if index not in left]] = -torch.inf
    found = margin_cotangent(masked, torch.tensor([5, 1, 8]), 1.35)
    assert_close(found[:, left], margin_cotangent(logits[:, left], torch.tensor([2, 0, 4]), 1.35), torch.float64)
    assert found.count_nonzero() == 3 * len(left)
    alone = torch.full((1, 4), -torch.inf).index_fill(1, torch.tensor([2]), 1.0)
    assert torch.equal(margin_cotangent(alone, torch.tensor([2]), 1.35), torch.tensor([[0.0, 0, 1, 0]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("targets", [None, [0, 1], [[0, 2], [1, 2]]])
def test_logits_that_are_no_numbers(value, targets):
    class Broken(torch.nn.Sequential):
        def forward(self, images):
            return super().forward(images) + torch.tensor([[0.0, 0, 0], [0, 0, value]])

    pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: grad-cam)")
    from cfcam_gpu.adapters import pytorch_grad_cam as adapters

    images = torch.randn(2, 3, 8, 8)
    model = Broken(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    with pytest.raises(ValueError, match="the model's logits must be finite, got NaN or infinity for image 1"):
        CFCAM(model, [model[0]]).maps(images, targets)
    CFCAM(model, [model[0]], check_finite=False).maps(images, targets)
    with pytest.raises(ValueError, match="logits must be finite"):
        adapters.CFCAM(model, [model[0]])(images, targets)
    CFCAM(model, [model[0]]).maps(images, [lambda output: output[0]] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, seed):
    logits, classes = (5 * torch.randn(3, 100)).to(dtype), torch.randint(100, (3,))
    found = margin_cotangent(logits, classes, 1.5)
    assert found.dtype == dtype
    assert_close(found, margin_cotangent(logits.double(), classes, 1.5), dtype, stretch=4)


def test_what_is_captured(resnet18):
    """Indices and None take the margin, callables and a single logit what they are."""
    images, classes = torch.randn(2, 3, 64, 64), [3, 700]
    layer = resnet18.layer4[-1]
    plain, margin = (HeadCapture(resnet18, [layer], margin_temperature=tau) for tau in (0.0, 1.5))
    captured = margin(images, classes)
    expected = plain(images, [lambda z, c=c: margins(z[None], torch.tensor([c]), 1.5)[0] for c in classes])
    assert_close(captured.gradients[0], expected.gradients[0])
    assert not torch.allclose(captured.gradients[0], plain(images, classes).gradients[0])
    top = captured.outputs.argmax(1)
    assert torch.equal(margin(images).gradients[0], margin(images, top).gradients[0])
    callables = [lambda z: z[3], lambda z: z[700]]
    assert torch.equal(margin(images, callables).gradients[0], plain(images, callables).gradients[0])
    resnet18.fc = torch.nn.Linear(512, 1)
    assert torch.equal(margin(images, [0, 0]).gradients[0], plain(images, [0, 0]).gradients[0])
