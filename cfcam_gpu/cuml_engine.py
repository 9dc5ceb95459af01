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

NOT_INSTALLED = 'cuml is not installed; pip install "cfcam_gpu[cuml]"'

PER_THREAD_DEFAULT_STREAM = 2
"""The CUDA handle cudaStreamPerThread, on which cuML works."""


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
        raise ImportError(f"clustering='cuml' cannot run: {NOT_INSTALLED}") from error

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
