"""The average over the cells with alike features: one step of it a launch, and before them one for their products.

    k_pq = max(0, cos(f_p, f_q))^power * 2^-(c_y (y_p - y_q)^2 + c_x (x_p - x_q)^2),   M_p = sum_q k_pq S_q / sum_q k_pq

with f_p = (F_1p ... F_Cp) the features of the guide's cell p, and q at most reach_y rows and reach_x columns away; a
cell without features keeps S_p. What the last step leaves is multiplied by |f_p|^guide_power, where that is above 0.
In the first step S is the signed sum over the channels on the target layer's coarser grid, of which each program takes
the bilinear value at q for itself, its negative cells scaled down to what the positive ones amount to
(`reference.balance`); later it is what the step before has left on the guide's own grid. A program owns a block of
cells p and walks over the cells q of the rows within reach.

The products f_p . f_q of a guide of up to `STORED_CELLS` cells are stored, each tile computed once for both of its
halves, because every step needs them; where a batch has few tiles, several programs share the channels of one, and who
reads the products adds their parts up in order. The products of more cells are computed in every step, as attention
does it, together with the norms in one pass over the channels.

The matrix units multiply float32 in TF32, with eleven significant bits, so each factor is split into two such parts and
three of their products are added: close to float32's accuracy. Triton's own tf32x3 does the same, but not for AMD.

With a range, k_pq is multiplied by exp(-((S_p - S_q) / (range * E))^2 / 2) too, E the mean of |S| over the target
layer's cells, which each program adds up for itself, as it does what it balances by.

Of K classes an image, sixteen share a program and its affinities, which are multiplied by their S in the same way; with
a range, where the affinities are each class's own, a program has one.

Floor: C * hg * wg reads and (hg * wg)^2 writes, once; C operations for each pair of cells. A step reads what was
written and does 2 * K operations for each pair within reach. To balance, each program of the first step, and for E
of every step, reads all of S: K * h * w values, which stay in the cache.
"""

import math

import torch
import triton
import triton.language as tl

from cfcam_gpu.config import WITHOUT_FEATURES
from cfcam_gpu.constants import constant
from cfcam_gpu.gaussian import coverage, window_decay, window_reach
from cfcam_gpu.kernels.class_map import bilinear, scaled_below_zero
from cfcam_gpu.kernels.launch import cdiv, next_power_of_2
from cfcam_gpu.kernels.order_statistic import tile_of

STORED_CELLS = 1024
"""Most cells of a guide whose products are stored: of more, an image's would take over 4 MiB."""

STORED_CELLS_AT_ONCE = 2
"""Cells of a program where the products are stored: few, so that one image alone fills many multiprocessors."""

STORED_BYTES = 2**30
"""Device memory the products of one launch may take; larger batches go in chunks."""


@triton.jit
def high_part(x):
    """The leading eleven significant bits of a float32, which TF32 holds exactly."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(a, b, total):
    """a @ b + total, close to float32's accuracy."""
    a_high = high_part(a)
    b_high = high_part(b)
    total = tl.dot(a - a_high, b_high, total, input_precision="tf32")
    total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def log2_likeness(product, square, other_square, power):
    """How much cells count for each other by their features, and which do at all: log2 of it, and where it is not 0.

    A cell without features, or with NaN among them, is like no cell, not even itself.
    """
    cosine = product / tl.sqrt(tl.where(square > 0, square, 1.0))[:, None]
    cosine = cosine / tl.sqrt(tl.where(other_square > 0, other_square, 1.0))[None, :]
    alike = cosine > 0
    return power * tl.log2(tl.where(alike, cosine, 1.0)), alike


