"""The Triton kernels: in the interpreter on a CPU, at small shapes; on a GPU, where there is one, at real ones.

Labels are exact for the kernels' own distances and eps; everything else is compared with the float64 reference. The
allocations of the launchers are poisoned, so that a value that no kernel wrote shows.
"""

import math

import numpy as np
import pytest
import torch
from compare import assert_close, averaged, stretch_of_map
from device import DEVICE, GPU, launched, on_gpu_only
from problems import CLUSTERING_KINDS, activations_like, clustering_rows, equal_labels, random_config
from scipy.ndimage import gaussian_filter as gaussian_filter_scipy
from sklearn.cluster import DBSCAN

pytest.importorskip("triton", reason="triton is not installed")

from cfcam_gpu import CFCAMConfig, cf_cam, cluster_channels, reference, torch_backend, triton_backend
from cfcam_gpu.config import BOUNDARIES, FLAT_RANGE, GRAD_CAM_EPSILON
from cfcam_gpu.gaussian import filter_matrix
from cfcam_gpu.kernels import connected_components, launch
from cfcam_gpu.kernels.centred_features import centred_features
from cfcam_gpu.kernels.channel_statistics import channel_statistics
from cfcam_gpu.kernels.class_map import resize_as_grad_cam, resize_normalize
from cfcam_gpu.kernels.dominant_channels import dominant_channels
from cfcam_gpu.kernels.gaussian_filter import gaussian_filter
from cfcam_gpu.kernels.pairwise_distances import distance_matrices, pairwise_distances

pytestmark = pytest.mark.usefixtures("poisoned")


def kernel_distances(activations, config):
    """The kernels' own distances, one float64 matrix per image, and the clustered channels."""
    transposed, squared_norm, _, _ = channel_statistics(activations)
    n_channels, unit = activations.shape[1], config.descriptor == "unit"
    rank = None
    if config.dominant_percentile < 100:
        rank = triton_backend.dominant_rank(n_channels, config.dominant_percentile)
    max_rows = triton_backend._max_rows(n_channels, config)
    _, member, n_rows, descriptors, _, histogram, _ = dominant_channels(squared_norm, transposed, rank, max_rows, unit)
    distances = pairwise_distances(descriptors, n_rows, histogram)
    members = [of_image[:n].long().cpu() for of_image, n in zip(member, n_rows.tolist())]
    return [matrix.cpu().numpy() for matrix in distance_matrices(distances, n_rows)], members


def check_labels(activations, config):
    """Labels and eps of the kernels against scikit-learn on their own distances; returns the numbers of clusters."""
    labels, eps = triton_backend.cluster_channels(activations.to(DEVICE), config, "batched")
    n_clusters = []
    for image, (distances, members) in enumerate(zip(*kernel_distances(activations.to(DEVICE), config))):
        n = len(distances)
        expected_eps = reference.neighbourhood_radius(distances, config)
        assert float(eps[image]) == pytest.approx(expected_eps, rel=1e-6)
        expected = np.full(n, -1)
        if n > 1:
            np.testing.assert_array_equal(distances <= float(eps[image]), distances <= expected_eps)
            dbscan = DBSCAN(eps=float(eps[image]), min_samples=config.min_samples(n), metric="precomputed")
            expected = dbscan.fit(distances).labels_
        np.testing.assert_array_equal(labels[image].cpu()[members], expected, err_msg=str(config))
        others = torch.ones(activations.shape[1], dtype=torch.bool)
        others[members] = False
        assert (labels[image].cpu()[others] < 0).all()
        dominant = reference.dominant_channels(reference.channel_norms(activations[image].double().numpy()), config)
        np.testing.assert_array_equal((labels[image] == -2).cpu(), dominant)
        n_clusters.append(expected.max(initial=-1) + 1)
    return n_clusters


@pytest.mark.parametrize("kind", CLUSTERING_KINDS)
def test_labels_equal_scikit_learn(kind, rng):
    for n in (1, 2, 65, 129) if not GPU else (1, 2, 37, 64, 65, 300, 511, 1536):
        rows = torch.from_numpy(clustering_rows(rng, n, kind))
        for _ in range(1 if not GPU else 12):
            check_labels(rows[None, :, :, None], random_config(rng, dominant_percentile=100.0))


