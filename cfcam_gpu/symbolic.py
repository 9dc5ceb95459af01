"""Some functions of `gaussian` as operations of a graph, for grids whose sizes are symbols while it is traced.

Names, arguments and values are those of `gaussian`; grids have two axes. Sizes become tensors without axes, because a
graph computes with tensors what Python computes with numbers.
"""

import math

import torch

from cfcam_gpu import gaussian
from cfcam_gpu.config import WINDOW_SIGMAS
from cfcam_gpu.constants import with_values


def pooling_weights(shape, sigmas, boundary):
    rows, columns = (_column_sums(size, sigma, boundary) for size, sigma in zip(shape, sigmas))
    return rows[:, None] * columns / (_number(shape[0]) * _number(shape[1]))


def _column_sums(size, sigma_cells, boundary):
    """Of `gaussian.filter_matrix`."""
    with with_values():
        taps = torch.from_numpy(gaussian.gaussian_taps(sigma_cells))
        offsets = torch.arange(len(taps)) - len(taps) // 2
    source = torch.arange(size)[:, None] + offsets
    weights = taps.expand_as(source)
    if boundary == "constant":
        weights = weights * ((source >= 0) & (source < size))
    elif boundary == "reflect":
        source = source % (2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    return _summed(source, weights, size)


def coverage(target_size, size, sigma_cells):
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (_number(target_size) / _number(size)) - 0.5
    position = position.clamp_min(0)
    left = position.floor()
    of_cells = window_matrix(size, target_size, sigma_cells).sum(1)
    shares = torch.cat([of_cells * (1 - (position - left)), of_cells * (position - left)])
    return _summed(torch.cat([left, left + 1]).long(), shares, target_size)


def rows_window(shape, target_shape, sigma_cells):
    return window_matrix(shape[0], target_shape[0], sigma_cells)


def window_matrix(size, target_size, sigma_cells):
    cells = torch.arange(size, dtype=torch.float64)
    distance = (cells[:, None] - cells).abs()
    if math.isinf(sigma_cells):
        return torch.ones_like(distance)
    ratio = _number(size) / _number(target_size)
    reach = WINDOW_SIGMAS * sigma_cells * ratio + 1e-6  # distances are whole, and so as good as its whole part
    decay = (0.5 * (1 / ratio / max(sigma_cells, 1e-15)) ** 2).clamp_max(1e30)
    return torch.exp(-decay * distance**2) * (distance <= reach)


def _summed(index, values, size):
    """``values`` added up where ``index`` says, of what is beyond the ends at the ends: float64 (size,)."""
    index = torch.minimum(index.clamp_min(0), _number(size).long() - 1)
    return torch.zeros(size, dtype=torch.float64).scatter_add(0, index.flatten(), values.double().flatten())


def _number(size):
    return torch.full((), size, dtype=torch.float64)
