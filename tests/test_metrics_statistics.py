"""The bootstrap, against SciPy's."""

import numpy as np
import pytest
import torch

from cfcam_gpu import metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bootstrap_as_scipy(rng):
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is not installed (extra: reference)")
    values, other = rng.exponential(size=60), rng.exponential(size=60)
    for actual, sample, confidence in (
        (metrics.bootstrap_ci(values), values, 0.95),
        (metrics.bootstrap_ci(torch.from_numpy(values), minus=other), values - other, 0.95),
        (metrics.bootstrap_ci(values.tolist(), confidence=0.5), values, 0.5),
    ):
        options = {"confidence_level": confidence, "n_resamples": 10_000, "method": "percentile", "rng": rng}
        expected = scipy.bootstrap((sample,), np.mean, **options).confidence_interval
        # Two sets of resamples: an end moves by about 3% of the mean's standard error.
        slack = 0.15 * sample.std() / np.sqrt(60)
        assert abs(actual.low - expected.low) < slack and abs(actual.high - expected.high) < slack
        assert abs(actual.mean - sample.mean()) < 1e-12 and actual.n == 60
        assert expected.high - expected.low > 4 * slack


def test_bootstrap_leaves_out_what_is_no_number(rng):
    values, other = rng.random(30), rng.random(30)
    values[3] = other[5] = np.nan
    assert metrics.bootstrap_ci(values).n == 29
    paired = metrics.bootstrap_ci(values, minus=other)
    kept = np.delete(values - other, [3, 5])
    assert paired == metrics.bootstrap_ci(kept) and paired.n == 28
    assert metrics.bootstrap_ci(kept, seed=1) != paired
    assert metrics.bootstrap_ci([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0, 3)
