"""Labels: equal to scikit-learn's DBSCAN for a path's own distances and eps, and close to the float64 reference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import CLUSTERING_KINDS, activations_like, clustering_rows, pairs_at_the_edge, random_config
from scipy.spatial.distance import cdist, squareform
from sklearn.cluster import DBSCAN

from cfcam_gpu import CFCAMConfig, cluster_channels, reference
from cfcam_gpu.clustering import batched as batched_engine
from cfcam_gpu.clustering import host as host_engine
from cfcam_gpu.clustering.ranks import radius_ranks
from cfcam_gpu.config import EPS_FLOOR

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"


def sklearn_labels(distances, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_


def host(rows, config):
    """Labels, eps and the distances that the CPU path itself saw."""
    labels = np.full((1, len(rows)), -7, np.int32)
    (eps,) = host_engine.cluster_images(rows[None], np.ones((1, len(rows)), bool), labels, config)
    distances = host_engine.pairwise_distances(rows).astype(np.float64)
    return labels[0], float(eps), squareform(distances, checks=False)


def library():
    """The functions of `clustering/host.c`."""
    if host_engine.compiled() is None:
        pytest.skip("clustering/host.c is not built: no GCC when the package was installed, or it is not installed")
    return host_engine.compiled()


def compiled(rows, config):
    """The same, where it is not the one in NumPy."""
    library()
    return host(rows, config)


def in_numpy(rows, config):
    """The same from torch and NumPy, which stand in for what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_engine, "compiled", lambda: None)
        return host(rows, config)


def batched(rows, config):
    """The same from the path for accelerators, with padding that must not matter."""
    padded = torch.full((1, len(rows) + 3, rows.shape[1]), torch.nan)
    padded[0, : len(rows)] = torch.from_numpy(rows)
    n_rows = torch.tensor([len(rows)])
    is_row = torch.arange(padded.shape[1]) < n_rows[:, None]
    labels, eps = batched_engine.cluster_rows(padded, n_rows, config)
    distances = batched_engine.pairwise_distances(padded, is_row)[0, : len(rows), : len(rows)].double()
    assert (labels[0, len(rows) :] == -1).all()
    return labels[0, : len(rows)].numpy(), float(eps), distances.numpy()


@pytest.mark.parametrize("path, problems", [(compiled, 2100), (in_numpy, 1050), (batched, 350)])
def test_labels_equal_scikit_learn(path, problems, rng):
    n_clusters = set()
    for problem in range(problems):
        kind = CLUSTERING_KINDS[problem % len(CLUSTERING_KINDS)]
        # Mostly small, where every combination occurs; up to 300 for the host, 90 for the batched path's many rounds.
        largest = 90 if path is batched else 300
        n = int(rng.integers(1, 40 if problem % 5 else largest + 1))
        rows, config = clustering_rows(rng, n, kind), random_config(rng)
        labels, eps, distances = path(rows, config)
        expected = sklearn_labels(distances, eps, config.min_samples(n))
        np.testing.assert_array_equal(labels, expected, err_msg=f"problem {problem}: {kind}, n={n}, {config}")
        n_clusters.add(expected.max() + 1)
    assert {0, 1, 2, 3} <= n_clusters, "the problems must have no, one and several clusters"


def relu_rows(rng, n, dead=0.0):
    """Descriptors of ReLU channels, scales spread out, a share of them exactly zero: float32 (n, 49)."""
    rows = np.maximum(rng.normal(size=(n, 49)), 0) * rng.random((n, 1)) * (rng.random((n, 1)) >= dead)
    return rows.astype(np.float32)


