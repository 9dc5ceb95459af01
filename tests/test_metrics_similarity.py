"""Similarity of maps and class sensitivity, against scikit-image and SciPy."""

import sys

import numpy as np
import pytest
import torch
from compare import assert_close
from measured import shuffled

from cfcam_gpu import metrics

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: metrics)")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 6), (7, 13), (40, 40)])  # the smallest, a prime, more than the window
def test_ssim_as_scikit_image(dtype, shape, rng):
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed (extra: demo)")
    first = rng.random((3, *shape))
    second = np.clip(first + [[[0.0]], [[0.1]], [[1.0]]] * rng.standard_normal((3, *shape)), 0, 1)
    first[1] = 0  # flat, where the constants decide
    actual = metrics.ssim(*(torch.from_numpy(each).to(dtype) for each in (first, second)))
    for index in range(3):
        # scikit-image leaves out a margin of 5 pixels: with that margin mirrored on, it leaves out nothing else.
        padded = (np.pad(each[index], 5, mode="reflect") for each in (first, second))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        expected = skimage.structural_similarity(*padded, **options)
        assert abs(actual[index].item() - expected) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert abs(actual[0] - 1) < 1e-6


@pytest.mark.parametrize(
    "device, dtype, computed",
    [
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", torch.float64, torch.float64),
        ("meta", torch.float32, torch.float64),  # stands for a GPU, whose convolutions would round to TF32
    ],
)
def test_arithmetic_of_ssim(device, dtype, computed, monkeypatch):
    import torchmetrics.functional.image as home

    seen, original = [], home.structural_similarity_index_measure

    def spy(first, second, **options):
        assert device == "meta" or not torch.is_autocast_enabled(device)
        seen.extend((first.dtype, second.dtype))
        return original(first, second, **options)

    monkeypatch.setattr(home, "structural_similarity_index_measure", spy)
    maps = torch.rand(2, 8, 8, dtype=dtype, device=device)
    with torch.autocast("cpu"):
        result = metrics.ssim(maps, maps)
    assert seen == [computed, computed] and result.dtype == torch.float64 and result.shape == (2,)


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])  # constant; half and half; many ties; hardly any
def test_rank_correlation_as_scipy(levels, rng):
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is not installed (extra: reference)")
    first, second = (rng.integers(0, levels, (4, 6, 9)).astype(np.float32) for _ in range(2))
    second[1] = first[1]
    second[2] = 1 - first[2]
    second[3] = np.where(second[3] > levels / 2, second[3], first[3])
    actual = metrics.rank_correlation(*map(torch.from_numpy, (first, second)))
    for index in range(4):
        if levels == 1:
            assert actual[index].isnan()
        else:
            expected = scipy.spearmanr(first[index].ravel(), second[index].ravel()).statistic
            assert abs(actual[index].item() - expected) < 1e-12


@pytest.mark.filterwarnings("error")  # searchsorted warns of strides
def test_rank_correlation_in_half_precision_and_of_views(seed):
    maps, other = torch.rand(9, 7, 2).permute(2, 0, 1), torch.rand(4, 9, 7)[::2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = maps.to(dtype), other.to(dtype)
        expected = metrics.rank_correlation(*(each.double() for each in rounded))
        assert_close(metrics.rank_correlation(*rounded), expected, torch.float64)


def test_class_sensitivity(seed):
    maps = torch.rand(4, 20, 20)
    other = shuffled(maps)
    other[0], other[1] = maps[0], 0
    maps[2] = 0
    result = metrics.class_sensitivity(maps, other)
    assert result.zero.tolist() == [False, True, True, False]
    assert result.ssim_distance.isnan().tolist() == result.rank_distance.isnan().tolist() == result.zero.tolist()
    assert abs(result.ssim_distance[0]) < 1e-6 and abs(result.rank_distance[0]) < 1e-12
    assert result.ssim_distance[3] > 0.5 and result.rank_distance[3] > 0.5
    assert_close(1 - result.ssim_distance[3:], metrics.ssim(maps, other)[3:])
    assert metrics.bootstrap_ci(result.ssim_distance).n == 2
    of_two = metrics.class_sensitivity(torch.stack([maps, other], dim=1))
    torch.testing.assert_close(of_two, result, equal_nan=True)
    for bad in (maps, torch.stack([maps] * 3, dim=1)):
        with pytest.raises(ValueError, match=r"maps must have shape \(B, 2, H, W\) without other_maps, got"):
            metrics.class_sensitivity(bad)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r'"metrics" extra: pip install "cfcam_gpu\[metrics\]"'):
        metrics.ssim(torch.rand(1, 8, 8), torch.rand(1, 8, 8))
