"""The exact order statistic of the pair distances, by a radix select over their bits.

Non-negative float32 numbers order like their bits: 31 bits in digits of 11, 10 and 10. `pairwise_distances` counts
the first digit as it makes the distances; each launch here finds the digit of the wanted rank in the histogram
before it and counts the next digit of the distances that share the prefix. The last digit is found by `adjacency`.
Integer counters only, so that the order of execution changes nothing.

Floor of a launch: one read of the stored distances, R^2 / 2 float32.
"""

import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv

DIGIT_BITS = tl.constexpr(10)
"""Bits of the second and of the last digit; the first has one more."""

DIGIT_BINS = tl.constexpr(1024)
FIRST_BINS = tl.constexpr(2048)
"""Counters of such a digit, and of the first."""

FIRST_SHIFT = tl.constexpr(20)
"""Bits below the first digit."""

SECOND_OFFSET = tl.constexpr(2048)
LAST_OFFSET = tl.constexpr(3072)
"""Where the later digits' counters start among those of an image."""

HISTOGRAM_BINS = 4096
"""Counters of an image."""

TILES_AT_ONCE = 2
"""Tiles that a program reads in one step."""

PROGRAMS, MOST_TILES = 2048, 16
"""Programs that a launch has at least before each of them goes through more tiles, and how many: each finds the digit
before its own anew."""


@triton.jit
def find_bin(histogram_ptr, rank, BINS: tl.constexpr):
    """The bin that holds the value of the 0-based ``rank``, and the rank within it."""
    count = tl.load(histogram_ptr + tl.arange(0, BINS))
    up_to = tl.cumsum(count, axis=0)
    found = tl.sum((up_to <= rank).to(tl.int32), axis=0)
    before = tl.max(tl.where(up_to <= rank, up_to, 0), axis=0)
    return found, rank - before


@triton.jit
def tile_of(tile):
    """Row and column of the ``tile``-th upper tile, numbered column by column: (0,0) (0,1) (1,1) (0,2) ..."""
    # Exact: 8 * tile + 1 stays below 2^24, and a rounding of the root is corrected.
    column = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    return tile - column * (column + 1) // 2, column


@triton.jit
def order_statistic_kernel(
    distances_ptr,
    n_rows_ptr,
    low_rank_ptr,
    histogram_ptr,
    prefix_ptr,
    remaining_ptr,
    n_tiles,
    tiles_per_program,
    PASS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HISTOGRAM_SIZE: tl.constexpr,
):
    programs_per_image = tl.cdiv(n_tiles, tiles_per_program)
    image = (tl.program_id(0) // programs_per_image).to(tl.int64)
    program = tl.program_id(0) % programs_per_image
    n_rows = tl.load(n_rows_ptr + image)
    columns = tl.cdiv(n_rows, TILE)
    start = program * tiles_per_program
    end = tl.where(n_rows > 1, tl.minimum(start + tiles_per_program, columns * (columns + 1) // 2), 0)
    histogram_ptr += image * HISTOGRAM_SIZE
    if start < end:
        if PASS == 1:
            prefix, remaining = find_bin(histogram_ptr, tl.load(low_rank_ptr + n_rows), FIRST_BINS)
        else:
            digit, remaining = find_bin(histogram_ptr + SECOND_OFFSET, tl.load(remaining_ptr + image * 2), DIGIT_BINS)
            prefix = tl.load(prefix_ptr + image * 2) * DIGIT_BINS + digit
        if program == 0:
            tl.store(prefix_ptr + image * 2 + (PASS - 1), prefix)
            tl.store(remaining_ptr + image * 2 + (PASS - 1), remaining)

        SHIFT: tl.constexpr = FIRST_SHIFT - DIGIT_BITS * PASS
        first = (prefix << (SHIFT + DIGIT_BITS)).to(tl.uint32)
        counts = tl.zeros([2 * DIGIT_BINS], tl.int32)
        while start < end:
            tile = start + tl.arange(0, TILES)
            offset = (image * n_tiles + tile)[:, None] * (TILE * TILE) + tl.arange(0, TILE * TILE)[None, :]
            bits = tl.load(distances_ptr + offset, mask=(tile < end)[:, None], other=float("-inf"))
            # Unsigned, whatever has another prefix is behind the last bin, and so is what is no pair: it has a sign.
            digits = tl.minimum((bits.to(tl.uint32, bitcast=True) - first) >> SHIFT, DIGIT_BINS).to(tl.int32)
            counts += tl.histogram(tl.reshape(digits, [TILES * TILE * TILE], can_reorder=True), 2 * DIGIT_BINS)
            start += TILES
        bins = tl.arange(0, 2 * DIGIT_BINS)
        OFFSET: tl.constexpr = SECOND_OFFSET if PASS == 1 else LAST_OFFSET
        wanted = (counts != 0) & (bins < DIGIT_BINS)
        tl.atomic_add(histogram_ptr + OFFSET + bins, counts, mask=wanted, sem="relaxed")


def refine(distances, n_rows, low_rank, histogram, prefix, remaining, digit, tile):
    """Count digit 1 or 2 of the distances that share the prefix found so far.

    Args:
        distances: float32 (B, n_tiles, tile, tile), the upper tiles of each image.
        n_rows: int32 (B,).
        low_rank: int32 (max_rows + 1,), the wanted 0-based rank for every number of rows.
        histogram: int32 (B, HISTOGRAM_BINS), updated.
        prefix, remaining: int32 (B, 2), the bits found and the rank within them after each digit, written.
        digit: 1 or 2.
    """
    batch, n_tiles = distances.shape[:2]
    tiles_per_program = max(1, min(batch * n_tiles // PROGRAMS, MOST_TILES) // TILES_AT_ONCE) * TILES_AT_ONCE
    order_statistic_kernel[(batch * cdiv(n_tiles, tiles_per_program),)](
        distances,
        n_rows,
        low_rank,
        histogram,
        prefix,
        remaining,
        n_tiles,
        tiles_per_program,
        PASS=digit,
        TILE=tile,
        TILES=TILES_AT_ONCE,
        HISTOGRAM_SIZE=HISTOGRAM_BINS,
        num_warps=8,
    )
