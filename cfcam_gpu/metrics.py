"""How good is a class activation map? Measures of faithfulness, class sensitivity, stability and localisation.

Everything takes maps as tensors (B, H, W) and models as callables ``images -> logits (B, n_classes)``, so that the maps
of any library can be measured. All values are per image, (B,), on the maps' device; `bootstrap_ci` makes the mean and
its interval of them. A value that has no meaning, such as the similarity to a map of zeros, is NaN and never enters
a mean unseen: the results count such maps in ``zero``.

Models run in the mode they are in, without autograd, ``batch_size`` images at a time; nothing about them is changed.
Nothing here makes the host wait for the device, `mosaics` and `bootstrap_ci` apart. As elsewhere, NaN, infinity and
classes out of range are refused where that costs nothing: on the CPU.

>>> from cfcam_gpu import metrics
>>> curves = metrics.insertion_deletion(model, images, cam.maps(images))  # images (8, 3, 224, 224)
>>> curves.insertion.shape, metrics.bootstrap_ci(curves.insertion).mean
(torch.Size([8]), 0.61)
"""

from copy import deepcopy
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cfcam_gpu.arrays import as_tensor
from cfcam_gpu.capture import check_targets, classes_on
from cfcam_gpu.checks import check_values, needs
from cfcam_gpu.gaussian import filter_matrix
from cfcam_gpu.models import IMAGENET_MEAN, IMAGENET_STD
from cfcam_gpu.pipeline import plain_arithmetic
from cfcam_gpu.torch_backend import constant, filter_grids

BASELINES = ("blurred", "mean", "zero")

BLUR_SIGMA_PIXELS = 10.0
"""The Gaussian of the blurred baseline, for images of about 224 pixels."""

VARIANTS = ("standard", "authors")

SSIM_RADIUS = 5
"""Half the window of the structural similarity, 11 pixels; a map must be larger than this."""

RANGE_SLACK = 1e-6
"""How far outside [0, 1] a map may be: bilinear interpolation rounds."""


# Faithfulness: what the model says when the map decides what it sees.


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
    model,
    images,
    maps,
    targets=None,
    *,
    steps=32,
    insertion_baseline="blurred",
    deletion_baseline="zero",
    batch_size=64,
):
    """Insertion and deletion: the target's probability as the pixels appear or disappear, the map's highest first.

    Both curves share one ranking. Pixels of equal value are ranked by index, row by row from the top left, so a map
    with large flat parts is ranked by position there. After step k of n pixels k * n // steps have changed; the area is
    the trapezoid rule's over the shares of changed pixels. An image costs 2 * steps + 1 forward passes.

    Args:
        model: images (n, C, H, W) -> logits (n, n_classes).
        images: (B, C, H, W), floating point.
        maps: (B, H, W), floating point, any scale: only the order of a map's values counts.
        targets: class indices as a list or an integer tensor (B,), or None for each image's top class.
        steps: points on a curve besides the first, from 1 to H * W; default 32.
        insertion_baseline, deletion_baseline: what a pixel is where the image is not. "blurred": the image under a
            Gaussian of 10 pixels (`blurred`); "mean": the image's own mean colour; "zero": 0, which is the data set's
            mean colour for normalised inputs; or a tensor that broadcasts to the images. Default: "blurred" for
            insertion and "zero" for deletion, as in RISE.
        batch_size: images per forward pass; default 64.

    Returns:
        `InsertionDeletion`: insertion (B,), deletion (B,), both curves (B, steps + 1), fractions (steps + 1,).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices that do not match, an empty batch, NaN, a class, a count or a name out of range.

    Source: Petsiuk et al., RISE, BMVC 2018. Departure: RISE blurs with an 11 x 11 kernel, which leaves more of the
    evidence in place. jerryp-hfut/CF-CAM@c227652 metrics/auc.py is close to steps=100 with "zero" for both.

    >>> curves = insertion_deletion(model, images, maps, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> curves.insertion.shape, curves.insertion_curve.shape
    (torch.Size([2]), torch.Size([2, 33]))
    """
    images, maps = _check_images_and_maps(images, maps)
    n_pixels = maps[0].numel()
    steps, batch_size = _check_count("steps", steps, n_pixels), _check_count("batch_size", batch_size)
    appear = _baseline("insertion_baseline", insertion_baseline, images)
    vanish = _baseline("deletion_baseline", deletion_baseline, images)

    classes, intact = _classes_and_scores(model, images, targets, batch_size)
    ranks = pixel_ranks(maps).flatten(1)
    counts = torch.arange(steps + 1, device=maps.device) * n_pixels // steps
    # The end of one curve and the start of the other are the intact image, which has been scored already.
    insertion = _mixture_scores(model, images, appear, ranks, counts[:-1], classes, batch_size)
    insertion = torch.cat((insertion, intact[:, None]), 1)
    deletion = _mixture_scores(model, vanish, images, ranks, counts[1:], classes, batch_size)
    deletion = torch.cat((intact[:, None], deletion), 1)
    fractions = counts.to(intact.dtype) / n_pixels
    areas = (torch.trapezoid(curve, fractions, dim=1) for curve in (insertion, deletion))
    return InsertionDeletion(*areas, insertion, deletion, fractions)