def test_many_clusters_and_borders(rng):
    found = set()
    for _ in range(6 if not GPU else 60):
        rows = torch.from_numpy(clustering_rows(rng, 100, "blobs"))
        percentile = float(rng.choice([1, 2, 4, 8]))
        config = CFCAMConfig(dominant_percentile=100.0, eps_percentile=percentile, min_samples_fraction=0.04)
        found.update(check_labels(rows[None, :, :, None], config))
    assert max(found) >= 3, "several clusters, so that numbering and the border rule matter"


def test_components_in_several_steps(rng, monkeypatch):
    monkeypatch.setitem(connected_components.ROWS, 128, 16)  # rows of a step, instead of all at once
    for kind in ("blobs", "line", "zeros"):
        rows = torch.from_numpy(clustering_rows(rng, 100, kind))
        config = CFCAMConfig(dominant_percentile=100.0, eps_percentile=3.0, min_samples_fraction=0.03)
        check_labels(rows[None, :, :, None], config)


def test_programs_of_large_batches(seed, monkeypatch):
    # Several tiles a program, the last of which has fewer; all cells of an image.
    for module in ("adjacency", "connected_components", "dominant_channels", "order_statistic"):
        monkeypatch.setattr(f"cfcam_gpu.kernels.{module}.PROGRAMS", 1)
    for percentile, descriptor in ((75.0, "raw"), (100.0, "unit")):
        config = CFCAMConfig(dominant_percentile=percentile, descriptor=descriptor)
        check_labels(activations_like((2, 260, 5, 3)), config)
    activations = activations_like((2, 70, 5, 4))
    for config in (CFCAMConfig(), CFCAMConfig.paper()):
        compare_with_reference(activations, torch.randn(activations.shape), config)


