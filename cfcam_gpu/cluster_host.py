"""Stage 2 on the CPU, one image at a time: exact, and many times faster there than the batched form.

On a CPU the host is the device, so shapes may depend on data. That pays four times. Rows of zeros, the dead channels of
a ReLU, are clustered as one. Many pairs are told near or far by their norms alone, and most of the rest by a matrix
product with a bound on its rounding (`certified_neighbours`): only those closer to eps than the bound are measured, and
eps is among them; where that does not settle it, all pairs are (`measured_neighbours`). And components are contracted,
so that a round after the first works on a small graph.
"""

from functools import lru_cache

import numpy as np
import torch

from cfcam_gpu.config import EPS_FLOOR
from cfcam_gpu.labels import NOISE
from cfcam_gpu.ranks import radius_ranks

FLOAT32_LENGTH = 4096
"""Longest descriptor whose float32 distances stay within 1e-6 of exact; longer ones are summed in float64."""

CERTIFIED_ROWS = 512
"""From how many rows on the matrix product is tried: for 512 both ways take 0.5 ms, for 1536 they take 2 and 5."""

OPEN_SHARE = 1 / 256
"""Largest share of the pairs that the matrix product may leave open: measured singly, one costs 100 times as much."""

BLOCK_ROWS = 128
"""Rows of the matrix product at a time: of fewer, more pairs are told by norms alone, but each block has its calls."""

SAMPLE_COLUMNS = 32
"""Distances that the sample has for each row: with more, sorting them takes longer than a narrower bracket saves."""

PAIRS_AT_ONCE = 32
"""Pairs measured singly by one call, which takes as long as the pairs nobody wants of their rows."""


def cluster_image(rows, config, engine):
    """Labels and eps of one image's descriptors.

    Args:
        rows: (R, D) CPU tensor, float32 or float64.
        config: `CFCAMConfig`.
        engine: "host" for `dbscan`, "sklearn" for scikit-learn's on the same distances and eps.

    Returns:
        labels int (R,) as a NumPy array, and eps as a float.
    """
    n = len(rows)
    if n < 2:
        return np.full(n, NOISE, np.int32), EPS_FLOOR
    if engine == "sklearn":
        distances = pairwise_distances(rows)
        eps = neighbourhood_radius(distances, n, config)
        return dbscan_sklearn(distances, n, eps, config.min_samples(n)), float(eps)
    found = None
    if n >= CERTIFIED_ROWS and rows.dtype == torch.float32 and rows.shape[1] <= FLOAT32_LENGTH:
        found = certified_neighbours(rows, config)
    place, order, adjacency, degrees, eps = found or measured_neighbours(rows, config)
    return dbscan(adjacency, degrees, config.min_samples(n), order)[place], float(eps)


def measured_neighbours(rows, config):
    """Who is near whom, from the distances of all pairs.

    Returns:
        place: where each row is among those of ``adjacency``, as an index; here, the same.
        order: int (M,), which row each of those is; here, M = R and the same.
        adjacency: bool (M, M), True on and below the diagonal where two are within eps, as every row is of itself;
            above it may be True where below it is.
        degrees: int (M,), how many of the R rows are neighbours of each.
        eps: a scalar of the rows' dtype.
    """
    n = len(rows)
    distances = pairwise_distances(rows)
    eps = neighbourhood_radius(distances, n, config)
    near = np.empty(len(distances) + 1, bool)
    np.less_equal(distances, eps, out=near[:-1])
    near[-1] = True
    adjacency = torch.from_numpy(near).index_select(0, _square_index(n)).view(n, n)
    return slice(None), np.arange(n), adjacency.numpy(), adjacency.sum(1, dtype=torch.int32).numpy(), eps


