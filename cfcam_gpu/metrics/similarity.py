"""Similarity of maps, and class sensitivity."""

from typing import Any, NamedTuple

import torch

from cfcam_gpu.checks import needs
from cfcam_gpu.metrics import checks
from cfcam_gpu.pipeline import plain_arithmetic

SSIM_RADIUS = 5
"""Half the window of the structural similarity, 11 pixels; a map must be larger than this."""


def ssim(maps: Any, other_maps: Any) -> torch.Tensor:
    """Structural similarity of two maps, per image: (B,), 1 for equal maps.

    Gaussian window of sigma 1.5 and 11 pixels, data range 1, mean over the whole map with its edges mirrored, as
    torchmetrics has it.

    Args:
        maps, other_maps: (B, H, W), floating point, in [0, 1], H and W at least 6.

    Returns:
        (B,) float64, computed in float32 on a CPU (float64 for float64 maps).

    Raises:
        TypeError, ValueError: the maps are no floating-point (B, H, W) of one shape and device, too small, outside
            [0, 1], NaN.
        ImportError: torchmetrics is not installed; the message names the extra.

    Source: Wang et al., IEEE Transactions on Image Processing 13, 2004.

    >>> ssim(maps_of_cat, maps_of_dog).shape
    torch.Size([8])
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(needs("torchmetrics", "metrics")) from error
    maps, other_maps = checks.check_pair(maps, other_maps, unit_range=True)
    if min(maps.shape[1:]) <= SSIM_RADIUS:
        raise ValueError(f"maps must be at least {SSIM_RADIUS + 1} pixels high and wide, got {tuple(maps.shape)}")
    # A variance is a difference of nearly equal numbers: the TF32 of a GPU's convolutions would leave flat parts of a
    # map to rounding. Float64 is safe from it, but costs nine times as much as float32 on a CPU.
    dtype = torch.promote_types(maps.dtype, torch.float32) if maps.device.type == "cpu" else torch.float64
    with plain_arithmetic(maps.device):
        first, second = (each.to(dtype)[:, None] for each in (maps, other_maps))
        found: Any = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
        return found.double()


@torch.no_grad()
def rank_correlation(maps: Any, other_maps: Any) -> torch.Tensor:
    """Spearman's rank correlation of two maps' pixels, per image: (B,) float64 in [-1, 1].

    Equal pixels take the average of their ranks. NaN where a map is constant: it ranks nothing.

    Args:
        maps, other_maps: (B, H, W), floating point, any scale.

    Raises:
        TypeError, ValueError: the maps are no floating-point (B, H, W) of one shape and device; NaN.

    >>> rank_correlation(maps, maps**2)  # maps (2, 7, 7)
    tensor([1., 1.], dtype=torch.float64)
    """
    maps, other_maps = checks.check_pair(maps, other_maps)
    first, second = (_centred_ranks(each.flatten(1)) for each in (maps, other_maps))
    norms = first.square().sum(1).sqrt() * second.square().sum(1).sqrt()
    return (first * second).sum(1) / norms


def _centred_ranks(values):
    """Average ranks of each row, less their mean: (B, N) -> float64 (B, N)."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    # An entry's equals lie between these two places; their average rank is the middle.
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to).double() / 2 - values.shape[1] / 2


class ClassSensitivity(NamedTuple):
    """What `class_sensitivity` returns: 0 for maps that do not depend on the class."""

    ssim_distance: torch.Tensor
    """(B,) float64: 1 - SSIM, NaN where ``zero``."""
    rank_distance: torch.Tensor
    """(B,) float64: 1 - Spearman's rank correlation, NaN where ``zero`` or where a map is constant."""
    zero: torch.Tensor
    """(B,) bool: one of the two maps is zero everywhere, and there is nothing to compare."""


@torch.no_grad()
def class_sensitivity(maps: Any, other_maps: Any = None) -> ClassSensitivity:
    """How much the maps of two classes of the same images differ.

    Pairs with a map of zeros are left out, not averaged in: ``zero`` marks them and their distances are NaN.

    Args:
        maps: (B, 2, H, W), floating point, in [0, 1]: of two classes of each image; or (B, H, W) of one class.
        other_maps: (B, H, W), the same images, another class; None: ``maps`` are of two.

    Returns:
        `ClassSensitivity`: ssim_distance, rank_distance, zero, all (B,).

    Raises:
        TypeError, ValueError, ImportError: as for `ssim`.

    >>> result = class_sensitivity(cam.maps(images, top=2))
    >>> bootstrap_ci(result.ssim_distance).mean, int(result.zero.sum())
    (0.68, 0)
    """
    if other_maps is None:
        shape = tuple(getattr(maps, "shape", ()))
        if len(shape) != 4 or shape[1] != 2:
            raise ValueError(f"maps must have shape (B, 2, H, W) without other_maps, got {shape}")
        maps, other_maps = maps[:, 0], maps[:, 1]
    maps, other_maps = checks.check_pair(maps, other_maps, unit_range=True)
    zero = checks.is_zero(maps) | checks.is_zero(other_maps)
    by_ssim = (1 - ssim(maps, other_maps)).masked_fill(zero, torch.nan)
    by_rank = (1 - rank_correlation(maps, other_maps)).masked_fill(zero, torch.nan)
    return ClassSensitivity(by_ssim, by_rank, zero)
