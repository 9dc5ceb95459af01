"""Percentiles as order statistics: the ranks that decide, without interpolating on the device.

A comparison with NumPy's linearly interpolated percentile depends on rank alone. With the sorted values s
and the position r = (n - 1) * q / 100, values >= the percentile are those >= s[ceil(r)], and values <= it
are those <= s[floor(r)].
"""

import math


def dominant_rank(n_channels, percentile):
    """The 0-based rank in ascending order from which on a norm is dominant.

    It is also the largest number of channels that can be left to cluster: what a buffer has to hold.
    """
    return math.ceil((n_channels - 1) * (percentile / 100))


def radius_ranks(n_points, percentile):
    """Where eps lies among the ``n_points * (n_points - 1) / 2`` sorted pair distances; n_points >= 2.

    Each pair counts twice in the percentile. Returns (low, high, fraction): eps = s[low] + (s[high] - s[low])
    * fraction, and the neighbours are the pairs <= s[low] (or <= the floor of eps).
    """
    n_ordered = n_points * (n_points - 1)
    position = (n_ordered - 1) * (percentile / 100)
    floor = math.floor(position)
    return floor // 2, min(floor + 1, n_ordered - 1) // 2, position - floor


def rank_table(max_points, config):
    """For every number of points 0..max_points: lists of low, high, fraction of `radius_ranks`, and min_samples.

    For backends where only the device knows the count.
    """
    ranks = [(0, 0, 0.0)] * 2 + [radius_ranks(n, config.eps_percentile) for n in range(2, max_points + 1)]
    low, high, fraction = zip(*ranks[: max_points + 1])
    return low, high, fraction, [config.min_samples(n) for n in range(max_points + 1)]
