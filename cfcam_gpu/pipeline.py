"""The public functions on activations and gradients: checks, choice of backend and engine, and the result."""

import importlib
import os
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from cfcam_gpu import operators, torch_backend
from cfcam_gpu.arrays import as_tensor
from cfcam_gpu.checks import (
    check_config,
    check_floating,
    check_grid,
    check_guide,
    check_output_size,
    check_values,
    is_installed,
)
from cfcam_gpu.clustering import ENGINES, automatic, reference_unavailable
from cfcam_gpu.config import CFCAMConfig

BACKENDS = ("auto", "triton", "torch", "reference")


class CFCAMResult(NamedTuple):
    """What `cf_cam` returns; arrays of the kind and on the device of its input."""

    maps: Any
    """(B, H, W) in [0, 1], or (B, K, H, W) of K classes an image; float32, or float64 for float64 input and the
    reference backend."""
    labels: Any
    """(B, C) int32: -2 dominant, -1 noise, k >= 0 cluster k."""
    weights: Any
    """(B, C), or (B, K, C) of K classes an image; dtype of the maps."""
    eps: Any
    """(B,), dtype of the maps: the clustering radius of each image."""


def cf_cam(
    activations: Any,
    gradients: Any,
    output_size: Sequence[int] | None = None,
    config: CFCAMConfig | None = None,
    backend: str = "auto",
    clustering: str = "auto",
    check_finite: bool | None = None,
    guide: Any = None,
) -> CFCAMResult:
    """CF-CAM maps from a layer's activations and the gradients of a score with respect to them.

    Args:
        activations: (B, C, h, w), floating point; a torch tensor or anything else with DLPack (NumPy, CuPy, JAX). Of
            volumes (B, C, d, h, w), of series (B, C, t); then all that is (h, w) or (H, W) here has as many axes. Any
            strides. |values| below 1e18: squares are taken in float32.
        gradients: (B, C, h, w), likewise, on the same device; or (B, K, C, h, w), those of K scores of each image, of
            which everything that does not depend on the class is done once.
        output_size: (H, W) of the maps; default: the grid's own.
        config: `CFCAMConfig`; default: ``CFCAMConfig()``, of volumes ``CFCAMConfig.volumes()``.
        backend: "triton" (CUDA or ROCm devices; at most 4096 channels, float32 and less), "torch" (any device),
            "reference" (NumPy, SciPy and scikit-learn in float64, on the host), or "auto": triton where it takes the
            tensors, else torch.
        clustering: "batched" (ours, on the device and without a host synchronisation), "host" (ours, compiled, on the
            host), "cuml" (RAPIDS, image by image on the device), "sklearn" (on the host), or "auto": "host" for
            tensors on a CPU, else "batched". All give the same labels. cuML makes the host wait; see
            `cfcam_gpu.clustering.cuml` for its streams and memory.
        check_finite: refuse NaN and infinity. Default: on the CPU only, because elsewhere the host would have to
            wait for the device.
        guide: (B, Cg, hg, wg) with hg >= h and wg >= w, floating point, on the same device: an earlier layer's
            activations, whose features say which cells are alike and whose grid the average is on (see
            ``affinity_power`` in `CFCAMConfig`). Default: the activations. Without an average it has no effect.

    Returns:
        `CFCAMResult` (maps, labels, weights, eps). Every image of the batch is its own problem.

    Raises:
        TypeError: an argument has the wrong type, or the arrays are not floating point.
        ValueError: shapes or devices that do not match, an empty batch, an unknown choice or one that cannot run
            on these tensors, NaN or infinity.
        ImportError: what is asked for is not installed; the message names the extra.

    Source: arXiv 2504.00060. Departures: the Gaussian's sigma and boundary (`CFCAMConfig`); by default also the upper
    three quarters of the channels dominant, signed weights, the average over alike cells and min-max scaling, chosen by
    measurement (benchmarks/faithfulness.md); ``CFCAMConfig.paper()`` has the published choices.

    >>> result = cf_cam(torch.rand(2, 64, 7, 7), torch.randn(2, 64, 7, 7), output_size=(224, 224))
    >>> result.maps.shape, result.labels.shape
    (torch.Size([2, 224, 224]), torch.Size([2, 64]))
    """
    if torch.compiler.is_compiling():
        arguments = output_size, config, backend, clustering, check_finite, guide
        return CFCAMResult(*operators.result_of_compiled(activations, gradients, *arguments))
    config = check_config(config)
    activations, restore = as_tensor("activations", activations)
    if not isinstance(gradients, torch_backend.PooledGradients):
        gradients, _ = as_tensor("gradients", gradients)
    if guide is not None:
        guide, _ = as_tensor("guide", guide)
    module, engine = _checked(activations, gradients, backend, clustering, check_finite)
    check_guide(guide, activations)
    if guide is not None:
        check_values({"guide": guide}, check_finite)
    output_size = check_output_size(output_size, activations)
    config = config.of(activations.ndim - 2)
    with plain_arithmetic(activations.device):
        result = module.cf_cam(activations, gradients, output_size, config, engine, guide)
    return CFCAMResult(*map(restore, result))


