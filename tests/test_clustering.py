"""Labels: equal to scikit-learn's DBSCAN for a path's own distances and eps, and close to the float64 reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from problems import CLUSTERING_KINDS, activations_like, clustering_rows, random_config
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


@pytest.mark.parametrize("kind", CLUSTERING_KINDS)
def test_labels_equal_scikit_learn_at_full_size(kind, rng):
    # 1536 = three quarters of 2048 channels, the size of a ResNet-50.
    rows = clustering_rows(rng, 1536, kind)
    for config in (CFCAMConfig(), CFCAMConfig(eps_percentile=1.0, min_samples_fraction=0.001)):
        labels, eps, distances = host(rows, config)
        np.testing.assert_array_equal(labels, sklearn_labels(distances, eps, config.min_samples(1536)))


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


def pairs_at_the_edge(activations, config):
    """Pairs (i, j) of clustered channels whose float64 distance is within 1e-6 of eps: rounding may move them."""
    activations = activations.double().numpy()
    norms = reference.channel_norms(activations)
    clustered = ~reference.dominant_channels(norms, config)
    if config.descriptor == "unit":
        clustered &= norms > 0
    distances = reference.pairwise_distances(reference.descriptors(activations, norms, config)[clustered])
    eps = reference.neighbourhood_radius(distances, config)
    close = np.abs(distances - eps) <= 1e-6 * eps
    np.fill_diagonal(close, False)
    channels = np.flatnonzero(clustered)
    return [(channels[i], channels[j]) for i, j in np.argwhere(np.triu(close))]


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
