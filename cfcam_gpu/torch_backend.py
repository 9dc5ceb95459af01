"""CF-CAM in vectorised PyTorch, on any device: the five stages for a whole batch.

The clustering is an engine's (`cfcam_gpu.clustering`); the rest is the same code. Arithmetic is in float32 for
float16, bfloat16 and float32 inputs, in float64 for float64. Function names are those of `reference`.
"""

import torch
import torch.nn.functional as F

from cfcam_gpu.clustering import ENGINES
from cfcam_gpu.clustering.ranks import dominant_rank
from cfcam_gpu.config import FLAT_RANGE, GRAD_CAM_EPSILON
from cfcam_gpu.constants import constant
from cfcam_gpu.gaussian import filter_matrix, pooling_weights
from cfcam_gpu.labels import DOMINANT, NOISE

AFFINITY_BYTES, AFFINITY_BYTES_ON_CPU = 32 * 2**20, 2**20
"""Memory the affinities between cells may take at once; on a CPU less, which stays in the cache."""


def cf_cam(activations, gradients, output_size, config, engine):
    """All five stages for a batch.

    Args:
        activations, gradients: (B, C, h, w) on one device.
        output_size: (H, W).
        config: `CFCAMConfig`.
        engine: a name in `cfcam_gpu.clustering.ENGINES`.

    Returns:
        maps (B, H, W), labels int32 (B, C), weights (B, C), eps (B,), on that device.
    """
    activations = as_computed(activations)
    labels, weights, eps = cluster_and_weigh(activations, gradients, config, engine)
    return class_map(activations, weights, output_size, config), labels, weights, eps


def cluster_and_weigh(activations, gradients, config, engine):
    """Stages 1 to 4: labels int32 (B, C), weights (B, C) and eps (B,)."""
    labels, eps = cluster_channels(activations, config, engine)
    return labels, channel_weights(gradients, labels, config), eps


def as_computed(tensor):
    """Contiguous and in the dtype of the arithmetic, so that results do not depend on the memory format."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(dtype).contiguous()


# Stages 1 and 2: importance and clustering.


def cluster_channels(activations, config, engine):
    """Labels int32 (B, C) and eps (B,) of activations (B, C, h, w)."""
    activations = as_computed(activations)
    norms = channel_norms(activations)
    dominant = dominant_channels(norms, config)
    clustered = ~dominant if config.descriptor == "raw" else ~dominant & (norms > 0)
    rows = descriptors(activations, norms, config)
    labels = torch.where(dominant, DOMINANT, NOISE).int()
    return ENGINES[engine].load().cluster(rows, clustered, labels, config)


def channel_norms(activations):
    """L2 norm of each channel over the grid: (B, C)."""
    return torch.linalg.vector_norm(activations.flatten(2), dim=2)


def dominant_channels(norms, config):
    """The channels whose norm reaches the percentile of their image: bool (B, C)."""
    if config.dominant_percentile == 100:
        return torch.zeros_like(norms, dtype=torch.bool)
    rank = dominant_rank(norms.shape[1], config.dominant_percentile)
    if norms.device.type == "cpu":  # 20 times faster there than a sort; on CUDA not deterministic in its indices
        threshold = norms.kthvalue(rank + 1, dim=1, keepdim=True).values
    else:
        threshold = norms.sort(dim=1).values[:, rank, None]
    dominant = norms >= threshold
    return dominant if config.descriptor == "raw" else dominant & (norms > 0)


def descriptors(activations, norms, config):
    """What is clustered, one row per channel: (B, C, h * w)."""
    rows = activations.flatten(2)
    if config.descriptor == "raw":
        return rows
    return rows / torch.where(norms > 0, norms, 1)[:, :, None]


# Stages 3 and 4: filtered gradients and weights.


def filter_grids(grids, rows, columns):
    """Grids (N, h, w) filtered along both axes by the filter matrices rows (h, h) and columns (w, w)."""
    return rows @ grids @ columns.T


def filter_gradients(gradients, labels, config, filter_grids=filter_grids):
    """The gradient each channel is weighted by: (B, C, h, w).

    A dominant channel keeps its own; the members of a cluster share their filtered mean; noise has none.
    `channel_weights` does not need it: the spatial mean of a filtered grid is one dot product.
    """
    gradients = as_computed(gradients)
    mean = _cluster_mean(gradients.flatten(2), labels).view_as(gradients)
    rows, columns = (
        constant(filter_matrix, (size, config.sigma, config.boundary), mean.device, mean.dtype)
        for size in gradients.shape[2:]
    )
    filtered = filter_grids(mean.flatten(0, 1), rows, columns).view_as(mean)
    dominant, noise = (labels[:, :, None, None] == label for label in (DOMINANT, NOISE))
    return torch.where(dominant, gradients, torch.where(noise, 0, filtered))


def channel_weights(gradients, labels, config):
    """The weight of each channel, the spatial mean of its filtered gradient; 0 for noise: (B, C)."""
    gradients = as_computed(gradients)
    flat = gradients.flatten(2)
    arguments = (*gradients.shape[2:], config.sigma, config.boundary)
    pooling = constant(pooling_weights, arguments, flat.device, flat.dtype)
    of_cluster = _cluster_mean((flat * pooling.flatten()).sum(2, keepdim=True), labels)[:, :, 0]
    weights = torch.where(labels == DOMINANT, flat.mean(2), of_cluster)
    kept = labels != NOISE
    if config.weighting == "softmax":
        # An image without a kept channel gives a softmax of nothing (NaN), which the line below drops.
        weights = weights.masked_fill(~kept, -torch.inf).softmax(1)
    return torch.where(kept, weights, 0)


def _cluster_mean(values, labels):
    """Each clustered channel's mean over its cluster, of values (B, C, N); undefined for the others."""
    # Clusters take the slots from 0; noise and dominant channels share the last one.
    n_channels = labels.shape[1]
    slot = torch.where(labels >= 0, labels, n_channels).long()
    count = values.new_zeros(len(values), n_channels + 1).scatter_add_(1, slot, torch.ones_like(values[:, :, 0]))
    slots = slot[:, :, None].expand_as(values)
    total = values.new_zeros(len(values), n_channels + 1, values.shape[2]).scatter_add_(1, slots, values)
    return total.gather(1, slots) / count.gather(1, slot)[:, :, None]


