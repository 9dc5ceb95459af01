"""The comparison itself: it must refuse zeros, a shuffled answer, a wrong shape and NaN."""

import pytest
import torch
from compare import TOLERANCE, assert_close, stretch_of_map

from cfcam_gpu import CFCAMConfig


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_refuses_wrong_answers(seed, dtype):
    expected = torch.rand(7, 5, dtype=torch.float64)
    assert_close(expected.clone(), expected, dtype)
    for wrong in (
        torch.zeros_like(expected),
        expected.flatten()[torch.randperm(35)].view(7, 5),
        expected.T,
        torch.full_like(expected, torch.nan),
        expected + 2 * TOLERANCE[dtype],
    ):
        with pytest.raises(AssertionError):
            assert_close(wrong, expected, dtype)


def test_allows_rounding(seed):
    expected = torch.rand(100, dtype=torch.float64)
    assert_close(expected * (1 + 1e-6), expected)


def test_the_stretch_of_a_map():
    weights = torch.tensor([1.0, -1.0])
    usual = torch.rand(2, 4, 4) * torch.tensor([4.0, 1.0])[:, None, None]
    assert stretch_of_map(usual, weights, (8, 8), CFCAMConfig()) == 1
    nearly_cancelled = torch.ones(2, 4, 4)
    nearly_cancelled[0, 0, 0] += 1e-3
    for config in (CFCAMConfig(affinity_power=0.0), CFCAMConfig.paper()):
        assert stretch_of_map(nearly_cancelled, weights, (4, 4), config) == pytest.approx(20, rel=1e-2)
    assert stretch_of_map(usual, -torch.ones(2), (8, 8), CFCAMConfig()) == 1, "a map of zeros has nothing to stretch"
