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

from cfcam_gpu.kernels.order_statistic import FIRST_BINS, FIRST_SHIFT, HISTOGRAM_BINS, tile_of

TILE = 64
"""Side of a tile of distances."""

REGISTERS = {} if torch.version.hip else {"maxnreg": 168}
"""What three programs a multiprocessor leave: left to itself, the CUDA assembler takes fewer, and spills some."""


@triton.jit
def pairwise_distances_kernel(
    descriptors_ptr,
    n_rows_ptr,
    distances_ptr,
    histogram_ptr,
    n_cells,
    n_tiles,
    STRIDE: tl.constexpr,
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
        # A thread owns 4 x 8 pairs, of four neighbouring rows and twice four neighbouring columns, so that it loads
        # three times four values: the last dimension of both is shared between threads, the others are not.
        SIDE: tl.constexpr = TILE // 4
        quad = tl.arange(0, 4)
        of_tile = quad[:, None] + 4 * tl.arange(0, SIDE)[None, :]
        in_halves = tl.arange(0, 2)[:, None, None] * (TILE // 2) + quad[None, :, None]
        in_halves += 4 * tl.arange(0, SIDE // 2)[None, None, :]
        row = (tile_row * TILE + of_tile)[None, :, None, None, :]
        column = (tile_column * TILE + in_halves)[:, None, :, :, None]
        # Channels of padding are there, and no numbers: without masks four channels are one load.
        of_row = descriptors_ptr + image * n_cells * STRIDE + tile_row * TILE
        of_column = descriptors_ptr + image * n_cells * STRIDE + tile_column * TILE
        squared = tl.zeros([2, 4, 4, SIDE // 2, SIDE], tl.float32)
        start = 0
        while start + CELLS <= n_cells:
            # Summed in short runs first: the error of one long float32 sum would grow with the grid.
            partial = tl.zeros([2, 4, 4, SIDE // 2, SIDE], tl.float32)
            for step in tl.static_range(CELLS):
                x = tl.load(of_row + (step * STRIDE + of_tile))
                y = tl.load(of_column + (step * STRIDE + in_halves))
                difference = x[None, :, None, None, :] - y[:, None, :, :, None]
                partial += difference * difference
            squared += partial
            start += CELLS
            of_row += CELLS * STRIDE
            of_column += CELLS * STRIDE
        while start < n_cells:
            x = tl.load(of_row + of_tile)
            y = tl.load(of_column + in_halves)
            difference = x[None, :, None, None, :] - y[:, None, :, :, None]
            squared += difference * difference
            start += 1
            of_row += STRIDE
            of_column += STRIDE
        stored = tl.sqrt_rn(squared)
        n_columns = tl.minimum(n_rows - tile_column * TILE, TILE)
        n_pairs = tl.where(tile_row == tile_column, n_columns * (n_columns - 1) // 2, TILE * n_columns)
        if n_pairs < TILE * TILE:
            # A sign tells what is no pair: a channel and itself, a pair the other way round, what is no channel.
            ahead = tl.where(column < n_rows, column, 0) - 1 - row
            stored = (stored.to(tl.int32, bitcast=True) | (ahead & -(2**31))).to(tl.float32, bitcast=True)
        # In the order of the threads: a column's four neighbours, the rows of a fourth of the tile.
        offset = (in_halves // 4 * (4 * TILE) + in_halves % 4)[:, None, :, :, None]
        offset += (of_tile % 4 * TILE + of_tile // 4 * 4)[None, :, None, None, :]
        tl.store(distances_ptr + (image * n_tiles + tile) * TILE * TILE + offset, stored)

        # What is no pair has a digit behind the last, where it is counted with not-a-numbers, and taken off again.
        digit = tl.minimum(stored.to(tl.uint32, bitcast=True) >> FIRST_SHIFT, FIRST_BINS - 1).to(tl.int32)
        counts = tl.histogram(tl.reshape(digit, [TILE * TILE], can_reorder=True), FIRST_BINS)
        bins = tl.arange(0, FIRST_BINS)
        counts -= tl.where(bins == FIRST_BINS - 1, TILE * TILE - n_pairs, 0)
        tl.atomic_add(histogram_ptr + image * HISTOGRAM_SIZE + bins, counts, mask=counts != 0, sem="relaxed")


def pairwise_distances(descriptors, n_rows, histogram):
    """Distances float32 (B, n_tiles, TILE // 4, 4, TILE // 4, 4) of the upper tiles, numbered column by column.

    Within a tile, that of row 4 i + j and column 4 k + l is at (k, j, i, l). What is no pair of two channels in
    ascending order has a sign: a distance the other way round, -0 on the diagonal, -nan beyond the channels there are.

    Args:
        descriptors: float32 (B, h * w, n), n a multiple of TILE: of the clustered channels, and nan up to whole tiles.
        n_rows: int32 (B,), how many channels there are.
        histogram: int32 (B, HISTOGRAM_BINS), zeros; its first digit is counted.
    """
    batch, n_cells, stride = descriptors.shape
    columns = stride // TILE
    n_tiles = columns * (columns + 1) // 2
    tile = (TILE // 4, 4, TILE // 4, 4)
    distances = torch.empty(batch, n_tiles, *tile, dtype=torch.float32, device=descriptors.device)
    pairwise_distances_kernel[(batch * n_tiles,)](
        descriptors,
        n_rows,
        distances,
        histogram,
        n_cells,
        n_tiles,
        STRIDE=stride,  # known to the compiler, the cells of a step are fixed distances from one address
        TILE=TILE,
        CELLS=7,  # divides 7 x 7 and 14 x 14
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        num_warps=4,
        **REGISTERS,
    )
    return distances


def distance_matrices(distances, n_rows):
    """The tiles as one symmetric float64 (R, R) matrix per image; for checks, and engines on the host."""
    batch, n_tiles = distances.shape[:2]
    columns = next(c for c in range(1, n_tiles + 1) if c * (c + 1) // 2 == n_tiles)
    distances = distances.abs().permute(0, 1, 4, 3, 2, 5).reshape(batch, n_tiles, TILE, TILE)
    whole = distances.new_zeros(batch, columns, TILE, columns, TILE, dtype=torch.float64)
    tile = 0
    for column in range(columns):
        for row in range(column + 1):
            whole[:, row, :, column] = distances[:, tile]
            whole[:, column, :, row] = distances[:, tile].transpose(1, 2)
            tile += 1
    whole = whole.view(batch, columns * TILE, columns * TILE)
    return [matrix[:n, :n] for matrix, n in zip(whole, n_rows.tolist())]
