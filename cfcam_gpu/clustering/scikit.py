"""scikit-learn's DBSCAN as the clustering engine, on the distances and the eps of the backend that asks for it."""

import numpy as np
import torch

from cfcam_gpu.clustering import host


def cluster(rows, members, labels, config):
    """Labels and eps of a batch, as `cfcam_gpu.clustering.Engine` has them."""
    return host.on_host(rows, members, labels, config, dbscan)


def label(distances, eps, min_samples):
    """Labels (R,) of one image's distances (R, R), on the host."""
    from cfcam_gpu import reference

    return torch.from_numpy(reference.dbscan(distances.cpu().numpy(), float(eps), min_samples))


def dbscan(distances, n, eps, min_samples):
    """Labels (n,) of condensed distances, as `host.dbscan`."""
    from cfcam_gpu import reference

    square = np.zeros((n, n))
    row, column = np.triu_indices(n, 1)
    square[row, column] = square[column, row] = distances
    return reference.dbscan(square, float(eps), min_samples)