def pixel_ranks(maps):
    """The place of each pixel in its map's descending order: (B, H, W) -> int32 (B, H, W), 0 for the highest.

    Equal values are ranked by index, row by row from the top left.
    """
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places.expand_as(order)).view_as(maps)


def blurred(images, sigma_pixels=BLUR_SIGMA_PIXELS):
    """Images under a Gaussian filter, the edge pixels continued outwards: (B, C, H, W), dtype of the images.

    Args:
        images: (B, C, H, W), floating point.
        sigma_pixels: the Gaussian's standard deviation, > 0; default 10. Its radius is 4 times that.

    Raises:
        ValueError: sigma_pixels is not positive.

    >>> blurred(torch.rand(2, 3, 224, 224), sigma_pixels=5).shape
    torch.Size([2, 3, 224, 224])
    """
    if not sigma_pixels > 0:
        raise ValueError(f"sigma_pixels must be positive, got {sigma_pixels}")
    rows, columns = (
        constant(filter_matrix, (size, float(sigma_pixels), "nearest"), images.device, images.dtype)
        for size in images.shape[2:]
    )
    with plain_arithmetic(images.device):
        return filter_grids(images.flatten(0, 1), rows, columns).view_as(images)


@torch.no_grad()
def average_drop(model, images, maps, targets=None, *, variant="standard", fill=None, batch_size=64):
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
    images, maps = _check_images_and_maps(images, maps, unit_range=True)
    black = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    masked = _masked(images, maps, variant, 0.5, black if fill is None else fill)
    classes, before = _classes_and_scores(model, images, targets, batch_size)
    _, after = _classes_and_scores(model, masked, classes, batch_size)
    lost = before - after if variant == "authors" else (before - after).clamp_min(0)
    return lost / before.clamp_min(torch.finfo(before.dtype).tiny)


@torch.no_grad()
def increase_in_confidence(model, images, maps, targets=None, *, variant="standard", fill=None, batch_size=64):
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
    images, maps = _check_images_and_maps(images, maps, unit_range=True)
    fill = IMAGENET_MEAN if fill is None else fill
    masked = _masked(images, maps, variant, 0.3, fill)
    classes, before = _classes_and_scores(model, images, targets, batch_size)
    _, after = _classes_and_scores(model, masked, classes, batch_size)
    if variant == "standard":
        return (after > before).to(after.dtype)
    blank = _colour(fill, images).expand_as(images[:1])
    return after - _probability(_logits(model, blank).expand(len(images), -1), classes)


# Similarity of maps, and class sensitivity.


def ssim(maps, other_maps):
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
    maps, other_maps = _check_pair(maps, other_maps, unit_range=True)
    if min(maps.shape[1:]) <= SSIM_RADIUS:
        raise ValueError(f"maps must be at least {SSIM_RADIUS + 1} pixels high and wide, got {tuple(maps.shape)}")
    # A variance is a difference of nearly equal numbers: the TF32 of a GPU's convolutions would leave flat parts of a
    # map to rounding. Float64 is safe from it, but costs nine times as much as float32 on a CPU.
    dtype = torch.promote_types(maps.dtype, torch.float32) if maps.device.type == "cpu" else torch.float64
    with plain_arithmetic(maps.device):
        pair = (each.to(dtype)[:, None] for each in (maps, other_maps))
        return structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").double()


