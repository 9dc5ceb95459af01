"""CF-CAM's variants that were tried: each a function of activations and gradients, for benchmarks/faithfulness.py.

What became an option of `CFCAMConfig` is there; what did not earn its place is here, in plain torch, so that the table
can be made again. A function takes activations and gradients (B, C, h, w) and returns the signed sum (B, h, w).
"""

import math

import numpy as np
import torch
from sklearn.cluster import DBSCAN

from cfcam_gpu import CFCAMConfig, cf_cam, cluster_channels, torch_backend
from cfcam_gpu.gaussian import filter_matrix
from cfcam_gpu.weights import grad_cam

MANY_CLUSTERS = CFCAMConfig(
    dominant_percentile=100.0, descriptor="unit", eps_percentile=1.0, min_samples_fraction=0.0, affinity_power=0.0
)
"""Unit descriptors, eps at the first percentile, two channels make a cluster: many clusters, and none dominant."""


def weighted(activations, weights):
    """The sum over channels (B, h, w) for weights (B, C)."""
    return torch_backend.class_grid(activations, weights, relu=False)


def of_clusters(activations, gradients, labels, statistic):
    """The pooled gradients, with ``statistic(values, norms)`` of the members for all members of a cluster; noise 0."""
    weights = grad_cam(activations, gradients)
    norms = activations.flatten(2).norm(dim=2)
    for image, of_image in enumerate(labels):
        for cluster in range(int(of_image.max()) + 1):
            members = of_image == cluster
            weights[image, members] = statistic(weights[image, members], norms[image, members])
        weights[image, of_image == -1] = 0
    return weights


def plain_mean(values, norms):
    return values.mean()


def norm_weighted_mean(values, norms):
    return (values * norms).sum() / norms.sum().clamp_min(1e-20)


def shrunk_mean(values, norms):
    """The mean, less the more the members' gradients disagree: t^2 / (1 + t^2) of it, t = mean / standard error."""
    squared_error = values.var(correction=0) / len(values)
    return values.mean() ** 3 / (values.mean() ** 2 + squared_error).clamp_min(1e-30)


def half_pooled(values, norms):
    """Half a channel's own, half its cluster's."""
    return (values + values.mean()) / 2


def many_clusters(statistic, keep_noise=False):
    def grid(activations, gradients):
        labels, _ = cluster_channels(activations, MANY_CLUSTERS)
        weights = of_clusters(activations, gradients, labels, statistic)
        if keep_noise:
            weights = torch.where(labels == -1, grad_cam(activations, gradients), weights)
        return weighted(activations, weights)

    return grid


def knee(activations, gradients):
    """eps at the knee of the sorted distances to the fourth neighbour, the point farthest from the chord."""
    labels = torch.full(activations.shape[:2], -1)
    rows = torch.nn.functional.normalize(activations.flatten(2), dim=2)
    for image, of_image in enumerate(rows):
        live = of_image.any(1)
        distances = torch.cdist(of_image[live], of_image[live]).fill_diagonal_(0)
        fourth = distances.kthvalue(min(5, len(distances)), dim=1).values.sort().values
        chord = torch.linspace(float(fourth[0]), float(fourth[-1]), len(fourth))
        eps = max(float(fourth[(chord - fourth).argmax()]), 1e-5)
        found = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit(distances.numpy()).labels_
        labels[image, live] = torch.from_numpy(found)
    return weighted(activations, of_clusters(activations, gradients, labels, plain_mean))


def standardised_softmax(temperature):
    """The published clustering, its weights standardised before the softmax, so that it is no longer uniform."""

    def grid(activations, gradients):
        result = cf_cam(activations, gradients, config=CFCAMConfig(affinity_power=0.0))
        kept = result.labels != -1
        weights = torch.where(kept, result.weights, 0)
        deviation = weights.std(1, keepdim=True).clamp_min(1e-30)
        weights = (weights / deviation / temperature).masked_fill(~kept, -torch.inf).softmax(1)
        return weighted(activations, torch.where(kept, weights, 0))

    return grid


