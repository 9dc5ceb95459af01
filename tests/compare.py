"""How the tests compare: one tolerance table by dtype, scaled by the largest reference value."""

import numpy as np
import torch

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-3,
}
"""Largest error by the dtype of the *inputs*, as a share of max|expected|."""


def assert_close(actual, expected, dtype=torch.float32):
    """Fail unless every value of ``actual`` is within the dtype's tolerance of ``expected``."""
    actual, expected = (np.asarray(torch.as_tensor(array).double().cpu()) for array in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "values must be finite"
    scale = np.abs(expected).max(initial=0)
    error = np.abs(actual - expected).max(initial=0)
    assert error <= TOLERANCE[dtype] * scale, f"error {error:.3g} on a scale of {scale:.3g}"