@torch.no_grad()
def rank_correlation(maps, other_maps):
    """Spearman's rank correlation of two maps' pixels, per image: (B,) float64 in [-1, 1].

    Equal pixels take the average of their ranks. NaN where a map is constant: it ranks nothing.

    Args:
        maps, other_maps: (B, H, W), floating point, any scale.

    Raises:
        TypeError, ValueError: the maps are no floating-point (B, H, W) of one shape and device; NaN.

    >>> rank_correlation(maps, maps**2)  # maps (2, 7, 7)
    tensor([1., 1.], dtype=torch.float64)
    """
    maps, other_maps = _check_pair(maps, other_maps)
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
def class_sensitivity(maps, other_maps):
    """How much the maps of two classes of the same images differ.

    Pairs with a map of zeros are left out, not averaged in: ``zero`` marks them and their distances are NaN.

    Args:
        maps, other_maps: (B, H, W), floating point, in [0, 1]: the same images, another class.

    Returns:
        `ClassSensitivity`: ssim_distance, rank_distance, zero, all (B,).

    Raises:
        TypeError, ValueError, ImportError: as for `ssim`.

    >>> result = class_sensitivity(cam.maps(images, cats), cam.maps(images, dogs))
    >>> bootstrap_ci(result.ssim_distance).mean, int(result.zero.sum())
    (0.68, 0)
    """
    maps, other_maps = _check_pair(maps, other_maps, unit_range=True)
    similarity, ranks = ssim(maps, other_maps), rank_correlation(maps, other_maps)
    zero = _is_zero(maps) | _is_zero(other_maps)
    return ClassSensitivity(*((1 - each).masked_fill(zero, torch.nan) for each in (similarity, ranks)), zero)


# Stability and sanity.


class Stability(NamedTuple):
    """What `gradient_noise_stability` and `input_noise_stability` return."""

    ssim: torch.Tensor
    """(B, len(stds)) float64: SSIM of the clean map and the noisy one, mean over the draws; NaN where ``zero``."""
    zero: torch.Tensor
    """(B,) bool: the clean map is zero everywhere, and its stability would say nothing."""


def gradient_noise_stability(activations, gradients, method, stds, *, draws=5, generator=None):
    """How much a map changes when Gaussian noise is added to the raw gradient, before anything else sees it.

    Every std sees the same draws of noise, scaled; so do two methods that are given generators with one seed.

    Args:
        activations, gradients: (B, C, h, w), floating point.
        method: (activations, gradients) -> maps (B, H, W) in [0, 1]: any CAM as a function of the two.
        stds: standard deviations of the noise, as multiples of the root mean square of the image's gradient.
        draws: noises to average over; default 5.
        generator: ``torch.Generator`` on the gradients' device; default: torch's own.

    Returns:
        `Stability`: ssim (B, len(stds)), zero (B,). 1 is a map that does not change, which is no merit in one that
        ignores the gradient: compare with `class_sensitivity`.

    Raises:
        TypeError, ValueError, ImportError: as for `ssim`; a negative std, no std, a wrong number of draws.

    >>> method = lambda a, g: cf_cam(a, g, output_size=(224, 224)).maps
    >>> gradient_noise_stability(activations, gradients, method, stds=[0.5, 1, 2]).ssim.shape
    torch.Size([8, 3])
    """
    if gradients.shape != activations.shape:
        raise ValueError(f"gradients must match activations {tuple(activations.shape)}, got {tuple(gradients.shape)}")
    # In float64: the squares of gradients of 1e-25 would vanish in float32.
    scale = gradients.detach().double().flatten(1).square().mean(1).sqrt()
    return _noise_stability(lambda noisy: method(activations, noisy), gradients, scale, stds, draws, generator)


