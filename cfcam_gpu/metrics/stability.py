"""Stability and sanity: what a map does when noise is added, and when the model forgets what it has learnt."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch

from cfcam_gpu.metrics import checks
from cfcam_gpu.metrics.similarity import rank_correlation, ssim


class Stability(NamedTuple):
    """What `gradient_noise_stability` and `input_noise_stability` return."""

    ssim: torch.Tensor
    """(B, len(stds)) float64: SSIM of the clean map and the noisy one, mean over the draws; NaN where ``zero``."""
    zero: torch.Tensor
    """(B,) bool: the clean map is zero everywhere, and its stability would say nothing."""


def gradient_noise_stability(
    activations: torch.Tensor,
    gradients: torch.Tensor,
    method: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stds: Sequence[float],
    *,
    draws: int = 5,
    generator: torch.Generator | None = None,
) -> Stability:
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


def input_noise_stability(
    maps_of: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    stds: Sequence[float],
    *,
    draws: int = 5,
    generator: torch.Generator | None = None,
) -> Stability:
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
    draws = checks.check_count("draws", draws)
    tensor = tensor.detach()
    clean = checks.check_maps("maps", maps_of(tensor))
    total = torch.zeros(len(tensor), len(stds), dtype=torch.float64, device=clean.device)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for _ in range(draws):
        noise = torch.randn(tensor.shape, dtype=dtype, device=tensor.device, generator=generator)
        noise *= scale.to(dtype).view(-1, *[1] * (tensor.ndim - 1))
        for column, std in enumerate(stds):
            total[:, column] += ssim(clean, maps_of((tensor + std * noise).to(tensor.dtype)))
    zero = checks.is_zero(clean)
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


def parameter_randomization(
    maps_of_model: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    model: torch.nn.Module,
    images: torch.Tensor,
    layers: Sequence[str] | None = None,
    *,
    cascading: bool = True,
    seed: int = 0,
) -> Randomization:
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
    clean = checks.check_maps("maps", maps_of_model(changed, images))
    columns = []
    for name in layers:
        _copy_weights(random, changed, name)
        maps = checks.check_maps("maps", maps_of_model(changed, images))
        zero = checks.is_zero(clean) | checks.is_zero(maps)
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
