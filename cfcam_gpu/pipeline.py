"""The public functions on activations and gradients: checks, choice of backend and engine, and the result."""

import importlib
import importlib.util
import os
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch

from cfcam_gpu import cuml_engine, torch_backend
from cfcam_gpu.arrays import as_tensor
from cfcam_gpu.config import CFCAMConfig

BACKENDS = ("auto", "triton", "torch", "reference")
ENGINES = ("auto", "cuml", "batched", "sklearn")


class CFCAMResult(NamedTuple):
    """What `cf_cam` returns; arrays of the kind and on the device of its input."""

    maps: Any
    """(B, H, W) in [0, 1]; float32, or float64 for float64 input and the reference backend."""
    labels: Any
    """(B, C) int32: -2 dominant, -1 noise, k >= 0 cluster k."""
    weights: Any
    """(B, C), dtype of the maps."""
    eps: Any
    """(B,), dtype of the maps: the clustering radius of each image."""


def cf_cam(activations, gradients, output_size=None, config=None, backend="auto", clustering="auto", check_finite=None):
    """CF-CAM maps from a layer's activations and the gradients of a score with respect to them.

    Args:
        activations, gradients: (B, C, h, w), floating point, on one device; torch tensors or anything else with
            DLPack (NumPy, CuPy, JAX). Any strides. |values| below 1e18: squares are taken in float32.
        output_size: (H, W) of the maps; default: the grid's own.
        config: `CFCAMConfig`; default: ``CFCAMConfig()``.
        backend: "triton" (CUDA or ROCm devices; at most 4096 channels, float32 and less), "torch" (any device),
            "reference" (NumPy, SciPy and scikit-learn in float64, on the host), or "auto": triton where it takes the
            tensors, else torch.
        clustering: "batched" (ours, on the device and without a host synchronisation), "cuml", "sklearn" (on the
            host), or "auto": ours, on a CPU in the form that is fastest there. All give the same labels. cuML
            works image by image and makes the host wait; see `cfcam_gpu.cuml_engine` for its streams and memory.
        check_finite: refuse NaN and infinity. Default: on the CPU only, because elsewhere the host would have to
            wait for the device.

    Returns:
        `CFCAMResult` (maps, labels, weights, eps). Every image of the batch is its own problem.

    Raises:
        TypeError: an argument has the wrong type, or the arrays are not floating point.
        ValueError: shapes or devices that do not match, an empty batch, an unknown choice or one that cannot run
            on these tensors, NaN or infinity.
        ImportError: what is asked for is not installed; the message names the extra.

    Source: arXiv 2504.00060. Departures: the Gaussian's sigma and boundary (`CFCAMConfig`); by default also the upper
    half of the channels dominant, signed weights, the average over alike cells and min-max scaling, chosen by
    measurement (benchmarks/faithfulness.md); ``CFCAMConfig.paper()`` has the published choices.

    >>> result = cf_cam(torch.rand(2, 64, 7, 7), torch.randn(2, 64, 7, 7), output_size=(224, 224))
    >>> result.maps.shape, result.labels.shape
    (torch.Size([2, 224, 224]), torch.Size([2, 64]))
    """
    config = check_config(config)
    activations, restore = as_tensor("activations", activations)
    gradients, _ = as_tensor("gradients", gradients)
    module, engine = _checked(activations, gradients, backend, clustering, check_finite)
    output_size = _check_output_size(output_size, activations)
    with plain_arithmetic(activations.device):
        result = module.cf_cam(activations, gradients, output_size, config, engine)
    return CFCAMResult(*map(restore, result))


def channel_weights(activations, gradients, config, backend="auto", clustering="auto", check_finite=None):
    """`cf_cam`'s weights (B, C) of tensors (B, C, h, w), without its maps. Args, Raises: as there."""
    module, engine = _checked(activations, gradients, backend, clustering, check_finite)
    with plain_arithmetic(activations.device):
        return module.cluster_and_weigh(activations, gradients, config, engine)[1]


