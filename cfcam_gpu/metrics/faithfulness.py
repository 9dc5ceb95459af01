"""Faithfulness: what the model says when the map decides what it sees."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cfcam_gpu.constants import constant
from cfcam_gpu.gaussian import filter_matrix
from cfcam_gpu.metrics import checks
from cfcam_gpu.models import IMAGENET_MEAN, IMAGENET_STD
from cfcam_gpu.pipeline import plain_arithmetic
from cfcam_gpu.torch_backend import filter_grids

Model = Callable[[torch.Tensor], torch.Tensor]
"""Images (n, C, H, W) -> logits (n, n_classes)."""

Targets = Sequence[int] | torch.Tensor | None
"""Class indices, or None for each image's top class."""

BASELINES = ("blurred", "mean", "zero")

BLUR_SIGMA_PIXELS = 10.0
"""The Gaussian of the blurred baseline, for images of about 224 pixels."""

VARIANTS = ("standard", "authors")


class InsertionDeletion(NamedTuple):
    """What `insertion_deletion` returns."""

    insertion: torch.Tensor
    """(B,) area under the insertion curve, in [0, 1]; higher is better."""
    deletion: torch.Tensor
    """(B,) area under the deletion curve, in [0, 1]; lower is better."""
    insertion_curve: torch.Tensor
    """(B, steps + 1) the target's probability as pixels appear, from the baseline to the image."""
    deletion_curve: torch.Tensor
    """(B, steps + 1) the target's probability as pixels disappear, from the image to the baseline."""
    fractions: torch.Tensor
    """(steps + 1,) share of the pixels that have changed, from 0 to 1."""


@torch.no_grad()
def insertion_deletion(
    model: Model,
    images: torch.Tensor,
    maps: Any,
    targets: Targets = None,
    *,
    steps: int = 32,
    by: str = "pixels",
    insertion_baseline: str | torch.Tensor = "blurred",
    deletion_baseline: str | torch.Tensor = "zero",
    batch_size: int = 64,
) -> InsertionDeletion:
    """Insertion and deletion: the target's probability as the pixels appear or disappear, the map's highest first.

    Both curves share one ranking. Pixels of equal value are ranked by index, row by row from the top left, so a map
    with large flat parts is ranked by position there. After step k of n pixels k * n // steps have changed; the area is
    the trapezoid rule's over the shares of changed pixels. An image costs 2 * steps + 1 forward passes.

    Args:
        model: images (n, C, H, W) -> logits (n, n_classes).
        images: (B, C, H, W), floating point; or volumes and videos (B, C, D, H, W).
        maps: (B, H, W), or (B, D, H, W), floating point, any scale: only the order of a map's values counts.
        targets: class indices as a list or an integer tensor (B,), or None for each image's top class.
        steps: points on a curve besides the first, from 1 to H * W, or to what else there is to change; default 32.
        by: "pixels" (default), in volumes voxels; or "frames": whole slices or frames of a volume, in the order of
            their maps' means.
        insertion_baseline, deletion_baseline: what a pixel is where the image is not. "blurred": the image under a
            Gaussian of 10 pixels (`blurred`); "mean": the image's own mean colour; "zero": 0, which is the data set's
            mean colour for normalised inputs; or a tensor that broadcasts to the images. Default: "blurred" for
            insertion and "zero" for deletion, as in RISE.
        batch_size: images per forward pass; default 64.

    Returns:
        `InsertionDeletion`: insertion (B,), deletion (B,), both curves (B, steps + 1), fractions (steps + 1,).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices that do not match, an empty batch, NaN, a class, a count or a name out of range;
            frames of images that are no volumes.

    Source: Petsiuk et al., RISE, BMVC 2018. Departure: RISE blurs with an 11 x 11 kernel, which leaves more of the
    evidence in place. jerryp-hfut/CF-CAM@c227652 metrics/auc.py is close to steps=100 with "zero" for both.

    >>> curves = insertion_deletion(model, images, maps, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> curves.insertion.shape, curves.insertion_curve.shape
    (torch.Size([2]), torch.Size([2, 33]))
    """
    images, maps = checks.check_images_and_maps(images, maps)
    at_once = _changed_at_once(by, maps)
    n_pixels = maps[0].numel()
    if at_once > 1:
        maps = maps.mean((2, 3), keepdim=True).expand_as(maps)
    n_changes = n_pixels // at_once
    steps, batch_size = checks.check_count("steps", steps, n_changes), checks.check_count("batch_size", batch_size)
    appear = _baseline("insertion_baseline", insertion_baseline, images)
    vanish = _baseline("deletion_baseline", deletion_baseline, images)

    classes, intact = _classes_and_scores(model, images, targets, batch_size)
    ranks = pixel_ranks(maps).flatten(1)
    counts = torch.arange(steps + 1, device=maps.device) * n_changes // steps * at_once
    # The end of one curve and the start of the other are the intact image, which has been scored already.
    insertion = _mixture_scores(model, images, appear, ranks, counts[:-1], classes, batch_size)
    insertion = torch.cat((insertion, intact[:, None]), 1)
    deletion = _mixture_scores(model, vanish, images, ranks, counts[1:], classes, batch_size)
    deletion = torch.cat((intact[:, None], deletion), 1)
    fractions = counts.to(intact.dtype) / n_pixels
    inserted, deleted = (torch.trapezoid(curve, fractions, dim=1) for curve in (insertion, deletion))
    return InsertionDeletion(inserted, deleted, insertion, deletion, fractions)