@pytest.mark.parametrize("programs, weighting", [(1, "signed"), (6, "softmax"), (1000, "signed"), (None, "softmax")])
def test_weights_and_sums_of_parts(programs, weighting, seed, monkeypatch):
    """Of one class, of three and with labels from elsewhere, however many programs share an image; None: none does."""
    if programs is None:
        monkeypatch.setattr(connected_components, "MOST_ROWS", 0)
    else:
        monkeypatch.setattr(connected_components, "PROGRAMS", programs)
    activations, config = activations_like((2, 37, 5, 3)).to(DEVICE), CFCAMConfig(weighting=weighting)
    gradients = torch.randn(2, 3, 37, 5, 3, device=DEVICE)
    of_three = triton_backend.cluster_and_weigh(activations, gradients, config, "batched")
    for k in (0, 2):
        cells, *result, sums = triton_backend._cluster_and_weigh(activations, gradients[:, k], config, "batched", True)
        assert torch.equal(result[0], of_three[0]) and torch.equal(result[2], of_three[2])
        assert_close(result[1], of_three[1][:, k])
        elsewhere = triton_backend.cluster_and_weigh(activations, gradients[:, k], config, "sklearn")
        assert torch.equal(result[0], elsewhere[0]) and torch.equal(result[2], elsewhere[2])
        assert_close(result[1], elsewhere[1])
        assert (sums is None) == (programs is None)
        if sums is not None:
            again = triton_backend.class_grid(cells[..., None], result[1], relu=False)[..., 0]
            np.testing.assert_allclose(sums.cpu(), again.cpu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_clusters", [2, 5])
def test_border_channels_of_several_clusters(n_clusters, rng):
    # On a line: clusters of 20, all within 1 of each other, and between two of them one that is near to 4 of each.
    centres = 3.0 * np.arange(n_clusters)
    rows = np.concatenate([(centres[:, None] + [0, 0.25, 0.5, 0.75, 1] * 4).ravel(), centres[:-1] + 2])
    rows = torch.from_numpy(rng.permutation(rows).astype(np.float32))
    n_near = (torch.pdist(rows[:, None]) <= 1).sum().item()
    percentile = 100 * (n_near - 1) / (len(rows) * (len(rows) - 1) // 2 - 1)
    config = CFCAMConfig(dominant_percentile=100.0, eps_percentile=percentile, min_samples_fraction=12 / len(rows))
    assert check_labels(rows[None, :, None, None], config) == [n_clusters]


@pytest.mark.skipif(GPU, reason="the interpreter's loads are watched")
def test_of_one_channel_no_neighbours_are_read(monkeypatch):
    # One channel is left to cluster: no one has written its neighbours.
    from triton.runtime import interpreter

    read, kernel = [], connected_components.connected_components_kernel
    load = interpreter.InterpreterBuilder.create_masked_load

    def watched(self, pointers, mask, *rest):
        read.append(pointers.data[mask.data])
        return load(self, pointers, mask, *rest)

    class Watched:
        def __getitem__(self, grid):
            def launch(bits, *args, **kwargs):
                monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
                kernel[grid](bits, *args, **kwargs)
                addresses = np.concatenate([each.ravel() for each in read]).astype(np.int64)
                inside = (addresses >= bits.data_ptr()) & (addresses < bits.data_ptr() + bits.nbytes)
                assert len(addresses) and not inside.any()

            return launch

    monkeypatch.setattr(connected_components, "connected_components_kernel", Watched())
    labels, _ = triton_backend.cluster_channels(activations_like((2, 2, 3, 3), 0.0), CFCAMConfig(), "batched")
    assert read and labels.shape == (2, 2)


def test_a_chain_needs_many_rounds(rng):
    # Points on a line in random order, each near the next alone: the slowest case for hooking and pointer jumping.
    n = 90 if not GPU else 1500
    rows = torch.from_numpy(rng.permutation(n).astype(np.float32))
    config = CFCAMConfig(dominant_percentile=100.0, eps_percentile=0.0, min_samples_fraction=0.0)
    assert check_labels(rows[None, :, None, None], config) == [1]


@pytest.mark.parametrize("descriptor", ["raw", "unit"])
@pytest.mark.parametrize("shape", [(2, 67, 5, 3), (2, 64, 1, 2), (1, 1, 2, 2), (2, 2, 1, 3), (1, 5, 14, 14)])
def test_batches_with_dominant_and_dead_channels(shape, descriptor, rng, seed):
    # One of them, drawn: in the interpreter each takes seconds.
    for percentile in rng.permutation([0.0, 50.0, 75.0, 100.0])[: None if GPU else 1]:
        activations = activations_like(shape)
        if percentile == 50.0:
            activations[0], activations[-1] = 0, 1
        config = random_config(rng, descriptor=descriptor, dominant_percentile=percentile)
        check_labels(activations, config)


def compare_with_reference(activations, gradients, config, output_size=(20, 31), guide=None):
    arguments = activations.to(DEVICE), gradients.to(DEVICE), output_size, config, "batched"
    result = triton_backend.cf_cam(*arguments, guide if guide is None else guide.to(DEVICE))
    maps, labels, weights, _ = (tensor.cpu() for tensor in result)
    doubles = [each if each is None else each.double() for each in (activations, gradients, guide)]
    expected = reference.cf_cam(*doubles[:2], output_size, config, doubles[2])
    for image in equal_labels(activations, labels, expected[1], config).nonzero()[:, 0].tolist():
        assert_close(weights[image], expected[2][image], activations.dtype)
        of_image = guide if guide is None else doubles[2][image]
        stretch = stretch_of_map(activations[image], expected[2][image], output_size, config, of_image)
        assert_close(maps[image], expected[0][image], activations.dtype, stretch)


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("config", [CFCAMConfig(), CFCAMConfig.paper()])
def test_equals_the_reference(dtype, config, seed):
    shape = (2, 70, 7, 7)
    gradients = (torch.randn(shape) * 1e-3).to(dtype)
    compare_with_reference(activations_like(shape, dtype=dtype), gradients, config)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(2, 33, 2, 3), (1, 40, 9, 8)])  # smaller than the filter; more than a block of cells
def test_boundaries(boundary, shape, seed):
    config = CFCAMConfig(boundary=boundary, sigma=1.7, eps_percentile=40.0)
    compare_with_reference(activations_like(shape), torch.randn(shape), config)


