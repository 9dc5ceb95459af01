"""Stage 2 on the CPU, one image at a time: exact, and many times faster there than the batched form.

On a CPU the host is the device, so shapes may depend on data: only the pairs of the channels that are really clustered
are looked at, each once. `host.c` does it, compiled; where GCC was not at hand when the package was installed, and in
float64, torch and NumPy do, 3 to 5 times slower and equal but for the rounding of the distances.
"""

import ctypes
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch

from cfcam_gpu.clustering.ranks import radius_ranks
from cfcam_gpu.config import EPS_FLOOR
from cfcam_gpu.labels import NOISE

FLOAT32_LENGTH = 4096
"""Longest descriptor whose float32 distances stay within 1e-6 of exact; longer ones are summed in float64."""

PROBLEM = np.dtype(
    [("n", np.intp), ("low", np.intp), ("high", np.intp), ("fraction", float), ("min_samples", np.int32)], align=True
)
"""What one image's clustering depends on besides its rows, as `host.c` has it."""


def cluster(rows, members, labels, config):
    """Labels and eps of a batch, as `cfcam_gpu.clustering.Engine` has them."""
    return on_host(rows, members, labels, config, dbscan)


def label(distances, eps, min_samples):
    """Labels (R,) of one image's distances (R, R), on the host."""
    square = distances.cpu().numpy()
    condensed = square[np.triu_indices(len(square), 1)]
    return torch.from_numpy(dbscan(condensed, len(square), square.dtype.type(eps), min_samples))


def on_host(rows, members, labels, config, dbscan):
    """Labels and eps of a batch of tensors, clustered on the host by `cluster_images`; back on their device."""
    labels = labels.cpu()
    arrays = (tensor.cpu().numpy() for tensor in (rows, members, labels))
    eps = torch.from_numpy(cluster_images(*arrays, config, dbscan))
    return labels.to(rows.device), eps.to(rows.device)


def cluster_images(rows, members, labels, config, run=None):
    """Cluster each image's descriptors, and write their labels.

    Args:
        rows: (B, C, D) NumPy array, float32 or float64.
        members: bool (B, C), which of them are clustered.
        labels: int32 (B, C); those of the members are overwritten.
        config: `CFCAMConfig`.
        run: what labels condensed distances; default: `dbscan`, compiled where it can be.

    Returns:
        eps (B,) of the rows' dtype.
    """
    eps = np.full(len(rows), EPS_FLOOR, rows.dtype)
    if run in (None, dbscan) and is_compiled(rows):
        _cluster_compiled(rows, members, labels, eps, config)
        return eps
    for image, chosen in enumerate(members):
        labels[image, chosen], eps[image] = _cluster_image(rows[image, chosen], config, run or dbscan)
    return eps


def _cluster_image(rows, config, run):
    n = len(rows)
    if n < 2:
        return NOISE, EPS_FLOOR
    distances = pairwise_distances(rows)
    eps = neighbourhood_radius(distances, n, config)
    return run(distances, n, eps, config.min_samples(n)), eps


