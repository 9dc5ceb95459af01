"""CF-CAM in plain NumPy, SciPy and scikit-learn, in float64: the specification in code.

Every function handles one image, loops over channels and clusters, and has the name of its counterpart in
`torch_backend`. Slow by design; it judges the fast paths. Needs the ``reference`` extra. A grid (h, w) may have any
number of axes.

Source: arXiv 2504.00060; jerryp-hfut/CF-CAM@c227652 (cfcam.py).
"""

import math
from functools import reduce

import numpy as np

from cfcam_gpu.config import AS_THE_MEAN, EPS_FLOOR, FLAT_RANGE, WITHOUT_FEATURES
from cfcam_gpu.gaussian import coverage, interpolation_matrix, window_reach
from cfcam_gpu.labels import DOMINANT, NOISE


def cf_cam(activations, gradients, output_size, config, guide=None):
    """All stages for a batch.

    Args:
        activations: array_like (B, C, h, w).
        gradients: array_like (B, C, h, w), or of K classes an image (B, K, C, h, w).
        output_size: (H, W).
        config: `CFCAMConfig`.
        guide: array_like (B, Cg, hg, wg), the features that say which cells are alike; None: the activations.

    Returns:
        maps float64 (B, H, W), labels int32 (B, C), weights float64 (B, C), eps float64 (B,); of K classes an image
        maps (B, K, H, W) and weights (B, K, C).
    """
    activations = np.asarray(activations, np.float64)
    gradients = np.asarray(gradients, np.float64)
    guides = [None] * len(activations) if guide is None else np.asarray(guide, np.float64)
    several, results = gradients.ndim > activations.ndim, []
    for image_activations, image_gradients, image_guide in zip(activations, gradients, guides):
        labels, eps = cluster_channels(image_activations, config)
        of_classes = []
        for class_gradients in image_gradients if several else [image_gradients]:
            filtered = filter_gradients(class_gradients, labels, config)
            weights = channel_weights(filtered, labels, config)
            of_classes.append((class_map(image_activations, weights, output_size, config, image_guide), weights))
        maps, weights = map(np.stack, zip(*of_classes)) if several else of_classes[0]
        results.append((maps, labels, weights, eps))
    return tuple(np.stack(column) for column in zip(*results))


# Stages 1 and 2: importance and clustering.


def cluster_channels(activations, config):
    """Labels int32 (C,) and eps of one image's activations (C, h, w)."""
    norms = channel_norms(activations)
    dominant = dominant_channels(norms, config)
    clustered = ~dominant if config.descriptor == "raw" else ~dominant & (norms > 0)

    labels = np.full(len(norms), NOISE, np.int32)
    labels[dominant] = DOMINANT
    distances = pairwise_distances(descriptors(activations, norms, config)[clustered])
    eps = neighbourhood_radius(distances, config)
    labels[clustered] = dbscan(distances, eps, config.min_samples(clustered.sum()))
    return labels, eps


def channel_norms(activations):
    """L2 norm of each channel over the grid: (C,)."""
    return np.sqrt((activations**2).sum(_axes(activations)))


def _axes(channels):
    """The grid's axes of (C, h, w)."""
    return tuple(range(1, channels.ndim))


def dominant_channels(norms, config):
    """The channels whose norm reaches the percentile: bool (C,)."""
    if config.dominant_percentile == 100:
        return np.zeros(len(norms), bool)
    dominant = norms >= np.percentile(norms, config.dominant_percentile)
    # A channel of zeros has no shape: with unit descriptors it takes no part at all.
    return dominant if config.descriptor == "raw" else dominant & (norms > 0)


def descriptors(activations, norms, config):
    """What is clustered, one row per channel: (C, h * w)."""
    rows = activations.reshape(len(activations), -1)
    if config.descriptor == "raw":
        return rows
    return rows / np.where(norms > 0, norms, 1)[:, None]


def pairwise_distances(rows):
    """Euclidean distances (R, R) by direct differences, so that equal rows are at exactly 0."""
    from scipy.spatial.distance import cdist

    return cdist(rows, rows)


def neighbourhood_radius(distances, config):
    """eps: the percentile of all ordered off-diagonal distances, at least EPS_FLOOR."""
    n = len(distances)
    if n < 2:
        return EPS_FLOOR
    off_diagonal = distances[~np.eye(n, dtype=bool)]
    return max(np.percentile(off_diagonal, config.eps_percentile), EPS_FLOOR)


def dbscan(distances, eps, min_samples):
    """scikit-learn's labels for a distance matrix: int (R,), -1 is noise."""
    from sklearn.cluster import DBSCAN

    if len(distances) < 2:
        return np.full(len(distances), NOISE)
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_


# Stages 3 and 4: filtered gradients and weights.


def filter_gradients(gradients, labels, config):
    """The gradient each channel is weighted by: (C, h, w).

    A dominant channel keeps its own; the members of a cluster share their filtered mean; noise has none.
    """
    from scipy.ndimage import gaussian_filter

    filtered = np.zeros_like(gradients)
    filtered[labels == DOMINANT] = gradients[labels == DOMINANT]
    for cluster in range(labels.max(initial=NOISE) + 1):
        mean = gradients[labels == cluster].mean(0)
        sigmas = config.sigmas(mean.ndim)
        filtered[labels == cluster] = gaussian_filter(mean, sigmas, mode=config.boundary, truncate=4.0)
    return filtered


