"""Who is near to whom, as bit masks; the degree of every channel; and what eps is made of.

The radius is the order statistic that `order_statistic` has found but for its last digit, and at least EPS_FLOOR. A
channel's neighbours are a row of bits, 32 to a word, itself included. Integer counters only.

Floor: one read of the stored distances, R^2 / 8 bytes written.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import LARGEST_INT32
from cfcam_gpu.kernels.launch import cdiv
from cfcam_gpu.kernels.order_statistic import DIGIT_BINS, HISTOGRAM_BINS, LAST_OFFSET, find_bin, tile_of
from cfcam_gpu.kernels.pairwise_distances import TILE

PROGRAMS, MOST_TILES = 4096, 8
"""Programs that a launch has at least before each of them goes through several tiles, and how many."""


@triton.jit
def count_bits(words):
    """How many bits of each word are set: what compilers recognise as one instruction."""
    words = words.to(tl.uint32, bitcast=True)
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


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
    tiles_per_program,
    TILE: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
):
    programs_per_image = tl.cdiv(n_tiles, tiles_per_program)
    image = (tl.program_id(0) // programs_per_image).to(tl.int64)
    tile = (tl.program_id(0) % programs_per_image) * tiles_per_program
    n_rows = tl.load(n_rows_ptr + image)
    columns = tl.cdiv(n_rows, TILE)
    end = tl.where(n_rows > 1, tl.minimum(tile + tiles_per_program, columns * (columns + 1) // 2), 0)
    if tile < end:
        last_digit = histogram_ptr + image * HISTOGRAM_SIZE + LAST_OFFSET
        digit, rank_in_bin = find_bin(last_digit, tl.load(remaining_ptr + image * 2 + 1), DIGIT_BINS)
        below_bits = tl.load(prefix_ptr + image * 2 + 1) * DIGIT_BINS + digit
        below = below_bits.to(tl.float32, bitcast=True)
        if tile == 0:
            tl.store(below_ptr + image, below)
            # The bin of the last digit holds equal distances: the next rank may be one of them.
            if rank_in_bin + 1 < tl.load(last_digit + digit):
                tl.atomic_min(above_ptr + image, below_bits, sem="relaxed")
        # One more each: what is smaller is near, what is not is beyond.
        radius_bits = (tl.maximum(below, eps_floor).to(tl.int32, bitcast=True) + 1).to(tl.uint32)
        next_bits = (below_bits + 1).to(tl.uint32)
        while tile < end:
            tile_row, tile_column = tile_of(tile)
            # Words are made in registers: a thread reads four neighbours of a row at a time, or a row of four columns.
            # Whether a distance is near is the sign of a difference of bits, which is shifted in.
            WORDS: tl.constexpr = TILE // 32
            tile_ptr = distances_ptr + (image * n_tiles + tile) * TILE * TILE
            word = tl.arange(0, WORDS)
            quad = tl.arange(0, 4)
            place = tl.arange(0, TILE)
            start = word[:, None, None] * (32 * TILE) + place[None, :, None] * 4 + quad[None, None, :]
            nibbles = tl.zeros([WORDS, TILE, 4], tl.uint32)
            # The distance at the next rank, of pairs alone: the other end of eps's interpolation. Unsigned, the
            # differences of what is no pair, or not beyond, are larger than those of all that are.
            least = tl.full([WORDS, TILE, 4], 0xFFFFFFFF, tl.uint32)
            loaded = ()
            for step in tl.static_range(8):
                loaded += (tl.load(tile_ptr + (start + step * 4 * TILE)).to(tl.uint32, bitcast=True),)
            for step in tl.static_range(8):
                nibbles = (nibbles << 4) | (((loaded[7 - step] & 0x7FFFFFFF) - radius_bits) >> 28)
                least = tl.minimum(least, loaded[7 - step] - next_bits)
            by_row = tl.sum((nibbles & 0x88888888) >> (3 - quad)[None, None, :].to(tl.uint32), axis=2).to(tl.int32)
            beyond = (tl.min(tl.reshape(least, [WORDS * TILE * 4], can_reorder=True), axis=0) + next_bits).to(tl.int32)
            tl.atomic_min(above_ptr + image, tl.where(beyond > below_bits, beyond, LARGEST_INT32), sem="relaxed")
            row = tile_row * TILE + place % (TILE // 4) * 4 + place // (TILE // 4)
            in_rows = (row < n_rows)[None, :]
            of_row = image * max_rows + row[None, :] + 0 * word[:, None]
            tl.store(bits_ptr + of_row * n_words + tile_column * WORDS + word[:, None], by_row, mask=in_rows)
            tl.atomic_add(degree_ptr + of_row, count_bits(by_row), mask=in_rows, sem="relaxed")
            if tile_row != tile_column:
                # Four threads share a word, of eight rows each: all are pairs here, but for columns that are left out.
                byte = tl.arange(0, 4)
                four = tl.arange(0, TILE // 4)
                first = word[:, None, None, None] * 32 + four[None, :, None, None] * (4 * TILE)
                first += byte[None, None, :, None] * 8 + quad[None, None, None, :]
                parts = tl.zeros([WORDS, TILE // 4, 4, 4], tl.uint32)
                of_pairs = ()
                for step in tl.static_range(8):
                    offset = first + (step // 4 * 4 + step % 4 * TILE)
                    of_pairs += (tl.load(tile_ptr + offset).to(tl.uint32, bitcast=True),)
                for step in tl.static_range(8):
                    parts = (parts << 1) | ((of_pairs[7 - step] - radius_bits) >> 31)
                by_column = tl.sum(parts << (8 * byte)[None, None, :, None].to(tl.uint32), axis=2).to(tl.int32)
                column = (tile_column * TILE + 4 * four[:, None] + quad[None, :])[None, :, :]
                in_columns = column < n_rows
                of_column = image * max_rows + column + 0 * word[:, None, None]
                tl.store(
                    bits_ptr + of_column * n_words + tile_row * WORDS + word[:, None, None], by_column, mask=in_columns
                )
                tl.atomic_add(degree_ptr + of_column, count_bits(by_column), mask=in_columns, sem="relaxed")
            tile += 1


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
    # A program finds the radius anew: where there are many, each goes through several tiles.
    tiles_per_program = max(1, min(batch * n_tiles // PROGRAMS, MOST_TILES))
    adjacency_kernel[(batch * cdiv(n_tiles, tiles_per_program),)](
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
        tiles_per_program,
        TILE=TILE,
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        num_warps=4,
    )
    return bits, below
