"""The torch backend against the float64 reference and against SciPy, over presets, boundaries, dtypes and layouts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, stretch_of_map
from problems import activations_like, equal_labels
from scipy.ndimage import correlate1d, gaussian_filter
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel

from cfcam_gpu import CFCAMConfig, cf_cam, cluster_channels, reference, torch_backend
from cfcam_gpu.clustering import batched
from cfcam_gpu.config import BOUNDARIES
from cfcam_gpu.gaussian import filter_matrix, pooling_weights

PRESETS = {
    "default": CFCAMConfig(),
    "affinity": CFCAMConfig(affinity_power=4.0, affinity_sigma=math.inf, affinity_steps=1),
    "paper": CFCAMConfig.paper(),
}


def compare_with_reference(activations, gradients, config, output_size=(33, 47), guide=None):
    """Weights and maps of both backends; labels may differ only at the edge, and then there is nothing to compare."""
    result = cf_cam(activations, gradients, output_size, config, guide=guide)
    expected = cf_cam(activations, gradients, output_size, config, backend="reference", guide=guide)
    assert expected.maps.dtype == torch.float64
    for image in equal_labels(activations, result.labels, expected.labels, config).nonzero()[:, 0].tolist():
        assert_close(result.weights[image], expected.weights[image], activations.dtype)
        of_image = None if guide is None else guide[image].double()
        stretch = stretch_of_map(activations[image], expected.weights[image], output_size, config, of_image)
        assert_close(result.maps[image], expected.maps[image], activations.dtype, stretch)
    return result


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("descriptor", ["raw", "unit"])
# A ResNet's last grid at a prime number of channels, a grid smaller than the filter, a single row, a large grid.
@pytest.mark.parametrize("shape", [(3, 127, 7, 7), (2, 64, 2, 3), (2, 33, 1, 8), (2, 40, 28, 14)])
def test_equals_the_reference(preset, boundary, descriptor, shape, seed):
    for sigma in (0.4, 1.0, 3.5):
        config = CFCAMConfig(
            boundary=boundary,
            descriptor=descriptor,
            sigma=sigma,
            weighting=PRESETS[preset].weighting,
            normalize=PRESETS[preset].normalize,
            affinity_power=PRESETS[preset].affinity_power,
            affinity_sigma=PRESETS[preset].affinity_sigma,
            affinity_steps=PRESETS[preset].affinity_steps,
        )
        result = compare_with_reference(activations_like(shape), torch.randn(shape), config)
        assert result.maps.shape == (shape[0], 33, 47)
        assert 0 <= result.maps.min() and result.maps.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_dtypes(dtype, preset, seed):
    shape = (3, 128, 7, 7)
    # Gradients of a trained network are about 1e-3 and smaller: subnormal in float16 where they are pooled.
    gradients = (torch.randn(shape) * 1e-3).to(dtype)
    result = compare_with_reference(activations_like(shape, dtype=dtype), gradients, PRESETS[preset])
    assert result.maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def by_reference(grids, guide, config):
    """`reference.average_alike_cells` of a batch."""
    images = zip(grids.double().numpy(), guide.double().numpy())
    return np.stack([reference.average_alike_cells(*image, config) for image in images])


def everywhere(power):
    """One average over all alike cells, near and far."""
    return CFCAMConfig(affinity_power=power, affinity_sigma=math.inf, affinity_steps=1, affinity_range=math.inf)


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("shape", [(2, 40, 7, 7), (2, 16, 9, 14), (1, 5, 1, 2)])
@pytest.mark.parametrize("centring, of_range", [(1, math.inf), (0.3, math.inf), (0, math.inf), (0.3, 1.5)])
def test_average_of_alike_cells_equals_scikit_learn(shape, power, centring, of_range, seed):
    activations, grids, config = torch.randn(shape).relu(), torch.randn(shape[0], *shape[2:]), everywhere(power)
    config = dataclasses.replace(config, guide_power=0, affinity_centring=centring, affinity_range=of_range)
    activations[0, :, 0, 0] = 0  # a cell without features: it keeps its value
    average = torch_backend.average_alike_cells(grids.double(), activations.double(), config)
    for image in range(shape[0]):
        features = activations[image].flatten(1).T.double()
        affinity = cosine_similarity(features - centring * features.mean(0)).clip(0) ** power
        values = grids[image].double().flatten().numpy()
        if not math.isinf(of_range):
            affinity *= rbf_kernel(values[:, None], gamma=1 / (2 * (of_range * abs(values).mean()) ** 2))
        mass = affinity.sum(1)
        expected = np.where(mass > 0, affinity @ values / np.maximum(mass, 1e-30), values)
        assert_close(average[image].flatten(), expected, torch.float64)
    if power <= 4:  # the power multiplies the rounding of the cosine
        assert_close(torch_backend.average_alike_cells(grids, activations, config), average)
    if power <= 1 and shape[1] > 10 and centring == 0:  # random features then have a cosine of about a third
        assert (average - grids).abs().max() > 0.1 * grids.abs().max()
    constant = torch_backend.average_alike_cells(torch.ones_like(grids), activations + 1, config)
    assert_close(constant, torch.ones_like(grids))


# Grids and guides: twice the sides; ratios that are not whole, primes; one row; a guide no finer than the grid, and one
# finer in one direction alone.
GUIDES = [
    ((7, 7), (14, 14)),
    ((5, 3), (11, 8)),
    ((1, 6), (1, 13)),
    ((6, 7), (6, 7)),
    ((4, 4), (9, 4)),
    ((7, 1), (7, 1)),
]


@pytest.mark.parametrize("grid, fine", GUIDES)
@pytest.mark.parametrize(
    "power, sigma, steps, guide_power, centring, of_range",
    [
        *((2, 2, 2, 0.5, *others) for others in ((1, 1.5), (0.75, 0.3), (0, math.inf))),
        *((0.5, 0.7, 1, 0, 0, 3), (3, math.inf, 3, 2, 1, 1), (1, 1e-20, 2, 1, 0, 1), (2, 1.4, 0, 1, 1, 1)),
    ],
)
def test_average_on_a_guide_equals_the_reference(
    grid, fine, power, sigma, steps, guide_power, centring, of_range, seed
):
    config = CFCAMConfig(
        affinity_power=power,
        affinity_sigma=sigma,
        affinity_steps=steps,
        guide_power=guide_power,
        affinity_centring=centring,
        affinity_range=of_range,
    )
    guide = torch.randn(4, 13, *fine).relu()
    guide[0, :, 0, 0] = 0  # without features
    guide[1] = 0
    guide[2] = torch.rand(13, 1, 1)  # all alike
    for layout in (guide, guide.contiguous(memory_format=torch.channels_last), F.pad(guide, (1, 2))[..., 1:-2]):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            features = layout.to(dtype)
            grids = torch.randn(4, *grid, dtype=torch.promote_types(dtype, torch.float32))
            average = torch_backend.average_alike_cells(grids, features, config)
            assert average.shape == (4, *(fine if steps else grid)) and average.dtype == grids.dtype
            assert_close(average, by_reference(grids, features, config), grids.dtype)
    if steps:
        resized = F.interpolate(grids[1:2, None], fine, mode="bilinear")[0, 0]
        least = 1e-30 ** (guide_power / 2)
        torch.testing.assert_close(
            average[1], resized * least, msg="without features every cell keeps its value", atol=0, rtol=1e-5
        )
    expanded = guide[:1, :, :1, :1].add(1).expand(4, 13, *fine)  # stride 0
    assert_close(
        torch_backend.average_alike_cells(grids, expanded, config), by_reference(grids, expanded, config), grids.dtype
    )
    several = torch.stack([grids, -2 * grids], 1)
    both = torch_backend.average_alike_cells(several, guide, config)
    assert_close(both[:, 1], -2 * both[:, 0])
    assert_close(both[:, 0], by_reference(grids, guide, config))


@pytest.mark.parametrize("sigma", [0.4, 1.5, 2.0])
def test_the_average_of_cells_all_alike_is_a_gaussian_filter(sigma, rng):
    grids, guide = rng.normal(size=(1, 6, 9)), torch.ones(1, 3, 12, 27).double()
    config = CFCAMConfig(
        affinity_sigma=sigma, affinity_steps=1, guide_power=0, affinity_centring=0, affinity_range=math.inf
    )

    def filtered(image):  # truncated at three sigma of the grid's cells, each two or three of the guide's
        for axis, finer in ((0, 2), (1, 3)):
            reach = int(3 * sigma * finer + 1e-9)
            taps = np.exp(-((np.arange(-reach, reach + 1) / finer / sigma) ** 2) / 2)
            image = correlate1d(image, taps, axis, mode="constant")
        return image

    fine = F.interpolate(torch.from_numpy(grids)[None], (12, 27), mode="bilinear")[0, 0].numpy()
    expected = filtered(fine) / filtered(np.ones_like(fine))
    assert_close(torch_backend.average_alike_cells(torch.from_numpy(grids), guide, config)[0], expected, torch.float64)
    # SciPy's own Gaussian where the rounding of its radius is the window's.
    own = torch_backend.average_alike_cells(torch.from_numpy(grids), torch.ones(1, 1, 6, 9), config)[0]
    scipy = [
        gaussian_filter(image, sigma, mode="constant", radius=int(3 * sigma + 1e-9))
        for image in (grids[0], grids[0] * 0 + 1)
    ]
    assert_close(own, scipy[0] / scipy[1], torch.float64)


def test_what_all_cells_have_in_common_makes_none_alike(seed):
    guide, grids, config = torch.randn(2, 8, 6, 5), torch.randn(2, 3, 5), CFCAMConfig(affinity_centring=1)
    average = torch_backend.average_alike_cells(grids, guide, config)
    shifted = torch_backend.average_alike_cells(grids, guide + 10 * torch.randn(2, 8, 1, 1), config)
    torch.testing.assert_close(shifted, average, rtol=1e-4, atol=1e-4)
    # All of a cell in common: what is left is rounding, and the sum is as it was, wherever the mean was rounded to.
    config = CFCAMConfig(affinity_centring=1, guide_power=0)
    resized = torch_backend.resize(grids, (6, 5))
    for of_all in torch.rand(20, 1, 8, 1, 1):
        kept = torch_backend.average_alike_cells(grids, of_all.expand(2, 8, 6, 5), config)
        assert_close(kept, resized)
        assert_close(by_reference(grids, of_all.expand(2, 8, 6, 5), config), resized.double().numpy())


def test_features_that_are_nan_are_none(seed):
    guide, grids = torch.randn(2, 8, 6, 5), torch.randn(2, 3, 5)
    guide[0, 3, 2, 2], guide[1, 0, 0, 0] = torch.nan, torch.inf
    without = guide.clone()
    without[0, :, 2, 2] = without[1, :, 0, 0] = 0
    plain = CFCAMConfig(affinity_centring=0)
    average = torch_backend.average_alike_cells(grids, guide, plain)
    assert torch.equal(average, torch_backend.average_alike_cells(grids, without, plain))
    for config in (plain, CFCAMConfig()):
        average = torch_backend.average_alike_cells(grids, guide, config)
        assert_close(average, by_reference(grids, guide, config))
    weights, activations = torch.randn(2, 8), guide.nan_to_num(torch.nan, 0)
    left_out = torch_backend.class_grid(activations, weights, False, skip_nan=True, config=CFCAMConfig())
    sums = torch_backend.class_grid(activations, weights, False, skip_nan=True)
    sums = torch_backend.balance(sums, (6, 5), CFCAMConfig())
    assert_close(left_out, by_reference(sums, activations, CFCAMConfig()))


# All cells at once, some rows, one row, and parts of one row; kept between the steps, and made again for each.
@pytest.mark.parametrize("block_bytes", [2**20, 9000, 4000, 300])
@pytest.mark.parametrize("sigma", [0.6, math.inf])
def test_average_of_alike_cells_in_blocks(block_bytes, sigma, seed, monkeypatch):
    guide, grids, config = torch.randn(3, 20, 13, 11), torch.randn(3, 2, 9, 5), CFCAMConfig(affinity_sigma=sigma)
    guide[1, :, 8, 4] = 0
    whole = torch_backend.average_alike_cells(grids, guide, config)
    assert_close(whole[:, 0], by_reference(grids[:, 0], guide, config))
    monkeypatch.setattr(torch_backend, "AFFINITY_BYTES_ON_CPU", block_bytes)
    for kept in (torch_backend.AFFINITY_BYTES, 1):  # then one class at a time, too
        monkeypatch.setattr(torch_backend, "AFFINITY_BYTES", kept)
        assert_close(torch_backend.average_alike_cells(grids, guide, config), whole)


def test_blocks_of_a_large_grid_stay_small(monkeypatch):
    sizes, blocks = [], torch_backend.affinities

    def measured(*arguments):
        for start, affinity in blocks(*arguments):
            sizes.append(affinity.numel() * affinity.element_size())
            yield start, affinity

    monkeypatch.setattr(torch_backend, "affinities", measured)
    guide = torch.rand(1, 4, 160, 160)
    torch_backend.average_alike_cells(guide[:, 0], guide, CFCAMConfig())
    assert max(sizes) <= torch_backend.AFFINITY_BYTES_ON_CPU
    assert sum(sizes) < 160**4 * 4 / 10, "the window leaves most pairs out"


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_affinity_equals_the_reference(power, seed):
    for shape, guide in (((3, 127, 7, 7), None), ((2, 40, 12, 5), (2, 31, 25, 9)), ((3, 127, 7, 7), (3, 40, 14, 14))):
        config = CFCAMConfig(affinity_power=power)
        guide = guide and torch.randn(guide).relu()
        compare_with_reference(activations_like(shape), torch.randn(shape), config, guide=guide)


def test_affinity_takes_extreme_values(seed):
    """Squares that underflow make a cell without features; nothing becomes NaN."""
    activations, gradients = activations_like((2, 64, 5, 5)), torch.randn(2, 64, 5, 5)
    for scale in (1e-30, 1e-18, 1e15):
        maps = cf_cam(activations * scale, gradients, (9, 9), CFCAMConfig(affinity_power=4.0)).maps
        assert maps.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_image_is_its_own_problem(preset, seed):
    activations, gradients = activations_like((5, 96, 7, 7)), torch.randn(5, 96, 7, 7)
    activations[2] = 0
    batch = cf_cam(activations, gradients, (32, 32), PRESETS[preset])
    for image in range(5):
        alone = cf_cam(activations[image : image + 1], gradients[image : image + 1], (32, 32), PRESETS[preset])
        for of_batch, of_one in zip(batch[1:], alone[1:]):
            assert torch.equal(of_batch[image], of_one[0])
        # The library behind torch.bmm adds up in another order in batches of another size, on some processors.
        stretch = stretch_of_map(activations[image], alone.weights[0], (32, 32), PRESETS[preset])
        assert_close(batch.maps[image], alone.maps[0], stretch=stretch)


def test_memory_format_does_not_matter(seed):
    activations, gradients = activations_like((2, 96, 7, 6)), torch.randn(2, 96, 7, 6)
    expected = cf_cam(activations, gradients, (32, 32))
    channels_last = torch.channels_last
    sliced = torch.full((4, 96, 7, 9), torch.nan)
    sliced[::2, :, :, 1:7] = activations
    for result in (
        cf_cam(activations.to(memory_format=channels_last), gradients.to(memory_format=channels_last), (32, 32)),
        cf_cam(sliced[::2, :, :, 1:7], gradients, (32, 32)),
    ):
        for actual, wanted in zip(result, expected):
            assert torch.equal(actual, wanted)
    expanded = torch.randn(2, 96, 1, 1)  # the gradient of an average pool, stride 0 over the grid
    for actual, wanted in zip(
        cf_cam(activations, expanded.expand(2, 96, 7, 6)), cf_cam(activations, expanded.repeat(1, 1, 7, 6))
    ):
        assert torch.equal(actual, wanted)


def test_chunks_of_the_batched_path_do_not_matter(seed, monkeypatch):
    activations = activations_like((5, 40, 5, 5))
    whole = cluster_channels(activations, clustering="batched")
    monkeypatch.setattr(batched, "CHUNK_BYTES", 1)  # one image at a time
    one_by_one = cluster_channels(activations, clustering="batched")
    assert torch.equal(whole[0], one_by_one[0]) and torch.equal(whole[1], one_by_one[1])


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(7, 7), (1, 5), (13, 2)])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 8.0])  # radius 1 to 32: far wider than the grid too
def test_filter_equals_scipy(boundary, shape, sigma, rng):
    grid = rng.normal(size=shape)
    expected = gaussian_filter(grid, sigma, mode=boundary, truncate=4.0)
    rows, columns = (filter_matrix(size, sigma, boundary) for size in shape)
    assert_close(rows @ grid @ columns.T, expected, torch.float64)
    # The mean of the filtered grid is one dot product.
    pooled = (grid * pooling_weights(shape, (sigma, sigma), boundary)).sum()
    assert pooled == pytest.approx(expected.mean(), abs=1e-13)


def test_reflect_changes_no_pooled_weight():
    np.testing.assert_allclose(pooling_weights((7, 5), (1.3, 1.3), "reflect"), 1 / 35)


def test_filtered_gradients_equal_the_reference(seed):
    activations, gradients = activations_like((3, 80, 7, 5)), torch.randn(3, 80, 7, 5)
    for boundary in BOUNDARIES:
        config = CFCAMConfig(boundary=boundary, sigma=1.5)
        labels = cf_cam(activations, gradients, config=config).labels
        assert {-2, -1, 0} <= set(labels.flatten().tolist())
        expected = [
            reference.filter_gradients(of_image, of_labels, config)
            for of_image, of_labels in zip(gradients.double().numpy(), labels.numpy())
        ]
        filtered = torch_backend.filter_gradients(gradients, labels, config)
        assert_close(filtered, np.stack(expected))
        # Pooling the filtered gradients gives the weights that are computed without filtering.
        assert_close(torch_backend.channel_weights(gradients, labels, config), filtered.mean((2, 3)))


@pytest.mark.parametrize("old, new", [((7, 7), (224, 224)), ((5, 8), (5, 8)), ((14, 9), (6, 31)), ((1, 3), (7, 2))])
def test_reference_resize_equals_torch(old, new, rng):
    grid = rng.normal(size=old)
    expected = F.interpolate(torch.from_numpy(grid)[None, None], new, mode="bilinear", align_corners=False)[0, 0]
    assert_close(reference.resize(grid, new), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_flat_and_empty_maps(dtype, backend):
    ones, zeros = torch.ones(1, 3, 3, 3, dtype=dtype), torch.zeros(1, 3, 3, 3, dtype=dtype)
    for normalize, value in (("max", 1.0), ("minmax", 0.0)):
        config = CFCAMConfig(normalize=normalize)
        for scale in (1e-4, 0.3, 7.0):  # 0.3: interpolating a constant does not give it back exactly
            flat = cf_cam(ones * scale, ones * scale, (50, 31), config, backend)
            assert (flat.maps == value).all()
        for activations, gradients in ((zeros, ones), (ones, zeros), (ones, -ones), (zeros, zeros)):
            assert (cf_cam(activations, gradients, (50, 31), config, backend).maps == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_kept_channel_gives_zeros(backend, preset, rng):
    config = CFCAMConfig(
        dominant_percentile=100.0,
        eps_percentile=0.0,
        min_samples_fraction=1.0,
        weighting=PRESETS[preset].weighting,
    )
    activations = torch.from_numpy(rng.normal(size=(2, 20, 4, 4))).float()
    result = cf_cam(activations, torch.ones(2, 20, 4, 4), (8, 8), config, backend)
    assert (result.labels == -1).all()
    assert (result.weights == 0).all() and (result.maps == 0).all()


def test_min_and_max_of_the_two_scalings(seed):
    activations, gradients = activations_like((4, 64, 7, 7)), torch.randn(4, 64, 7, 7).abs()
    gradients[3] = -gradients[3]  # a map of zeros
    for normalize, backend in itertools.product(("minmax", "max"), ("torch", "reference")):
        maps = cf_cam(activations, gradients, (20, 20), CFCAMConfig(normalize=normalize), backend).maps
        assert maps.amax((1, 2)).tolist() == [1, 1, 1, 0]
        lowest = maps.amin((1, 2))
        assert (lowest == 0).all() if normalize == "minmax" else (lowest[:3] > 0).any()


def test_published_weights_hardly_depend_on_the_gradient(seed):
    """What the specification says of the published softmax, so that nobody is surprised by it."""
    activations = activations_like((1, 256, 7, 7))
    maps = [cf_cam(activations, torch.randn(1, 256, 7, 7) * 1e-3, (56, 56), CFCAMConfig.paper()).maps for _ in range(2)]
    assert (maps[0] - maps[1]).abs().max() < 0.01