def channel_weights(filtered, labels, config):
    """The weight of each channel, the spatial mean of its filtered gradient; 0 for noise: (C,)."""
    weights = filtered.mean(_axes(filtered))
    kept = labels != NOISE
    if config.weighting == "softmax" and kept.any():
        weights = np.where(kept, np.exp(weights - weights[kept].max()), 0)
        weights /= weights.sum()
    return weights


# Stage 5: the average over alike cells.


def balance(grid, shape, config):
    """The signed sum (h, w), the evidence against the class scaled down to the evidence for it where there is more.

    Averaged over cells that are all alike, a sum whose total is negative would be negative everywhere, whatever speaks
    for the class. What is compared is the totals of the averages on a guide of this shape (hg, wg), were all its cells
    alike. A sum without a positive value stays as it is: it has no positive part however it is averaged.
    """
    if not config.averages:
        return grid
    weights = cell_weights(grid.shape, shape, config)
    evidence_for, evidence_against = (weights * np.maximum(grid, 0)).sum(), (weights * np.maximum(-grid, 0)).sum()
    if evidence_against > evidence_for > 0:
        grid = np.where(grid < 0, grid * (evidence_for / evidence_against), grid)
    return grid


def cell_weights(target_shape, shape, config):
    """How much each cell of the target layer's grid counts in all averages together, were all cells alike: (h, w)."""
    of_axes = (coverage(old, new, config.affinity_sigma) for old, new in zip(target_shape, shape))
    return reduce(np.multiply.outer, of_axes)


def average_alike_cells(grid, guide, config, whole=None):
    """The balanced signed sum (h, w) on the guide's grid, averaged over the cells with alike features there: (hg, wg).

    It is more where the features are strong, by ``guide_power``, and next to nothing where there are none.

    Args:
        guide: (Cg, hg, wg), the features. Without an average (`CFCAMConfig.averages`), grid comes back as it is.
        whole: (h, w), the sum that grid is a part of, whose cells are compared in grid's place (``affinity_range``).
    """
    if not config.averages:
        return grid
    shape = guide.shape[1:]
    whole = grid if whole is None else whole
    values, compared = resize(grid, shape).ravel(), resize(whole, shape).ravel()
    features = guide.reshape(len(guide), -1).T
    if config.affinity_centring > 0:
        common = config.affinity_centring * np.where(np.isfinite(features), features, 0).mean(0)
        is_rounding = (config.affinity_centring == 1) & (abs(features - common) <= AS_THE_MEAN * abs(common))
        features = np.where(is_rounding, 0, features - common)
    norms = np.linalg.norm(features, axis=1)
    has_features = (norms > 0) & np.isfinite(norms)
    features = np.where(has_features[:, None], features / np.where(has_features, norms, 1)[:, None], 0)
    near = window(grid.shape, shape, config.affinity_sigma)
    evidence = np.average(abs(whole), weights=cell_weights(grid.shape, shape, config))
    for _ in range(config.affinity_steps):
        averaged, of_whole = values.copy(), compared.copy()  # a cell without features keeps its own
        for cell in np.flatnonzero(has_features):
            affinity = likeness(features @ features[cell], config) * near[cell]
            if not math.isinf(config.affinity_range) and evidence > 0:
                difference = (compared - compared[cell]) / (config.affinity_range * evidence)
                affinity *= np.exp(-(difference**2) / 2)
            averaged[cell] = affinity @ values / affinity.sum()
            of_whole[cell] = affinity @ compared / affinity.sum()
        values, compared = averaged, of_whole
    if config.guide_power > 0:
        squares = np.where(has_features, norms, 0) ** 2
        values = values * np.maximum(squares, WITHOUT_FEATURES) ** (config.guide_power / 2)
    return values.reshape(shape)


def likeness(cosine, config):
    """How much cells count for each other by their features."""
    return np.maximum(cosine, 0) ** config.affinity_power


def window(target_shape, shape, sigma):
    """How much cells count for each other by their distance in target cells: (hg * wg, hg * wg)."""
    exponent, within = 0.0, True
    for target_size, size, position in zip(target_shape, shape, np.indices(shape)):
        apart = np.abs(np.subtract.outer(position.ravel(), position.ravel()))
        exponent = exponent - (apart * target_size / size / sigma) ** 2 / 2
        within = within & (apart <= window_reach(size, target_size, sigma))
    return np.exp(exponent) * within


# Stage 6: the map.


def class_map(activations, weights, output_size, config, guide=None):
    """The normalised map of one image: (H, W) in [0, 1]."""
    guide = activations if guide is None else guide
    grid = np.tensordot(weights, activations, 1)
    grid = average_alike_cells(balance(grid, guide.shape[1:], config), guide, config)
    if not config.averages:
        grid = np.maximum(grid, 0)  # as published; an averaged sum is resized with its sign
    return normalize(np.maximum(resize(grid, output_size), 0), config)


def resize(grid, output_size):
    """Linear resize (half-pixel centres, align_corners=False, no antialias) to (H, W)."""
    for axis, (old, new) in enumerate(zip(grid.shape, output_size)):
        grid = np.moveaxis(np.tensordot(interpolation_matrix(old, new), grid, (1, axis)), 0, axis)
    return grid


def normalize(image, config):
    """Scale a non-negative map to [0, 1]; zeros where it has no positive value."""
    low, high = image.min(), image.max()
    if high <= 0:
        return np.zeros_like(image)
    if high - low <= FLAT_RANGE * high:
        return np.full_like(image, float(config.normalize == "max"))
    return image / high if config.normalize == "max" else (image - low) / (high - low)
