"""CF-CAM in Triton kernels: some ten launches a batch from the gradients to the maps, and no host synchronisation.

Function names are those of `reference`. The clustering works on float32 distances; see `cfcam_gpu.kernels`. To
everything up to the weighted sum a grid is its cells, in any number of axes; the average and the last resize of
volumes and series are torch's.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from cfcam_gpu import torch_backend
from cfcam_gpu.clustering import ENGINES
from cfcam_gpu.clustering.ranks import dominant_rank, rank_table
from cfcam_gpu.config import EPS_FLOOR, FLAT_RANGE, GRAD_CAM_EPSILON
from cfcam_gpu.constants import constant
from cfcam_gpu.gaussian import as_rows_and_columns, pooling_weights
from cfcam_gpu.kernels import launch
from cfcam_gpu.kernels.adjacency import adjacency
from cfcam_gpu.kernels.affinity_sum import affinity_sum, empty_products
from cfcam_gpu.kernels.centred_features import centred_features
from cfcam_gpu.kernels.channel_statistics import channel_statistics
from cfcam_gpu.kernels.channel_statistics import pool_gradients as kernels_pool_gradients
from cfcam_gpu.kernels.channel_weights import channel_weights
from cfcam_gpu.kernels.class_map import class_sums, resize_as_grad_cam, resize_normalize, weighted_sum
from cfcam_gpu.kernels.connected_components import connected_components
from cfcam_gpu.kernels.dominant_channels import dominant_channels
from cfcam_gpu.kernels.gaussian_filter import gaussian_filter
from cfcam_gpu.kernels.order_statistic import refine
from cfcam_gpu.kernels.pairwise_distances import TILE, distance_matrices, pairwise_distances

WORKSPACE_BYTES = 4 * 2**30
"""Device memory the distances and masks of one launch may take; larger batches go in chunks."""

EPS_FLOOR_FLOAT32 = float(np.float32(EPS_FLOOR))
"""EPS_FLOOR as the kernels compare it; rounded to nearest, which here is down."""


def cf_cam(activations, gradients, output_size, config, engine, guide=None):
    """All stages for a batch.

    Args:
        activations: (B, C, h, w), float16, bfloat16 or float32, on a CUDA or ROCm device; any strides.
        gradients: (B, C, h, w), likewise; of K classes an image (B, K, C, h, w), or their `PooledGradients`.
        output_size: (H, W).
        config: `CFCAMConfig`.
        engine: a name in `cfcam_gpu.clustering.ENGINES`; one that is not in the kernels labels their distances.
        guide: (B, Cg, hg, wg), the features that say which cells are alike; None: the activations.

    Returns:
        maps float32 (B, H, W), labels int32 (B, C), weights float32 (B, C), eps float32 (B,); of K classes an image
        maps (B, K, H, W) and weights (B, K, C).
    """
    arguments = (activations.detach(), gradients, output_size, config, engine, guide)
    return _in_chunks(_cf_cam, len(activations), _chunk(activations, config), arguments)


def cluster_and_weigh(activations, gradients, config, engine):
    """Stages 1 to 4: labels int32 (B, C), weights float32 (B, C) or (B, K, C), and eps float32 (B,)."""
    arguments = (activations.detach(), gradients, config, engine)
    return _in_chunks(_without_cells, len(activations), _chunk(activations, config), arguments)


def cluster_channels(activations, config, engine):
    """Labels int32 (B, C) and eps float32 (B,) of activations (B, C, h, w)."""
    arguments = (activations.detach(), config, engine)
    return _in_chunks(_cluster_channels, len(activations), _chunk(activations, config), arguments)


def filter_gradients(gradients, labels, config):
    """The gradient each channel is weighted by, as `torch_backend.filter_gradients`, filtered by the kernel."""
    return torch_backend.filter_gradients(gradients, labels, config, gaussian_filter)


def refusal(activations):
    """Why the kernels do not take these activations (B, C, h, w), a ValueError; None when they do."""
    if activations.dtype not in launch.DTYPES:
        names = ", ".join(str(dtype) for dtype in launch.DTYPES)
        return ValueError(f'backend="triton" takes {names}, got {activations.dtype}; use backend="torch"')
    n_channels, n_cells = activations.shape[1], math.prod(activations.shape[2:])
    for what, most, got in (
        ("channels", launch.MAX_CHANNELS, n_channels),
        ("grid cells", launch.MAX_GRID_CELLS, n_cells),
    ):
        if got > most:
            return ValueError(f'backend="triton" takes at most {most} {what}, got {got}; use backend="torch"')
    return None


def _chunk(activations, config):
    """How many images fit in the workspace at once."""
    columns = launch.cdiv(_max_rows(activations.shape[1], config), TILE)
    distances = columns * (columns + 1) // 2 * TILE**2 * 4
    masks = 2 * (columns * TILE) ** 2 // 8
    return max(1, WORKSPACE_BYTES // (distances + masks))


def _in_chunks(function, batch, chunk, arguments):
    """``function(*arguments)`` on ``chunk`` images at a time: the tensors among the arguments are cut."""
    if batch <= chunk:
        return function(*arguments)
    results = []
    for start in range(0, batch, chunk):
        rows = slice(start, start + chunk)
        cut = tree_map_only(torch.Tensor, lambda tensor, rows=rows: tensor[rows], arguments)
        results.append(function(*cut))
    return tuple(torch.cat(column) for column in zip(*results))


def _cf_cam(activations, gradients, output_size, config, engine, guide):
    # As published, the positive part is resized; an averaged sum is resized with its sign.
    relu, in_planes = not config.averages, activations.ndim == 4
    guide = activations if guide is None else guide
    products = None
    if config.averages and in_planes:
        guide = _features(guide, config)
        products = empty_products(guide)
    cells, labels, weights, eps, sums = _cluster_and_weigh(
        activations, gradients, config, engine, in_planes, relu, guide, products
    )
    cells = cells.unflatten(2, activations.shape[2:])
    if not in_planes:
        return torch_backend.class_map(cells, weights, output_size, config, guide), labels, weights, eps
    grid = class_grid(cells, weights, relu) if sums is None else sums.unflatten(1, cells.shape[2:])
    if config.averages:
        grid = _averaged(grid, guide, relu, config, products)
    maps = resize_normalize(grid.flatten(0, -3), output_size, FLAT_RANGE, config.normalize)
    return maps.unflatten(0, grid.shape[:-2]), labels, weights, eps


def _cluster_and_weigh(activations, gradients, config, engine, with_sums=False, relu=False, guide=None, products=None):
    """The activations float32 (B, C, h * w), neighbours in memory along C; labels, weights and eps; and the sums.

    The sums, float32 (B, h * w), are those of one class, where they are asked for and the labels are the kernels' own;
    else None. The ``products`` of the guide's cells are made on the way, if there are any to make.
    """
    several = torch_backend.are_several(gradients, activations)
    if several:
        pooled = (
            gradients if isinstance(gradients, torch_backend.PooledGradients) else pool_gradients(gradients, config)
        )
        pooled = [each.contiguous() for each in pooled]
        planes = _as_planes(activations), None, None
    else:
        pooling = _pooling(gradients.shape[2:], gradients.device, config)
        planes = _as_planes(activations), _as_planes(gradients.detach()), pooling
    transposed, squared_norm, *statistics = channel_statistics(*planes, guide, products)
    pooled = pooled if several else statistics
    summed = transposed if with_sums and not several else None
    labels, eps, weights, sums = _cluster(transposed, squared_norm, config, engine, pooled, summed, relu)
    return transposed.transpose(1, 2), labels, weights, eps, sums


def pool_gradients(gradients, config):
    """The `PooledGradients`, float32 (B, K, C), of gradients (B, K, C, h, w)."""
    pooling = _pooling(gradients.shape[3:], gradients.device, config)
    pooled = kernels_pool_gradients(_as_planes(gradients.detach(), first=3), pooling)
    return torch_backend.PooledGradients(*pooled)


def _pooling(shape, device, config):
    arguments = (tuple(shape), config.sigmas(len(shape)), config.boundary)
    return constant(pooling_weights, arguments, device, torch.float32).flatten()


def _as_planes(grids, first=2):
    """Grids, from axis ``first`` on, as planes of rows and columns; a view where the strides allow it."""
    return grids.reshape(*grids.shape[:first], *as_rows_and_columns(grids.shape[first:]))


def _without_cells(*arguments):
    return _cluster_and_weigh(*arguments)[1:4]


def class_grid(activations, weights, relu=True, skip_nan=False, config=None, guide=None):
    """The weighted sum over channels, averaged as the configuration says, as `torch_backend.class_grid`, by kernels."""
    weights, cells = weights.detach(), activations.detach().flatten(2)
    averages = config is not None and config.averages
    if weights.ndim == 3:
        grid = class_sums(cells, weights.float().contiguous(), relu and not averages)
    else:
        weights = weights.flatten(2) if weights.ndim > 3 else weights[:, :, None].expand(-1, -1, cells.shape[2])
        grid = weighted_sum(cells, weights, relu and not averages, skip_nan)
    grid = grid.unflatten(-1, activations.shape[2:])
    if not averages:
        return grid
    guide = (activations if guide is None else guide).detach()
    return _averaged(grid, _features(guide, config) if guide.ndim == 4 else guide, relu, config)


def _averaged(grid, guide, relu, config, products=None):
    """The sum averaged over the guide's alike cells, as the configuration says.

    Args:
        guide: in planes its `_features`.
        products: those of its cells, if made.
    """
    if guide.ndim != 4:
        grid = torch_backend.balance(grid, guide.shape[2:], config)
        grid = torch_backend.average_alike_cells(grid, guide, config)
        return grid.relu_() if relu else grid
    return affinity_sum(grid, guide, config, relu, products)


def _features(guide, config):
    """What of a guide (B, Cg, hg, wg) says which cells are alike, in a dtype that the kernels read."""
    guide = guide.detach()
    guide = guide if guide.dtype in launch.DTYPES else guide.float()
    return centred_features(guide, config.affinity_centring) if config.affinity_centring > 0 else guide


def grad_cam_maps(grids, output_size, scale_mean=True):
    """The maps as pytorch-grad-cam scales them, as `torch_backend.grad_cam_maps`, by a kernel launch a layer."""
    grids = [torch_backend.as_computed(grid) for grid in grids]
    return resize_as_grad_cam(grids, output_size, GRAD_CAM_EPSILON, scale_mean)


def _cluster_channels(activations, config, engine):
    transposed, squared_norm, _, _ = channel_statistics(_as_planes(activations))
    return _cluster(transposed, squared_norm, config, engine)[:2]


def _max_rows(n_channels, config):
    """The largest number of channels that can be left to cluster; a buffer holds at least one."""
    if config.dominant_percentile == 100:
        return n_channels
    return max(dominant_rank(n_channels, config.dominant_percentile), 1)


def _cluster(transposed, squared_norm, config, engine, pooled=None, summed=None, relu=False):
    """Labels and eps; the weights, if there are ``pooled`` gradients; and the sums of ``summed``, or None.

    Labels of another engine, and those of very many channels, are weighed by a launch of its own, without sums.
    """
    batch, _, n_channels = transposed.shape
    unit = config.descriptor == "unit"
    max_rows = _max_rows(n_channels, config)
    rank = None if config.dominant_percentile == 100 else dominant_rank(n_channels, config.dominant_percentile)
    low_rank, fraction, min_samples = _rank_table(max_rows, config, transposed.device)

    labels, member, n_rows, descriptors, degree, histogram, above = dominant_channels(
        squared_norm, transposed, rank, max_rows, unit
    )
    distances = pairwise_distances(descriptors, n_rows, histogram)
    prefix, remaining = torch.empty(2, batch, 2, dtype=torch.int32, device=transposed.device)
    for digit in (1, 2):
        refine(distances, n_rows, low_rank, histogram, prefix, remaining, digit, TILE)
    bits, below = adjacency(distances, n_rows, histogram, prefix, remaining, degree, above, EPS_FLOOR_FLOAT32)
    in_kernels, softmax = ENGINES[engine].in_kernels, config.weighting == "softmax"
    to_weigh = (pooled, softmax, summed, relu) if in_kernels else ()
    labels, eps, weights, sums = connected_components(
        bits, degree, member, n_rows, min_samples, fraction, below, above, EPS_FLOOR_FLOAT32, labels, TILE, *to_weigh
    )
    if not in_kernels:
        _label_with(ENGINES[engine].load(), labels, distance_matrices(distances, n_rows), member, eps, config)
    if pooled is not None and weights is None:
        weights = channel_weights(labels, *pooled, softmax)
    return labels, eps, weights, sums


def _label_with(engine, labels, matrices, member, eps, config):
    """Overwrite the clusters of ``labels`` by those of another engine, for the same distances and eps."""
    for image, matrix in enumerate(matrices):
        n = len(matrix)
        if n > 1:
            found = engine.label(matrix, eps[image], config.min_samples(n))
            labels[image, member[image, :n].long()] = found.to(labels)


@lru_cache(maxsize=64)
def _rank_table(max_rows, config, device):
    """For every number of rows 0..max_rows: the low rank and the fraction of eps, and min_samples."""
    # Cached, as `constant` is: a copy from the host would make the host wait.
    low, high, fraction, min_samples = rank_table(max_rows, config)
    # Where both ends are the same rank there is nothing to interpolate.
    fraction = [0.0 if below == above else part for below, above, part in zip(low, high, fraction)]
    return (
        torch.tensor(low, dtype=torch.int32, device=device),
        torch.tensor(fraction, dtype=torch.float32, device=device),
        torch.tensor(min_samples, dtype=torch.int32, device=device),
    )