# Stage 5: the map.


def class_map(activations, weights, output_size, config):
    """The normalised maps of a batch: (B, H, W) in [0, 1]."""
    grid = class_grid(activations, weights, affinity_power=config.affinity_power)
    return normalize(resize(grid, output_size), config)


def class_grid(activations, weights, relu=True, skip_nan=False, affinity_power=0.0):
    """The weighted sum over channels on the layer's own grid, by default its positive part: (B, h, w).

    Args:
        activations: (B, C, h, w).
        weights: (B, C), or (B, C, h, w) for a weight of each cell's own.
        skip_nan: leave out the terms that are NaN.
        affinity_power: above 0, the sum is averaged over alike cells (`average_alike_cells`).
    """
    activations, weights = as_computed(activations), weights.detach()
    if weights.ndim == 4 or skip_nan:
        terms = activations * (weights if weights.ndim == 4 else weights[:, :, None, None])
        grid = terms.nansum(1) if skip_nan else terms.sum(1)
    else:
        weights, cells = weights.to(activations.dtype), activations.flatten(2)
        if cells.device.type == "cpu":  # the rounding of a batched product depends on the size of the batch
            grid = torch.stack([of_image @ image_cells for of_image, image_cells in zip(weights, cells)])
        else:
            grid = torch.bmm(weights[:, None, :], cells)
        grid = grid.view(len(grid), *activations.shape[2:])
    if affinity_power > 0:
        grid = average_alike_cells(grid, activations, affinity_power)
    return grid.relu_() if relu else grid


def average_alike_cells(grids, activations, power):
    """Each cell's mean over all cells, weighted by max(0, cos)^power of their activations (B, C, h, w).

    Args:
        grids: (B, h, w), or (B, K, h, w) for several of an image; what comes back has this shape.
    """
    cells = as_computed(activations).flatten(2)
    norms = (cells * cells).sum(1, keepdim=True).sqrt()  # a third of the time of vector_norm, slow across rows
    cells = cells / torch.where(norms > 0, norms, 1)
    values = grids.to(cells.dtype).reshape(len(cells), -1, cells.shape[2]).transpose(1, 2)
    values = torch.cat([values, torch.ones_like(values[:, :, :1])], dim=2)  # whose sum is the mass
    # In blocks of images, or of cells: the affinities of a large grid or batch would not fit in memory at once.
    # On a CPU image by image: the rounding of a product of matrices depends on how many go in at once.
    n_cells = values.shape[1]
    row_bytes = n_cells * cells.element_size()
    on_cpu = values.device.type == "cpu"
    images = 1 if on_cpu else max(1, AFFINITY_BYTES // (n_cells * row_bytes))
    rows = max(1, min(n_cells, (AFFINITY_BYTES_ON_CPU if on_cpu else AFFINITY_BYTES) // row_bytes))
    sums = torch.zeros_like(values)
    for image in range(0, len(cells), images):
        chunk = slice(image, image + images)
        for row in range(0, n_cells, rows):
            block, behind = slice(row, row + rows), slice(row + rows, None)
            affinity = torch.bmm(cells[chunk, :, block].transpose(1, 2), cells[chunk, :, row:])
            affinity.clamp_min_(0).pow_(power)
            sums[chunk, block] += torch.bmm(affinity, values[chunk, row:])
            if row + rows < n_cells:  # the cells behind are as alike to these as these to them
                sums[chunk, behind] += torch.bmm(affinity[:, :, rows:].transpose(1, 2), values[chunk, block])
    mass = sums[:, :, -1:]  # 0 for a cell without features
    return (sums[:, :, :-1] / torch.where(mass > 0, mass, 1)).transpose(1, 2).reshape(grids.shape)


def resize(grid, output_size):
    """Bilinear resize (half-pixel centres, align_corners=False, no antialias) of (B, h, w) to (B, H, W)."""
    return F.interpolate(grid[:, None], tuple(output_size), mode="bilinear", align_corners=False)[:, 0]


def grad_cam_maps(grids, output_size, scale_mean=True):
    """The mean over layers of their scaled and resized grids (B, h, w), by default scaled again: (B, H, W).

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM.forward``.
    """
    mean = torch.stack([resize(scale_as_grad_cam(grid), output_size) for grid in grids]).mean(0)
    return scale_as_grad_cam(mean) if scale_mean else mean


def scale_as_grad_cam(images):
    """Maps (B, H, W), each scaled to (x - min) / (GRAD_CAM_EPSILON + max(x - min)).

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``scale_cam_image``.
    """
    shifted = images - images.amin((1, 2), True)
    return shifted / (GRAD_CAM_EPSILON + shifted.amax((1, 2), True))


def normalize(images, config):
    """Scale non-negative maps (B, H, W) to [0, 1] each; zeros where one has no positive value."""
    low, high = images.amin((1, 2), True), images.amax((1, 2), True)
    flat = high - low <= FLAT_RANGE * high
    base, span = (0, high) if config.normalize == "max" else (low, high - low)
    scaled = (images - base) / torch.where(flat, 1, span)
    of_flat = (high > 0).to(images.dtype) if config.normalize == "max" else torch.zeros_like(high)
    return torch.where(flat, of_flat, scaled)