def elementwise(activations, gradients):
    """The filtered gradient of each cell instead of its mean."""
    config = CFCAMConfig(affinity_power=0.0)
    labels, _ = cluster_channels(activations, config)
    return (torch_backend.filter_gradients(gradients, labels, config) * activations).sum(1)


def smoothed(sigma_cells):
    """Grad-CAM's signed sum behind a Gaussian of the grid."""

    def grid(activations, gradients):
        rows, columns = (
            torch.tensor(filter_matrix(size, sigma_cells, "nearest"), dtype=activations.dtype)
            for size in activations.shape[2:]
        )
        return rows @ weighted(activations, grad_cam(activations, gradients)) @ columns.T

    return grid


def spectral(exponent):
    """The weights smoothed on the graph of the channels: the singular directions of A times (s / s_1)^exponent."""

    def grid(activations, gradients):
        cells = activations.flatten(2).double()
        values, vectors = torch.linalg.eigh(cells.transpose(1, 2) @ cells)
        gain = (values.clamp_min(0) / values[:, -1:].clamp_min(1e-300)) ** (exponent / 2)
        flat = weighted(activations, grad_cam(activations, gradients)).flatten(1).double()
        filtered = torch.einsum("bpk,bk,bqk,bq->bp", vectors, gain, vectors, flat)
        return filtered.view(len(flat), *activations.shape[2:]).float()

    return grid


def largest(share):
    """The share of the channels whose norm times |weight| is largest, the others left out."""

    def grid(activations, gradients):
        weights = grad_cam(activations, gradients)
        size = weights.abs() * activations.flatten(2).norm(dim=2)
        threshold = size.kthvalue(int(np.ceil((1 - share) * size.shape[1])), dim=1, keepdim=True).values
        return weighted(activations, weights * (size >= threshold))

    return grid


def everywhere(power):
    """One average over all alike cells, near and far."""
    plain = {"affinity_sigma": math.inf, "affinity_steps": 1, "guide_power": 0.0, "affinity_centring": 0.0}
    return CFCAMConfig(affinity_power=power, affinity_range=math.inf, **plain)


def centred_affinity(power):
    """The average over alike cells, with the mean cell subtracted before the cosine."""

    def grid(activations, gradients):
        centred = activations - activations.mean((2, 3), keepdim=True)
        plain = weighted(activations, grad_cam(activations, gradients))
        return torch_backend.average_alike_cells(plain, centred, everywhere(power))

    return grid


def grad_cam_with_affinity(power):
    """Grad-CAM's weights, no clustering, and the average over alike cells."""

    def grid(activations, gradients):
        weights = grad_cam(activations, gradients)
        return torch_backend.class_grid(activations, weights, relu=False, config=everywhere(power))

    return grid


VARIANTS = {
    "unit, 1st percentile, pairs": many_clusters(plain_mean),
    "the same, norm-weighted mean": many_clusters(norm_weighted_mean),
    "the same, mean shrunk by its spread": many_clusters(shrunk_mean),
    "the same, half pooled, noise kept": many_clusters(half_pooled, keep_noise=True),
    "unit, eps at the knee": knee,
    "standardised softmax, T = 1": standardised_softmax(1.0),
    "standardised softmax, T = 0.3": standardised_softmax(0.3),
    "element-wise filtered gradient": elementwise,
    "Grad-CAM, Gaussian of 0.7 cells": smoothed(0.7),
    "Grad-CAM, spectral 0.25": spectral(0.25),
    "Grad-CAM, spectral 0.5": spectral(0.5),
    "Grad-CAM, largest tenth": largest(0.1),
    "Grad-CAM, affinity 4": grad_cam_with_affinity(4.0),
    "Grad-CAM, centred affinity 2": centred_affinity(2.0),
}
"""Name -> function (activations, gradients) -> signed sum."""
