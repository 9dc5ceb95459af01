"""Stage 2 for a batch on any device: fixed shapes, no host synchronisation, no data-dependent loop.

Every image is padded to the same number of rows. The padding has infinite distance to everything, so it
never is a neighbour, and masks keep it out of counts and clusters. Memory grows with the square of
the rows: callers bound the batch (`bytes_per_image`).
"""

from functools import lru_cache

import torch

from cfcam_gpu.clustering.ranks import dominant_rank, rank_table
from cfcam_gpu.config import EPS_FLOOR
from cfcam_gpu.constants import has_symbolic_batch, has_symbols, with_values
from cfcam_gpu.labels import NOISE

CHUNK_BYTES = 512 * 2**20
"""Extra memory that may be taken at once; larger batches go in chunks."""

FLOAT32_LENGTH = 256
"""Longest descriptor whose float32 distances stay within 1e-6 of exact, even if a device sums one by one."""


def cluster(rows, members, labels, config):
    """Labels and eps of a batch, as `cfcam_gpu.clustering.Engine` has them."""
    # One row at least, if only padding: reductions need something to reduce.
    largest = rows.shape[1]
    if config.dominant_percentile < 100:
        largest = max(dominant_rank(largest, config.dominant_percentile), 1)
    if has_symbolic_batch(rows):
        parts = [(rows, members)]
    else:
        chunk = max(1, CHUNK_BYTES // bytes_per_image(largest, rows.element_size()))
        parts = list(zip(rows.split(chunk), members.split(chunk)))
    results = [_cluster_chunk(*part, largest, config) for part in parts]
    found, eps = (torch.cat(column) for column in zip(*results))
    return torch.where(members, found, labels), eps


def _cluster_chunk(rows, members, largest, config):
    # The clustered channels first, in their order: a stable sort instead of a data-dependent selection.
    order = (~members).to(torch.uint8).argsort(dim=1, stable=True)[:, :largest]
    gathered = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
    found, eps = cluster_rows(gathered, members.sum(1), config)
    labels = found.new_full(members.shape, NOISE)
    return labels.scatter_(1, order, found), eps


def cluster_rows(rows, n_rows, config):
    """Labels and eps of a batch of descriptors.

    Args:
        rows: (B, R, D) float32 or float64; the first n_rows[b] rows of an image count, the rest is padding.
        n_rows: (B,) int64.
        config: `CFCAMConfig`.

    Returns:
        labels int32 (B, R), NOISE on the padding, and eps (B,) in the dtype of ``rows``.
    """
    is_row = torch.arange(rows.shape[1], device=rows.device) < n_rows[:, None]
    distances = pairwise_distances(rows, is_row)
    ranks = _rank_table(rows.shape[1], config, rows.device, rows.dtype)
    low, high, fraction, min_samples = (column[n_rows] for column in ranks)
    eps, radius = neighbourhood_radius(distances, low, high, fraction)
    return dbscan(distances, is_row, radius, min_samples), eps


def bytes_per_image(n_rows, itemsize):
    """Peak extra memory of `cluster_rows` for one image of ``n_rows`` rows, in bytes."""
    # The distances, their upper triangle and its sort (values and int64 indices); later masks and int32 labels.
    return n_rows * n_rows * (2 * itemsize + 8)


def pairwise_distances(rows, is_row):
    """Euclidean distances (B, R, R) by direct differences; infinite where either side is padding."""
    long = has_symbols(rows.shape[2]) or rows.shape[2] > FLOAT32_LENGTH
    summed = rows.double() if long else rows
    # Not the matrix-product form: equal rows must be at exactly 0.
    distances = torch.cdist(summed, summed, compute_mode="donot_use_mm_for_euclid_dist").to(rows.dtype)
    return distances.masked_fill_(~(is_row[:, :, None] & is_row[:, None, :]), torch.inf)


def neighbourhood_radius(distances, low, high, fraction):
    """eps (B,) and the radius (B,) that decides who is a neighbour, from the ranks of `radius_ranks`.

    The two select the same pairs, but the radius is an order statistic and needs no interpolation.
    """
    n = distances.shape[1]
    row, column = _upper_triangle(n, distances.device)
    ordered = distances[:, row, column].sort(dim=1).values
    if not ordered.shape[1]:
        ordered = distances.new_full((distances.shape[0], 1), torch.inf)
    below, above = (ordered.gather(1, rank[:, None])[:, 0] for rank in (low, high))
    # Fewer than two rows leave only infinite distances: eps is then the floor.
    below, above = (torch.where(value.isinf(), 0, value) for value in (below, above))
    # Rounding may carry the interpolated value up to `above`, which is no neighbour.
    eps = torch.minimum(below + (above - below) * fraction, torch.nextafter(above, below))
    return eps.clamp_min(EPS_FLOOR), below.clamp_min(EPS_FLOOR)


def dbscan(distances, is_row, radius, min_samples):
    """DBSCAN's labels int32 (B, R), numbered and resolved as scikit-learn does."""
    n = distances.shape[1]
    adjacency = (distances <= radius[:, None, None]) & is_row[:, :, None] & is_row[:, None, :]
    is_core = (adjacency.sum(2) >= min_samples[:, None]) & is_row
    reaches = adjacency & is_core[:, None, :]

    # The component of a core is its smallest member. Each round hooks every tree under the smallest tree that
    # it touches; two rounds at least halve the trees, which bounds the rounds without looking at the data.
    root = torch.arange(n, device=distances.device).expand(distances.shape[0], n)
    for _ in range(2 * max(n - 1, 1).bit_length() + 1):
        smallest = _smallest_reached(reaches, root)
        smallest = torch.where(is_core, smallest, root).minimum(root)
        parent = root.scatter_reduce(1, root, smallest, "amin")
        root = _jump(parent.gather(1, root))

    is_root = is_core & (root == torch.arange(n, device=root.device))
    rank_of_root = is_root.cumsum(1) - 1
    rank = torch.where(is_core, rank_of_root.gather(1, root), n)
    rank = torch.where(is_core, rank, _smallest_reached(reaches, rank))
    return torch.where(rank < n, rank, NOISE).int()


def _smallest_reached(reaches, value):
    """The smallest ``value`` (B, R) among the columns that each row reaches; R where it reaches none."""
    n = value.shape[1]
    return torch.where(reaches, value[:, None, :], n).amin(2)


def _jump(parent):
    """Pointer jumping until every node points at its root; chains of n nodes need log2(n) doublings."""
    for _ in range(parent.shape[1].bit_length()):
        parent = parent.gather(1, parent)
    return parent


@lru_cache(maxsize=8)
def _upper_triangle(n, device):
    with with_values():
        return torch.triu_indices(n, n, 1, device=device)


@lru_cache(maxsize=32)
def _rank_table(n_max, config, device, dtype):
    """`rank_table` as tensors; cached, because copying them from the host on every call would make the host wait."""
    *ranks, fraction, min_samples = rank_table(n_max, config)
    with with_values():
        low, high, min_samples = (torch.tensor(column, device=device) for column in (*ranks, min_samples))
        return low, high, torch.tensor(fraction, device=device, dtype=dtype), min_samples