def _changed_at_once(by, maps):
    """How many pixels are changed together."""
    if by not in ("pixels", "frames"):
        raise ValueError(f'by must be "pixels" or "frames", got {by!r}')
    if by == "frames" and maps.ndim != 4:
        raise ValueError(f'by="frames" needs maps (B, D, H, W) of volumes, got {tuple(maps.shape)}')
    return maps[0, 0].numel() if by == "frames" else 1


def pixel_ranks(maps: torch.Tensor) -> torch.Tensor:
    """The place of each pixel in its map's descending order: (B, H, W) -> int32 (B, H, W), 0 for the highest; of other
    axes likewise.

    Equal values are ranked by index, row by row from the top left.
    """
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places.expand_as(order)).view_as(maps)


def blurred(images: torch.Tensor, sigma_pixels: float = BLUR_SIGMA_PIXELS) -> torch.Tensor:
    """Images under a Gaussian filter, the edge pixels continued outwards: (B, C, H, W), dtype of the images.

    Args:
        images: (B, C, H, W), floating point; or volumes (B, C, D, H, W), which are filtered along all three axes.
        sigma_pixels: the Gaussian's standard deviation, > 0; default 10. Its radius is 4 times that.

    Raises:
        ValueError: sigma_pixels is not positive.

    >>> blurred(torch.rand(2, 3, 224, 224), sigma_pixels=5).shape
    torch.Size([2, 3, 224, 224])
    """
    if not sigma_pixels > 0:
        raise ValueError(f"sigma_pixels must be positive, got {sigma_pixels}")
    *depths, rows, columns = (
        constant(filter_matrix, (size, float(sigma_pixels), "nearest"), images.device, images.dtype)
        for size in images.shape[2:]
    )
    with plain_arithmetic(images.device):
        found = filter_grids(images.flatten(0, -3), rows, columns).view_as(images)
        for depth in depths:
            found = torch.einsum("ed,bcdhw->bcehw", depth, found)
        return found


@torch.no_grad()
def average_drop(
    model: Model,
    images: torch.Tensor,
    maps: Any,
    targets: Targets = None,
    *,
    variant: str = "standard",
    fill: Sequence[float] | torch.Tensor | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """How much of the target's probability is lost where the map hides the image; lower is better.

    With Y the probability for the image and O for the masked image:

    - "standard": the image times the map, max(0, Y - O) / Y, in [0, 1];
    - "authors": pixels where the map is at most 0.5 take the colour ``fill``; (Y - O) / Y, negative where the
      probability rises. The script reports it in per cent and masks the photograph before it is resized; here the
      network's input is masked.

    Args:
        model, images, targets, batch_size: as for `insertion_deletion`.
        maps: (B, H, W), floating point, in [0, 1].
        variant: "standard" or "authors"; default "standard".
        fill: for "authors": the colour of hidden pixels in the network's input, C floats or a tensor (C,); default
            black as ImageNet's normalisation has it.

    Returns:
        (B,): the average drop of a data set is the mean.

    Raises:
        TypeError, ValueError: as for `insertion_deletion`; also maps outside [0, 1], an unknown variant.

    Source: Chattopadhay et al., Grad-CAM++, WACV 2018; jerryp-hfut/CF-CAM@c227652 metrics/ad.py.

    >>> average_drop(model, images, maps, targets=[285, 282])  # images (2, 3, 224, 224)
    tensor([0.1042, 0.0000])
    """
    images, maps = checks.check_images_and_maps(images, maps, unit_range=True)
    black = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    masked = _masked(images, maps, variant, 0.5, black if fill is None else fill)
    classes, before = _classes_and_scores(model, images, targets, batch_size)
    _, after = _classes_and_scores(model, masked, classes, batch_size)
    lost = before - after if variant == "authors" else (before - after).clamp_min(0)
    return lost / before.clamp_min(torch.finfo(before.dtype).tiny)


@torch.no_grad()
def increase_in_confidence(
    model: Model,
    images: torch.Tensor,
    maps: Any,
    targets: Targets = None,
    *,
    variant: str = "standard",
    fill: Sequence[float] | torch.Tensor | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """Whether the target's probability rises where the map hides the rest of the image; higher is better.

    With Y the probability for the image and O for the masked image:

    - "standard": the image times the map, 1 where O > Y, else 0;
    - "authors": pixels where the map is at most 0.3 take the colour ``fill``; O minus the probability for an image of
      that colour alone. It is another quantity than the one whose name it bears: it does not look at Y.

    Args:
        model, images, maps, targets, variant, batch_size: as for `average_drop`.
        fill: as for `average_drop`; default (0.485, 0.456, 0.406) in the network's normalised input, as in the script.

    Returns:
        (B,): the increase in confidence of a data set is the mean.

    Raises:
        TypeError, ValueError: as for `average_drop`.

    Source: Chattopadhay et al., Grad-CAM++, WACV 2018; jerryp-hfut/CF-CAM@c227652 metrics/ai.py.

    >>> increase_in_confidence(model, images, maps, targets=[285, 282])  # images (2, 3, 224, 224)
    tensor([0., 1.])
    """
    images, maps = checks.check_images_and_maps(images, maps, unit_range=True)
    fill = IMAGENET_MEAN if fill is None else fill
    masked = _masked(images, maps, variant, 0.3, fill)
    classes, before = _classes_and_scores(model, images, targets, batch_size)
    _, after = _classes_and_scores(model, masked, classes, batch_size)
    if variant == "standard":
        return (after > before).to(after.dtype)
    blank = _colour(fill, images).expand_as(images[:1])
    return after - _probability(_logits(model, blank).expand(len(images), -1), classes)


def _logits(model, images):
    logits = model(images)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"model must return logits (B, n_classes), got {type(logits).__name__}")
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"model must return logits ({len(images)}, n_classes), got {tuple(logits.shape)}")
    return logits


