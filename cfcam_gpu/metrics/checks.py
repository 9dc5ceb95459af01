"""Checks of what the measures are given. Values are looked at on the CPU alone, where that costs nothing."""

from numbers import Integral

import torch

from cfcam_gpu.arrays import as_tensor
from cfcam_gpu.checks import check_values
from cfcam_gpu.targets import check_targets, classes_on

RANGE_SLACK = 1e-6
"""How far outside [0, 1] a map may be: bilinear interpolation rounds."""


def check_count(name, value, largest=None):
    """``value`` as an int from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1 or (largest is not None and value > largest):
        raise ValueError(f"{name} must be at least 1{f' and at most {largest}' if largest else ''}, got {value}")
    return int(value)


def check_floating(name, tensor, shape, *ndims):
    """Refuse what is not a non-empty floating-point tensor of one of these numbers of axes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.ndim not in ndims or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape {shape} and not be empty, got {tuple(tensor.shape)}")


def check_maps(name, maps, unit_range=False, volumes=False):
    """Maps of any library as a detached tensor (B, H, W), or also (B, D, H, W); with ``unit_range`` in [0, 1]."""
    maps, _ = as_tensor(name, maps)
    if volumes:
        check_floating(name, maps, "(B, H, W) or (B, D, H, W)", 3, 4)
    else:
        check_floating(name, maps, "(B, H, W)", 3)
    check_values({name: maps}, None)
    if unit_range and maps.device.type == "cpu":
        low, high = (bound.item() for bound in maps.aminmax())
        if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
            raise ValueError(f"{name} must be in [0, 1], got values from {low} to {high}")
    return maps.detach()


def check_pair(maps, other_maps, unit_range=False):
    """Both as `check_maps` has them, of one shape and device."""
    maps, other_maps = check_maps("maps", maps, unit_range), check_maps("other_maps", other_maps, unit_range)
    if other_maps.shape != maps.shape:
        raise ValueError(f"other_maps must match maps {tuple(maps.shape)}, got {tuple(other_maps.shape)}")
    if other_maps.device != maps.device:
        raise ValueError(f"other_maps must be on the maps' device {maps.device}, got {other_maps.device}")
    return maps, other_maps


def check_images_and_maps(images, maps, unit_range=False):
    """Images (B, C, H, W) and their maps (B, H, W), or volumes (B, C, D, H, W) and theirs, detached."""
    check_floating("images", images, "(B, C, H, W) or (B, C, D, H, W)", 4, 5)
    maps = check_maps("maps", maps, unit_range, volumes=True)
    expected = (len(images), *images.shape[2:])
    if tuple(maps.shape) != expected:
        raise ValueError(f"maps must have the images' batch and size {expected}, got {tuple(maps.shape)}")
    if maps.device != images.device:
        raise ValueError(f"maps must be on the images' device {images.device}, got {maps.device}")
    return images.detach(), maps


def check_classes(classes, batch, device, n_classes, name="targets"):
    """Class indices of any kind as an int64 tensor (B,) on the device."""
    try:
        classes = check_targets(classes, batch)
        if isinstance(classes, torch.Tensor):
            return classes_on(device, classes, n_classes)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("targets", name)) from None
    raise TypeError(f"{name} must be class indices: a list of integers or an integer tensor")


def is_zero(maps):
    """Whether each map is zero everywhere: bool (B,)."""
    return maps.flatten(1).eq(0).all(1)