@lru_cache(maxsize=1)
def compiled():
    """The functions of `host.c`, or None where they were not built."""
    # Beside this file, not by import: that could find another installation's.
    paths = (Path(__file__).with_name(f"_host{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return None
    library, size = ctypes.CDLL(str(path)), ctypes.c_ssize_t
    floats, labels, booleans, problems = (
        np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS") for dtype in (np.float32, np.int32, np.bool_, PROBLEM)
    )
    library.pairwise_distances.argtypes = [floats, size, size, floats]
    library.dbscan.argtypes = [floats, size, ctypes.c_float, ctypes.c_int32, labels]
    library.cluster_images.argtypes = [floats, booleans, size, size, size, problems, ctypes.c_double, labels, floats]
    for function in (library.pairwise_distances, library.dbscan, library.cluster_images):
        function.errcheck = _check_memory
    return library


def _check_memory(status, *_):
    if status:
        raise MemoryError("no memory for the distances between all channels of an image")


def is_compiled(rows):
    """Whether `host.c` measures these rows."""
    return rows.dtype == np.float32 and rows.shape[-1] <= FLOAT32_LENGTH and compiled() is not None


def _cluster_compiled(rows, members, labels, eps, config):
    n = members.sum(1).tolist()
    # radius_ranks needs two points; with fewer, any rank will do.
    problems = [(m, *radius_ranks(max(m, 2), config.eps_percentile), config.min_samples(m)) for m in n]
    compiled().cluster_images(rows, members, *rows.shape, np.array(problems, PROBLEM), EPS_FLOOR, labels, eps)


def pairwise_distances(rows):
    """Euclidean distances of the pairs i < j in row order: (P,) of the rows' dtype, by direct differences.

    Equal rows are at exactly 0, which |x|^2 + |y|^2 - 2xy does not give.
    """
    n, length = rows.shape
    if is_compiled(rows):
        distances = np.empty(n * (n - 1) // 2, np.float32)
        compiled().pairwise_distances(rows, n, length, distances)
        return distances
    rows = torch.from_numpy(rows)
    if length > FLOAT32_LENGTH:
        return torch.pdist(rows.double()).to(rows.dtype).numpy()
    return torch.pdist(rows).numpy()


def neighbourhood_radius(distances, n, config):
    """eps, a scalar of the distances' dtype: the percentile of all ordered off-diagonal distances, at least
    EPS_FLOOR."""
    low, high, fraction = radius_ranks(n, config.eps_percentile)
    # One rank at a time: a partition at two ranks leaves NumPy's vectorised path and takes seven times as long.
    part = np.partition(distances, low)
    below = float(part[low])
    above = below if low == high else float(np.fmin.reduce(part[high:]))  # NaN is larger than any
    return _round_down(max(below + (above - below) * fraction, EPS_FLOOR), distances.dtype)


def _round_down(value, dtype):
    """The largest number of ``dtype`` not above ``value``: an eps rounded up could reach one pair further."""
    rounded = dtype.type(value)
    return np.nextafter(rounded, dtype.type(0)) if float(rounded) > value else rounded


def dbscan(distances, n, eps, min_samples):
    """DBSCAN's labels int32 (n,) for condensed distances, numbered and resolved as scikit-learn does."""
    near = np.empty(len(distances) + 1, bool)
    np.less_equal(distances, eps, out=near[:-1])
    near[-1] = True  # every point is its own neighbour
    adjacency = torch.from_numpy(near).index_select(0, _square_index(n)).view(n, n)
    is_core = adjacency.sum(1, dtype=torch.int32) >= min_samples
    reaches = adjacency.logical_and_(is_core).numpy()  # which cores each point is near to
    core = np.flatnonzero(is_core.numpy())
    labels = np.full(n, NOISE, np.int32)
    if not len(core):
        return labels

    nearest = reaches.argmax(1)  # the first core each point is near to, where there is one
    cluster = _components(nearest, reaches, core)
    if cluster[core].any():
        # More than one cluster: a border point joins the lowest-numbered among its core neighbours'. With the
        # cores sorted by cluster, that is again the first True of its row.
        core = core[np.argsort(cluster[core], kind="stable")]
        other = np.flatnonzero(~is_core.numpy())
        nearest[other] = core[reaches[other][:, core].argmax(1)]
    is_reached = reaches[np.arange(n), nearest]
    labels[is_reached] = cluster[nearest[is_reached]]
    return labels


@lru_cache(maxsize=4)
def _square_index(n):
    """Where each entry of the (n, n) matrix lies in a condensed vector with one diagonal entry appended."""
    n_pairs = n * (n - 1) // 2
    index = torch.empty(n, n, dtype=torch.int32)
    row, column = torch.triu_indices(n, n, 1, dtype=torch.int32)
    pair = torch.arange(n_pairs, dtype=torch.int32)
    index[row, column] = pair
    index[column, row] = pair
    index.fill_diagonal_(n_pairs)
    return index.view(-1)


def _components(smallest, adjacency, nodes):
    """Connected components of the ``nodes``, numbered by smallest member: int (n,), valid at the nodes.

    Args:
        smallest: int (n,), the smallest neighbour of each node, itself included.
        adjacency: bool (n, n), symmetric and True on the diagonal of the nodes; False in the columns of the rest.
        nodes: int (m,), ascending.

    Each node points at its smallest neighbour; pointer jumping finds the roots, which are the smallest of their
    trees; the trees are contracted to the nodes of the next round. Two rounds at least halve the nodes, so there
    are at most 2 * log2(n) + 1.
    """
    parent = np.arange(len(smallest))
    parent[nodes] = smallest[nodes]
    while not np.array_equal(parent, grandparent := parent[parent]):
        parent = grandparent
    roots, tree = np.unique(parent[nodes], return_inverse=True)
    if 1 < len(roots) < len(nodes):
        by_tree = np.argsort(tree, kind="stable")
        starts = np.searchsorted(tree[by_tree], np.arange(len(roots)))
        rows = np.logical_or.reduceat(adjacency[nodes[by_tree]], starts, axis=0)
        contracted = np.logical_or.reduceat(rows[:, nodes[by_tree]], starts, axis=1)
        tree = _components(contracted.argmax(1), contracted, np.arange(len(roots)))[tree]
    component = np.zeros(len(smallest), np.intp)
    component[nodes] = tree
    return component