def _checked(activations, gradients, backend, clustering, check_finite):
    """The module of the backend, and the engine, for tensors that are fit for them."""
    check_activations(activations)
    if gradients.shape != activations.shape:
        raise ValueError(f"gradients must match activations {tuple(activations.shape)}, got {tuple(gradients.shape)}")
    _check_floating("gradients", gradients)
    if gradients.device != activations.device:
        raise ValueError(f"gradients must be on the activations' device {activations.device}, got {gradients.device}")
    backend, engine = choose(backend, clustering, activations)
    check_values({"activations": activations, "gradients": gradients}, check_finite)
    return _module(backend), engine


def cluster_channels(activations, config=None, backend="auto", clustering="auto", check_finite=None):
    """Stages 1 and 2 alone: which channels are dominant, noise, or in which cluster.

    Args, Raises: as for `cf_cam`.

    Returns:
        labels (B, C) int32 (-2 dominant, -1 noise, k >= 0 cluster k, numbered as scikit-learn does) and eps (B,).

    >>> labels, eps = cluster_channels(torch.rand(2, 64, 7, 7))
    >>> labels.shape, eps.shape
    (torch.Size([2, 64]), torch.Size([2]))
    """
    config = check_config(config)
    activations, restore = as_tensor("activations", activations)
    check_activations(activations)
    backend, engine = choose(backend, clustering, activations)
    check_values({"activations": activations}, check_finite)

    with plain_arithmetic(activations.device):
        labels, eps = _module(backend).cluster_channels(activations, config, engine)
    return restore(labels), restore(eps)


def class_grid(activations, weights, relu=True, skip_nan=False, affinity_power=0.0, backend="auto"):
    """The weighted sum over channels on the layer's own grid, by default its positive part: (B, h, w).

    Args:
        activations: (B, C, h, w), floating point, any strides.
        weights: (B, C), or (B, C, h, w) for a weight of each cell's own; on the same device.
        skip_nan: leave out the terms that are NaN.
        affinity_power: as in `CFCAMConfig`; 0 for the sum as it is.
        backend: as for `cf_cam`; "reference" is "torch" here.

    Returns:
        float32, or float64 for float64 activations.
    """
    module = _module("triton" if takes_kernels(activations, backend) else "torch")
    with plain_arithmetic(activations.device):
        return module.class_grid(activations, weights, relu, skip_nan, affinity_power)


def grad_cam_maps(grids, output_size, scale_mean=True, backend="auto"):
    """pytorch-grad-cam's maps from the layers' grids: each scaled and resized, their mean scaled again; (B, H, W).

    To scale is (x - min) / (1e-7 + max(x - min)), image by image; a map without a range becomes zeros.

    Args:
        grids: list of non-negative (B, h, w), a layer each, of any sizes.
        output_size: (H, W).
        scale_mean: False leaves the mean as it is, which of one layer is its own map.
        backend: as for `cf_cam`; "reference" is "torch" here.

    Returns:
        float32, or float64 for float64 grids.
    """
    kernels = all(takes_kernels(grid[:, None], backend) for grid in grids)
    with plain_arithmetic(grids[0].device):
        return _module("triton" if kernels else "torch").grad_cam_maps(grids, tuple(output_size), scale_mean)


def takes_kernels(activations, backend="auto"):
    """Whether this backend, "auto" resolved, is Triton's for these activations; never for what is no (B, C, h, w)."""
    if backend in ("torch", "reference") or not isinstance(activations, torch.Tensor) or activations.ndim != 4:
        return False
    return choose(backend, "auto", activations)[0] == "triton"


