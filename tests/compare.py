"""How the tests compare: one tolerance table by dtype, scaled by the largest reference value."""

import numpy as np
import torch

from cfcam_gpu import CFCAMConfig, reference, torch_backend

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-3,
}
"""Largest error by the dtype of the *inputs*, as a share of max|expected|."""


def assert_close(actual, expected, dtype=torch.float32, stretch=1.0):
    """Fail unless every value of ``actual`` is within the dtype's tolerance, times ``stretch``, of ``expected``."""
    actual, expected = (np.asarray(torch.as_tensor(array).double().cpu()) for array in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "values must be finite"
    scale = np.abs(expected).max(initial=0)
    error = np.abs(actual - expected).max(initial=0)
    assert error <= TOLERANCE[dtype] * stretch * scale, f"error {error:.3g} on a scale of {scale:.3g}"


def stretch_of_map(activations, weights, output_size, config, guide=None):
    """How much more than usual the scaling of a map stretches its rounding, which is relative to the terms of the sum.

    1 for the usual map, whose terms (C, h, w) add up to at most a hundred times its range. In one of some thousands
    of random problems they nearly cancel, and what is stretched to the range from 0 to 1 is mostly rounding.
    """
    of_channels = torch.as_tensor(weights).double().view(-1, *[1] * (activations.ndim - 1))
    terms = of_channels * activations.double()
    features = activations if guide is None else guide
    total = torch.from_numpy(averaged(terms.sum(0)[None], features[None], config))
    grid = torch_backend.resize(total.relu(), output_size)
    span = float(grid.max() - (grid.min() if config.normalize == "minmax" else 0))
    return max(1.0, float(terms.abs().sum(0).max()) / span / 100) if span > 0 else 1.0


def averaged(grids, guide, config=None):
    """Signed sums (B, h, w) averaged on the guide's grid as the configuration says, by the reference: float64."""
    grids, guide = (np.asarray(torch.as_tensor(array).double().cpu()) for array in (grids, guide))
    config = config or CFCAMConfig()
    return np.stack(
        [
            reference.average_alike_cells(reference.balance(grid, features.shape[1:], config), features, config)
            for grid, features in zip(grids, guide)
        ]
    )