def input_noise_stability(maps_of, images, stds, *, draws=5, generator=None):
    """How much a map changes when Gaussian noise is added to the image.

    Args:
        maps_of: images (B, C, H, W) -> maps (B, H, W) in [0, 1]. It should hold the target classes fixed: with the top
            class, a change of class is measured too.
        images: (B, C, H, W), floating point.
        stds: standard deviations of the noise, as multiples of the standard deviation of the image's values.
        draws, generator: as for `gradient_noise_stability`.

    Returns, Raises: as for `gradient_noise_stability`.

    >>> input_noise_stability(lambda x: cam.maps(x, classes), images, stds=[0.1, 0.2]).ssim.shape
    torch.Size([8, 2])
    """
    scale = images.detach().double().flatten(1).std(1, correction=0)
    return _noise_stability(maps_of, images, scale, stds, draws, generator)


def _noise_stability(maps_of, tensor, scale, stds, draws, generator):
    stds = [float(std) for std in stds]
    if not stds or not all(0 <= std < float("inf") for std in stds):
        raise ValueError(f"stds must be one or more numbers >= 0, got {stds}")
    draws = _check_count("draws", draws)
    tensor = tensor.detach()
    clean = _check_maps("maps", maps_of(tensor))
    total = torch.zeros(len(tensor), len(stds), dtype=torch.float64, device=clean.device)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for _ in range(draws):
        noise = torch.randn(tensor.shape, dtype=dtype, device=tensor.device, generator=generator)
        noise *= scale.to(dtype).view(-1, *[1] * (tensor.ndim - 1))
        for column, std in enumerate(stds):
            total[:, column] += ssim(clean, maps_of((tensor + std * noise).to(tensor.dtype)))
    zero = _is_zero(clean)
    return Stability((total / draws).masked_fill(zero[:, None], torch.nan), zero)


class Randomization(NamedTuple):
    """What `parameter_randomization` returns; L layers, in the order of randomisation."""

    layers: tuple
    """L names."""
    ssim: torch.Tensor
    """(B, L) float64: SSIM of the maps before and after; NaN where ``zero``."""
    rank: torch.Tensor
    """(B, L) float64: Spearman's rank correlation of the two; NaN where ``zero`` or where a map is constant."""
    zero: torch.Tensor
    """(B, L) bool: one of the two maps is zero everywhere."""


def parameter_randomization(maps_of_model, model, images, layers=None, *, cascading=True, seed=0):
    """The sanity check of saliency maps: do they change when the model's weights are randomised, from the head down?

    Modules with a ``reset_parameters`` start anew as it says; parameters that a module without one holds itself are
    drawn from a normal distribution with their own mean and standard deviation.

    Args:
        maps_of_model: (model, images) -> maps (B, H, W) in [0, 1]; must look its layers up in the model that it gets.
        model: ``torch.nn.Module``. It is copied, and stays as it is.
        images: (B, C, H, W), handed to ``maps_of_model``.
        layers: names of submodules, in the order of randomisation; default: the model's children that have parameters,
            the last one first.
        cascading: whether a layer stays random when the next one follows, or only one is random at a time; default
            True.
        seed: of the random weights, drawn on the CPU; default 0. torch's own random numbers are not touched.

    Returns:
        `Randomization`: layers, ssim (B, L), rank (B, L), zero (B, L). Low is good: a map that survives does not depend
        on what the model has learnt.

    Raises:
        TypeError, ValueError, ImportError: as for `ssim`; a layer that is not in the model, no layer.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.

    >>> maps_of = lambda model, images: CFCAM(model, [model.layer4]).maps(images, classes)
    >>> parameter_randomization(maps_of, resnet18, images).layers
    ('fc', 'layer4', 'layer3', 'layer2', 'layer1', 'bn1', 'conv1')
    """
    if layers is None:
        layers = [name for name, child in model.named_children() if any(True for _ in child.parameters())][::-1]
    layers, names = tuple(layers), dict(model.named_modules())
    for name in layers:
        if name not in names:
            raise ValueError(f"layers must be names of the model's modules, got {name!r}")
    if not layers:
        raise ValueError("layers must name one module or more, got none")
    changed, random = deepcopy(model), _randomized(model, seed)
    clean = _check_maps("maps", maps_of_model(changed, images))
    columns = []
    for name in layers:
        _copy_weights(random, changed, name)
        maps = _check_maps("maps", maps_of_model(changed, images))
        zero = _is_zero(clean) | _is_zero(maps)
        measures = ssim(clean, maps), rank_correlation(clean, maps)
        columns.append((*(measure.masked_fill(zero, torch.nan) for measure in measures), zero))
        if not cascading:
            _copy_weights(model, changed, name)
    return Randomization(layers, *(torch.stack(column, 1) for column in zip(*columns)))