def certified_neighbours(rows, config):
    """What `measured_neighbours` returns, sorted by norm and with all rows of zeros as one; None if it is not certain.

    A sample brackets eps^2. Of rows sorted by norm many pairs are told near or far by their norms alone: all but a
    stretch of columns for each block of rows. There a matrix product gives each pair's squared distance, scaled so that
    -1 and 1 are the ends of the bracket: below is near, above is far. Of the entries between, those at the ranks of eps
    are eps^2 but for rounding, whose bound ``slack`` leaves a few pairs open. These are measured; eps is among them.

    A pair with the merged row, which comes first, counts ``copies`` times.
    """
    rows = rows.numpy()
    n, length = rows.shape
    low, high, fraction = radius_ranks(n, config.eps_percentile)
    norms = np.einsum("rd,rd->r", rows, rows)
    largest = float(norms.max())
    if not 1e-20 < largest < 1e30:  # nor NaN; between these neither underflow nor overflow can matter
        return None
    # To first order and in units of 2^-24, with s = |x|^2 + |y|^2 and D = length, rounding moves the product and its
    # operands by (D + 5)(2 s + middle), the norms by D s, the square of a measured distance by 2 (D + 6) s. What the
    # norms alone tell is off by at most 2 D s.
    rounding = 6 * (length + 4) * 2.0**-24
    # NumPy for all but the product: a parallel region of torch waits milliseconds for its threads on a busy machine.
    left, right = np.ones((n, length + 2), np.float32), np.ones((n, length + 2), np.float32)
    left[:, :-2], left[:, -2] = rows, norms
    np.multiply(rows, -2, out=right[:, :-2])
    right[:, -1] = norms

    order = norms.argsort()
    copies = max(1, n - np.count_nonzero(norms))
    zeros = order[:copies]
    if copies > 1 and rows[zeros].any():  # squares that underflow
        return None
    at_zero = copies * (copies - 1) // 2
    is_floor = at_zero > high
    share = config.eps_percentile / 100
    bracket = (0.0, EPS_FLOOR**2) if is_floor else _bracket(left, right, largest, share, rounding)
    if bracket is None:
        return None
    place = np.empty(n, np.intp)
    place[order] = np.arange(1 - copies, n - copies + 1)
    if copies > 1:
        # The first of the zeros stands for all.
        order = order[copies - 1 :]
        order[0] = zeros.min()
        np.maximum(place, 0, out=place)
    norms, left, right = norms[order], left[order], right[order]

    middle = sum(bracket) / 2
    slack = rounding * (2 * largest + bracket[1])
    half = bracket[1] - middle + 3 * slack
    told = _told_by_norms(norms, middle - half, middle + half, left.min() >= 0)
    slack, rounding = slack / half, rounding / half
    right *= 1 / half
    right[:, -1] -= middle / half
    adjacency, i, j, entries, n_near, of_itself = _product_in_bracket(left, right, *told)
    # A row is at 0 from itself, but for rounding. Where a setting lets float32 products round to bfloat16, such as
    # torch.set_float32_matmul_precision("medium"), the bound does not hold, and this shows it.
    if not np.abs(of_itself + middle / half).max(initial=0) <= slack:
        return None
    counts = np.where(j == 0, copies, 1) if copies > 1 else 1

    if is_floor:
        start, end = -np.inf, (EPS_FLOOR**2 - middle) / half
    else:
        of_zero = np.count_nonzero(adjacency[1:, 0])
        n_near += at_zero + (copies - 1) * of_zero
        counted = np.repeat(entries, counts)
        if low < n_near or high >= n_near + len(counted):
            return None
        counted.partition(low - n_near)
        start, end = counted[low - n_near], counted[high - n_near :].min()
        start, end = float(start) - slack, float(end) + slack
        if start - slack <= -1 or end + slack >= 1:
            return None

    # By the bound for the longest rows first, then by each pair's own.
    is_near = entries < start - slack
    is_open = ~is_near & (entries <= end + slack)
    reach = rounding * (norms[i[is_open]] + norms[j[is_open]] + middle)
    is_near[is_open] = entries[is_open] < start - reach
    is_open[is_open] = (entries[is_open] >= start - reach) & (entries[is_open] <= end + reach)
    if np.count_nonzero(is_open) > OPEN_SHARE * n * (n - 1) / 2:
        return None
    distances = _distances_of_pairs(rows, order[i[is_open]], order[j[is_open]])

    if is_floor:
        eps = _round_down(EPS_FLOOR, distances.dtype)
    else:
        n_near += np.count_nonzero(is_near) if copies == 1 else counts[is_near].sum()
        ordered = np.sort(np.repeat(distances, counts if copies == 1 else counts[is_open]))
        eps = _interpolated(ordered[low - n_near], ordered[high - n_near], fraction)
        if eps <= EPS_FLOOR:  # which may lie below the bracket
            return None
    is_near[is_open] = distances <= eps
    adjacency[i, j] = is_near
    degrees = _degrees(adjacency)
    degrees += (copies - 1) * adjacency[:, 0]
    return place, order, adjacency[:, : len(order)], degrees, eps


