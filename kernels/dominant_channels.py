"""Which channels are dominant, and the list of those left to cluster.

The threshold is the order statistic at a rank that the host knows (`cfcam_gpu.clustering.ranks.dominant_rank`): no
interpolation. It is found digit by digit, as `order_statistic` finds that of the distances: the bits of non-negative
float32 numbers order like the numbers, so that three histograms over values held in registers give the exact value.
One program an image.

Floor: C reads, 2 * C writes; three histograms of C values.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import DOMINANT, LARGEST_INT32, NOISE
from cfcam_gpu.kernels.launch import next_power_of_2
from cfcam_gpu.kernels.order_statistic import DIGIT_BINS, DIGIT_BITS, FIRST_BINS, FIRST_SHIFT, HISTOGRAM_BINS


@triton.jit
def bin_of(digits, rank, BINS: tl.constexpr):
    """The digit of the value of the 0-based ``rank``, and its rank among those of this digit."""
    up_to = tl.cumsum(tl.histogram(digits, BINS), axis=0)
    below = up_to <= rank
    return tl.sum(below.to(tl.int32), axis=0), rank - tl.max(tl.where(below, up_to, 0), axis=0)


@triton.jit
def dominant_channels_kernel(
    squared_norm_ptr,
    labels_ptr,
    member_ptr,
    n_rows_ptr,
    degree_ptr,
    histogram_ptr,
    above_ptr,
    n_channels,
    max_rows,
    rank,
    HAS_DOMINANT: tl.constexpr,
    UNIT: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    in_channels = channel < n_channels
    squared_norm = tl.load(squared_norm_ptr + image * n_channels + channel, mask=in_channels, other=0.0)
    # The padding sorts behind every number, infinity included.
    bits = tl.where(in_channels, squared_norm.to(tl.int32, bitcast=True), LARGEST_INT32)
    dominant = channel < 0
    if HAS_DOMINANT:
        threshold, rank_in_bin = bin_of(bits >> FIRST_SHIFT, rank, FIRST_BINS)
        for step in tl.static_range(1, 3):
            # Unsigned, whatever has another prefix is behind the last bin. It may be counted there: behind the rank.
            first = threshold << (FIRST_SHIFT - DIGIT_BITS * (step - 1))
            beyond = (bits - first).to(tl.uint32, bitcast=True) >> (FIRST_SHIFT - DIGIT_BITS * step)
            digit, rank_in_bin = bin_of(tl.minimum(beyond, DIGIT_BINS - 1).to(tl.int32), rank_in_bin, DIGIT_BINS)
            threshold = threshold * DIGIT_BINS + digit
        dominant = in_channels & (bits >= threshold)
    takes_part = in_channels
    if UNIT:
        # A channel of zeros has no shape.
        takes_part = in_channels & (squared_norm > 0)
        dominant = dominant & takes_part
    tl.store(labels_ptr + image * n_channels + channel, tl.where(dominant, DOMINANT, NOISE), mask=in_channels)

    clustered = (takes_part & (~dominant)).to(tl.int32)
    row = tl.cumsum(clustered, axis=0) - 1
    tl.store(member_ptr + image * max_rows + row, channel, mask=clustered != 0)
    tl.store(n_rows_ptr + image, tl.sum(clustered, axis=0))

    # The counters of the next kernels start here, which saves a launch.
    tl.store(degree_ptr + image * max_rows + channel, tl.zeros([BLOCK_C], tl.int32), mask=channel < max_rows)
    counter = tl.arange(0, HISTOGRAM_SIZE)
    tl.store(histogram_ptr + image * HISTOGRAM_SIZE + counter, tl.zeros([HISTOGRAM_SIZE], tl.int32))
    tl.store(above_ptr + image, LARGEST_INT32)


def dominant_channels(squared_norm, rank, max_rows, unit):
    """Labels, the channels to cluster, and cleared counters.

    Args:
        squared_norm: float32 (B, C).
        rank: ascending rank from which on a channel is dominant; None: no channel is.
        max_rows: largest number of channels that can be left to cluster.
        unit: leave out channels of zeros.

    Returns:
        labels int32 (B, C), DOMINANT or NOISE; member int32 (B, max_rows), the clustered channels in ascending order;
        n_rows int32 (B,); and the counters as they start: degree int32 (B, max_rows) and histogram int32 (B,
        HISTOGRAM_BINS), zeros, and above int32 (B,), the largest int32.
    """
    batch, n_channels = squared_norm.shape
    options = {"dtype": torch.int32, "device": squared_norm.device}
    labels = torch.empty(batch, n_channels, **options)
    member, degree = torch.empty(2, batch, max_rows, **options)
    n_rows, above = torch.empty(2, batch, **options)
    histogram = torch.empty(batch, HISTOGRAM_BINS, **options)
    dominant_channels_kernel[(batch,)](
        squared_norm,
        labels,
        member,
        n_rows,
        degree,
        histogram,
        above,
        n_channels,
        max_rows,
        0 if rank is None else rank,
        HAS_DOMINANT=rank is not None,
        UNIT=unit,
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        BLOCK_C=next_power_of_2(n_channels),
        num_warps=16,
    )
    return labels, member, n_rows, degree, histogram, above
