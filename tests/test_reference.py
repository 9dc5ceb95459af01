"""The reference against an independent writing of the published procedure, and against worked examples."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from problems import activations_like

from cfcam_gpu import CFCAMConfig, cf_cam, reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import naive


def test_equals_the_authors_approach(seed):
    # Double precision on both sides: the comparison is of the procedure, not of rounding at eps.
    activations = activations_like((4, 150, 7, 7), dead=0.2).double()
    gradients = torch.randn(4, 150, 7, 7).double()
    result = cf_cam(activations, gradients, (50, 40), CFCAMConfig.paper(), backend="reference")
    for image in range(4):
        np.testing.assert_array_equal(result.labels[image], naive.cluster(activations[image]))
        assert_close(result.maps[image], naive.class_map(activations[image], gradients[image], (50, 40)))


def one_image(rows):
    return np.array(rows, float).reshape(len(rows), 1, -1)


def test_dominant_channels_reach_the_percentile():
    norms = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    raw, unit = CFCAMConfig(dominant_percentile=50), CFCAMConfig(dominant_percentile=50, descriptor="unit")
    assert reference.dominant_channels(norms, raw).tolist() == [False, False, True, True, True]
    assert reference.dominant_channels(np.zeros(3), raw).tolist() == [True] * 3  # as in the authors' code
    assert reference.dominant_channels(np.zeros(3), unit).tolist() == [False] * 3
    assert not reference.dominant_channels(norms, CFCAMConfig(dominant_percentile=100)).any()


def test_zero_channels_take_no_part_with_unit_descriptors():
    activations = one_image([[0, 0], [1, 0], [2, 0], [0, 0], [0, 3]])
    config = CFCAMConfig(dominant_percentile=100, descriptor="unit", min_samples_fraction=0)
    labels, eps = reference.cluster_channels(activations, config)
    # Three channels are clustered; their distances are 0, sqrt 2, sqrt 2, each twice: the 25th percentile is
    # a quarter of the way from the second 0 to the first sqrt 2.
    assert labels.tolist() == [-1, 0, 0, -1, -1]
    assert eps == pytest.approx(0.25 * np.sqrt(2))


def test_border_point_takes_the_lowest_cluster():
    # Points on a line, eps 1, min_samples 4: 3.0 is within 1 of a core of either group and is no core itself.
    line = [5.0, 4.0, 4.5, 4.25, 1.0, 2.0, 1.5, 1.25, 3.0]
    distances = np.abs(np.subtract.outer(line, line))
    assert reference.dbscan(distances, 1.0, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_weights_of_a_worked_example():
    config = CFCAMConfig(boundary="reflect")
    gradients = np.stack([np.full((2, 2), value) for value in (1.0, 2.0, 4.0, 8.0)])
    labels = np.array([-2, 0, 0, -1])
    filtered = reference.filter_gradients(gradients, labels, config)
    assert reference.channel_weights(filtered, labels, config) == pytest.approx([1, 3, 3, 0])
    softmax = reference.channel_weights(filtered, labels, CFCAMConfig.paper())
    weights = np.exp([1, 3, 3])
    # The paper's boundary is "constant", but filtered here with "reflect": the softmax alone is checked.
    assert softmax == pytest.approx([*(weights / weights.sum()), 0])