@contextmanager
def plain_arithmetic(device):
    """No gradients, and no autocast: a caller's autocast is the model's and would round the maps to half precision."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


# Backends and engines.


def unavailable(backend):
    """Why ``backend`` cannot run in this installation, as an exception; None when it can."""
    if backend == "triton":
        if not _installed("triton"):
            return ImportError("triton is not installed; it comes with torch on Linux")
        if not (torch.cuda.is_available() or _interpreted()):
            return ValueError("no CUDA or ROCm device is usable here")
    if backend == "reference":
        return _missing_reference()
    return None


def clustering_unavailable(engine):
    """Why the clustering engine cannot run in this installation, as an exception; None when it can."""
    if engine == "cuml":
        if not _installed("cuml"):
            return ImportError(cuml_engine.NOT_INSTALLED)
        if not torch.cuda.is_available():
            return ValueError("no CUDA device is usable here")
    if engine == "sklearn":
        return _missing_reference()
    return None


def choose(backend, clustering, activations=None):
    """The backend and engine to run on these activations, "auto" resolved; raises when what is asked for cannot run."""
    for name, value, choices in (("backend", backend, BACKENDS), ("clustering", clustering, ENGINES)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {type(value).__name__}")
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    for choice, reason in (
        (f"backend={backend!r}", unavailable(backend)),
        (f"clustering={clustering!r}", clustering_unavailable(clustering)),
    ):
        if reason:
            raise type(reason)(f"{choice} cannot run: {reason}")
    if backend == "reference":
        if clustering not in ("auto", "sklearn"):
            raise ValueError('backend="reference" clusters with scikit-learn: clustering must be "auto" or "sklearn"')
        return backend, "sklearn"
    if activations is None:
        return backend, clustering
    on_gpu = activations.device.type == "cuda"
    if clustering == "cuml" and not on_gpu:
        raise ValueError(f'clustering="cuml" needs tensors on a CUDA device, got {activations.device}')
    if backend == "auto":
        backend = "torch"
        if on_gpu and _installed("triton") and _module("triton").refusal(activations) is None:
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
    if clustering == "auto":
        clustering = "host" if backend == "torch" and activations.device.type == "cpu" else "batched"
    return backend, clustering


def check_choices(backend, clustering, check_finite):
    """The choices of `cf_cam` as its keyword arguments, for objects that are made before the tensors are there.

    Raises what `choose` raises for choices that cannot run on any tensors here.
    """
    choose(backend, clustering)
    return {"backend": backend, "clustering": clustering, "check_finite": check_finite}


def _module(backend):
    """The module whose functions are the backend's; imported when it is first asked for."""
    return torch_backend if backend == "torch" else importlib.import_module(f"cfcam_gpu.{backend}_backend")


def _installed(package):
    return importlib.util.find_spec(package) is not None


def _interpreted():
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _missing_reference():
    missing = [name for name in ("scipy", "sklearn") if not _installed(name)]
    if missing:
        return ImportError(f'{" and ".join(missing)} not installed; pip install "cfcam_gpu[reference]"')
    return None


# Checks of the arguments, at the public edge and before anything is done.


def check_config(config):
    """``config``, or the default for None."""
    if config is None:
        return CFCAMConfig()
    if not isinstance(config, CFCAMConfig):
        raise TypeError(f"config must be a CFCAMConfig, got {type(config).__name__}")
    return config


def check_activations(activations):
    """Refuse what is not a non-empty floating-point (B, C, h, w)."""
    if activations.ndim != 4:
        raise ValueError(f"activations must have shape (B, C, h, w), got {tuple(activations.shape)}")
    if 0 in activations.shape:
        raise ValueError(f"activations (B, C, h, w) must not be empty, got {tuple(activations.shape)}")
    _check_floating("activations", activations)


def check_values(named_tensors, check_finite):
    """Refuse NaN and infinity where ``check_finite`` says so; None: on the CPU only."""
    for name, tensor in named_tensors.items():
        check = tensor.device.type == "cpu" if check_finite is None else check_finite
        # A sum is finite only if all its terms are: a thirtieth of the time. It may overflow, so then they are counted.
        if check and not tensor.sum().isfinite():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values of {tensor.numel()}")


def _check_floating(name, tensor):
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_output_size(output_size, activations):
    if output_size is None:
        return tuple(activations.shape[2:])
    if not isinstance(output_size, (tuple, list, torch.Size)) or len(output_size) != 2:
        raise TypeError(f"output_size must be a pair (H, W), got {output_size!r}")
    for side in output_size:
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"output_size must be a pair of integers, got {output_size!r}")
        if side < 1:
            raise ValueError(f"output_size must be at least (1, 1), got {tuple(output_size)}")
    return tuple(int(side) for side in output_size)
