"""Random clustering problems and activations, the awkward ones included."""

import numpy as np
import torch

from cfcam_gpu import reference
from cfcam_gpu.config import CFCAMConfig


def clustering_rows(rng, n, kind):
    """Descriptors float32 (n, D) of one kind; see `CLUSTERING_KINDS`."""
    length = int(rng.integers(1, 50))
    if kind == "gaussian":
        rows = rng.normal(size=(n, length))
    elif kind == "blobs":  # several clusters, so that numbering and borders matter
        centres = rng.normal(size=(int(rng.integers(2, 9)), 2)) * 6
        rows = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, 2)) * rng.uniform(0.1, 1.5)
    elif kind == "lattice":  # few distinct distances: many pairs lie exactly at eps
        rows = rng.integers(0, 5, size=(n, int(rng.integers(1, 4))))
    elif kind == "line":  # long chains of neighbours: the slowest case for label propagation
        rows = rng.permutation(n)[:, None] * rng.choice([0.5, 1.0])
    elif kind == "duplicates":
        rows = rng.normal(size=(max(n // 4, 1), length))[rng.integers(max(n // 4, 1), size=n)]
    elif kind == "zeros":  # half-dead ReLU channels
        rows = np.maximum(rng.normal(size=(n, length)), 0) * (rng.random((n, 1)) < rng.uniform(0.1, 0.9))
    elif kind == "scattered":  # distances grow without bound: nearly all noise
        rows = np.cumsum(np.exp(np.linspace(0, 12, n)))[:, None] * np.ones(2)
    else:
        raise ValueError(kind)
    return np.ascontiguousarray(rows, np.float32)


CLUSTERING_KINDS = ("gaussian", "blobs", "lattice", "line", "duplicates", "zeros", "scattered")


def random_config(rng, **choices):
    """A configuration of the clustering stage over the ranges that give noise, one and many clusters."""
    return CFCAMConfig(
        eps_percentile=float(rng.choice([0, 1, 2, 5, 10, 25, 25, 25, 50, 100, rng.uniform(0, 100)])),
        min_samples_fraction=float(rng.choice([0.0, 0.01, 0.05, 0.05, 0.2, 1.0])),
        **choices,
    )


def activations_like(shape, dead=0.1, dtype=torch.float32):
    """Post-ReLU activations (B, C, h, w), or of other axes, channel scales spread out and a share of channels dead."""
    of_channels = (*shape[:2], *[1] * (len(shape) - 2))
    scale = torch.rand(of_channels) * (torch.rand(of_channels) > dead)
    return (torch.randn(shape).relu() * scale).to(dtype)


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


def equal_labels(activations, labels, expected, config):
    """Which images have equal labels, bool (B,); fails where they differ and no pair of channels is at the edge."""
    same = (torch.as_tensor(labels).cpu() == torch.as_tensor(expected).cpu()).all(1)
    for image in (~same).nonzero()[:, 0]:
        assert pairs_at_the_edge(activations[image], config), f"image {image}: labels differ and no pair is near eps"
    return same
