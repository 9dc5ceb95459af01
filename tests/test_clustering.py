"""Labels: equal to scikit-learn's DBSCAN for a path's own distances and eps, and close to the float64 reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from problems import CLUSTERING_KINDS, activations_like, clustering_rows, pairs_at_the_edge, random_config
from scipy.spatial.distance import cdist, squareform
from sklearn.cluster import DBSCAN

from cfcam_gpu import CFCAMConfig, cluster_batched, cluster_channels, cluster_host, reference
from cfcam_gpu.config import EPS_FLOOR

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"


def sklearn_labels(distances, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_


def host(rows, config):
    """Labels, eps and the distances that the CPU path itself saw."""
    rows = torch.from_numpy(rows)
    labels, eps = cluster_host.cluster_image(rows, config, "host")
    return labels, eps, squareform(cluster_host.pairwise_distances(rows).astype(np.float64))


def batched(rows, config):
    """The same from the path for accelerators, with padding that must not matter."""
    padded = torch.full((1, len(rows) + 3, rows.shape[1]), torch.nan)
    padded[0, : len(rows)] = torch.from_numpy(rows)
    n_rows = torch.tensor([len(rows)])
    is_row = torch.arange(padded.shape[1]) < n_rows[:, None]
    labels, eps = cluster_batched.cluster_rows(padded, n_rows, config)
    distances = cluster_batched.pairwise_distances(padded, is_row)[0, : len(rows), : len(rows)].double()
    assert (labels[0, len(rows) :] == -1).all()
    return labels[0, : len(rows)].numpy(), float(eps), distances.numpy()


@pytest.mark.parametrize("path, problems", [(host, 2100), (batched, 350)])
def test_labels_equal_scikit_learn(path, problems, rng):
    n_clusters = set()
    for problem in range(problems):
        kind = CLUSTERING_KINDS[problem % len(CLUSTERING_KINDS)]
        # Mostly small, where every combination occurs; up to 300 for the host, 90 for the batched path's many rounds.
        largest = 300 if path is host else 90
        n = int(rng.integers(1, 40 if problem % 5 else largest + 1))
        rows, config = clustering_rows(rng, n, kind), random_config(rng)
        labels, eps, distances = path(rows, config)
        expected = sklearn_labels(distances, eps, config.min_samples(n))
        np.testing.assert_array_equal(labels, expected, err_msg=f"problem {problem}: {kind}, n={n}, {config}")
        n_clusters.add(expected.max() + 1)
    assert {0, 1, 2, 3} <= n_clusters, "the problems must have no, one and several clusters"


def relu_rows(rng, n, dead=0.0, length=49):
    """Descriptors of ReLU channels, scales spread out, a share of them exactly zero: float32 (n, length)."""
    rows = np.maximum(rng.normal(size=(n, length)), 0) * rng.random((n, 1)) * (rng.random((n, 1)) >= dead)
    return rows.astype(np.float32)


def near_duplicates(rng, n):
    """Half of the rows are the other half, each entry moved by 1e-7 to 1e-3 of itself: what the product cannot tell."""
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
MOSTLY_CERTIFIED = ("0 % dead", "30 % dead", "45 % dead", "55 % dead", "70 % dead", "near duplicates", "twins", "zeros")
MOSTLY_CERTIFIED += ("along a line", "both ways along a line", "heaps")


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_certified_neighbours_are_the_measured_ones(kind, rng):
    certified = 0
    choices = [(25, 0.05), (25, 0.2), (1, 0.001), (0, 0), (5, 0.01), (50, 0.05), (90, 0.5), (100, 0.05)]
    for problem, (percentile, fraction) in enumerate(choices):
        # 1536 = three quarters of 2048 channels, the size of a ResNet-50; 770 is not whole words of 8 bytes, nor whole
        # blocks of rows or of the sample.
        n = 770 if problem % 2 else 1536
        rows, config = FULL_SIZE[kind](rng, n), CFCAMConfig(eps_percentile=percentile, min_samples_fraction=fraction)
        labels, eps, distances = host(rows, config)
        np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, config.min_samples(n)))
        found = cluster_host.certified_neighbours(torch.from_numpy(rows), config)
        _, _, adjacency, degrees, measured_eps = cluster_host.measured_neighbours(torch.from_numpy(rows), config)
        assert eps == float(measured_eps)
        if found:
            certified += 1
            place, order, merged_adjacency, merged_degrees, certified_eps = found
            assert certified_eps == measured_eps
            merged_adjacency = np.tril(merged_adjacency)
            np.testing.assert_array_equal((merged_adjacency | merged_adjacency.T)[place][:, place], adjacency)
            np.testing.assert_array_equal(merged_degrees[place], degrees)
            np.testing.assert_array_equal(place[order], np.arange(len(order)))
            np.testing.assert_array_equal(rows[order][place], rows)
            assert order[0] == np.flatnonzero(place == 0)[0], "the first of the merged rows numbers their cluster"
    print(f"{kind}: {certified} of {len(choices)} certified")
    if kind in MOSTLY_CERTIFIED:
        assert certified >= len(choices) // 2, "the fast path must be the one that is tested"


def test_zeros_are_merged_and_others_are_not(rng):
    for dead, merged in ((0.0, False), (0.3, True), (0.7, True)):
        rows = torch.from_numpy(relu_rows(rng, 1536, dead))
        found = cluster_host.certified_neighbours(rows, CFCAMConfig(eps_percentile=20.0 + 10 * merged))
        # A sample can miss, but hardly for two percentiles.
        found = found or cluster_host.certified_neighbours(rows, CFCAMConfig(eps_percentile=25.0))
        n_zeros = int((rows == 0).all(1).sum())
        assert len(found[2]) == 1536 - max(n_zeros - 1, 0) and (n_zeros > 1) == merged


def test_degrees_beyond_a_byte_per_lane(rng):
    # 2100 neighbours are 263 words of 8 bytes: one more sum than a byte can count.
    rows = torch.from_numpy(rng.normal(size=(2100, 20)).astype(np.float32))
    _, _, adjacency, degrees, _ = cluster_host.certified_neighbours(rows, CFCAMConfig(eps_percentile=100))
    assert (degrees == 2100).all() and (adjacency | adjacency.T).all()


@pytest.mark.parametrize("is_lower", [True, False])
def test_dbscan_of_any_graph(is_lower, rng):
    # Sparse graphs, which need no geometry: chains of cores, many clusters, and border points between several.
    n_clusters = set()
    for _ in range(400):
        n, min_samples = int(rng.integers(1, 80)), int(rng.integers(1, 6))
        near = np.tril(rng.random((n, n)) < rng.choice([0.01, 0.03, 0.1]), -1)
        near |= near.T | np.eye(n, dtype=bool)
        expected = sklearn_labels(1.0 - near, 0.5, min_samples)
        order = rng.permutation(n)  # the graph as another order of its points has it
        adjacency = near[order][:, order]
        adjacency = np.tril(adjacency) if is_lower else adjacency
        labels = cluster_host.dbscan(adjacency, near.sum(1)[order], min_samples, order)
        np.testing.assert_array_equal(labels, expected[order])
        n_clusters.add(expected.max() + 1)
    assert {0, 1, 2, 3, 5} <= n_clusters


@pytest.mark.parametrize(
    "rows",
    [
        lambda rng: rng.integers(0, 3, size=(600, 3)),  # many pairs exactly at eps
        lambda rng: rng.normal(size=(600, 9)) * np.where(np.arange(600) == 7, 1e4, 1)[:, None],  # a long row
        lambda rng: np.zeros((600, 9)),
        lambda rng: rng.normal(size=(600, 9)) * 1e-12,  # squares below the normal numbers
        lambda rng: rng.normal(size=(600, 9)) * 1e16,
        lambda rng: rng.normal(size=(600, 9)) * 1e-6,  # all within the floor of eps, none of them zero
        lambda rng: np.where(rng.random((600, 1)) < 0.9, 1e-6, 1) * rng.normal(size=(600, 9)),
    ],
)
def test_what_a_product_cannot_tell_is_measured(rows, rng):
    rows = rows(rng).astype(np.float32)
    assert cluster_host.certified_neighbours(torch.from_numpy(rows), CFCAMConfig()) is None
    labels, eps, distances = host(rows, CFCAMConfig())
    np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, CFCAMConfig().min_samples(600)))


@pytest.mark.parametrize("share", [(0.05, 0.1), (0.4, 0.5), (0.0, 1e-9), (0.9, 1.0)])
def test_a_bracket_without_eps_is_refused(share, rng, monkeypatch):
    rows = relu_rows(rng, 600)
    squares = np.sort(cluster_host.pairwise_distances(torch.from_numpy(rows)) ** 2)
    bracket = tuple(float(np.quantile(squares, of)) for of in share)
    expected, expected_eps, _ = host(rows, CFCAMConfig())
    monkeypatch.setattr(cluster_host, "_bracket", lambda *_: bracket)
    assert cluster_host.certified_neighbours(torch.from_numpy(rows), CFCAMConfig()) is None
    labels, eps, _ = host(rows, CFCAMConfig())
    assert eps == expected_eps and np.array_equal(labels, expected)


def test_too_many_open_pairs_are_refused(rng, monkeypatch):
    rows, config = relu_rows(rng, 600), CFCAMConfig()
    rows[:330] = 0  # eps is its floor, whatever a sample says
    rows[330:450] = rng.random((120, 49)) * 1e-3
    # Told apart by their own bound, though not by that of the longest rows.
    assert cluster_host.certified_neighbours(torch.from_numpy(rows), config) is not None
    rows[330:450, 0] += 10
    labels, eps, distances = host(rows, config)
    np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, config.min_samples(600)))
    assert cluster_host.certified_neighbours(torch.from_numpy(rows), config) is None
    monkeypatch.setattr(cluster_host, "OPEN_SHARE", 1)
    assert cluster_host.certified_neighbours(torch.from_numpy(rows), config) is not None
    labels_of_product, eps_of_product, _ = host(rows, config)
    assert eps_of_product == eps and np.array_equal(labels_of_product, labels)


@pytest.mark.parametrize("length", [1, 7, 49, 196, 784, 4096])
def test_pairs_measured_singly_are_measured_alike(length, rng):
    rows = relu_rows(rng, 60, length=length)
    i, j = np.triu_indices(60, 1)
    for some in (slice(0, 0), slice(5, 6), slice(0, 32), slice(0, 33), slice(None)):
        distances = cluster_host._distances_of_pairs(rows, i[some], j[some])
        np.testing.assert_array_equal(distances, cluster_host.pairwise_distances(torch.from_numpy(rows))[some])


@pytest.mark.parametrize(
    "n, length, dtype, tried",
    [(512, 9, "float32", True), (511, 9, "float32", False), (512, 9, "float64", False), (512, 4097, "float32", False)],
)
def test_when_a_product_is_tried(n, length, dtype, tried, rng, monkeypatch):
    calls = []
    monkeypatch.setattr(cluster_host, "certified_neighbours", lambda *arguments: calls.append(arguments))
    host(relu_rows(rng, n, length=length).astype(dtype), CFCAMConfig())
    assert bool(calls) == tried


@pytest.mark.parametrize("path", [host, batched])
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
    labels, eps = cluster_host.cluster_image(torch.ones(n, 4), CFCAMConfig(), "host")
    assert list(labels) == [-1] * n and eps == EPS_FLOOR
    labels, eps = cluster_batched.cluster_rows(torch.ones(1, 3, 4), torch.tensor([n]), CFCAMConfig())
    assert labels.tolist() == [[-1] * 3] and eps == pytest.approx(EPS_FLOOR)


@pytest.mark.parametrize("path", [host, batched])
def test_duplicates_are_at_exactly_zero(path, rng):
    rows = rng.normal(size=(40, 49)).astype(np.float32)
    rows[20:] = rows[:20]  # large norms: the matrix-product form of the distance would leave a residue
    _, _, distances = path(rows * 1e3, CFCAMConfig())
    assert (np.diag(distances, 20) == 0).all()
    assert (distances == distances.T).all()


@pytest.mark.parametrize("length", [49, 196, 784, 4096, 4097])  # grids from 7x7 to 64x64, and the float64 path
def test_distances_are_within_half_of_a_millionth(length, rng):
    rows = np.maximum(rng.normal(size=(120, length)), 0).astype(np.float32)
    expected = cdist(rows.astype(np.float64), rows.astype(np.float64))
    for path in (host, batched):
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
    inputs = torch.stack([demo.preprocess(load_image(path)) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:50]])
    seen = {}
    hook = demo.model._avg_pooling.register_forward_pre_hook(lambda _, inputs: seen.update(activations=inputs[0]))
    with torch.no_grad():
        demo.model(inputs)
    hook.remove()

    activations = seen["activations"]
    assert activations.shape == (50, 1280, 7, 7)
    for config in (CFCAMConfig(), CFCAMConfig(descriptor="unit", eps_percentile=2.0, min_samples_fraction=0.0)):
        labels, eps = cluster_channels(activations, config)
        by_sklearn, _ = cluster_channels(activations, config, clustering="sklearn")
        assert torch.equal(labels, by_sklearn)
        assert labels.max() >= 0
    assert_labels_close_to_reference(activations, CFCAMConfig())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_product_of_low_precision_is_noticed(precision, rng):
    """A program may let float32 products round to bfloat16: the labels must stay those of the distances."""
    rows = torch.from_numpy(np.maximum(rng.normal(size=(770, 49)), 0) * rng.random((770, 1))).float()
    expected, expected_eps = cluster_host.cluster_image(rows, CFCAMConfig(), "sklearn")
    exact = rows @ rows.T
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        is_rounded = (rows @ rows.T - exact).abs().max() > 1e-4 * exact.max()
        certified = cluster_host.certified_neighbours(rows, CFCAMConfig())
        labels, eps = cluster_host.cluster_image(rows, CFCAMConfig(), "host")
    finally:
        torch.set_float32_matmul_precision(before)
    print(f"the product is {'rounded' if is_rounded else 'exact'} on this processor")
    assert certified is None or not is_rounded
    np.testing.assert_array_equal(labels, expected)
    assert eps == expected_eps