@on_gpu_only
@pytest.mark.parametrize("channels, side", [(512, 7), (960, 7), (1280, 7), (2048, 7), (512, 14), (768, 8), (4096, 7)])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_real_shapes(channels, side, batch, seed):
    shape = (batch, channels, side, side)
    activations, gradients = activations_like(shape), torch.randn(shape) * 1e-3
    check_labels(activations[:2], CFCAMConfig())
    arguments = activations.cuda(), gradients.cuda(), (224, 224), CFCAMConfig(), "batched"
    first, second = triton_backend.cf_cam(*arguments), triton_backend.cf_cam(*arguments)
    for one, two in zip(first, second):
        assert torch.equal(one, two), "two runs must be bit-identical"
    expected = torch_backend.cf_cam(activations, gradients, (224, 224), CFCAMConfig(), "host")
    same = equal_labels(activations, first[1], expected[1], CFCAMConfig())
    assert_close(first[2].cpu()[same], expected[2][same])
    for image in same.nonzero()[:, 0].tolist():
        stretch = stretch_of_map(activations[image], expected[2][image], (224, 224), CFCAMConfig())
        assert_close(first[0][image], expected[0][image], stretch=stretch)


def test_public_functions(seed):
    activations, gradients = activations_like((2, 40, 4, 4)).to(DEVICE), torch.randn(2, 40, 4, 4).to(DEVICE)
    result = cf_cam(activations, gradients, (9, 9), backend="triton")
    expected = cf_cam(activations, gradients, (9, 9), backend="torch")
    assert torch.equal(result.labels, expected.labels)
    for image in range(2):
        stretch = stretch_of_map(activations[image], expected.weights[image], (9, 9), CFCAMConfig())
        assert_close(result.maps[image], expected.maps[image], stretch=stretch)
    labels, eps = cluster_channels(activations, backend="triton")
    assert torch.equal(labels, result.labels) and torch.equal(eps, result.eps)
    by_sklearn, _ = cluster_channels(activations, backend="triton", clustering="sklearn")
    assert torch.equal(by_sklearn, labels)


def test_deterministic(seed):
    activations, gradients = activations_like((2, 80, 4, 4)).to(DEVICE), torch.randn(2, 80, 4, 4).to(DEVICE)
    first, second = (triton_backend.cf_cam(activations, gradients, (9, 9), CFCAMConfig(), "batched") for _ in range(2))
    for one, two in zip(first, second):
        assert torch.equal(one, two)


def test_strides(seed):
    activations, gradients = activations_like((2, 40, 4, 6)), torch.randn(2, 40, 1, 1).expand(2, 40, 4, 6)
    expected = triton_backend.cf_cam(
        activations.to(DEVICE), gradients.contiguous().to(DEVICE), (9, 9), CFCAMConfig(), "batched"
    )
    sliced = torch.full((4, 40, 4, 9), torch.nan)
    sliced[::2, :, :, 1:7] = activations
    for layout in (activations.to(memory_format=torch.channels_last), sliced[::2, :, :, 1:7]):
        # An expanded gradient has stride 0 over the grid, as after an average pool.
        result = triton_backend.cf_cam(layout.to(DEVICE), gradients.to(DEVICE), (9, 9), CFCAMConfig(), "batched")
        for actual, wanted in zip(result, expected):
            assert torch.equal(actual, wanted)


def test_chunks_do_not_matter(seed, monkeypatch):
    arguments = activations_like((3, 40, 4, 4)).to(DEVICE), torch.randn(3, 40, 4, 4).to(DEVICE), (9, 9)
    guide = torch.rand(3, 7, 5, 6, device=DEVICE)
    whole = triton_backend.cf_cam(*arguments, CFCAMConfig(), "batched", guide)
    monkeypatch.setattr(triton_backend, "WORKSPACE_BYTES", 1)
    for one, two in zip(whole, triton_backend.cf_cam(*arguments, CFCAMConfig(), "batched", guide)):
        assert torch.equal(one, two)
    for one, two in zip(whole[1:], triton_backend.cluster_and_weigh(*arguments[:2], CFCAMConfig(), "batched")):
        assert torch.equal(one, two)


def test_flat_and_empty_maps():
    ones, zeros = torch.ones(1, 3, 3, 3, device=DEVICE), torch.zeros(1, 3, 3, 3, device=DEVICE)
    for normalize, value in (("max", 1.0), ("minmax", 0.0)):
        config = CFCAMConfig(normalize=normalize)
        for dtype in launch.DTYPES:
            flat = triton_backend.cf_cam((ones * 0.3).to(dtype), (ones * 0.3).to(dtype), (20, 31), config, "batched")
            assert (flat[0] == value).all()
        for activations, gradients in ((zeros, ones), (ones, zeros), (ones, -ones), (zeros, zeros)):
            assert (triton_backend.cf_cam(activations, gradients, (20, 31), config, "batched")[0] == 0).all()