def near_duplicates(rng, n):
    """Half of the rows are the other half, each entry moved by 1e-7 to 1e-3 of itself, about as little as it rounds."""
    rows = relu_rows(rng, n // 2)
    moved = rows * (1 + 10 ** rng.uniform(-7, -3, rows.shape) * rng.choice([-1, 1], rows.shape))
    return np.concatenate([rows, moved]).astype(np.float32)


def twins(rng, n):
    """Every row twice: each distance occurs four times, the one at eps too."""
    return relu_rows(rng, n // 2).repeat(2, axis=0)


def along_a_line(rng, n):
    """Multiples of one row, none negative: the difference of two norms is their distance."""
    return (rng.random((n, 1)) ** 2 * rng.random(49)).astype(np.float32)


def both_ways_along_a_line(rng, n):
    """Half of them negative: the sum of two norms is the distance of rows that point apart."""
    return along_a_line(rng, n) * rng.choice(np.float32([-1, 1]), (n, 1))


def one_cell_each(rng, n):
    """One entry of each row is not zero: two norms give the distance of all rows that share no cell."""
    return (rng.random((n, 1)) * np.eye(49)[rng.integers(0, 49, n)]).astype(np.float32)


def heaps(rng, n):
    """Several clusters and noise between, at norms from 1 to 30."""
    centres = rng.normal(size=(12, 49)) * np.linspace(0.15, 4, 12)[:, None]
    spread = 0.02 * 10 ** rng.uniform(0, 1.5, (n, 1))
    return (centres[rng.integers(0, 12, n)] + spread * rng.normal(size=(n, 49))).astype(np.float32)


FULL_SIZE = {
    **{kind: lambda rng, n, kind=kind: clustering_rows(rng, n, kind) for kind in CLUSTERING_KINDS},
    **{f"{dead} % dead": lambda rng, n, dead=dead: relu_rows(rng, n, dead / 100) for dead in (0, 30, 45, 55, 70)},
    "near duplicates": near_duplicates,
    "twins": twins,
    "along a line": along_a_line,
    "both ways along a line": both_ways_along_a_line,
    "one cell each": one_cell_each,
    "heaps": heaps,
}


@pytest.mark.parametrize("path", [compiled, in_numpy])
@pytest.mark.parametrize("kind", FULL_SIZE)
def test_full_size(kind, path, rng):
    choices = [(25, 0.05), (25, 0.2), (1, 0.001), (0, 0), (5, 0.01), (50, 0.05), (90, 0.5), (100, 0.05)]
    for problem, (percentile, fraction) in enumerate(rng.permutation(choices)[:3]):
        # 1536 = three quarters of 2048 channels, the size of a ResNet-50; 770 is no whole number of tiles.
        n = 770 if problem % 2 else 1536
        rows, config = FULL_SIZE[kind](rng, n), CFCAMConfig(eps_percentile=percentile, min_samples_fraction=fraction)
        labels, eps, distances = path(rows, config)
        np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, config.min_samples(n)))
        assert eps == eps_of_sorted(distances, config)


def eps_of_sorted(distances, config):
    """eps of these distances, float32, from a sort of them; NaN last."""
    ordered = np.sort(squareform(distances, checks=False).astype(np.float32)).astype(float)
    low, high, fraction = radius_ranks(len(distances), config.eps_percentile)
    eps = max(ordered[low] + (ordered[high] - ordered[low]) * fraction, EPS_FLOOR)
    return np.float32(eps) if np.float32(eps) <= eps else np.nextafter(np.float32(eps), np.float32(0))


@pytest.mark.parametrize("path", [compiled, in_numpy])
@pytest.mark.parametrize(
    "rows",
    [
        lambda rng, n: np.zeros((n, 3)),
        lambda rng, n: rng.integers(0, 2, (n, 1)),  # two distances: no sample of them brackets a rank
        lambda rng, n: np.arange(n)[:, None] == 0,  # all but one alike
        lambda rng, n: np.linspace(0, 1, n)[:, None] ** 9,
        lambda rng, n: rng.normal(size=(n, 1)) * 10.0 ** rng.integers(-30, 18, (n, 1)),
        lambda rng, n: np.where(rng.random((n, 1)) < 0.1, 1e20, rng.normal(size=(n, 1))),  # squares overflow
        lambda rng, n: np.where(rng.random((n, 1)) < 0.1, np.nan, rng.normal(size=(n, 1))),
        lambda rng, n: np.where(rng.random((n, 1)) < 0.1, -np.inf, rng.normal(size=(n, 1))),  # and inf - inf
        lambda rng, n: np.full((n, 2), np.nan),
    ],
)
def test_ranks_among_awkward_distances(rows, path, rng):
    for n in (2, 3, 64, 65, 66, 300):  # of 64 and 65 rows there are 2016 and 2080 pairs, about the size of a sample
        of_kind = rows(rng, n).astype(np.float32)
        for percentile in (0, 0.01, 10, 25, 50, 99.99, 100, *rng.uniform(0, 100, 5)):
            config = CFCAMConfig(eps_percentile=percentile)
            with np.errstate(invalid="ignore"):
                labels, eps, distances = path(of_kind, config)
                np.testing.assert_equal(np.float32(eps), eps_of_sorted(distances, config))
            if np.isfinite(eps):
                far = np.nan_to_num(distances, nan=1e300, posinf=1e300)
                np.testing.assert_array_equal(labels, sklearn_labels(far, eps, config.min_samples(n)))
            elif np.isnan(eps):
                assert (labels == -1).all()