@torch.no_grad()
def _randomized(model, seed):
    """A copy of the model with random weights throughout, on the CPU, so that they are the same on every device."""
    model = deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())
    return model


def _copy_weights(source, target, name):
    target.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())


# Localisation: the grid pointing game.


class Mosaics(NamedTuple):
    """What `mosaics` returns. Cells: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    images: torch.Tensor
    """(n, C, 2H, 2W), or (n, C, H, W) when shrunk."""
    classes: torch.Tensor
    """(n, 4) int64: the class of each cell, all different in a mosaic."""
    sources: torch.Tensor
    """(n, 4) int64: the index of each cell's image."""


def mosaics(images, classes, n, rng, *, shrink=False):
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
    _check_floating("images", images, "(N, C, H, W)", 4)
    n = _check_count("n", n)
    classes = np.asarray(torch.as_tensor(classes).cpu())
    if classes.shape != (len(images),) or classes.dtype.kind not in "iu":
        raise ValueError(f"classes must be {len(images)} integers, got {classes.dtype} of shape {classes.shape}")
    members = [np.flatnonzero(classes == index) for index in np.unique(classes)]
    if len(members) < 4:
        raise ValueError(f"classes must hold four different classes or more, got {len(members)}")
    if shrink:
        if images.shape[2] % 2 or images.shape[3] % 2:
            raise ValueError(f"images must have an even height and width to be halved, got {tuple(images.shape)}")
        images = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    rng = np.random.default_rng(rng)
    chosen = [rng.choice(len(members), 4, replace=False) for _ in range(n)]
    sources = np.array([[rng.choice(members[index]) for index in four] for four in chosen])
    classes, sources = (torch.from_numpy(each).long().to(images.device) for each in (classes[sources], sources))
    height, width = images.shape[2:]
    cells = images[sources].view(n, 2, 2, -1, height, width)  # mosaic, row, column
    return Mosaics(cells.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, 2 * height, 2 * width), classes, sources)


class PointingGame(NamedTuple):
    """What `pointing_game` returns."""

    energy: torch.Tensor
    """(B,) share of the map's positive values that lies in the right cell; chance is 0.25. NaN where ``zero``."""
    hit: torch.Tensor
    """(B,) bool: the map's peak lies in the right cell, and in no other."""
    zero: torch.Tensor
    """(B,) bool: the map has no positive value."""


