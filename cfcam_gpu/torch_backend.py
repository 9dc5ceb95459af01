"""CF-CAM in vectorised PyTorch, on any device: the stages for a whole batch.

The clustering is an engine's (`cfcam_gpu.clustering`); the rest is the same code. Arithmetic is in float32 for
float16, bfloat16 and float32 inputs, in float64 for float64. Function names are those of `reference`.

A grid (h, w) may have any number of axes from one to three: (t,), or (d, h, w), and (H, W) then as many.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cfcam_gpu.clustering import ENGINES
from cfcam_gpu.clustering.ranks import dominant_rank
from cfcam_gpu.config import AS_THE_MEAN, FLAT_RANGE, GRAD_CAM_EPSILON, WITHOUT_FEATURES
from cfcam_gpu.constants import constant, has_symbolic_batch, has_symbols, is_traced
from cfcam_gpu.gaussian import (
    as_rows_and_columns,
    coverage,
    filter_matrices,
    interpolation_matrices,
    pooling_weights,
    rows_reach,
    rows_window,
    window_matrix,
)
from cfcam_gpu.labels import DOMINANT, NOISE
from cfcam_gpu.weights import per_cell

ROWS_AT_ONCE = 4
"""Of a product of matrices on a CPU."""

MAP_BYTES_ON_CPU = 2**21
"""Maps that are resized and scaled at once, so that they stay in the cache in between."""

AFFINITY_BYTES, AFFINITY_BYTES_ON_CPU = 32 * 2**20, 2**20
"""Memory the affinities between cells may take; a block of them less on a CPU, where it stays in the cache."""


class PooledGradients(NamedTuple):
    """What the weights need of gradients (B, K, C, h, w)."""

    plain: torch.Tensor
    """(B, K, C), the mean over the cells."""
    filtered: torch.Tensor
    """(B, K, C), the mean over the cells of the filtered gradient."""


def cf_cam(activations, gradients, output_size, config, engine, guide=None):
    """All stages for a batch.

    Args:
        activations: (B, C, h, w).
        gradients: (B, C, h, w) on the same device; of K classes an image (B, K, C, h, w), or their `PooledGradients`.
        output_size: (H, W).
        config: `CFCAMConfig`.
        engine: a name in `cfcam_gpu.clustering.ENGINES`.
        guide: (B, Cg, hg, wg), the features that say which cells are alike; None: the activations.

    Returns:
        maps (B, H, W), labels int32 (B, C), weights (B, C), eps (B,), on that device; of K classes an image maps
        (B, K, H, W) and weights (B, K, C).
    """
    activations = as_computed(activations)
    labels, weights, eps = cluster_and_weigh(activations, gradients, config, engine)
    return class_map(activations, weights, output_size, config, guide), labels, weights, eps


def cluster_and_weigh(activations, gradients, config, engine):
    """Stages 1 to 4: labels int32 (B, C), weights (B, C) or (B, K, C), and eps (B,)."""
    labels, eps = cluster_channels(activations, config, engine)
    return labels, channel_weights(gradients, labels, config, are_several(gradients, activations)), eps


def are_several(gradients, activations):
    """Whether gradients are of K classes an image, (B, K, C, h, w) beside activations (B, C, h, w)."""
    return isinstance(gradients, PooledGradients) or gradients.ndim > activations.ndim


def as_computed(tensor):
    """Contiguous and in the dtype of the arithmetic, so that results do not depend on the memory format."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(dtype).contiguous()


# Stages 1 and 2: importance and clustering.


def cluster_channels(activations, config, engine):
    """Labels int32 (B, C) and eps (B,) of activations (B, C, h, w)."""
    activations = as_computed(activations)
    return cluster_computed(activations, channel_norms(activations), config, engine)