def dbscan_compiled(distances, n, eps, min_samples):
    labels = np.full(n, -7, np.int32)
    library().dbscan(distances, n, eps, min_samples, labels)
    return labels


@pytest.mark.parametrize("dbscan", [dbscan_compiled, host_engine.dbscan])
def test_dbscan_of_any_graph(dbscan, rng):
    # Sparse graphs, which need no geometry: chains of cores, many clusters, and border points between several.
    n_clusters = set()
    for _ in range(600):
        n, min_samples = int(rng.integers(2, 80)), int(rng.integers(1, 6))
        distances = (rng.random(n * (n - 1) // 2) >= rng.choice([0.01, 0.03, 0.1])).astype(np.float32)
        expected = sklearn_labels(squareform(distances), 0.5, min_samples)
        np.testing.assert_array_equal(dbscan(distances, n, 0.5, min_samples), expected)
        n_clusters.add(expected.max() + 1)
    assert {0, 1, 2, 3, 5} <= n_clusters


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_images_of_a_batch_do_not_touch_each_other(threads, rng):
    n_images, n_channels = 9, 70
    rows = np.stack([clustering_rows(rng, n_channels, "blobs") for _ in range(n_images)])
    members = rng.random((n_images, n_channels)) < rng.random((n_images, 1))
    members[3], members[4] = False, np.arange(n_channels) == 5  # none, and one
    labels, config = np.full((n_images, n_channels), -7, np.int32), CFCAMConfig(eps_percentile=5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        eps = host_engine.cluster_images(rows, members, labels, config)
    finally:
        torch.set_num_threads(before)
    assert (labels[~members] == -7).all(), "what is not clustered keeps its label"
    for image in range(n_images):
        if members[image].sum() > 1:
            alone, eps_alone, _ = host(rows[image, members[image]], config)
            np.testing.assert_array_equal(labels[image, members[image]], alone)
            assert eps[image] == np.float32(eps_alone)
        else:
            assert (labels[image, members[image]] == -1).all() and eps[image] == np.float32(EPS_FLOOR)


def test_no_memory_is_an_error_in_python():
    nothing = np.zeros((1, 1), np.float32)
    with pytest.raises(MemoryError, match="no memory for the distances"):
        library().pairwise_distances(nothing, 2**40, 2**19, nothing)


@pytest.mark.parametrize(
    "length, dtype, is_compiled", [(4096, "float32", True), (4097, "float32", False), (9, "float64", False)]
)
def test_what_is_compiled(length, dtype, is_compiled, rng):
    rows = rng.normal(size=(20, length)).astype(dtype)
    assert host_engine.is_compiled(rows) == (is_compiled and host_engine.compiled() is not None)
    labels, eps, distances = host(rows, CFCAMConfig())
    np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, 2))
    assert distances.max() == pytest.approx(cdist(rows.astype(float), rows.astype(float)).max(), rel=1e-6)


@pytest.mark.parametrize("path", [compiled, in_numpy, batched])
def test_eps_is_numpys_percentile_of_the_same_distances(path, rng):
    for problem in range(100):
        rows = clustering_rows(rng, int(rng.integers(2, 40)), CLUSTERING_KINDS[problem % len(CLUSTERING_KINDS)])
        config = random_config(rng)
        _, eps, distances = path(rows, config)
        expected = reference.neighbourhood_radius(distances, config)
        assert eps == pytest.approx(expected, rel=1e-6)
        # Not one pair more or fewer than within NumPy's value.
        np.testing.assert_array_equal(distances <= eps, distances <= expected)


@pytest.mark.parametrize("n", [0, 1])  # nothing to measure a distance to
def test_fewer_than_two_channels_are_noise(n):
    for path in (compiled, in_numpy):
        labels, eps, _ = path(np.ones((n, 4), np.float32), CFCAMConfig())
        assert list(labels) == [-1] * n and eps == np.float32(EPS_FLOOR)
    labels, eps = batched_engine.cluster_rows(torch.ones(1, 3, 4), torch.tensor([n]), CFCAMConfig())
    assert labels.tolist() == [[-1] * 3] and eps == pytest.approx(EPS_FLOOR)


@pytest.mark.parametrize("path", [compiled, in_numpy, batched])
def test_duplicates_are_at_exactly_zero(path, rng):
    rows = rng.normal(size=(40, 49)).astype(np.float32)
    rows[20:] = rows[:20]  # large norms: the matrix-product form of the distance would leave a residue
    _, _, distances = path(rows * 1e3, CFCAMConfig())
    assert (np.diag(distances, 20) == 0).all()
    assert (distances == distances.T).all()


# Grids from 1x1 to 64x64, about a partial sum, and the float64 path; of rows a tile, one more, and some.
@pytest.mark.parametrize("length", [1, 49, 63, 64, 65, 196, 784, 4096, 4097])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 15, 16, 17, 18, 33, 120])
def test_distances_are_within_half_of_a_millionth(n, length, rng):
    rows = np.abs(rng.normal(size=(n, length))).astype(np.float32)
    expected = cdist(rows.astype(np.float64), rows.astype(np.float64))
    for path in (compiled, in_numpy, batched):
        _, _, distances = path(rows, CFCAMConfig())
        error = np.abs(distances - expected).max() / expected.max()
        assert error < 5e-7