def channel_weights(activations, gradients, config, backend="auto", clustering="auto", check_finite=None):
    """`cf_cam`'s weights (B, C) or (B, K, C), without its maps. Args, Raises: as there."""
    module, engine = _checked(activations, gradients, backend, clustering, check_finite)
    with plain_arithmetic(activations.device):
        return module.cluster_and_weigh(activations, gradients, config, engine)[1]


def pool_gradients(gradients, activations, config, backend="auto", clustering="auto", check_finite=None):
    """What `cf_cam` needs of the gradients (B, k, C, h, w) of some of the classes; it takes this in their place.

    Activations (B, C, h, w) are those that the gradients are of.

    A tensor or a named tuple of tensors (B, k, ...), to be joined along k.
    """
    backend, _ = choose(backend, clustering, activations)
    check_values({"gradients": gradients}, check_finite)
    with plain_arithmetic(gradients.device):
        return _module(backend).pool_gradients(gradients, config)


def _checked(activations, gradients, backend, clustering, check_finite):
    """The module of the backend, and the engine, for tensors that are fit for them."""
    check_grid("activations", activations)
    pooled = isinstance(gradients, torch_backend.PooledGradients)
    if not pooled:
        _check_gradients(gradients, activations)
    backend, engine = choose(backend, clustering, activations)
    check_values(
        {"activations": activations} if pooled else {"activations": activations, "gradients": gradients}, check_finite
    )
    return _module(backend), engine


def _check_gradients(gradients, activations):
    batch, *of_image = activations.shape
    several = gradients.ndim == activations.ndim + 1 and gradients.shape[1] > 0
    if tuple(gradients.shape) != (batch, *gradients.shape[1 : 1 + several], *of_image):
        raise ValueError(
            f"gradients must match activations {tuple(activations.shape)}, got {tuple(gradients.shape)}; of K classes"
            " an image they are (B, K, C, ...)"
        )
    check_floating("gradients", gradients)
    if gradients.device != activations.device:
        raise ValueError(f"gradients must be on the activations' device {activations.device}, got {gradients.device}")


def cluster_channels(
    activations: Any,
    config: CFCAMConfig | None = None,
    backend: str = "auto",
    clustering: str = "auto",
    check_finite: bool | None = None,
) -> tuple[Any, Any]:
    """Stages 1 and 2 alone: which channels are dominant, noise, or in which cluster.

    Args, Raises: as for `cf_cam`.

    Returns:
        labels (B, C) int32 (-2 dominant, -1 noise, k >= 0 cluster k, numbered as scikit-learn does) and eps (B,).

    >>> labels, eps = cluster_channels(torch.rand(2, 64, 7, 7))
    >>> labels.shape, eps.shape
    (torch.Size([2, 64]), torch.Size([2]))
    """
    if torch.compiler.is_compiling():
        return operators.labels_of_compiled(activations, config, backend, clustering, check_finite)
    config = check_config(config)
    activations, restore = as_tensor("activations", activations)
    check_grid("activations", activations)
    backend, engine = choose(backend, clustering, activations)
    check_values({"activations": activations}, check_finite)

    with plain_arithmetic(activations.device):
        labels, eps = _module(backend).cluster_channels(activations, config, engine)
    return restore(labels), restore(eps)


def class_grid(activations, weights, relu=True, skip_nan=False, config=None, guide=None, backend="auto"):
    """The weighted sum over channels, averaged as the configuration says, by default its positive part.

    Args:
        activations: (B, C, h, w), floating point, any strides.
        weights: (B, C); (B, C, h, w) for a weight of each cell's own; (B, K, C) for K sums; on the same device.
        skip_nan: leave out the terms that are NaN.
        config: `CFCAMConfig`, of which the average over alike cells counts; None for the sum as it is.
        guide: as for `cf_cam`.
        backend: as for `cf_cam`; "reference" is "torch" here.

    Returns:
        (B, h, w), or with an average (B, hg, wg), the guide's grid; of K sums (B, K, ...). float32, or float64 for
        float64 activations.
    """
    check_guide(guide, activations)
    config = config and config.of(activations.ndim - 2)
    module = _module("triton" if takes_kernels(activations, backend) else "torch")
    with plain_arithmetic(activations.device):
        return module.class_grid(activations, weights, relu, skip_nan, config, guide)


