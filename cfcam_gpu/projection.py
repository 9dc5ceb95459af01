"""The first principal component of a layer's channels, with LAPACK in one thread."""

from functools import lru_cache

import numpy as np
import torch

from cfcam_gpu import weights
from cfcam_gpu.calls import Counted


@lru_cache(1)
def _libraries():
    """threadpoolctl's controller; None where that is not installed (it comes with scikit-learn)."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def _limit():
    libraries = _libraries()
    if libraries is None:
        return lambda: None
    return libraries.limit(limits=1, user_api="blas").restore_original_limits


ONE_THREAD = Counted(_limit)
"""NumPy's BLAS, of the whole process, in one thread, where threadpoolctl is installed. With more it shares the cores
with torch's threads, and waits for them at each of the many small products: up to 100 times as long for a layer of
7 x 7 cells."""


def principal_projection(terms: torch.Tensor) -> torch.Tensor:
    """`weights.principal_projection`, of terms (B, C, h, w) or of any other grid: (B, h, w)."""
    with ONE_THREAD.on():
        return weights.principal_projection(terms)


def first_component(terms: np.ndarray) -> np.ndarray:
    """The projection of terms (B, C, ...) on their first principal component: float32 (B, ...).

    Source: ``utils.svd_on_activations.get_2d_projection`` of pytorch-grad-cam 1.5.7.
    """
    return np.float32(principal_projection(torch.from_numpy(np.ascontiguousarray(terms))))
