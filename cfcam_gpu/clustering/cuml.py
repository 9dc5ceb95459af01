"""RAPIDS cuML's DBSCAN as the clustering engine: one image at a time, on the device.

cuML is handed who is near to whom, not the descriptors: a float32 matrix of 0 (neighbour) and 1 (not), with
``metric="precomputed"`` and eps 0.5. Its Euclidean metric expands |x|^2 + |y|^2 - 2xy and narrows eps to float32, so
that ties at eps would fall either way; compared by the caller, in the dtype of the distances, they fall as
scikit-learn's do, and 0.5 survives any narrowing.

cuML synchronises the host several times a fit and cannot be captured in a CUDA graph. It allocates through RMM, and
importing it makes RMM CuPy's allocator for the process: set a pool up first (``rmm.reinitialize(pool_allocator=True)``)
if its memory should be pooled. Both happen only when this engine is asked for.

Source: cuML 26.10, ``cuml.cluster.DBSCAN``.
"""

import torch

from cfcam_gpu.checks import needs
from cfcam_gpu.clustering import batched
from cfcam_gpu.clustering.ranks import radius_ranks
from cfcam_gpu.config import EPS_FLOOR

PER_THREAD_DEFAULT_STREAM = 2
"""The CUDA handle cudaStreamPerThread, on which cuML works."""


def cluster(rows, members, labels, config):
    """Labels and eps of a batch, as `cfcam_gpu.clustering.Engine` has them."""
    eps = rows.new_full((len(rows),), EPS_FLOOR)
    for image, chosen in enumerate(members):
        chosen = chosen.nonzero()[:, 0]
        n = len(chosen)
        if n > 1:
            all_rows = torch.ones(1, n, dtype=torch.bool, device=rows.device)
            distances = batched.pairwise_distances(rows[image, chosen][None], all_rows)
            low, high, fraction = radius_ranks(n, config.eps_percentile)
            ranks = (torch.tensor([rank], device=rows.device) for rank in (low, high))
            eps[image], radius = batched.neighbourhood_radius(distances, *ranks, fraction)
            labels[image, chosen] = dbscan(distances[0] <= radius, config.min_samples(n))
    return labels, eps


def label(distances, eps, min_samples):
    """Labels (R,) of one image's distances (R, R), on their device."""
    return dbscan(distances <= eps, min_samples)


def dbscan(near, min_samples):
    """DBSCAN's labels int32 (R,), numbered and resolved as scikit-learn does, on the device of ``near``.

    Args:
        near: bool (R, R), symmetric, True on the diagonal: pairs whose distance is at most eps.
        min_samples: neighbours that make a core point, itself included.

    Raises:
        ImportError: cuML is not installed.
    """
    try:
        from cuml.cluster import DBSCAN
    except ImportError as error:
        raise ImportError(f"clustering='cuml' cannot run: {needs('cuml', 'cuml')}") from error

    matrix = (~near).float().contiguous()
    ours = torch.cuda.current_stream(near.device)
    theirs = torch.cuda.ExternalStream(PER_THREAD_DEFAULT_STREAM, device=near.device)
    _wait(theirs, ours)
    engine = DBSCAN(
        eps=0.5, min_samples=min_samples, metric="precomputed", output_type="cupy", calc_core_sample_indices=False
    )
    labels = torch.from_dlpack(engine.fit_predict(matrix, out_dtype="int32"))
    _wait(ours, theirs)
    labels = labels.clone()
    # RMM hands the labels' memory out again on cuML's stream, which must not overtake the copy.
    _wait(theirs, ours)
    return labels


def _wait(stream, other):
    """Make ``stream`` wait for what ``other`` has been given so far, without making the host wait."""
    event = torch.cuda.Event()
    event.record(other)
    stream.wait_event(event)
