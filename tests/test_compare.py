"""The comparison itself: it must refuse zeros, a shuffled answer, a wrong shape and NaN."""

import pytest
import torch
from compare import TOLERANCE, assert_close


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