def cluster_computed(activations, norms, config, engine):
    """`cluster_channels` of what `as_computed` and `channel_norms` gave."""
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
    if of_images_on_cpu(norms):  # 20 times faster there than a sort; on CUDA not deterministic in its indices
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
    mean = _cluster_mean(gradients.flatten(2), labels)
    shape = gradients.shape[2:]
    rows, columns = (
        constant(
            _filter_matrix, (tuple(shape), config.sigmas(len(shape)), config.boundary, axis), mean.device, mean.dtype
        )
        for axis in (0, 1)
    )
    filtered = filter_grids(mean.view(-1, *as_rows_and_columns(shape)), rows, columns).view_as(gradients)
    dominant, noise = (per_cell(labels == label, gradients) for label in (DOMINANT, NOISE))
    return torch.where(dominant, gradients, torch.where(noise, 0, filtered))


def _interpolation_matrix(shape, new_shape, axis):
    return interpolation_matrices(shape, new_shape)[axis]


def _filter_matrix(shape, sigmas, boundary, axis):
    return filter_matrices(shape, sigmas, boundary)[axis]


def channel_weights(gradients, labels, config, several=False):
    """The weight of each channel, the spatial mean of its filtered gradient; 0 for noise: (B, C).

    Of ``several`` gradients (B, K, C, h, w), or of `PooledGradients`, (B, K, C).
    """
    pooled = gradients if isinstance(gradients, PooledGradients) else pool_gradients(gradients, config, several)
    several = several or isinstance(gradients, PooledGradients)
    plain, filtered = pooled if several else (each[:, None] for each in pooled)
    of_cluster = _cluster_mean(filtered.transpose(1, 2), labels).transpose(1, 2)
    labels = labels[:, None]
    weights = torch.where(labels == DOMINANT, plain, of_cluster)
    kept = labels != NOISE
    if config.weighting == "softmax":
        # An image without a kept channel gives a softmax of nothing (NaN), which the line below drops.
        weights = weights.masked_fill(~kept, -torch.inf).softmax(2)
    weights = torch.where(kept, weights, 0)
    return weights if several else weights[:, 0]


def pool_gradients(gradients, config, several=True):
    """The `PooledGradients` of gradients (B, K, C, h, w): (B, K, C); (B, C) of (B, C, h, w), which are not several."""
    if several and gradients.device.type == "cpu":  # as in `row_products`
        of_classes = [pool_gradients(of_class, config, several=False) for of_class in gradients.unbind(1)]
        return PooledGradients(*(torch.stack(each, dim=1) for each in zip(*of_classes)))
    shape = tuple(gradients.shape[2 + several :])
    flat = as_computed(gradients).flatten(2 + several)
    arguments = (shape, config.sigmas(len(shape)), config.boundary)
    pooling = constant(pooling_weights, arguments, flat.device, flat.dtype).flatten()
    return PooledGradients(flat.mean(-1), flat @ pooling)


def _cluster_mean(values, labels):
    """Each clustered channel's mean over its cluster, of values (B, C, N); undefined for the others."""
    # Clusters take the slots from 0; noise and dominant channels share the last one.
    n_channels = labels.shape[1]
    slot = torch.where(labels >= 0, labels, n_channels).long()
    count = values.new_zeros(values.shape[0], n_channels + 1).scatter_add_(1, slot, torch.ones_like(values[:, :, 0]))
    slots = slot[:, :, None].expand_as(values)
    total = values.new_zeros(values.shape[0], n_channels + 1, values.shape[2]).scatter_add_(1, slots, values)
    return total.gather(1, slots) / count.gather(1, slot)[:, :, None]


# Stage 5: the average over alike cells.


def balance(grids, shape, config):
    """Signed sums with the evidence against the class scaled down to the evidence for it; see `reference.balance`.

    Args:
        grids: (B, h, w) or (B, K, h, w).
        shape: (hg, wg) of the guide.
    """
    if not config.averages:
        return grids
    return grids * evidence_factors(grids, shape, config)


def evidence_factors(grids, shape, config):
    """What `balance` multiplies each cell by: 1, or less where the cell speaks against the class; as grids."""
    axes = tuple(range(-len(shape), 0))
    weighted = grids * cell_weights(grids, shape, config)
    evidence_for, evidence_against = (each.clamp_min(0).sum(axes, True) for each in (weighted, -weighted))
    outweighed = (evidence_against > evidence_for) & (evidence_for > 0)
    share = torch.where(outweighed, evidence_for / evidence_against, 1)
    return torch.where(grids < 0, share, 1)


