"""Euclidean distances of the clustered channels, the upper triangle in tiles, with the first digit's histogram.

    d_ij = sqrt(sum_p (x_ip - x_jp)^2)

by direct differences, so that equal channels are at exactly 0 and d_ij = d_ji; |x|^2 + |y|^2 - 2xy promises neither.
Each pair is computed once. The distances stay in memory for the three passes that follow: by count, R^2 / 2 float32
written and read three times cost about as much as computing them once more.

Floor: R^2 / 2 * h * w differences and multiply-adds, R^2 / 2 float32 writes.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv
from cfcam_gpu.kernels.order_statistic import FIRST_BINS, FIRST_SHIFT, HISTOGRAM_BINS, tile_of

TILE = 64
"""Side of a tile of distances."""


@triton.jit
def pairwise_distances_kernel(
    transposed_ptr,
    squared_norm_ptr,
    member_ptr,
    n_rows_ptr,
    distances_ptr,
    histogram_ptr,
    n_cells,
    max_rows,
    n_tiles,
    N_CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
):
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    n_rows = tl.load(n_rows_ptr + image)
    tile_row, tile_column = tile_of(tile)
    # Tiles are numbered column by column: those of an image with fewer rows come first.
    if tile_column * TILE < n_rows:
        # A thread owns squares of 4 x 4 pairs, for which it loads 8 values: the last two dimensions are shared between
        # threads, the first two are not.
        SIDE: tl.constexpr = TILE // 4
        within = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, SIDE)[None, :]
        row = tile_row * TILE + within
        column = tile_column * TILE + within
        in_rows = row < n_rows
        in_columns = column < n_rows
        row_channel = tl.load(member_ptr + image * max_rows + row, mask=in_rows, other=0)
        column_channel = tl.load(member_ptr + image * max_rows + column, mask=in_columns, other=0)
        row_scale = tl.full([4, SIDE], 1.0, tl.float32)
        column_scale = tl.full([4, SIDE], 1.0, tl.float32)
        if UNIT:
            row_norm = tl.load(squared_norm_ptr + image * N_CHANNELS + row_channel, mask=in_rows, other=1.0)
            column_norm = tl.load(squared_norm_ptr + image * N_CHANNELS + column_channel, mask=in_columns, other=1.0)
            row_scale = 1.0 / tl.sqrt_rn(row_norm)
            column_scale = 1.0 / tl.sqrt_rn(column_norm)

        # Rows of padding have the values of channel 0, which nobody looks at: without masks a load is one instruction.
        of_cell = transposed_ptr + image * n_cells * N_CHANNELS
        squared = tl.zeros([4, 4, SIDE, SIDE], tl.float32)
        start = 0
        while start + CELLS <= n_cells:
            # Summed in short runs first: the error of one long float32 sum would grow with the grid.
            partial = tl.zeros([4, 4, SIDE, SIDE], tl.float32)
            for step in tl.static_range(CELLS):
                x = tl.load(of_cell + row_channel + step * N_CHANNELS)
                y = tl.load(of_cell + column_channel + step * N_CHANNELS)
                if UNIT:
                    x *= row_scale
                    y *= column_scale
                difference = x[:, None, :, None] - y[None, :, None, :]
                partial += difference * difference
            squared += partial
            start += CELLS
            of_cell += CELLS * N_CHANNELS
        while start < n_cells:
            x = tl.load(of_cell + row_channel)
            y = tl.load(of_cell + column_channel)
            if UNIT:
                x *= row_scale
                y *= column_scale
            difference = x[:, None, :, None] - y[None, :, None, :]
            squared += difference * difference
            start += 1
            of_cell += N_CHANNELS
        distances = tl.sqrt_rn(squared)
        pair = (row[:, None, :, None] < column[None, :, None, :]) & in_columns[None, :, None, :]
        # A sign tells what is no pair: a channel and itself, a pair the other way round; infinity what is no channel.
        inside = in_rows[:, None, :, None] & in_columns[None, :, None, :]
        stored = tl.where(pair, distances, tl.where(inside, -distances, float("-inf")))
        offset = within[:, None, :, None] * TILE + within[None, :, None, :]
        tl.store(distances_ptr + (image * n_tiles + tile) * TILE * TILE + offset, stored)

        digit = distances.to(tl.int32, bitcast=True) >> FIRST_SHIFT
        n_others = tl.sum(tl.reshape((~pair).to(tl.int32), [TILE * TILE], can_reorder=True), axis=0)
        bins = tl.arange(0, FIRST_BINS)
        counts = tl.histogram(tl.reshape(tl.where(pair, digit, 0), [TILE * TILE], can_reorder=True), FIRST_BINS)
        counts -= tl.where(bins == 0, n_others, 0)
        tl.atomic_add(histogram_ptr + image * HISTOGRAM_SIZE + bins, counts, mask=counts != 0, sem="relaxed")


def pairwise_distances(transposed, squared_norm, member, n_rows, histogram, unit):
    """Distances float32 (B, n_tiles, TILE, TILE) of the upper tiles, numbered column by column.

    What is no pair of two channels in ascending order has a negative sign: a distance the other way round, -0 on the
    diagonal, minus infinity beyond the channels there are.

    Args:
        transposed: float32 (B, h * w, C).
        squared_norm: float32 (B, C).
        member: int32 (B, max_rows), the clustered channels; n_rows int32 (B,), how many there are.
        histogram: int32 (B, HISTOGRAM_BINS), zeros; its first digit is counted.
        unit: scale every channel to unit length first.
    """
    batch, n_cells, n_channels = transposed.shape
    max_rows = member.shape[1]
    columns = cdiv(max_rows, TILE)
    n_tiles = columns * (columns + 1) // 2
    distances = torch.empty(batch, n_tiles, TILE, TILE, dtype=torch.float32, device=transposed.device)
    pairwise_distances_kernel[(batch * n_tiles,)](
        transposed,
        squared_norm,
        member,
        n_rows,
        distances,
        histogram,
        n_cells,
        max_rows,
        n_tiles,
        N_CHANNELS=n_channels,  # known to the compiler, the cells of a step are fixed distances from one address
        UNIT=unit,
        TILE=TILE,
        CELLS=7,  # divides 7 x 7 and 14 x 14
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        num_warps=4,
    )
    return distances


def distance_matrices(distances, n_rows):
    """The tiles as one symmetric float64 (R, R) matrix per image; for checks, and engines on the host."""
    batch, n_tiles = distances.shape[:2]
    columns = next(c for c in range(1, n_tiles + 1) if c * (c + 1) // 2 == n_tiles)
    distances = distances.abs()
    whole = distances.new_zeros(batch, columns, TILE, columns, TILE, dtype=torch.float64)
    tile = 0
    for column in range(columns):
        for row in range(column + 1):
            whole[:, row, :, column] = distances[:, tile]
            whole[:, column, :, row] = distances[:, tile].transpose(1, 2)
            tile += 1
    whole = whole.view(batch, columns * TILE, columns * TILE)
    return [matrix[:n, :n] for matrix, n in zip(whole, n_rows.tolist())]
