"""Who is near to whom, as bit masks; the degree of every channel; and what eps is made of.

The radius is the order statistic that `order_statistic` has found but for its last digit, and at least EPS_FLOOR. A
channel's neighbours are a row of bits, 32 to a word, itself included. Integer counters only.

Floor: one read of the stored distances, R^2 / 8 bytes written.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import LARGEST_INT32
from cfcam_gpu.kernels.order_statistic import DIGIT_BINS, HISTOGRAM_BINS, LAST_OFFSET, find_bin, tile_of
from cfcam_gpu.kernels.pairwise_distances import TILE


@triton.jit
def adjacency_kernel(
    distances_ptr,
    n_rows_ptr,
    histogram_ptr,
    prefix_ptr,
    remaining_ptr,
    bits_ptr,
    degree_ptr,
    below_ptr,
    above_ptr,
    eps_floor,
    max_rows,
    n_words,
    n_tiles,
    TILE: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
):
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    n_rows = tl.load(n_rows_ptr + image)
    tile_row, tile_column = tile_of(tile)
    if (tile_column * TILE < n_rows) & (n_rows > 1):
        last_digit = histogram_ptr + image * HISTOGRAM_SIZE + LAST_OFFSET
        digit, rank_in_bin = find_bin(last_digit, tl.load(remaining_ptr + image * 2 + 1), DIGIT_BINS)
        below_bits = tl.load(prefix_ptr + image * 2 + 1) * DIGIT_BINS + digit
        below = below_bits.to(tl.float32, bitcast=True)
        if tile == 0:
            tl.store(below_ptr + image, below)
            # The bin of the last digit holds equal distances: the next rank may be one of them.
            if rank_in_bin + 1 < tl.load(last_digit + digit):
                tl.atomic_min(above_ptr + image, below_bits, sem="relaxed")
        radius = tl.maximum(below, eps_floor)

        index = tl.arange(0, TILE)
        row = tile_row * TILE + index
        column = tile_column * TILE + index
        offset = (image * n_tiles + tile) * TILE * TILE + index[:, None] * TILE + index[None, :]
        distances = tl.load(distances_ptr + offset)
        near = tl.abs(distances) <= radius
        # The distance at the next rank, of pairs alone: the other end of eps's interpolation.
        bits = distances.to(tl.int32, bitcast=True)
        beyond = tl.where(bits > below_bits, bits, LARGEST_INT32)
        tl.atomic_min(above_ptr + image, tl.min(tl.min(beyond, axis=1), axis=0), sem="relaxed")

        WORDS: tl.constexpr = TILE // 32
        word = tl.arange(0, WORDS)
        bit = (1 << tl.arange(0, 32))[None, None, :]
        ones = near.to(tl.int32)
        by_row = tl.sum(tl.reshape(ones, [TILE, WORDS, 32]) * bit, axis=2)
        target = (image * max_rows + row).to(tl.int64)[:, None] * n_words + tile_column * WORDS + word[None, :]
        tl.store(bits_ptr + target, by_row, mask=(row < n_rows)[:, None])
        tl.atomic_add(degree_ptr + image * max_rows + row, tl.sum(ones, axis=1), mask=row < n_rows, sem="relaxed")
        if tile_row != tile_column:
            by_column = tl.sum(tl.reshape(tl.trans(ones), [TILE, WORDS, 32]) * bit, axis=2)
            target = (image * max_rows + column).to(tl.int64)[:, None] * n_words + tile_row * WORDS + word[None, :]
            tl.store(bits_ptr + target, by_column, mask=(column < n_rows)[:, None])
            in_columns = column < n_rows
            tl.atomic_add(degree_ptr + image * max_rows + column, tl.sum(ones, axis=0), mask=in_columns, sem="relaxed")


def adjacency(distances, n_rows, histogram, prefix, remaining, degree, above, eps_floor):
    """Bit masks of the neighbours, and the ends of eps's interpolation.

    Args:
        distances, n_rows, histogram, prefix, remaining: as `order_statistic.refine` left them.
        degree: int32 (B, max_rows), zeros; counts each channel's neighbours, itself included.
        above: int32 (B,), the largest int32; becomes the bits of the distance at the next rank.
        eps_floor: smallest radius.

    Returns:
        bits int32 (B, max_rows, n_words) and below float32 (B,), the order statistic. Nothing is written for an image
        with fewer than two rows, nor in words beyond its last tile.
    """
    batch, n_tiles = distances.shape[:2]
    max_rows = degree.shape[1]
    n_words = -(-max_rows // TILE) * (TILE // 32)
    bits = torch.empty(batch, max_rows, n_words, dtype=torch.int32, device=distances.device)
    below = torch.empty(batch, dtype=torch.float32, device=distances.device)
    adjacency_kernel[(batch * n_tiles,)](
        distances,
        n_rows,
        histogram,
        prefix,
        remaining,
        bits,
        degree,
        below,
        above,
        eps_floor,
        max_rows,
        n_words,
        n_tiles,
        TILE=TILE,
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        num_warps=4,
    )
    return bits, below
