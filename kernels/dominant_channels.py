"""Which channels are dominant; the list of those left to cluster, and their descriptors side by side.

The threshold is the order statistic at a rank that the host knows (`cfcam_gpu.clustering.ranks.dominant_rank`): no
interpolation. It is found digit by digit, as `order_statistic` finds that of the distances: the bits of non-negative
float32 numbers order like the numbers, so that three histograms over values held in registers give the exact value.
A program finds this for all channels of an image and gathers its share of the cells.

Floor: C reads, 2 * C writes; three histograms of C values. 2 * R * h * w reads and writes of descriptors.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import DOMINANT, LARGEST_INT32, NOISE
from cfcam_gpu.kernels.launch import cdiv, next_power_of_2
from cfcam_gpu.kernels.order_statistic import DIGIT_BINS, DIGIT_BITS, FIRST_BINS, FIRST_SHIFT, HISTOGRAM_BINS
from cfcam_gpu.kernels.pairwise_distances import TILE

PROGRAMS = 264
"""Programs of a launch that share the cells of a small batch, whose time is that of one program."""

CELLS_AT_ONCE, MOST_CELLS = 2, 100
"""Cells that a program gathers in one step, and in all."""


@triton.jit
def bin_of(digits, rank, BINS: tl.constexpr):
    """The digit of the value of the 0-based ``rank``, and its rank among those of this digit."""
    up_to = tl.cumsum(tl.histogram(digits, BINS), axis=0)
    below = up_to <= rank
    return tl.sum(below.to(tl.int32), axis=0), rank - tl.max(tl.where(below, up_to, 0), axis=0)


@triton.jit
def dominant_channels_kernel(
    squared_norm_ptr,
    transposed_ptr,
    labels_ptr,
    member_ptr,
    n_rows_ptr,
    descriptors_ptr,
    degree_ptr,
    histogram_ptr,
    above_ptr,
    n_channels,
    n_cells,
    max_rows,
    rank,
    n_parts,
    cells_per_part,
    HAS_DOMINANT: tl.constexpr,
    UNIT: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // n_parts).to(tl.int64)
    part = tl.program_id(0) % n_parts
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
    clustered = takes_part & (~dominant)
    row = tl.cumsum(clustered.to(tl.int32), axis=0) - 1
    n_rows = tl.sum(clustered.to(tl.int32), axis=0)
    if part == 0:
        tl.store(labels_ptr + image * n_channels + channel, tl.where(dominant, DOMINANT, NOISE), mask=in_channels)
        tl.store(member_ptr + image * max_rows + row, channel, mask=clustered)
        tl.store(n_rows_ptr + image, n_rows)
        # The counters of the next kernels start here, which saves a launch.
        tl.store(degree_ptr + image * max_rows + channel, tl.zeros([BLOCK_C], tl.int32), mask=channel < max_rows)
        counter = tl.arange(0, HISTOGRAM_SIZE)
        tl.store(histogram_ptr + image * HISTOGRAM_SIZE + counter, tl.zeros([HISTOGRAM_SIZE], tl.int32))
        tl.store(above_ptr + image, LARGEST_INT32)

    scale = tl.full([BLOCK_C], 1.0, tl.float32)
    if UNIT:
        scale = 1.0 / tl.sqrt_rn(tl.where(clustered, squared_norm, 1.0))
    # No numbers up to a whole tile, which are read and whose distances are none.
    padding = n_rows + tl.arange(0, TILE)
    in_padding = padding < tl.cdiv(n_rows, TILE) * TILE
    # As if scattered, so that the loads have the layout of the stores, which are.
    of_cell = tl.max_contiguous(tl.arange(0, BLOCK_C), 1)
    transposed_ptr += image * n_cells * n_channels
    descriptors_ptr += image * n_cells * STRIDE
    start = part * cells_per_part
    end = tl.minimum(start + cells_per_part, n_cells)
    while start < end:
        cell = start + tl.arange(0, CELLS)
        inside = (cell < end)[:, None] & clustered[None, :]
        value = tl.load(transposed_ptr + (cell[:, None] * n_channels + of_cell[None, :]), mask=inside, other=0.0)
        if UNIT:
            value *= scale[None, :]
        tl.store(descriptors_ptr + (cell[:, None] * STRIDE + row[None, :]), value, mask=inside)
        nothing = tl.full([CELLS, TILE], float("nan"), tl.float32)
        inside = (cell < end)[:, None] & in_padding[None, :]
        tl.store(descriptors_ptr + (cell[:, None] * STRIDE + padding[None, :]), nothing, mask=inside)
        start += CELLS


def dominant_channels(squared_norm, transposed, rank, max_rows, unit):
    """Labels, the channels to cluster, their descriptors, and cleared counters.

    Args:
        squared_norm: float32 (B, C); transposed float32 (B, h * w, C).
        rank: ascending rank from which on a channel is dominant; None: no channel is.
        max_rows: largest number of channels that can be left to cluster.
        unit: leave out channels of zeros, and scale the others to unit length.

    Returns:
        labels int32 (B, C), DOMINANT or NOISE; member int32 (B, max_rows), the clustered channels in ascending order;
        n_rows int32 (B,), how many there are; descriptors float32 (B, h * w, n), their values, and nan up to a
        multiple of TILE; and the counters as they start: degree int32 (B, max_rows) and histogram int32 (B,
        HISTOGRAM_BINS), zeros, and above int32 (B,), the largest int32.
    """
    batch, n_cells, n_channels = transposed.shape
    options = {"dtype": torch.int32, "device": squared_norm.device}
    labels = torch.empty(batch, n_channels, **options)
    member, degree = torch.empty(2, batch, max_rows, **options)
    n_rows, above = torch.empty(2, batch, **options)
    histogram = torch.empty(batch, HISTOGRAM_BINS, **options)
    stride = cdiv(max_rows, TILE) * TILE
    descriptors = torch.empty(batch, n_cells, stride, dtype=torch.float32, device=squared_norm.device)
    cells_per_part = min(cdiv(n_cells, max(PROGRAMS // batch, 1)), MOST_CELLS)
    cells_per_part = cdiv(cells_per_part, CELLS_AT_ONCE) * CELLS_AT_ONCE
    n_parts = cdiv(n_cells, cells_per_part)
    dominant_channels_kernel[(batch * n_parts,)](
        squared_norm,
        transposed,
        labels,
        member,
        n_rows,
        descriptors,
        degree,
        histogram,
        above,
        n_channels,
        n_cells,
        max_rows,
        0 if rank is None else rank,
        n_parts,
        cells_per_part,
        HAS_DOMINANT=rank is not None,
        UNIT=unit,
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        STRIDE=stride,
        TILE=TILE,
        CELLS=CELLS_AT_ONCE,
        BLOCK_C=next_power_of_2(n_channels),
        num_warps=16,
    )
    return labels, member, n_rows, descriptors, degree, histogram, above