@triton.jit
def share_of_evidence(
    grid_ptr, k, in_classes, rows_ptr, columns_ptr, height, width, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What the negative cells of classes k are multiplied by: the positive ones' total over theirs.

    At most 1, and 1 without any; and the total of both after that. (BLOCK_K,), or a scalar of one class.
    """
    speaks_for = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    speaks_against = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    first = 0
    while first < height * width:
        cell = first + tl.arange(0, BLOCK)
        inside = cell < height * width
        weight = tl.load(rows_ptr + cell // width, mask=inside, other=0.0)
        weight = weight * tl.load(columns_ptr + cell % width, mask=inside, other=0.0)
        offset = k[None, :] * (height * width) + cell[:, None]
        value = tl.load(grid_ptr + offset, mask=inside[:, None] & in_classes[None, :], other=0.0)
        weighted = value * weight[:, None]
        speaks_for += tl.maximum(weighted, 0.0)
        speaks_against += tl.maximum(-weighted, 0.0)
        first += BLOCK
    if BLOCK_K == 1:
        evidence_for = tl.sum(speaks_for)
        evidence_against = tl.sum(speaks_against)
    else:
        evidence_for = tl.sum(speaks_for, axis=0)
        evidence_against = tl.sum(speaks_against, axis=0)
    outweighed = (evidence_against > evidence_for) & (evidence_for > 0)
    share = tl.where(outweighed, evidence_for / tl.where(outweighed, evidence_against, 1.0), 1.0)
    return share, evidence_for + share * evidence_against


@triton.jit
def product_of_cells(
    program,
    f_ptr,
    products_ptr,
    n_channels,
    width,
    n_cells,
    f_stride_b,
    f_stride_c,
    f_stride_y,
    f_stride_x,
    SHARES: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the products, over a share of the channels: that of the ``program`` of those that make them."""
    columns = tl.cdiv(n_cells, BLOCK)
    n_tiles = columns * (columns + 1) // 2
    image_and_share = (program // n_tiles).to(tl.int64)
    tile_row, tile_column = tile_of(program % n_tiles)
    p = tile_row * BLOCK + tl.arange(0, BLOCK)
    q = tile_column * BLOCK + tl.arange(0, BLOCK)
    f_ptr += (image_and_share // SHARES) * f_stride_b
    of_p = (p // width).to(tl.int64) * f_stride_y + (p % width) * f_stride_x
    of_q = (q // width).to(tl.int64) * f_stride_y + (q % width) * f_stride_x
    first = (image_and_share % SHARES) * N_STEPS * BLOCK_C
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(N_STEPS):
        channel = first + step * BLOCK_C + tl.arange(0, BLOCK_C)
        in_channels = channel < n_channels
        a_offset = channel[:, None] * f_stride_c + of_p[None, :]
        b_offset = channel[:, None] * f_stride_c + of_q[None, :]
        a = tl.load(f_ptr + a_offset, mask=in_channels[:, None] & (p < n_cells)[None, :], other=0.0).to(tl.float32)
        b = tl.load(f_ptr + b_offset, mask=in_channels[:, None] & (q < n_cells)[None, :], other=0.0).to(tl.float32)
        product = add_product(tl.trans(a), b, product)
    products_ptr += image_and_share * n_cells * n_cells
    inside = (p < n_cells)[:, None] & (q < n_cells)[None, :]
    tl.store(products_ptr + p[:, None] * n_cells + q[None, :], product, mask=inside)
    if tile_row != tile_column:
        tl.store(products_ptr + q[None, :] * n_cells + p[:, None], product, mask=inside)


@triton.jit
def cell_products_kernel(
    f_ptr,
    products_ptr,
    n_channels,
    width,
    n_cells,
    f_stride_b,
    f_stride_c,
    f_stride_y,
    f_stride_x,
    SHARES: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    product_of_cells(
        tl.program_id(0),
        f_ptr,
        products_ptr,
        n_channels,
        width,
        n_cells,
        f_stride_b,
        f_stride_c,
        f_stride_y,
        f_stride_x,
        SHARES,
        N_STEPS,
        BLOCK_N,
        BLOCK_F,
    )


@triton.jit
def squares_of(products_ptr, cell, inside, n_cells, SHARES: tl.constexpr):
    """The features' squared norms, from the stored products."""
    square = tl.load(products_ptr + cell * n_cells + cell, mask=inside, other=0.0)
    for part in tl.static_range(1, SHARES):
        square += tl.load(products_ptr + (part * n_cells + cell) * n_cells + cell, mask=inside, other=0.0)
    return square


@triton.jit
def grid_value(
    grid_ptr,
    cell,
    inside,
    grid_height,
    grid_width,
    width,
    scale_y,
    scale_x,
    share,
    RESIZE: tl.constexpr,
    BALANCE: tl.constexpr,
):
    """The sum at cells of the guide."""
    if RESIZE:
        return bilinear(grid_ptr, cell, inside, grid_height, grid_width, width, scale_y, scale_x, 0.0, share, True)
    else:
        return scaled_below_zero(tl.load(grid_ptr + cell, mask=inside, other=0.0), share, BALANCE)


@triton.jit
def affinity_sum_kernel(
    f_ptr,
    products_ptr,
    grid_ptr,
    sum_ptr,
    rows_ptr,
    columns_ptr,
    averaged_ptr,
    n_classes,
    n_channels,
    height,
    width,
    grid_height,
    grid_width,
    sum_height,
    sum_width,
    scale_y,
    scale_x,
    reach_y,
    reach_x,
    decay_y,
    decay_x,
    power,
    range_scale,
    half_guide_power,
    least_square,
    f_stride_b,
    f_stride_c,
    f_stride_y,
    f_stride_x,
    RELU: tl.constexpr,
    STRENGTH: tl.constexpr,
    RESIZE: tl.constexpr,
    BALANCE: tl.constexpr,
    RANGE: tl.constexpr,
    SHARES: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_cells = height * width
    blocks_of_cells = tl.cdiv(n_cells, BLOCK_P)
    blocks_of_classes = tl.cdiv(n_classes, BLOCK_K)
    block = tl.program_id(0) // blocks_of_cells
    image = (block // blocks_of_classes).to(tl.int64)
    block_of_classes = (block % blocks_of_classes).to(tl.int64)
    k = block_of_classes * BLOCK_K + tl.arange(0, BLOCK_K)
    in_classes = k < n_classes
    start = (tl.program_id(0) % blocks_of_cells) * BLOCK_P
    cell = start + tl.arange(0, BLOCK_P)
    in_cells = cell < n_cells
    y = cell // width
    x = cell % width
    f_ptr += image * f_stride_b
    products_ptr += image * SHARES * n_cells * n_cells
    if SHARES > 0:
        own_square = squares_of(products_ptr, cell, in_cells, n_cells, SHARES)
    else:
        own_square = tl.zeros([BLOCK_P], tl.float32)
    grid_ptr += image * n_classes * grid_height * grid_width
    averaged_ptr += image * n_classes * n_cells
    share = 1.0
    range_unit = 0.0
    if BALANCE or RANGE:
        sum_ptr += image * n_classes * sum_height * sum_width
        share, evidence = share_of_evidence(
            sum_ptr, k, in_classes, rows_ptr, columns_ptr, sum_height, sum_width, BLOCK_Q, BLOCK_K
        )
        if RANGE:  # of one class a program
            range_unit = tl.where(evidence > 0, range_scale / tl.where(evidence > 0, evidence, 1.0), 0.0)
    # Of one class a program, cells are one-dimensional; of several, (cells, classes).
    if BLOCK_K == 1:
        total = tl.zeros([BLOCK_P], tl.float32)
        own_cell = cell
        own_inside = in_cells
        grids = grid_ptr + block_of_classes * (grid_height * grid_width)
        averaged_ptr += block_of_classes * n_cells
    else:
        total = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        own_cell = cell[:, None]
        own_inside = in_cells[:, None] & in_classes[None, :]
        grids = grid_ptr + k[None, :] * (grid_height * grid_width)
        if BALANCE:
            share = share[None, :]
    of_p = y.to(tl.int64) * f_stride_y + x.to(tl.int64) * f_stride_x
    if RANGE:
        value_of_p = grid_value(
            grids, own_cell, own_inside, grid_height, grid_width, width, scale_y, scale_x, share, RESIZE, BALANCE
        )

    mass = tl.zeros([BLOCK_P], tl.float32)
    first = tl.maximum(start // width - reach_y, 0) * width
    end = tl.minimum((start + BLOCK_P - 1) // width + reach_y + 1, height) * width
    while first < end:
        other = first + tl.arange(0, BLOCK_Q)
        in_others = other < end
        other_y = other // width
        other_x = other % width
        product = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
        if SHARES > 0:
            both = in_cells[:, None] & in_others[None, :]
            for part in tl.static_range(SHARES):
                row = (part * n_cells + cell) * n_cells
                product += tl.load(products_ptr + row[:, None] + other[None, :], mask=both, other=0.0)
            other_square = squares_of(products_ptr, other, in_others, n_cells, SHARES)
            exponent, alike = log2_likeness(product, own_square, other_square, power)
        else:
            of_q = other_y.to(tl.int64) * f_stride_y + other_x.to(tl.int64) * f_stride_x
            # Added up over the channels behind the loop: in it, every sum across threads would be a barrier.
            squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            other_squares = tl.zeros([BLOCK_C, BLOCK_Q], tl.float32)
            # Bounds known at compile time: only then are the loads of the next steps under way during this one.
            for step in range(N_STEPS):
                channel = (step * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
                in_channels = channel < n_channels
                a_offset = of_p[:, None] + channel[None, :] * f_stride_c
                b_offset = channel[:, None] * f_stride_c + of_q[None, :]
                a = tl.load(f_ptr + a_offset, mask=in_cells[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
                b = tl.load(f_ptr + b_offset, mask=in_channels[:, None] & in_others[None, :], other=0.0).to(tl.float32)
                product = add_product(a, b, product)
                squares += a * a
                other_squares += b * b
            own_square = tl.sum(squares, axis=1)
            exponent, alike = log2_likeness(product, own_square, tl.sum(other_squares, axis=0), power)
        apart_y = tl.abs(y[:, None] - other_y[None, :])
        apart_x = tl.abs(x[:, None] - other_x[None, :])
        near = (apart_y <= reach_y) & (apart_x <= reach_x)
        exponent -= decay_y * (apart_y * apart_y).to(tl.float32) + decay_x * (apart_x * apart_x).to(tl.float32)
        if BLOCK_K == 1:
            other_cell = other
            other_inside = in_others
        else:
            other_cell = other[:, None]
            other_inside = in_others[:, None] & in_classes[None, :]
        value = grid_value(
            grids,
            other_cell,
            other_inside,
            grid_height,
            grid_width,
            width,
            scale_y,
            scale_x,
            share,
            RESIZE,
            BALANCE,
        )
        if RANGE:
            difference = (value_of_p[:, None] - value[None, :]) * range_unit
            exponent -= difference * difference
        affinity = tl.where(alike & near, tl.exp2(exponent), 0.0)
        if BLOCK_K == 1:
            total += tl.sum(affinity * value[None, :], axis=1)
        else:
            total = add_product(affinity, value, total)
        mass += tl.sum(affinity, axis=1)
        first += BLOCK_Q

    own = grid_value(
        grids, own_cell, own_inside, grid_height, grid_width, width, scale_y, scale_x, share, RESIZE, BALANCE
    )
    if BLOCK_K == 1:
        out = cell
    else:
        mass = mass[:, None]
        out = k[None, :] * n_cells + cell[:, None]
    averaged = tl.where(mass > 0, total / tl.where(mass > 0, mass, 1.0), own)
    if STRENGTH:
        if SHARES > 0:  # read anew: kept since then, it would cost registers that some targets do not have
            own_square = squares_of(products_ptr, cell, in_cells, n_cells, SHARES)
        square = tl.where(own_square < float("inf"), own_square, 0.0)  # nor NaN
        strength = tl.exp2(half_guide_power * tl.log2(tl.maximum(square, least_square)))
        averaged = averaged * (strength if BLOCK_K == 1 else strength[:, None])
    if RELU:
        averaged = tl.maximum(averaged, 0.0)
    tl.store(averaged_ptr + out, averaged, mask=own_inside)


def affinity_sum(grid, guide, config, relu=True, products=None):
    """The signed sum balanced and averaged over alike cells, by default its positive part.

    A launch for the products of the cells, where they are stored and not there yet, and one a step; float32
    (B, hg, wg), or (B, K, hg, wg).

    Args:
        grid: float32 (B, h, w), or of K classes an image (B, K, h, w); contiguous.
        guide: (B, C, hg, wg), float16, bfloat16 or float32, any strides; centred, where that is wanted.
        config: `CFCAMConfig`, with an average in it.
        products: those of the guide's cells, where another launch has made them.
    """
    batch, _, height, width = guide.shape
    n_cells = height * width
    if products is not None or n_cells > STORED_CELLS:
        return _averaged(grid, guide, products, config, relu)
    at_once = max(1, STORED_BYTES // (4 * _shares(guide.shape) * n_cells**2))
    parts = []
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        products = cell_products(guide[part], _shares(guide.shape))
        parts.append(_averaged(grid[part], guide[part], products, config, relu))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def empty_products(guide):
    """Where the products of the cells of a guide (B, C, hg, wg) go, if they are stored and all at once; else None."""
    batch, _, height, width = guide.shape
    shape = batch, _shares(guide.shape), height * width, height * width
    if height * width > STORED_CELLS or 4 * math.prod(shape) > STORED_BYTES:
        return None
    return torch.empty(shape, dtype=torch.float32, device=guide.device)


def _shares(shape):
    """How many programs share the channels of a tile of a guide's products: more where the tiles are few."""
    batch, n_channels, height, width = shape
    columns = cdiv(height * width, 32)
    n_tiles = batch * columns * (columns + 1) // 2
    return max(1, min(8, 256 // n_tiles, n_channels // 64))


def cell_products(guide, n_shares):
    """The products of the features of any two cells, over a share of the channels: float32 (B, n_shares, N, N).

    Args:
        guide: (B, C, hg, wg), float16, bfloat16 or float32, any strides; N = hg * wg.
        n_shares: how many parts of the channels, in order.
    """
    n_cells = guide.shape[2] * guide.shape[3]
    products = torch.empty(len(guide), n_shares, n_cells, n_cells, dtype=torch.float32, device=guide.device)
    n_programs, arguments, options = product_launch(guide, products)
    cell_products_kernel[(n_programs,)](*arguments, **options)
    return products


def product_launch(guide, products):
    """Of a launch that makes the products: the number of programs, and the arguments and options of the kernel."""
    batch, n_channels, height, width = guide.shape
    n_shares, n_cells = products.shape[1], height * width
    block, block_c = (32 if n_cells > 16 else 16), 32
    columns = cdiv(n_cells, block)
    options = {
        "SHARES": n_shares,
        "N_STEPS": cdiv(n_channels, n_shares * block_c),
        "BLOCK_N": block,
        "BLOCK_F": block_c,
        "num_warps": 2,
        "num_stages": 1,
    }
    arguments = guide, products, n_channels, width, n_cells, *guide.stride()
    return batch * n_shares * columns * (columns + 1) // 2, arguments, options


def _averaged(grid, guide, products, config, relu):
    batch, n_channels, *shape = guide.shape
    n_cells = shape[0] * shape[1]
    classes, target_shape = grid.shape[1:-2], grid.shape[-2:]
    sigma_cells, steps, has_range = config.affinity_sigma, config.affinity_steps, not math.isinf(config.affinity_range)
    reach = [window_reach(size, target, sigma_cells) for size, target in zip(shape, target_shape)]
    decay = [window_decay(size, target, sigma_cells) * math.log2(math.e) for size, target in zip(shape, target_shape)]
    weights = [
        constant(coverage, (target, size, float(sigma_cells)), guide.device, torch.float32)
        for target, size in zip(target_shape, shape)
    ]
    # exp(-((S_p - S_q) / (range E))^2 / 2) as a power of 2, E the total evidence over the sum of the cells' weights.
    counted = math.prod(coverage(*axis, sigma_cells).sum() for axis in zip(target_shape, shape))
    range_scale = math.sqrt(math.log2(math.e) / 2) * counted / config.affinity_range
    n_classes, block_k, block_c = math.prod(classes), 16 if classes and not has_range else 1, 16
    # The matrix units take at least 16 cells. No supported version of the compiler spills registers for these blocks;
    # of 32 x 64 and 16 x 128 cells some do.
    longest = next_power_of_2(n_cells)
    if products is not None and block_k == 1:
        block_p, block_q = STORED_CELLS_AT_ONCE, min(longest, 256)
        num_warps = max(1, block_q // 64)
    else:
        block_p, block_q = 16, 256 if n_cells > 128 and block_k == 1 else max(16, min(longest, 64))
        num_warps = 8 if block_q == 256 or block_k > 1 else 4
    sums = grid
    for step in range(steps):
        averaged = torch.empty(batch, *classes, *shape, dtype=torch.float32, device=guide.device)
        affinity_sum_kernel[(batch * cdiv(n_classes, block_k) * cdiv(n_cells, block_p),)](
            guide,
            guide if products is None else products,
            grid,
            sums,
            *weights,
            averaged,
            n_classes,
            n_channels,
            *shape,
            *grid.shape[-2:],
            *target_shape,
            grid.shape[-2] / shape[0],
            grid.shape[-1] / shape[1],
            *reach,
            *decay,
            float(config.affinity_power),
            range_scale,
            config.guide_power / 2,
            WITHOUT_FEATURES,
            *guide.stride(),
            RELU=relu and step == steps - 1,
            STRENGTH=config.guide_power > 0 and step == steps - 1,
            RESIZE=tuple(grid.shape[-2:]) != tuple(shape),
            BALANCE=step == 0,
            RANGE=has_range,
            SHARES=0 if products is None else products.shape[1],
            N_STEPS=0 if products is not None else cdiv(n_channels, block_c),
            BLOCK_K=block_k,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            BLOCK_C=block_c,
            num_warps=num_warps,
            num_stages=2,
            enable_fp_fusion=False,
        )
        grid = averaged
    return grid