def grad_cam_maps(grids, output_size, scale_mean=True, backend="auto"):
    """pytorch-grad-cam's maps from the layers' grids: each scaled and resized, their mean scaled again.

    To scale is (x - min) / (1e-7 + max(x - min)), image by image; a map without a range becomes zeros.

    Args:
        grids: list of non-negative (B, h, w) or (B, K, h, w), a layer each, of any sizes.
        output_size: (H, W).
        scale_mean: False leaves the mean as it is, which of one layer is its own map.
        backend: as for `cf_cam`; "reference" is "torch" here.

    Returns:
        (B, H, W) or (B, K, H, W), float32, or float64 for float64 grids.
    """
    n_axes = len(output_size)
    images, grids = grids[0].shape[:-n_axes], [grid.reshape(-1, *grid.shape[-n_axes:]) for grid in grids]
    kernels = n_axes == 2 and all(takes_kernels(grid[:, None], backend) for grid in grids)
    with plain_arithmetic(grids[0].device):
        maps = _module("triton" if kernels else "torch").grad_cam_maps(grids, tuple(output_size), scale_mean)
    return maps.unflatten(0, images)


def takes_kernels(activations, backend="auto"):
    """Whether this backend, "auto" resolved, is Triton's for these activations; never for what is no (B, C, h, w)."""
    if backend in ("torch", "reference") or not isinstance(activations, torch.Tensor) or activations.ndim < 3:
        return False
    return choose(backend, "auto", activations)[0] == "triton"


@contextmanager
def plain_arithmetic(device):
    """No gradients, and no autocast: a caller's autocast is the model's and would round the maps to half precision."""
    with ExitStack() as stack:
        # Not in vain: behind a network, which has filled the caches, to enter both takes a tenth of a millisecond.
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


# Backends and engines.


def unavailable(backend: str) -> Exception | None:
    """Why ``backend`` cannot run in this installation, as an exception; None when it can."""
    if backend == "triton":
        if not is_installed("triton"):
            return ImportError("triton is not installed; it comes with torch on Linux")
        if not (torch.cuda.is_available() or _interpreted()):
            return ValueError("no CUDA or ROCm device is usable here")
    if backend == "reference":
        return reference_unavailable()
    return None


def choose(backend: str, clustering: str, activations: torch.Tensor | None = None) -> tuple[str, str]:
    """The backend and engine to run on these activations, "auto" resolved; raises when what is asked for cannot run."""
    for name, value, choices in (("backend", backend, BACKENDS), ("clustering", clustering, ("auto", *ENGINES))):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {type(value).__name__}")
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    engine = ENGINES.get(clustering)
    for choice, reason in (
        (f"backend={backend!r}", unavailable(backend)),
        (f"clustering={clustering!r}", engine and engine.unavailable()),
    ):
        if reason:
            raise type(reason)(f"{choice} cannot run: {reason}")
    if backend == "reference":
        if engine is None:
            return backend, next(name for name, each in ENGINES.items() if each.in_reference)
        if not engine.in_reference:
            names = ["auto", *(name for name, each in ENGINES.items() if each.in_reference)]
            expected = " or ".join(f'"{name}"' for name in names)
            raise ValueError(f'backend="reference" clusters with scikit-learn: clustering must be {expected}')
        return backend, clustering
    if activations is None:
        return backend, clustering
    refusal = engine and engine.refusal(activations.device)
    if refusal:
        raise refusal
    on_gpu = activations.device.type == "cuda"
    if backend == "auto":
        backend = "torch"
        if on_gpu and is_installed("triton") and _module("triton").refusal(activations) is None:
            backend = "triton"
    elif backend == "triton":
        if not on_gpu and not _interpreted():
            raise ValueError(
                f'backend="triton" needs tensors on a CUDA or ROCm device, got {activations.device};'
                " the CPU has only Triton's interpreter (TRITON_INTERPRET=1)"
            )
        refusal = _module("triton").refusal(activations)
        if refusal:
            raise refusal
    return backend, automatic(backend, activations.device) if clustering == "auto" else clustering


def check_choices(backend, clustering, check_finite):
    """The choices of `cf_cam` as its keyword arguments, for objects that are made before the tensors are there.

    Raises what `choose` raises for choices that cannot run on any tensors here.
    """
    choose(backend, clustering)
    return {"backend": backend, "clustering": clustering, "check_finite": check_finite}


def _module(backend):
    """The module whose functions are the backend's; imported when it is first asked for."""
    return torch_backend if backend == "torch" else importlib.import_module(f"cfcam_gpu.{backend}_backend")


def _interpreted():
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
