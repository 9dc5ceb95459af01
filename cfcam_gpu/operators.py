"""`cf_cam` and `cluster_channels` as operators of torch, ``torch.ops.cfcam_gpu``: what ``torch.compile`` sees of them.

Code that is being compiled calls them in the functions' place, so that a compiled function with `cf_cam` in it is one
graph. They run what the functions run, on whatever device the tensors are; the configuration comes as plain values.
"""

from typing import Any

import torch

from cfcam_gpu.checks import GRID_AXES, check_config
from cfcam_gpu.config import CFCAMConfig

CONFIG = (
    "float dominant_percentile, str descriptor, float eps_percentile, float min_samples_fraction, float[] sigma, "
    "str boundary, str weighting, str normalize, float affinity_power, float affinity_sigma, int affinity_steps, "
    "float margin_temperature, float guide_power, bool frozen_norms, "
    "float affinity_centring, float affinity_range"
)
"""The fields of `CFCAMConfig`; a sigma for all axes is a list of one."""

N_CONFIG = CONFIG.count(",") + 1

DEFAULTS = {n_axes: check_config(None).of(n_axes) for n_axes in GRID_AXES}
"""By the axes of a grid; made before, because code that is being compiled makes none."""

CHOICES = "str backend, str clustering, bool? check_finite"

CF_CAM = f"(Tensor activations, Tensor gradients, Tensor? guide, SymInt[] output_size, {CONFIG}, {CHOICES})"
CLUSTER_CHANNELS = f"(Tensor activations, {CONFIG}, {CHOICES})"


def plain_values(config: CFCAMConfig) -> tuple[Any, ...]:
    """A configuration as arguments of the operators."""
    sigma = config.sigma if isinstance(config.sigma, tuple) else (config.sigma,)
    return (
        float(config.dominant_percentile),
        config.descriptor,
        float(config.eps_percentile),
        float(config.min_samples_fraction),
        [float(each) for each in sigma],
        config.boundary,
        config.weighting,
        config.normalize,
        float(config.affinity_power),
        float(config.affinity_sigma),
        int(config.affinity_steps),
        float(config.margin_temperature),
        float(config.guide_power),
        config.frozen_norms,
        float(config.affinity_centring),
        float(config.affinity_range),
    )


def result_of_compiled(activations, gradients, output_size, config, backend, clustering, check_finite, guide):
    """`cf_cam` in code that is being compiled: its four tensors. What is wrong with them is found when it runs."""
    size = list(activations.shape[2:] if output_size is None else output_size)
    values = plain_values(_chosen(config, activations))
    return torch.ops.cfcam_gpu.cf_cam(
        activations.detach(), gradients.detach(), guide, size, *values, backend, clustering, check_finite
    )


def labels_of_compiled(activations, config, backend, clustering, check_finite):
    """`cluster_channels` in code that is being compiled: labels and eps."""
    values = plain_values(_chosen(config, activations))
    return torch.ops.cfcam_gpu.cluster_channels(activations.detach(), *values, backend, clustering, check_finite)


def _chosen(config, activations):
    return DEFAULTS.get(activations.ndim - 2, DEFAULTS[2]) if config is None else config


def _config(values):
    *before, sigma = values[:5]
    return CFCAMConfig(*before, sigma[0] if len(sigma) == 1 else tuple(sigma), *values[5:])


def _cf_cam(activations, gradients, guide, output_size, *rest):
    from cfcam_gpu import pipeline  # which has these operators run where code is compiled

    config, choices = _config(rest[:N_CONFIG]), rest[N_CONFIG:]
    return tuple(pipeline.cf_cam(activations, gradients, output_size, config, *choices, guide=guide))


def _like_cf_cam(activations, gradients, guide, output_size, *rest):
    batch, n_channels = activations.shape[:2]
    several = gradients.shape[1 : 1 + gradients.ndim - activations.ndim]
    dtype = _dtype(activations, backend=rest[N_CONFIG])
    labels, eps = _like_cluster_channels(activations, *rest)
    maps = activations.new_empty((batch, *several, *output_size), dtype=dtype)
    return maps, labels, activations.new_empty((batch, *several, n_channels), dtype=dtype), eps


def _cluster_channels(activations, *rest):
    from cfcam_gpu import pipeline

    return pipeline.cluster_channels(activations, _config(rest[:N_CONFIG]), *rest[N_CONFIG:])


def _like_cluster_channels(activations, *rest):
    labels = activations.new_empty(activations.shape[:2], dtype=torch.int32)
    return labels, activations.new_empty(activations.shape[:1], dtype=_dtype(activations, backend=rest[N_CONFIG]))


def _dtype(activations, backend):
    return torch.float64 if backend == "reference" or activations.dtype == torch.float64 else torch.float32


cf_cam = torch.library.custom_op(
    "cfcam_gpu::cf_cam", _cf_cam, mutates_args=(), schema=f"{CF_CAM} -> (Tensor, Tensor, Tensor, Tensor)"
)
cf_cam.register_fake(_like_cf_cam)

cluster_channels = torch.library.custom_op(
    "cfcam_gpu::cluster_channels", _cluster_channels, mutates_args=(), schema=f"{CLUSTER_CHANNELS} -> (Tensor, Tensor)"
)
cluster_channels.register_fake(_like_cluster_channels)