@pytest.mark.parametrize("descriptor", ["raw", "unit"])
@pytest.mark.parametrize("shape", [(3, 61, 7, 7), (2, 130, 5, 3), (4, 1, 2, 2), (2, 2, 1, 3), (2, 5, 14, 14)])
def test_both_paths_and_scikit_learn_agree_on_batches(shape, descriptor, rng, seed):
    for percentile in (0.0, 50.0, 75.0, 100.0):
        config = random_config(rng, descriptor=descriptor, dominant_percentile=percentile)
        activations = activations_like(shape)
        if percentile == 50:
            activations[0] = 0
            activations[-1] = 1
        labels, eps = cluster_channels(activations, config)
        assert labels.dtype == torch.int32 and labels.shape == shape[:2] and eps.shape == shape[:1]
        by_sklearn, _ = cluster_channels(activations, config, clustering="sklearn")
        assert torch.equal(by_sklearn, labels)
        on_device, eps_on_device = cluster_channels(activations, config, clustering="batched")
        # The two paths sum squares in another order: compared where no pair is at the edge.
        for image in range(shape[0]):
            if not pairs_at_the_edge(activations[image], config):
                assert torch.equal(on_device[image], labels[image])
        torch.testing.assert_close(eps_on_device, eps, rtol=1e-6, atol=0)


def assert_labels_close_to_reference(activations, config):
    """Equal labels, or a pair named that rounding may move across eps."""
    labels, _ = cluster_channels(activations, config)
    expected, _ = cluster_channels(activations, config, backend="reference")
    different = 0
    for image in range(len(activations)):
        if not torch.equal(labels[image], expected[image]):
            pairs = pairs_at_the_edge(activations[image], config)
            assert pairs, f"image {image}: labels differ and no pair is near eps"
            print(f"image {image}: labels differ; pairs within 1e-6 of eps: {pairs[:5]}")
            different += 1
    return different


def test_labels_close_to_the_float64_reference(rng, seed):
    different = 0
    for _ in range(60):
        shape = (2, int(rng.integers(1, 200)), int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        different += assert_labels_close_to_reference(activations_like(shape), random_config(rng))
    assert different < 60, "most images must agree exactly"


def test_real_activations_of_photographs():
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs at {PHOTOGRAPHS}")
    from cfcam_gpu.images import load_image
    from cfcam_gpu.models import load_model

    demo = load_model("demo", "cpu")
    inputs = torch.stack([demo.preprocess(load_image(path)) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:20]])
    seen = {}
    hook = demo.model._avg_pooling.register_forward_pre_hook(lambda _, inputs: seen.update(activations=inputs[0]))
    with torch.no_grad():
        demo.model(inputs)
    hook.remove()

    activations = seen["activations"]
    assert activations.shape == (20, 1280, 7, 7)
    half = CFCAMConfig(dominant_percentile=50.0)  # and not fewer: half of the channels are dead
    for config in (half, replace(half, descriptor="unit", eps_percentile=2.0, min_samples_fraction=0.0)):
        labels, eps = cluster_channels(activations, config)
        by_sklearn, _ = cluster_channels(activations, config, clustering="sklearn")
        assert torch.equal(labels, by_sklearn)
        assert labels.max() >= 0
    assert_labels_close_to_reference(activations, half)