def _bracket(left, right, largest, share, rounding):
    """Squared distances below and above that at ``share`` of all, by a sample; None where too many are as far.

    The sample is of blocks of the product. Each row meets SAMPLE_COLUMNS columns and each column as many rows, so that
    all have an equal part: it varies by two thirds of what as many random pairs would, so that this is 3 deviations.
    """
    blocks = len(left) // SAMPLE_COLUMNS
    used = blocks * SAMPLE_COLUMNS
    columns = right[:used].reshape(SAMPLE_COLUMNS, blocks, -1).transpose(1, 2, 0)
    sample = np.sort((left[:used].reshape(blocks, SAMPLE_COLUMNS, -1) @ columns).ravel())
    # Some of the sample, and of its smallest, is of a row with itself.
    of_itself = _rows_meeting_themselves(blocks)
    middle = of_itself + share * (len(sample) - of_itself - 1)
    margin = 2 * (share * (1 - share) * len(sample)) ** 0.5 + 4
    value = float(sample[int(middle)])
    slack = rounding * (2 * largest + value)
    first, last = sample.searchsorted(np.float32([value - 2 * slack, value + 2 * slack]))
    if last - first > OPEN_SHARE * len(sample):
        return None
    bottom = float(sample[int(middle - margin)]) if middle > margin else 0.0
    top = float(sample[int(middle + margin)]) if middle + margin < len(sample) else 4 * largest
    return max(bottom, 0.0), top