def cell_weights(grids, shape, config):
    """How much each cell of the grids (..., h, w) counts in all averages on a guide of this shape together, were all
    cells alike: (h, w)."""
    of_axes = (
        constant(coverage, (grids.shape[axis], shape[axis], config.affinity_sigma), grids.device, grids.dtype)
        for axis in range(-len(shape), 0)
    )
    return reduce(lambda first, last: first[..., None] * last, of_axes)


def average_alike_cells(grids, guide, config, whole=None):
    """Signed sums on the guide's grid, each cell averaged over the cells with alike features there, and multiplied by
    the power of its features' length.

    Args:
        grids: (B, h, w), or (B, K, h, w) for several of an image; balanced (`balance`).
        guide: (B, Cg, hg, wg), the features; any strides and floating dtype.
        config: `CFCAMConfig`; without an average in it, ``grids`` come back as they are.
        whole: (B, h, w), the sums that ``grids`` (B, K, h, w) are the parts of: whether two cells differ too much
            (``affinity_range``) is then for these to say, so that the averages are the parts of theirs.

    Returns:
        (B, hg, wg) or (B, K, hg, wg).
    """
    if not config.averages:
        return grids
    batch, shape = grids.shape[0], tuple(guide.shape[2:])
    target_shape = tuple(grids.shape[-len(shape) :])
    dtype = torch.float64 if grids.dtype == torch.float64 else torch.float32
    values = resize(grids.to(dtype).reshape(-1, *target_shape), shape).view(batch, -1, math.prod(shape))
    n_grids = values.shape[1]
    if whole is not None:
        values = torch.cat([values, resize(whole.to(dtype), shape).flatten(1)[:, None]], dim=1)
    has_range = not math.isinf(config.affinity_range)
    if has_range:
        scale = _range_scale((grids if whole is None else whole).to(dtype), shape, config)
    else:
        values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)  # whose sum is the mass
    # On a CPU image by image, as in `row_products`.
    rows, columns, n_others = _block_of_cells(target_shape, shape, config.affinity_sigma, values)
    n_bytes = values.shape[2] * n_others * values.element_size()
    images = 1 if of_images_on_cpu(values) or has_symbols(shape) else max(1, AFFINITY_BYTES // n_bytes)
    # A size that is a symbol is compared with nothing.
    keep = config.affinity_steps > 1 and (has_symbols(shape) or images * n_bytes <= AFFINITY_BYTES)
    for image in (0,) if has_symbolic_batch(values) else range(0, batch, images):
        chunk = slice(None) if has_symbolic_batch(values) else slice(image, image + images)
        cells = features_of_cells(guide[chunk], config, values.dtype)
        arguments = cells, shape, target_shape, config, rows, columns
        kept = list(affinities(*arguments)) if keep else None
        for _ in range(config.affinity_steps):
            blocks = kept or affinities(*arguments)
            if has_range:
                sums, mass = _sums_within_range(values[chunk], scale[chunk], blocks)
            else:
                sums = _sums(values[chunk], blocks)
                mass = sums[:, -1:]
            # 0 for a cell without features, which keeps its own value.
            values[chunk] = torch.where(mass > 0, sums / mass, values[chunk])
        if config.guide_power > 0:
            values[chunk] *= strengths(cells, config.guide_power)[:, None]
    values = values[:, :n_grids].unflatten(2, shape)
    return values if grids.ndim == values.ndim else values[:, 0]


def _sums(values, blocks):
    """The values (B, K, N) of all cells, weighted by how much they count for each: (B, K, N)."""
    sums = torch.zeros_like(values)
    for start, affinity in blocks:
        stop, end = start + affinity.shape[1], start + affinity.shape[2]
        sums[:, :, start:stop] += row_products(values[:, :, start:end], affinity.transpose(1, 2))
        if stop < end:  # the cells behind are as alike to these as these to them
            sums[:, :, stop:end] += row_products(values[:, :, start:stop], affinity[:, :, stop - start :])
    return sums


def _sums_within_range(values, scale, blocks):
    """`_sums` where less counts what differs more, and the mass: (B, K, N), and (B, K or 1, N).

    Args:
        values: (B, K, N).
        scale: (B, K, 1), or (B, 1, 1) where the last of the values says how far all of them differ.
    """
    n_ranges = scale.shape[1]
    sums, mass = torch.zeros_like(values), torch.zeros_like(values[:, -n_ranges:])
    scaled = values[:, -n_ranges:] * scale

    def add(of, part, others, near):
        """Of the cells of a part, from others that count so much, (B, sums, others, cells of the part)."""
        mass[:, of, part] += near.sum(2)
        if values.shape[1] > n_ranges:
            sums[:, :, part] += row_products(values[:, :, others], near[:, 0])
        else:
            sums[:, of, part] += (near * values[:, of, others, None]).sum(2)

    for start, affinity in blocks:
        n_cells = affinity.shape[1]
        cells, reached = slice(start, start + n_cells), slice(start, start + affinity.shape[2])
        behind = slice(cells.stop, reached.stop)
        for of in _sums_at_once(n_ranges, affinity):
            difference = scaled[:, of, cells, None] - scaled[:, of, None, reached]
            near = difference.mul_(difference).neg_().exp_().mul_(affinity[:, None])
            add(of, cells, reached, near.transpose(2, 3))
            if behind.start < behind.stop:
                add(of, behind, cells, near[..., n_cells:])
    return sums, mass


def _sums_at_once(n_sums, affinity):
    """Slices of the sums of an image whose affinities, each as large as these, are in memory together."""
    if has_symbols((n_sums, *affinity.shape)):
        return [slice(None)]
    n = max(1, AFFINITY_BYTES // max(1, affinity.numel() * affinity.element_size()))
    return [slice(first, first + n) for first in range(0, n_sums, n)]


def _range_scale(grids, shape, config):
    """What grids (B, h, w) or (B, K, h, w) are multiplied by, so that exp(-x^2) of a difference is how much it counts:
    (B, 1 or K, 1). 0 of a grid of zeros, whose cells do not differ.
    """
    weights = cell_weights(grids, shape, config)
    evidence = (grids.abs() * weights).sum(tuple(range(-len(shape), 0))) / weights.sum()
    scale = torch.where(evidence > 0, 1 / (math.sqrt(2) * config.affinity_range * evidence), 0)
    return scale[..., None] if scale.ndim == 2 else scale[:, None, None]


def features_of_cells(guide, config, dtype):
    """What says which cells of the guide (B, Cg, hg, wg) are alike: (B, Cg, hg * wg)."""
    # No copy where the channels are the fastest axis: a product of matrices takes its factors either way.
    cells = guide.detach().to(dtype).flatten(2)
    if config.affinity_centring == 0:
        return cells
    common = config.affinity_centring * cells.nan_to_num(0, 0, 0).mean(2, keepdim=True)
    cells = cells - common
    if config.affinity_centring == 1:  # of less, much more than rounding is left of what is the same everywhere
        cells.masked_fill_(cells.abs() <= AS_THE_MEAN * common.abs(), 0)
    return cells


def strengths(cells, power):
    """The power of the length of the cells' features (B, Cg, N): (B, N)."""
    squares = (cells * cells).sum(1).nan_to_num_(0, 0, 0)  # NaN or infinite features are no features
    return squares.clamp_min_(WITHOUT_FEATURES).pow_(power / 2)


def affinities(cells, shape, target_shape, config, rows, columns):
    """How much cells of a guide count for each other, in blocks; of features (B, Cg, hg * wg) on a grid of that shape.

    Yields:
        start, (B, n, m): of n cells from ``start`` on, with themselves and the m - n cells behind them that the window
        reaches. A block has at most ``columns`` of ``rows`` rows, whole rows unless it has only one.
    """
    height, width = as_rows_and_columns(shape)
    # A third of the time of vector_norm, slow across rows. NaN or infinite features are no features.
    scale = (cells * cells).sum(1).rsqrt().nan_to_num_(0, 0, 0)
    sigma = config.affinity_sigma
    reach = 0 if has_symbols(shape) else rows_reach(shape, target_shape, sigma)
    window = None
    for left in _starts(width, columns):
        for top in _starts(height, rows):
            # In a plane, rows as far apart are as near: one window for all blocks.
            if not math.isinf(sigma) and (window is None or top == 0 or len(shape) > 2):
                of_rows = constant(rows_window, (shape, target_shape, sigma), cells.device, cells.dtype)
                of_columns = constant(window_matrix, (width, target_shape[-1], sigma), cells.device, cells.dtype)
                window = of_rows[top : top + rows, None, top : top + rows + reach, None]
                window = window * of_columns[None, left : left + columns, None, :]
                window = window.reshape(-1, window.shape[2] * width)[:, left:]
            start, end = top * width + left, min(top + rows + reach, height) * width
            stop = (min(top + rows, height) - 1) * width + min(left + columns, width)
            affinity = cells[:, :, start:stop].transpose(1, 2) @ cells[:, :, start:end]
            affinity *= scale[:, start:stop, None]
            affinity *= scale[:, None, start:end]
            affinity = likeness(affinity, config)
            if window is not None:
                affinity *= window[: stop - start, : end - start]
            yield start, affinity


def _starts(length, step):
    """Of the parts of a length; of one that is a symbol there is one part."""
    return (0,) if has_symbols(length) else range(0, length, step)


def likeness(cosine, config):
    """How much cells count for each other by their features, in place."""
    return cosine.nan_to_num_(0, 0, 0).clamp_min_(0).pow_(config.affinity_power)


def _block_of_cells(target_shape, shape, sigma, values):
    """Rows and columns of a block of `affinities`, and the most other cells that it is compared with."""
    height, width = as_rows_and_columns(shape)
    if has_symbols(shape):
        return height, width, height * width
    reach = rows_reach(shape, target_shape, sigma)
    on_cpu = values.device.type == "cpu"
    limit = (AFFINITY_BYTES_ON_CPU if on_cpu else AFFINITY_BYTES) // values.element_size() // width
    # Thirds on a CPU: two thirds of the pairs are then computed, as they are the same both ways. Not where it is to be
    # compiled: there each block is code of its own.
    most = -(-height // 3) if on_cpu and height * width > 128 and not is_for_this_batch(values) else height
    fitting = [rows for rows in range(1, most + 1) if rows * width * min(rows + reach, height) <= limit]
    rows, columns = (fitting[-1], width) if fitting else (1, max(1, min(width, limit // (1 + reach))))
    return rows, columns, min(rows + reach, height) * width


# Stage 6: the map.


def class_map(activations, weights, output_size, config, guide=None):
    """The normalised maps of a batch: (B, H, W) in [0, 1]; (B, K, H, W) of weights (B, K, C)."""
    # As published, the positive part is resized; an averaged sum is resized with its sign.
    grid = class_grid(activations, weights, relu=not config.averages, config=config, guide=guide)
    n_axes = len(output_size)
    grids, n_bytes = grid.reshape(-1, *grid.shape[-n_axes:]), math.prod(output_size) * grid.element_size()
    at_once = max(1, MAP_BYTES_ON_CPU // n_bytes) if of_images_on_cpu(grid) else grids.shape[0]
    made = lambda part: normalize(resize(part, output_size).relu_(), config)
    if grids.shape[0] <= at_once:
        maps = made(grids)
    else:
        maps = grids.new_empty(len(grids), *output_size)
        for of_maps, part in zip(maps.split(at_once), grids.split(at_once)):
            of_maps.copy_(made(part))
    return maps.view(*grid.shape[:-n_axes], *output_size)


def class_grid(activations, weights, relu=True, skip_nan=False, config=None, guide=None):
    """The weighted sum over channels on the layer's own grid, by default its positive part: (B, h, w).

    Args:
        activations: (B, C, h, w).
        weights: (B, C); (B, C, h, w) for a weight of each cell's own, not of a series; (B, K, C) for K sums,
            (B, K, h, w).
        skip_nan: leave out the terms that are NaN.
        config: with an average over alike cells in it, the sum is balanced (`balance`) and averaged.
        guide: (B, Cg, hg, wg), whose grid the average is on; None: the activations.
    """
    activations, weights = as_computed(activations), weights.detach()
    of_cells = weights.ndim > 3
    if of_cells or skip_nan:
        terms = activations * (weights if of_cells else per_cell(weights, activations))
        grid = terms.nansum(1) if skip_nan else terms.sum(1)
    else:
        weights, cells = weights.to(activations.dtype), activations.flatten(2)
        rows = weights if weights.ndim == 3 else weights[:, None]
        if of_images_on_cpu(cells):  # as in `row_products`, the rounding depends on how many images go in at once
            grid = torch.stack([row_products(of_image, image_cells) for of_image, image_cells in zip(rows, cells)])
        else:
            grid = torch.bmm(rows, cells)
        grid = grid if weights.ndim == 3 else grid[:, 0]
        grid = grid.unflatten(-1, activations.shape[2:])
    if config is not None:
        guide = activations if guide is None else guide
        grid = average_alike_cells(balance(grid, guide.shape[2:], config), guide, config)
    return grid.relu_() if relu else grid


def of_images_on_cpu(tensor):
    """Whether images are taken one by one: on a CPU, where that is faster; not in a graph for any number of them."""
    return tensor.device.type == "cpu" and not has_symbolic_batch(tensor)


def is_for_this_batch(tensor):
    """Whether a graph is traced that is for these sizes alone, to be compiled."""
    return is_traced() and not has_symbolic_batch(tensor)


def row_products(rows, matrix):
    """``rows @ matrix``, each row rounded on a CPU as if it were alone; (..., K, N) and (..., N, M).

    The rounding of a product of matrices depends on how many rows go in at once; so here it is always as many.
    """
    if not of_images_on_cpu(rows):
        return rows @ matrix
    n_rows = rows.shape[-2]
    missing = -n_rows % ROWS_AT_ONCE
    if missing:
        rows = torch.cat([rows, rows.new_zeros(*rows.shape[:-2], missing, rows.shape[-1])], dim=-2)
    products = [part @ matrix for part in rows.split(ROWS_AT_ONCE, dim=-2)]
    return (products[0] if len(products) == 1 else torch.cat(products, dim=-2))[..., :n_rows, :]


def resize(grid, output_size):
    """Linear resize (half-pixel centres, align_corners=False, no antialias) of (B, h, w) to (B, H, W)."""
    if is_for_this_batch(grid):
        # Compiled, the look-ups of an interpolation take ten times as long as two products with its matrices.
        shapes = tuple(grid.shape[1:]), tuple(output_size)
        rows, columns = (constant(_interpolation_matrix, (*shapes, axis), grid.device, grid.dtype) for axis in (0, 1))
        return filter_grids(grid.reshape(-1, *as_rows_and_columns(shapes[0])), rows, columns).view(-1, *shapes[1])
    mode = ("linear", "bilinear", "trilinear")[grid.ndim - 2]
    return F.interpolate(grid[:, None], tuple(output_size), mode=mode, align_corners=False)[:, 0]


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
    axes = tuple(range(1, images.ndim))
    shifted = images - images.amin(axes, True)
    return shifted / (GRAD_CAM_EPSILON + shifted.amax(axes, True))


def normalize(images, config):
    """Scale non-negative maps (B, H, W), in place, to [0, 1] each; zeros where one has no positive value."""
    axes = tuple(range(1, images.ndim))
    low, high = images.amin(axes, True), images.amax(axes, True)
    flat = high - low <= FLAT_RANGE * high
    if config.normalize == "max":
        images /= torch.where(flat, torch.inf, high)
        images += flat & (high > 0)
    else:
        images -= low
        images /= torch.where(flat, torch.inf, high - low)
    return images