@pytest.mark.parametrize("weighting", ["signed", "softmax"])
def test_no_kept_channel_gives_zeros(weighting, rng):
    config = CFCAMConfig(dominant_percentile=100.0, eps_percentile=0.0, min_samples_fraction=1.0, weighting=weighting)
    activations = torch.from_numpy(rng.normal(size=(2, 20, 2, 2))).float().to(DEVICE)
    maps, labels, weights, _ = triton_backend.cf_cam(activations, activations, (8, 8), config, "batched")
    assert (labels == -1).all() and (weights == 0).all() and (maps == 0).all()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(7, 7), (1, 5), (70, 3)])  # a block of cells and more
def test_filter_equals_scipy(boundary, shape, rng):
    grids = rng.normal(size=(5, *shape)).astype(np.float32)
    expected = [gaussian_filter_scipy(grid, 1.4, mode=boundary, truncate=4.0) for grid in grids.astype(np.float64)]
    matrices = (torch.tensor(filter_matrix(n, 1.4, boundary)).float().to(DEVICE) for n in shape)
    assert_close(gaussian_filter(torch.from_numpy(grids).to(DEVICE), *matrices), np.stack(expected))


def test_filtered_gradients_equal_the_torch_backend(seed):
    activations, gradients = activations_like((2, 40, 6, 4)).to(DEVICE), torch.randn(2, 40, 6, 4).to(DEVICE)
    labels, _ = triton_backend.cluster_channels(activations, CFCAMConfig(), "batched")
    expected = torch_backend.filter_gradients(gradients.double(), labels, CFCAMConfig())
    assert_close(triton_backend.filter_gradients(gradients, labels, CFCAMConfig()), expected)


@pytest.mark.parametrize(
    "channels, old, new",
    [
        (37, (7, 7), (40, 33)),
        (37, (5, 8), (5, 8)),
        (37, (14, 9), (6, 31)),
        (600, (1, 3), (7, 2)),  # more than a block of channels
        (600, (5, 8), (5, 8)),
    ],
)
def test_map_kernels_equal_torch(channels, old, new, seed):
    activations = torch.randn(2, channels, *old)
    for weights in (torch.randn(2, channels), torch.randn(2, channels, *old)):  # of a channel, of a cell
        for relu in (True, False):
            expected = torch_backend.class_grid(activations.double(), weights.double(), relu)
            for layout in (activations, activations.to(memory_format=torch.channels_last)):
                grid = triton_backend.class_grid(layout.to(DEVICE), weights.to(DEVICE), relu)
                assert_close(grid, expected)
    grid = grid.relu()
    for config in (CFCAMConfig(), CFCAMConfig.paper()):
        maps = resize_normalize(grid, new, FLAT_RANGE, config.normalize)
        assert_close(maps, torch_backend.normalize(torch_backend.resize(grid.double(), new), config))


# One block of cells and more, and more than a block of channels; a grid and its guide: none, twice the sides, a ratio
# that is not whole, primes, one row, finer in one direction alone.
GRIDS = [
    ((3, 37, 3, 5), None),
    ((1, 20, 12, 13), None),
    ((2, 5, 5, 6), (17, 10, 12)),
    ((2, 5, 5, 3), (19, 11, 8)),
    ((2, 5, 1, 6), (7, 1, 13)),
    ((2, 5, 4, 4), (16, 9, 4)),
]


