"""The separable Gaussian filter as small matrices, what it does to a spatial mean, and the window of an average.

Filtering a grid g is ``K_y @ g @ K_x.T`` with one matrix per axis. Its mean needs no filtering at all:
mean(K g) = <g, s_y s_x^T> / (h * w) with s = K^T 1, the column sums (`pooling_weights`). Of a volume (d, h, w) the two
first axes are taken together as d * h rows, whose matrix is the Kronecker product of theirs, and a series (t,) is one
row (`as_rows_and_columns`); what works with rows and columns so works with any number of axes.
"""

import math
from functools import lru_cache, reduce

import numpy as np

from cfcam_gpu.config import WINDOW_SIGMAS


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


def as_rows_and_columns(shape):
    """(rows, columns) of a grid of any number of axes: all but the last taken together, and the last."""
    return math.prod(shape[:-1]), shape[-1]


def of_rows(matrices):
    """The matrix of the rows that several axes make together, of the matrices of each; (1, 1) without an axis."""
    return reduce(np.kron, matrices, np.ones((1, 1)))


def filter_matrices(shape, sigmas, boundary):
    """`filter_matrix` of the rows and of the columns of a grid, of a sigma for each axis."""
    *first, last = (filter_matrix(size, sigma, boundary) for size, sigma in zip(shape, sigmas))
    return of_rows(first), last


@lru_cache(maxsize=256)
def pooling_weights(shape, sigmas, boundary):
    """Weights whose dot product with a grid is the spatial mean of the filtered grid: float64, of the grid's shape."""
    column_sums = (filter_matrix(size, sigma, boundary).sum(0) for size, sigma in zip(shape, sigmas))
    weights = reduce(np.multiply.outer, column_sums) / math.prod(shape)
    weights.flags.writeable = False
    return weights


def window_reach(size, target_size, sigma_cells):
    """How many of ``size`` cells along an axis the window of the average over alike cells reaches to either side.

    ``sigma_cells`` is in cells of the target layer's grid, which has ``target_size`` along that axis.
    """
    if math.isinf(sigma_cells):
        return size - 1
    # A distance of exactly WINDOW_SIGMAS is inside, however it is rounded.
    return int(min(size - 1, WINDOW_SIGMAS * sigma_cells * size / target_size + 1e-6))


def rows_reach(shape, target_shape, sigma_cells):
    """`window_reach` of the rows that all axes but the last make together."""
    reaches = [window_reach(size, target, sigma_cells) for size, target in zip(shape[:-1], target_shape)]
    return sum(reach * math.prod(shape[axis + 1 : -1]) for axis, reach in enumerate(reaches))


def window_decay(size, target_size, sigma_cells):
    """c in exp(-c d^2), the window at a distance of d of ``size`` cells along an axis."""
    # Bounded, so that float32 holds it and 0 cells times it is 0.
    return min(0.5 * (target_size / size / sigma_cells) ** 2 if sigma_cells > 1e-15 else math.inf, 1e30)


@lru_cache(maxsize=256)
def interpolation_matrix(old, new):
    """Linear interpolation along one axis (half-pixel centres, align_corners=False): float64 (new, old)."""
    position = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
    left = np.minimum(position.astype(int), old - 1)
    right = np.minimum(left + 1, old - 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), left), 1 - (position - left))
    np.add.at(matrix, (np.arange(new), right), position - left)
    matrix.flags.writeable = False
    return matrix


def interpolation_matrices(shape, new_shape):
    """`interpolation_matrix` of the rows and of the columns of a grid, for another shape."""
    *first, last = map(interpolation_matrix, shape, new_shape)
    return of_rows(first), last


@lru_cache(maxsize=256)
def coverage(target_size, size, sigma_cells):
    """How much a cell of the target layer's grid counts along an axis in all averages of ``size`` cells together, were
    all cells alike: float64 (target_size,). Less near the border, where the window ends."""
    weights = interpolation_matrix(target_size, size).T @ window_matrix(size, target_size, sigma_cells).sum(1)
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=256)
def window_matrix(size, target_size, sigma_cells):
    """The window along an axis between every two of ``size`` cells, float64 (size, size), 0 out of reach."""
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    window = np.exp(-window_decay(size, target_size, sigma_cells) * distance**2)
    window[distance > window_reach(size, target_size, sigma_cells)] = 0
    window.flags.writeable = False
    return window


@lru_cache(maxsize=64)
def rows_window(shape, target_shape, sigma_cells):
    """`window_matrix` of the rows that all axes but the last make together."""
    window = of_rows(window_matrix(size, target, sigma_cells) for size, target in zip(shape[:-1], target_shape))
    window.flags.writeable = False
    return window