@torch.no_grad()
def pointing_game(maps, cells):
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
    maps = _check_maps("maps", maps)
    batch, height, width = maps.shape
    if height % 2 or width % 2:
        raise ValueError(f"maps must have an even height and width, got {tuple(maps.shape)}")
    cells = _classes(cells, batch, maps.device, n_classes=4, name="cells")
    positive = maps.clamp_min(0).double().view(batch, 2, height // 2, 2, width // 2)
    energy, peak = (each.flatten(1) for each in (positive.sum((2, 4)), positive.amax((2, 4))))  # (B, 4)
    total, right = energy.sum(1), cells[:, None] == torch.arange(4, device=maps.device)
    inside = (energy * right).sum(1)
    hit = peak.masked_fill(~right, -torch.inf).amax(1) > peak.masked_fill(right, -torch.inf).amax(1)
    return PointingGame(inside / total, hit, total == 0)


# Uncertainty.


class Interval(NamedTuple):
    """What `bootstrap_ci` returns."""

    mean: float
    low: float
    high: float
    n: int
    """Images that count: those that are not NaN."""


def bootstrap_ci(values, minus=None, *, confidence=0.95, resamples=10_000, seed=0):
    """The mean over images, with a percentile bootstrap interval.

    Args:
        values: (B,) per-image values, a tensor, an array or a list. NaN marks an image without a value, which is left
            out: ``n`` says how many count.
        minus: (B,) values of the same images under another method: then it is the mean of the paired differences,
            and its interval, over the images that have both.
        confidence: in (0, 1); default 0.95.
        resamples: of the images, with replacement; default 10000.
        seed: default 0.

    Returns:
        `Interval` (mean, low, high, n), Python numbers.

    Raises:
        ValueError: fewer than two values, shapes that do not match, infinity, a confidence out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> bootstrap_ci(curves.insertion, minus=other_curves.insertion)
    Interval(mean=0.021, low=0.004, high=0.039, n=200)
    """
    values, *others = (
        np.asarray(torch.as_tensor(each, dtype=torch.float64).detach().cpu())
        for each in (values, minus)
        if each is not None
    )
    if values.ndim != 1:
        raise ValueError(f"values must have shape (B,), got {values.shape}")
    for other in others:
        if other.shape != values.shape:
            raise ValueError(f"minus must match values {values.shape}, got {other.shape}")
        values = values - other
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    resamples = _check_count("resamples", resamples)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        raise ValueError(f"values must hold two numbers or more that are not NaN, got {len(values)}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite or NaN, got infinity")
    rng, rows = np.random.default_rng(seed), max(1, 2**22 // len(values))  # 32 MB of indices at a time
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (min(rows, resamples - start), len(values)))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(values.mean()), float(low), float(high), len(values))


# Scores.


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
    batch_size = _check_count("batch_size", batch_size)
    logits = torch.cat([_logits(model, chunk) for chunk in images.split(batch_size)])
    classes = logits.argmax(1) if targets is None else _classes(targets, len(images), logits.device, logits.shape[1])
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
        return images.mean((2, 3), keepdim=True).expand_as(images)
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
    return fill.to(images.device, images.dtype).view(1, -1, 1, 1)


# Checks of the arguments.


def _is_zero(maps):
    return maps.flatten(1).eq(0).all(1)


def _check_count(name, value, largest=None):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1 or (largest is not None and value > largest):
        raise ValueError(f"{name} must be at least 1{f' and at most {largest}' if largest else ''}, got {value}")
    return int(value)


def _check_floating(name, tensor, shape, ndim):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape {shape} and not be empty, got {tuple(tensor.shape)}")


def _check_maps(name, maps, unit_range=False):
    maps, _ = as_tensor(name, maps)
    _check_floating(name, maps, "(B, H, W)", 3)
    check_values({name: maps}, None)
    if unit_range and maps.device.type == "cpu":
        low, high = (bound.item() for bound in maps.aminmax())
        if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
            raise ValueError(f"{name} must be in [0, 1], got values from {low} to {high}")
    return maps.detach()


def _check_pair(maps, other_maps, unit_range=False):
    maps, other_maps = _check_maps("maps", maps, unit_range), _check_maps("other_maps", other_maps, unit_range)
    if other_maps.shape != maps.shape:
        raise ValueError(f"other_maps must match maps {tuple(maps.shape)}, got {tuple(other_maps.shape)}")
    if other_maps.device != maps.device:
        raise ValueError(f"other_maps must be on the maps' device {maps.device}, got {other_maps.device}")
    return maps, other_maps


def _check_images_and_maps(images, maps, unit_range=False):
    _check_floating("images", images, "(B, C, H, W)", 4)
    maps = _check_maps("maps", maps, unit_range)
    expected = (len(images), *images.shape[2:])
    if tuple(maps.shape) != expected:
        raise ValueError(f"maps must have the images' batch, height and width {expected}, got {tuple(maps.shape)}")
    if maps.device != images.device:
        raise ValueError(f"maps must be on the images' device {images.device}, got {maps.device}")
    return images.detach(), maps


def _classes(classes, batch, device, n_classes, name="targets"):
    """Class indices of any kind as an int64 tensor (B,) on the device."""
    try:
        classes = check_targets(classes, batch)
        if isinstance(classes, torch.Tensor):
            return classes_on(device, classes, n_classes)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("targets", name)) from None
    raise TypeError(f"{name} must be class indices: a list of integers or an integer tensor")