def _probability(logits, classes):
    """The classes' softmax probabilities (B,), in float32 or better: half precision has 0.1% steps below 1."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(1, dtype=dtype).gather(1, classes[:, None])[:, 0]


def _classes_and_scores(model, images, targets, batch_size):
    """The class to score in each image (B,), and its probability (B,)."""
    batch_size = checks.check_count("batch_size", batch_size)
    logits = torch.cat([_logits(model, chunk) for chunk in images.split(batch_size)])
    if targets is None:
        classes = logits.argmax(1)
    else:
        classes = checks.check_classes(targets, len(images), logits.device, logits.shape[1])
    return classes, _probability(logits, classes)


def _mixture_scores(model, top, rest, ranks, counts, classes, batch_size):
    """The classes' probabilities (B, K): images are ``top`` at the first counts[k] pixels and ``rest`` elsewhere.

    Images and counts make one long batch, so that every forward pass but the last is full.
    """
    n_images, n_counts, scores = len(ranks), len(counts), []
    for start in range(0, n_images * n_counts, batch_size):
        job = torch.arange(start, min(start + batch_size, n_images * n_counts), device=ranks.device)
        image, count = job // n_counts, counts[job % n_counts]
        on_top = (ranks[image] < count[:, None]).view(-1, 1, *top.shape[2:])
        scores.append(_probability(_logits(model, torch.where(on_top, top[image], rest[image])), classes[image]))
    return torch.cat(scores).view(n_images, n_counts)


def _baseline(name, baseline, images):
    if isinstance(baseline, torch.Tensor):
        if baseline.device != images.device:
            raise ValueError(f"{name} must be on the images' device {images.device}, got {baseline.device}")
        try:
            return baseline.to(images.dtype).expand_as(images)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to the images {tuple(images.shape)}, got {tuple(baseline.shape)}"
            ) from None
    if not isinstance(baseline, str):
        raise TypeError(f"{name} must be a string or a tensor, got {type(baseline).__name__}")
    if baseline not in BASELINES:
        raise ValueError(f"{name} must be one of {BASELINES} or a tensor, got {baseline!r}")
    if baseline == "blurred":
        return blurred(images)
    if baseline == "mean":
        return images.mean(tuple(range(2, images.ndim)), keepdim=True).expand_as(images)
    return images.new_zeros(()).expand_as(images)


def _masked(images, maps, variant, threshold, fill):
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    maps = maps[:, None]
    if variant == "standard":
        return images * maps.to(images.dtype)
    return torch.where(maps > threshold, images, _colour(fill, images))


def _colour(fill, images):
    if not isinstance(fill, torch.Tensor):
        fill = constant(tuple, (tuple(fill),), images.device, images.dtype)
    if tuple(fill.shape) != (images.shape[1],):
        raise ValueError(f"fill must be {images.shape[1]} numbers, one per channel, got shape {tuple(fill.shape)}")
    return fill.to(images.device, images.dtype).view(1, -1, *[1] * (images.ndim - 2))