@lru_cache(maxsize=64)
def _rows_meeting_themselves(blocks):
    """How many pairs of `_bracket`'s sample are of a row with itself."""
    row = np.arange(blocks * SAMPLE_COLUMNS)
    return np.count_nonzero(row // SAMPLE_COLUMNS == row % blocks)


def _told_by_norms(norms, low, high, is_positive):
    """The columns that each block of BLOCK_ROWS rows need not be multiplied with.

    Args:
        norms: float32 (M,), squared and ascending.
        low, high: squared distances below and above which a pair counts as near and far.
        is_positive: no entry of the rows is negative: then |x - y|^2 <= |x|^2 + |y|^2.

    Returns:
        near, far: int (blocks,), how many of the first columns are near to, and far from, all rows of the block.
    """
    squares = norms.astype(np.float64)
    lengths = np.sqrt(squares)
    first = np.arange(0, len(norms), BLOCK_ROWS)
    last = np.minimum(first + BLOCK_ROWS, len(norms)) - 1
    far = lengths.searchsorted(lengths[first] - high**0.5, side="right")
    if is_positive:
        near = squares.searchsorted(low - squares[last], side="right")
    else:
        near = lengths.searchsorted(max(low, 0) ** 0.5 - lengths[last], side="right")
    near = np.where(near > last, last + 1, np.minimum(near, first))
    return near, np.minimum(far, first)


def _product_in_bracket(left, right, near, far):
    """The pairs j < i by their entry of left @ right.T: near where <= -1, far where >= 1, listed between.

    Args:
        left, right: float32 (M, D).
        near, far: `_told_by_norms`.

    Returns:
        adjacency: bool (M, W), True for the near pairs below the diagonal and on the diagonal, not yet decided where
            listed; W is M rounded up to whole words of 8 bytes.
        i, j, entries: the pairs between and their entries, float32.
        n_near: how many pairs are near.
        of_itself: float32, the diagonal of what was multiplied.
    """
    n = len(left)
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    adjacency = np.zeros((n, n + -n % 8), bool)
    below = _below_diagonal(BLOCK_ROWS)
    nothing = np.empty(0, np.intp)
    found, of_itself = [(nothing, nothing, np.empty(0, np.float32))], [np.empty(0, np.float32)]
    for start, is_near, is_far in zip(range(0, n, BLOCK_ROWS), near.tolist(), far.tolist()):
        end = min(start + BLOCK_ROWS, n)
        adjacency[start:end, :is_near] = True
        if is_near == end:
            adjacency[start:end, start:end] = below[: end - start, : end - start]
            continue
        first = max(is_near, is_far)
        size, width = end - start, end - first
        block = torch.mm(left[start:end], right[first:end].T).numpy()
        close = adjacency[start:end, first:end]
        np.less_equal(block, -1, out=close)
        between = block < 1
        between ^= close
        square = slice(start - first, None)
        of_itself.append(block[:, square].diagonal())
        close[:, square] &= below[:size, :size]
        between[:, square] &= below[:size, :size]
        flat = np.flatnonzero(between)
        i = flat // width
        found.append((i + start, flat - (i * width - first), block.take(flat)))
    n_near = np.count_nonzero(adjacency)
    np.fill_diagonal(adjacency, True)
    return adjacency, *(np.concatenate(part) for part in zip(*found)), n_near, np.concatenate(of_itself)


def _degrees(adjacency):
    """The neighbours of each row, itself included: int64 (M,), for `_product_in_bracket`'s adjacency."""
    # Bytes summed eight at a time, at most 255 of them: a quarter of the time of a sum of booleans.
    words = adjacency.view(np.uint64)
    degrees = np.add.reduceat(words, np.arange(0, words.shape[1], 255), axis=1).view(np.uint8).sum(1, dtype=np.int64)
    for start in range(0, len(words), 255):
        of_columns = np.add.reduce(words[start : start + 255], axis=0).view(np.uint8)
        degrees += of_columns[: len(degrees)]
    return degrees - 1


@lru_cache(maxsize=1)
def _below_diagonal(n):
    """True below the diagonal: bool (n, n)."""
    return np.tri(n, k=-1, dtype=bool)


def _distances_of_pairs(rows, i, j):
    """`pairwise_distances` of some pairs, to the bit: (P,) for i, j int (P,)."""
    # Rows 2k and 2k + 1 of each call are a pair; the last call is filled up with pairs of the first row with itself.
    ends = np.zeros(((len(i) // PAIRS_AT_ONCE + 1) * PAIRS_AT_ONCE, 2), np.intp)
    ends[: len(i), 0], ends[: len(i), 1] = i, j
    first = np.arange(0, 2 * PAIRS_AT_ONCE, 2)
    wanted = first * (4 * PAIRS_AT_ONCE - 1 - first) // 2
    calls = torch.from_numpy(rows[ends.ravel()]).split(2 * PAIRS_AT_ONCE)
    return np.concatenate([pairwise_distances(call)[wanted] for call in calls])[: len(i)]


def pairwise_distances(rows):
    """Euclidean distances of the pairs i < j in row order: (P,) NumPy array, by direct differences.

    Equal rows are at exactly 0, which |x|^2 + |y|^2 - 2xy does not give; it is also no faster, because it
    cannot skip half of the pairs.
    """
    if rows.shape[1] > FLOAT32_LENGTH:
        return torch.pdist(rows.double()).to(rows.dtype).numpy()
    return torch.pdist(rows).numpy()


def neighbourhood_radius(distances, n, config):
    """eps, a scalar of the distances' dtype: the percentile of all ordered off-diagonal distances, at least
    EPS_FLOOR."""
    low, high, fraction = radius_ranks(n, config.eps_percentile)
    # One rank at a time: a partition at two ranks leaves NumPy's vectorised path and takes seven times as long.
    part = np.partition(distances, low)
    above = part[low] if low == high else part[high:].min()
    return _interpolated(part[low], above, fraction)


def _interpolated(below, above, fraction):
    """eps between two order statistics, scalars of one dtype."""
    value = float(below) + (float(above) - float(below)) * fraction
    return _round_down(max(value, EPS_FLOOR), below.dtype)


def _round_down(value, dtype):
    """The largest number of ``dtype`` not above ``value``: an eps rounded up could reach one pair further."""
    rounded = dtype.type(value)
    return np.nextafter(rounded, dtype.type(0)) if float(rounded) > value else rounded


def dbscan(adjacency, degrees, min_samples, order):
    """DBSCAN's labels int32 (n,), numbered and resolved as scikit-learn does.

    Args:
        adjacency: bool (n, n), True on and below the diagonal where two points are near; above it, False or the same.
        degrees: int (n,), each point's neighbours, itself included.
        min_samples: how many make a core.
        order: int (n,), distinct: clusters are numbered by the smallest that one of their cores has.
    """
    n = len(adjacency)
    is_core = degrees >= min_samples
    labels = np.full(n, NOISE, np.int32)
    core = np.flatnonzero(is_core)
    if not len(core):
        return labels

    # The first core each point is near to, where there is one before it.
    nearest = adjacency.argmax(1)
    others_first = np.flatnonzero(~is_core[nearest])
    nearest[others_first] = (adjacency[others_first] & is_core).argmax(1)
    cluster = _components(nearest, adjacency, core)[core]
    n_clusters = cluster.max() + 1
    if n_clusters > 1:
        first = np.full(n_clusters, n)
        np.minimum.at(first, cluster, order[core])
        cluster = first.argsort().argsort()[cluster]
    labels[core] = cluster
    other = np.flatnonzero(~is_core)
    if not len(other):
        return labels
    # A border point joins the lowest-numbered among its core neighbours' clusters, be they before it or after.
    if n_clusters == 1:
        joined = np.where(is_core[nearest[other]] & adjacency[other, nearest[other]], 0, n)
    else:
        by_cluster = cluster.argsort(kind="stable")
        core, cluster = core[by_cluster], cluster[by_cluster]
        before = adjacency[other][:, core]
        nearest = before.argmax(1)
        joined = np.where(before[np.arange(len(other)), nearest], cluster[nearest], n)
    later = np.flatnonzero(core > other[0])
    if len(later):
        core, cluster = core[later], cluster[later]
        starts = np.flatnonzero(np.diff(cluster, prepend=-1))
        after = np.logical_or.reduceat(adjacency[core][:, other], starts)
        nearest = after.argmax(0)
        joined = np.minimum(joined, np.where(after[nearest, np.arange(len(other))], cluster[starts][nearest], n))
    labels[other] = np.where(joined < n, joined, NOISE)
    return labels


def dbscan_sklearn(distances, n, eps, min_samples):
    """scikit-learn's own DBSCAN on the same condensed distances."""
    from cfcam_gpu import reference

    square = np.zeros((n, n))
    row, column = np.triu_indices(n, 1)
    square[row, column] = square[column, row] = distances
    return reference.dbscan(square, float(eps), min_samples)


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
        adjacency: bool (n, n), True on and below the diagonal where two nodes are near.
        nodes: int (m,), ascending.

    Each node points at its smallest neighbour; pointer jumping finds the roots, which are the smallest of their
    trees; the trees are contracted to the nodes of the next round. Two rounds at least halve the nodes, so there
    are at most 2 * log2(n) + 1.
    """
    parent = np.arange(len(smallest))
    parent[nodes] = smallest[nodes]
    while not np.array_equal(parent, grandparent := parent[parent]):
        parent = grandparent
    root = parent[nodes]
    if (root == root[0]).all():
        return np.zeros_like(parent)
    roots, tree = np.unique(root, return_inverse=True)
    if len(roots) < len(nodes):
        by_tree = np.argsort(tree, kind="stable")
        starts = np.searchsorted(tree[by_tree], np.arange(len(roots)))
        rows = np.logical_or.reduceat(adjacency[nodes[by_tree]], starts, axis=0)
        contracted = np.logical_or.reduceat(rows[:, nodes[by_tree]], starts, axis=1)
        contracted |= contracted.T
        tree = _components(contracted.argmax(1), contracted, np.arange(len(roots)))[tree]
    component = np.zeros(len(smallest), np.intp)
    component[nodes] = tree
    return component
