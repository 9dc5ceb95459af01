"""Uncertainty: a mean over images, and its interval."""

from typing import Any, NamedTuple

import numpy as np
import torch

from cfcam_gpu.metrics import checks


class Interval(NamedTuple):
    """What `bootstrap_ci` returns."""

    mean: float
    low: float
    high: float
    n: int
    """Images that count: those that are not NaN."""


def bootstrap_ci(
    values: Any, minus: Any = None, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean over images, with a percentile bootstrap interval.

    Args:
        values: (B,) per-image values, a tensor, an array or a list. NaN marks an image without a value, which is left
            out: ``n`` says how many count.
        minus: (B,) values of the same images under another method: then it is the mean of the paired differences,
            and its interval, over the images that have both.
        confidence: in (0, 1); default 0.95.
        resamples: of the images, with replacement; default 10000.
        seed: default 0.

    Returns:
        `Interval` (mean, low, high, n), Python numbers.

    Raises:
        ValueError: fewer than two values, shapes that do not match, infinity, a confidence out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> bootstrap_ci(curves.insertion, minus=other_curves.insertion)
    Interval(mean=0.021, low=0.004, high=0.039, n=200)
    """
    values, *others = (
        np.asarray(torch.as_tensor(each, dtype=torch.float64).detach().cpu())
        for each in (values, minus)
        if each is not None
    )
    if values.ndim != 1:
        raise ValueError(f"values must have shape (B,), got {values.shape}")
    for other in others:
        if other.shape != values.shape:
            raise ValueError(f"minus must match values {values.shape}, got {other.shape}")
        values = values - other
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    resamples = checks.check_count("resamples", resamples)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        raise ValueError(f"values must hold two numbers or more that are not NaN, got {len(values)}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite or NaN, got infinity")
    rng, rows = np.random.default_rng(seed), max(1, 2**22 // len(values))  # 32 MB of indices at a time
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (min(rows, resamples - start), len(values)))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(values.mean()), float(low), float(high), len(values))
