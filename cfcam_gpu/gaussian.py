"""The separable Gaussian filter as small matrices, and what it does to a spatial mean.

Filtering a grid g is ``K_y @ g @ K_x.T`` with one matrix per axis. Its mean needs no filtering at all:
mean(K g) = <g, s_y s_x^T> / (h * w) with s = K^T 1, the column sums (`pooling_weights`).
"""

from functools import lru_cache

import numpy as np


def gaussian_taps(sigma_cells):
    """Taps of the truncated Gaussian: float64 (2 * radius + 1,), summing to 1.

    The radius, int(4 * sigma + 0.5) cells, is that of ``scipy.ndimage.gaussian_filter``.
    """
    radius = int(4.0 * sigma_cells + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_cells) ** 2)
    return taps / taps.sum()


@lru_cache(maxsize=256)
def filter_matrix(size, sigma_cells, boundary):
    """The filter along one axis of ``size`` cells as a float64 (size, size) matrix, row = output cell.

    ``boundary`` is "constant" (zeros outside), "reflect" (d c b a | a b c d | d c b a) or "nearest", as in
    ``scipy.ndimage.gaussian_filter``. The array is shared between callers and read-only.
    """
    taps = gaussian_taps(sigma_cells)
    radius = len(taps) // 2
    output = np.repeat(np.arange(size), len(taps))
    source = output + np.tile(np.arange(-radius, radius + 1), size)
    weight = np.tile(taps, size)
    if boundary == "constant":
        inside = (source >= 0) & (source < size)
        output, source, weight = output[inside], source[inside], weight[inside]
    elif boundary == "nearest":
        source = source.clip(0, size - 1)
    else:  # reflect: the grid and its mirror image repeat with period 2 * size
        source = source % (2 * size)
        source = np.minimum(source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (output, source), weight)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=256)
def pooling_weights(height, width, sigma_cells, boundary):
    """Weights whose dot product with a grid is the spatial mean of the filtered grid: float64 (height, width)."""
    column_sums = [filter_matrix(size, sigma_cells, boundary).sum(0) for size in (height, width)]
    weights = np.outer(*column_sums) / (height * width)
    weights.flags.writeable = False
    return weights
