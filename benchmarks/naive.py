"""The published procedure as its authors run it, for comparison: broadcast distances and loops over channels.

Written from the description of arXiv 2504.00060 and the structure of jerryp-hfut/CF-CAM@c227652, with this
package's Gaussian in place of the data-dependent convolution, so that both compute the same maps: one (R, R, D)
difference tensor, a copied and masked distance matrix, scikit-learn on the raw descriptors, and a filter, a mean
and a host copy per cluster and channel.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.cluster import DBSCAN


def cluster(activations):
    """Labels int (C,) of one image's activations (C, h, w): -2 dominant, -1 noise."""
    features = activations.reshape(len(activations), -1).cpu().numpy()
    norms = np.linalg.norm(features, axis=1)
    remaining = np.where(norms < np.percentile(norms, 75))[0]
    labels = np.full(len(features), -2)
    rows = features[remaining]
    distances = np.linalg.norm(rows[:, None] - rows[None, :], axis=2)
    np.fill_diagonal(distances, np.inf)
    distances = distances.flatten()
    eps = max(np.percentile(distances[distances != np.inf], 25), 1e-5)
    labels[remaining] = DBSCAN(eps=eps, min_samples=max(2, int(len(remaining) * 0.05))).fit(rows).labels_
    return labels


def class_map(activations, gradients, output_size):
    """The published map (H, W) of one image's activations and gradients (C, h, w)."""
    labels = cluster(activations)
    weights = torch.zeros(len(labels))
    filtered = torch.zeros_like(gradients)
    for channel in np.where(labels == -2)[0]:
        filtered[channel] = gradients[channel]
        weights[channel] = filtered[channel].mean()
    for number in range(labels.max(initial=-1) + 1):
        members = np.where(labels == number)[0]
        mean = gradients[members].mean(0).numpy()
        smooth = torch.from_numpy(gaussian_filter(mean, 1.0, mode="constant"))
        for channel in members:
            filtered[channel] = smooth
            weights[channel] = smooth.mean()
    kept = torch.from_numpy(labels != -1)
    weights = torch.softmax(weights[kept], 0)
    grid = torch.relu((weights[:, None, None] * activations[kept]).sum(0))
    image = F.interpolate(grid[None, None], output_size, mode="bilinear", align_corners=False)[0, 0]
    return image / image.max() if image.max() > 0 else image