@pytest.mark.parametrize(
    "shape, fine, power, sigma, steps, centring, of_range",
    [
        *((*grids, 2, 2, 2, 0.75, 1.5) for grids in GRIDS),
        (*GRIDS[2], 0.5, 0.7, 1, 0, math.inf),
        (*GRIDS[1], 4, math.inf, 1, 0, math.inf),
        (*GRIDS[3], 1, 1e-20, 3, 1, math.inf),
    ],
)
@pytest.mark.parametrize("stored", [True, False])
def test_affinity_sum_equals_the_torch_backend(
    shape, fine, power, sigma, steps, centring, of_range, stored, seed, monkeypatch
):
    """With the products of cells stored, in chunks of one image; and computed in every step, as for large guides."""
    monkeypatch.setattr(f"cfcam_gpu.kernels.affinity_sum.STORED_{'BYTES' if stored else 'CELLS'}", 1)
    if shape == GRIDS[0][0]:
        monkeypatch.setattr("cfcam_gpu.kernels.affinity_sum.STORED_CELLS_AT_ONCE", 2)
    config = CFCAMConfig(
        affinity_power=power,
        affinity_sigma=sigma,
        affinity_steps=steps,
        affinity_centring=centring,
        affinity_range=of_range,
    )
    activations = torch.randn(shape).relu()
    guide = fine and torch.randn(shape[0], *fine).relu()
    features = activations if guide is None else guide
    features[0, :, 0, 0] = 0  # a cell without features
    weights = torch.randn(shape[:2] if guide is None else shape)  # of a channel, of a cell
    expected = torch_backend.class_grid(activations.double(), weights.double(), False, config=config, guide=guide)
    arguments = activations.to(DEVICE), weights.to(DEVICE)
    layout = guide if guide is None else strided(guide).to(DEVICE)
    signed, positive = (
        triton_backend.class_grid(*arguments, relu, config=config, guide=layout) for relu in (False, True)
    )
    # Averages of random signs may nearly cancel: the error is measured against the terms.
    of_cells = weights.double() if weights.ndim == 4 else weights.double()[:, :, None, None]
    size = (activations.double() * of_cells).abs().sum(1).max()
    assert (signed.cpu() - expected).abs().max() <= 1e-6 * size
    assert torch.equal(positive, signed.relu())


