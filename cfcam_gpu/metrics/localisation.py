"""Localisation: the grid pointing game."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cfcam_gpu.metrics import checks


class Mosaics(NamedTuple):
    """What `mosaics` returns. Cells: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    images: torch.Tensor
    """(n, C, 2H, 2W), or (n, C, H, W) when shrunk."""
    classes: torch.Tensor
    """(n, 4) int64: the class of each cell, all different in a mosaic."""
    sources: torch.Tensor
    """(n, 4) int64: the index of each cell's image."""


def mosaics(
    images: torch.Tensor,
    classes: Sequence[int] | torch.Tensor,
    n: int,
    rng: np.random.Generator | int,
    *,
    shrink: bool = False,
) -> Mosaics:
    """2 x 2 mosaics of images of four different classes, chosen at random.

    Args:
        images: (N, C, H, W).
        classes: N class indices, of four classes at least: a list or an integer tensor.
        n: how many mosaics.
        rng: ``numpy.random.Generator``, or a seed for one.
        shrink: halve each image (bilinear, with antialias), so that the mosaic has the images' size, for networks with
            a fixed input; default False: cells of full size, as in the literature. H and W must then be even.

    Returns:
        `Mosaics`: images, classes (n, 4), sources (n, 4), on the images' device.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a wrong number of classes, fewer than four different ones, n < 1, a size that cannot be halved.

    Source: Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021. Departures: the grid is 2 x 2 always, and
    which images to pass (there: those that the network is surest of) is the caller's choice.

    >>> grids = mosaics(images, classes, n=100, rng=0)  # images (50, 3, 224, 224)
    >>> grids.images.shape, grids.classes.shape
    (torch.Size([100, 3, 448, 448]), torch.Size([100, 4]))
    """
    checks.check_floating("images", images, "(N, C, H, W)", 4)
    n = checks.check_count("n", n)
    of_images = np.asarray(torch.as_tensor(classes).cpu())
    if of_images.shape != (len(images),) or of_images.dtype.kind not in "iu":
        raise ValueError(f"classes must be {len(images)} integers, got {of_images.dtype} of shape {of_images.shape}")
    members = [np.flatnonzero(of_images == index) for index in np.unique(of_images)]
    if len(members) < 4:
        raise ValueError(f"classes must hold four different classes or more, got {len(members)}")
    if shrink:
        if images.shape[2] % 2 or images.shape[3] % 2:
            raise ValueError(f"images must have an even height and width to be halved, got {tuple(images.shape)}")
        images = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    rng = np.random.default_rng(rng)
    chosen = [rng.choice(len(members), 4, replace=False) for _ in range(n)]
    drawn = np.array([[rng.choice(members[index]) for index in four] for four in chosen])
    sources, of_cells = (torch.from_numpy(each).long().to(images.device) for each in (drawn, of_images[drawn]))
    height, width = images.shape[2:]
    cells = images[sources].view(n, 2, 2, -1, height, width)  # mosaic, row, column
    return Mosaics(cells.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, 2 * height, 2 * width), of_cells, sources)


class PointingGame(NamedTuple):
    """What `pointing_game` returns."""

    energy: torch.Tensor
    """(B,) share of the map's positive values that lies in the right cell; chance is 0.25. NaN where ``zero``."""
    hit: torch.Tensor
    """(B,) bool: the map's peak lies in the right cell, and in no other."""
    zero: torch.Tensor
    """(B,) bool: the map has no positive value."""


@torch.no_grad()
def pointing_game(maps: Any, cells: Sequence[int] | torch.Tensor) -> PointingGame:
    """Does the map of a class point at the cell of the mosaic that shows it?

    Args:
        maps: (B, H, W), floating point, H and W even: maps of mosaics, each of the class in its cell.
        cells: (B,) the right cells, 0 to 3 in the order of `Mosaics`: a list or an integer tensor.

    Returns:
        `PointingGame`: energy, hit, zero, all (B,). Where the peak's value is reached in two cells, there is no hit.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes that do not match, an odd size, NaN, a cell that is not 0 to 3.

    Source: the energy is the localisation metric of Böhle et al., CVPR 2021; the peak is the pointing game of Zhang et
    al., Top-down Neural Attention by Excitation Backprop, ECCV 2016, with cells for objects.

    >>> maps = cam.maps(grids.images, targets=grids.classes[:, 0])  # of the class at the top left
    >>> pointing_game(maps, cells=[0] * len(maps)).energy.shape
    torch.Size([100])
    """
    maps = checks.check_maps("maps", maps)
    batch, height, width = maps.shape
    if height % 2 or width % 2:
        raise ValueError(f"maps must have an even height and width, got {tuple(maps.shape)}")
    right_cells = checks.check_classes(cells, batch, maps.device, n_classes=4, name="cells")
    positive = maps.clamp_min(0).double().view(batch, 2, height // 2, 2, width // 2)
    energy, peak = (each.flatten(1) for each in (positive.sum((2, 4)), positive.amax((2, 4))))  # (B, 4)
    total, right = energy.sum(1), right_cells[:, None] == torch.arange(4, device=maps.device)
    inside = (energy * right).sum(1)
    hit = peak.masked_fill(~right, -torch.inf).amax(1) > peak.masked_fill(right, -torch.inf).amax(1)
    return PointingGame(inside / total, hit, total == 0)


@torch.no_grad()
def energy_in_mask(maps: Any, masks: torch.Tensor) -> torch.Tensor:
    """The share of each map's positive values that lies in the object's mask.

    Args:
        maps: (B, H, W), or of volumes (B, D, H, W), floating point.
        masks: bool, of the same shape: where the object is.

    Returns:
        (B,) in [0, 1], NaN where a map has no positive value. Chance is the mask's share of the pixels.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices that do not match, NaN, a mask without a pixel.

    Source: the energy-based pointing game of Wang et al., Score-CAM, CVPR workshops 2020, with masks for boxes.

    >>> energy_in_mask(cam.maps(images, targets=classes), masks).shape  # masks (2, 224, 224)
    torch.Size([2])
    """
    maps = checks.check_maps("maps", maps, volumes=True)
    if not isinstance(masks, torch.Tensor):
        raise TypeError(f"masks must be a torch.Tensor, got {type(masks).__name__}")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}")
    if masks.shape != maps.shape or masks.device != maps.device:
        expected, got = f"{tuple(maps.shape)} on {maps.device}", f"{tuple(masks.shape)} on {masks.device}"
        raise ValueError(f"masks must match the maps, {expected}, got {got}")
    if masks.device.type == "cpu" and not masks.flatten(1).any(1).all():
        raise ValueError("masks must each have a pixel, got an empty one")
    positive = maps.clamp_min(0).double().flatten(1)
    return (positive * masks.flatten(1)).sum(1) / positive.sum(1)
