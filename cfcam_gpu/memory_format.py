"""Which memory format a network takes its images in."""

import torch
from torch import nn

from cfcam_gpu.calls import eager_without_grad_in
from cfcam_gpu.outputs import find_logits

TOLERANCE = 1e-3
"""By how much outputs may differ, as a share of the largest, before they are not the same: far more than rounding."""

FEW = 4
"""Images that make up for what a ResNet-50 loses with one: a tenth (benchmarks/memory_formats.py)."""


def of_images(model: nn.Module, image: torch.Tensor) -> torch.memory_format:
    """`torch.channels_last` where a network of two-dimensional convolutions on a CPU takes images in it, else
    `torch.contiguous_format`.

    On a CPU convolutions and what lies between them take less time so, and each hands the format on to the next; the
    weights may stay as they are. A network whose own code reshapes activations by their place in memory fails, or says
    something else, which one image shows: then it has its images as ever.

    Args:
        model: in evaluation mode; it runs twice, under ``torch.no_grad``, unless it has no such convolutions.
        image: (1, C, H, W), on the model's device.
    """
    convolves = any(parameter.ndim == 4 for parameter in model.parameters())
    if image.device.type != "cpu" or image.ndim != 4 or not convolves:
        return torch.contiguous_format
    try:
        with eager_without_grad_in(model):
            expected, found = (
                find_logits(model(image.clone(memory_format=each)), 1)
                for each in (torch.contiguous_format, torch.channels_last)
            )
    except Exception:  # of the network's own code, such as a view that there is not
        return torch.contiguous_format
    return torch.channels_last if _are_alike(found, expected) else torch.contiguous_format


def pays(model: nn.Module, n: int) -> bool:
    """Whether so many images at once take less time channels last: of a network with grouped convolutions, as depthwise
    ones, any number, of others `FEW` or more."""
    return n >= FEW or any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())


def _are_alike(found, expected):
    if found.shape != expected.shape:
        return False
    largest = expected.abs().amax()
    return bool(((found - expected).abs() <= TOLERANCE * largest).all())