# One cell, a prime, a block of 256 cells and one more, a row of several blocks; one channel, and more than a block.
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 300, 1, 7), (2, 9, 16, 16), (1, 17, 1, 257), (1, 1, 3, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_centred_features(shape, dtype, seed, poisoned):
    guide = (torch.randn(shape) + 1).to(dtype)
    guide[:, 0] = 0.1  # all that is left of it is rounding
    guide[0, -1, 0, 0] = torch.inf
    layout = strided(guide).to(DEVICE)
    for centring in (0.3, 1.0):
        features = centred_features(layout, centring).cpu()
        assert features.dtype == torch.float32 and features.is_contiguous()
        exact = guide.double()
        known = exact.masked_fill(~exact.isfinite(), 0)
        expected = exact - centring * known.mean((2, 3), keepdim=True)
        # A difference may nearly cancel: the error is measured against the terms.
        assert torch.allclose(features.double(), expected, rtol=1e-6, atol=1e-6 * known.abs().max())
        if centring == 1 and shape[1] > 1:
            assert not features[:, 0].any()


def strided(guide):
    """The same values in one of several layouts, at random."""
    layouts = (
        guide,
        guide.contiguous(memory_format=torch.channels_last),
        torch.nn.functional.pad(guide, (2, 1, 0, 3), value=torch.nan)[:, :, : guide.shape[2], 2:-1],
        guide.repeat_interleave(2, 1)[:, ::2],
    )
    return layouts[torch.randint(len(layouts), ())]


@pytest.mark.parametrize("kind", ["dead", "alike", "expanded", "nan", "float64"])
def test_awkward_guides(kind, seed):
    activations, weights, guide = torch.rand(2, 6, 4, 5), torch.randn(2, 6), torch.randn(2, 9, 8, 9)
    if kind == "dead":
        guide[1] = 0
    elif kind == "alike":
        guide[:] = torch.rand(9, 1, 1)
    elif kind == "expanded":
        guide = guide[:, :, :1, :1].expand_as(guide)
    elif kind == "nan":
        guide[0, 3, 2, 2], guide[1, 0, 7, 8] = torch.nan, torch.inf
    else:
        guide = guide.double()
    grid = triton_backend.class_grid(
        activations.to(DEVICE), weights.to(DEVICE), False, config=CFCAMConfig(), guide=guide.to(DEVICE)
    )
    sums = torch.einsum("bc,bchw->bhw", weights.double(), activations.double())
    assert_close(grid, averaged(sums, guide))


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("shape, fine", [((2, 70, 5, 4), None), ((1, 33, 5, 4), (1, 17, 11, 9))])
def test_affinity_equals_the_reference(shape, fine, dtype, seed):
    activations, gradients = activations_like(shape, dtype=dtype), torch.randn(shape).to(dtype)
    guide = fine and torch.randn(fine).relu().to(dtype)
    config = CFCAMConfig(affinity_power=3.0, affinity_steps=1) if guide is None else CFCAMConfig()
    compare_with_reference(activations, gradients, config, guide=guide)


@on_gpu_only
@pytest.mark.parametrize(
    "shape, fine",
    [
        ((64, 2048, 7, 7), (64, 1024, 14, 14)),
        ((3, 512, 14, 14), (3, 256, 28, 28)),
        ((1, 256, 56, 56), None),
        ((1, 32, 160, 160), None),
    ],
)
def test_affinity_at_real_shapes(shape, fine, seed):
    activations, weights = activations_like(shape), torch.randn(shape[:2])
    guide = fine and torch.randn(fine).relu()
    config = CFCAMConfig(affinity_power=4.0)
    expected = torch_backend.class_grid(activations.double(), weights.double(), config=config, guide=guide)
    arguments, on_device = (activations.cuda(), weights.cuda()), guide if guide is None else guide.cuda()
    first, second = (triton_backend.class_grid(*arguments, config=config, guide=on_device) for _ in range(2))
    assert torch.equal(first, second), "two runs must be bit-identical"
    assert_close(first, expected)


def test_terms_that_are_nan_are_left_out(seed):
    activations, weights = torch.randn(2, 37, 3, 5), torch.randn(2, 37)
    weights[:, 3] = torch.nan
    weights[:, 4], activations[:, 4] = torch.inf, 0
    activations[:, 5, 1] = torch.nan
    expected = (activations.double() * weights.double()[:, :, None, None]).nansum(1)
    for dtype in launch.DTYPES:
        if dtype != torch.float32:
            activations, weights = activations.to(dtype), weights.to(dtype)
            expected = (activations.double() * weights.double()[:, :, None, None]).nansum(1)
        arguments = activations.to(DEVICE), weights.to(DEVICE)
        assert_close(triton_backend.class_grid(*arguments, relu=False, skip_nan=True), expected, dtype)
        assert triton_backend.class_grid(*arguments, relu=False).isnan().all()
        guide = torch.rand(2, 4, 6, 5)
        average = triton_backend.class_grid(*arguments, False, True, CFCAMConfig(), guide.to(DEVICE))
        assert_close(average, averaged(expected, guide), dtype)


# One layer; several of different sizes, one of which is enlarged and one of which shrinks; more than a block of cells.
@pytest.mark.parametrize("sizes", [[(7, 7)], [(1, 1)], [(5, 8), (7, 3)], [(40, 33), (3, 2), (20, 31)]])
@pytest.mark.parametrize("new", [(45, 40)])  # more than a block of pixels
def test_scaling_equals_pytorch_grad_cam(sizes, new, seed):
    image = pytest.importorskip(
        "pytorch_grad_cam.utils.image", reason="pytorch-grad-cam is not installed (extra: test)"
    )
    base_cam = pytest.importorskip("pytorch_grad_cam.base_cam")
    grids = [torch.randn(7, *size).relu() * 10.0 ** torch.randint(-3, 3, (7, 1, 1)) for size in sizes]
    for grid in grids:
        grid[1] = 0
        grid[2] = 0.3  # flat
        for row, peak in ((3, 1e-7), (6, 1e-13)):  # as small as the epsilon before the one scaling, and the other
            grid[row] *= peak / grid[row].amax().clamp_min(1e-7)
        grid[4] += 1e3  # most digits are in the minimum
    grids[0][5] = 0
    scaled = [image.scale_cam_image(grid.numpy(), new[::-1]) for grid in grids]
    expected = base_cam.BaseCAM.aggregate_multi_layers(None, [layer[:, None] for layer in scaled])
    on_device = [grid.to(DEVICE) for grid in grids]
    maps = resize_as_grad_cam(on_device, new, GRAD_CAM_EPSILON)
    # The mean of several layers may span less than 0 to 1, and its scaling stretches the rounding with it.
    span = np.ptp(np.mean(scaled, axis=0), axis=(1, 2))
    # Where a pixel lies on the grid is rounded twice, in y and in x, and a scaled grid rises by 1 a cell at most.
    atol = GRAD_CAM_TOLERANCE + 4 * max(map(max, sizes)) * 2.0**-24
    tolerance = atol / np.where(span > 0, np.minimum(span, 1), 1)
    for judge in (expected, torch_backend.grad_cam_maps(grids, new).numpy()):
        assert (np.abs(maps.cpu().numpy() - judge).max((1, 2)) <= tolerance).all()
    for grid, layer in zip(on_device, scaled):
        maps = resize_as_grad_cam([grid], new, GRAD_CAM_EPSILON, scale_mean=False)
        np.testing.assert_allclose(maps.cpu(), layer, rtol=0, atol=atol)
    mean = resize_as_grad_cam(on_device, new, GRAD_CAM_EPSILON, scale_mean=False)
    np.testing.assert_allclose(mean.cpu(), np.mean(scaled, axis=0), rtol=0, atol=atol)


GRAD_CAM_TOLERANCE = 2e-6
"""As on a CPU: the maps reach 1, and the scaling adds nothing up that could cancel."""


def test_one_launch_a_layer(seed, monkeypatch):
    names = launched(monkeypatch)
    for layers in (1, 2, 3):
        names.clear()
        resize_as_grad_cam([torch.rand(2, 4, 4).to(DEVICE)] * layers, (9, 9), GRAD_CAM_EPSILON)
        assert names == ["resize_normalize_kernel"] * layers


@pytest.mark.parametrize("batch, steps, centring", [(1, 0, 1), (1, 2, 0), (4, 3, 0.5)])
def test_eight_launches_a_batch_and_for_the_average_one_a_step(batch, steps, centring, seed, monkeypatch):
    """And one for features that are centred."""
    names = launched(monkeypatch)
    shape, config = (batch, 20, 3, 3), CFCAMConfig(affinity_steps=steps, affinity_centring=centring)
    activations, gradients = activations_like(shape).to(DEVICE), torch.randn(shape).to(DEVICE)
    guide = torch.rand(batch, 7, 5, 6, device=DEVICE)
    triton_backend.cf_cam(activations, gradients, (9, 9), config, "batched", guide)
    if steps and centring:
        assert names.pop(0) == "centred_features_kernel"
    assert len(names) == 8 + steps, names
    assert names.count("affinity_sum_kernel") == steps
    with_maps = names.copy()
    names.clear()
    triton_backend.cluster_and_weigh(activations, gradients, config, "batched")
    assert names == with_maps[: -1 - steps], "neither the sum's average nor the maps"


def test_launchers_never_wait(seed, monkeypatch):
    """Between the gradients and the maps the host does nothing but allocate and launch."""
    from no_sync import NoSynchronisation

    shape = (2, 20, 3, 3)
    arguments = activations_like(shape).to(DEVICE), torch.randn(shape).to(DEVICE), (9, 9), CFCAMConfig(), "batched"
    arguments += (torch.rand(2, 7, 5, 6, device=DEVICE),)
    triton_backend.cf_cam(*arguments)  # constants are made once
    launched(monkeypatch, run=GPU)
    with NoSynchronisation():
        if GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            triton_backend.cf_cam(*arguments)
            grid = triton_backend.class_grid(arguments[0], arguments[1], relu=True, skip_nan=True)
            triton_backend.grad_cam_maps([grid, grid], (9, 9))
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu_only
def test_capturable_in_a_graph(seed):
    activations, gradients = activations_like((2, 256, 7, 7)).cuda(), torch.randn(2, 256, 7, 7).cuda()
    cf_cam(activations, gradients, (56, 56))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cf_cam(activations, gradients, (56, 56))
    for _ in range(2):
        activations.copy_(activations_like((2, 256, 7, 7)))
        graph.replay()
        for actual, expected in zip(result, cf_cam(activations, gradients, (56, 56))):
            assert torch.equal(actual, expected)


@on_gpu_only
def test_more_images_than_a_grid_axis(seed):
    activations = torch.rand(70_000, 8, 2, 2, device="cuda")
    result = cf_cam(activations, activations, (2, 2), backend="triton")
    last = cf_cam(activations[-1:], activations[-1:], (2, 2), backend="triton")
    for of_all, of_one in zip(result, last):
        assert torch.equal(of_all[-1], of_one[0])
    grids = [torch.rand(70_000, 2, 2, device="cuda"), torch.rand(70_000, 3, 2, device="cuda")]
    maps = triton_backend.grad_cam_maps(grids, (40, 40))
    assert torch.equal(maps[-1:], triton_backend.grad_cam_maps([grid[-1:] for grid in grids], (40, 40)))
