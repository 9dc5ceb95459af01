"""The map: weighted sum over channels, ReLU, bilinear resize, normalisation.

    S_p = sum_c W_cp A_cp

with W_cp = w_c for CF-CAM and Grad-CAM, and a weight of each cell's own for element-wise methods: one kernel, since a
stride of 0 broadcasts. In the pipeline it reads the transposed activations, in which the channels of a cell are
neighbours; each cell is one program's sum in a fixed order. The second kernel looks for the extremes first, which need
not lie on the grid: of the pixels between four cells, at the four next to these. The grid is small and stays in the
cache. Of K classes an image, the sums of sixteen classes share a program's reads of A.

The second kernel scales as `CFCAMConfig.normalize` says, or as pytorch-grad-cam does: the grid to
(x - min) / (e + max(x - min)), and the mean of the layers' resized maps again. That is one launch a layer, each of
which adds its own map to what the one before has written.

Floor: C * h * w reads and H * W writes; 2 * C * h * w + 2 * 8 * H * W operations.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

PARTS, LAUNCH = 8, 256
"""Least programs per image, each of which writes its share and looks for the extremes itself; and so many more that a
launch has about ``LAUNCH``, because the time of a small batch is that of one program."""


@triton.jit
def weighted_sum_kernel(
    a_ptr,
    w_ptr,
    grid_ptr,
    n_channels,
    n_cells,
    a_stride_b,
    a_stride_c,
    a_stride_p,
    w_stride_b,
    w_stride_c,
    w_stride_p,
    RELU: tl.constexpr,
    SKIP_NAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_per_image = tl.cdiv(n_cells, BLOCK_P)
    image = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    cell = ((tl.program_id(0) % blocks_per_image) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    in_cells = cell < n_cells
    a_ptr += image * a_stride_b
    w_ptr += image * w_stride_b
    total = tl.zeros([BLOCK_P], tl.float32)
    start = 0
    while start < n_channels:
        channel = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = in_cells[:, None] & (channel < n_channels)[None, :]
        a_offset = cell[:, None] * a_stride_p + channel[None, :] * a_stride_c
        w_offset = cell[:, None] * w_stride_p + channel[None, :] * w_stride_c
        a = tl.load(a_ptr + a_offset, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + w_offset, mask=inside, other=0.0).to(tl.float32)
        term = a * w
        if SKIP_NAN:
            term = tl.where(term == term, term, 0.0)
        total += tl.sum(term, axis=1)
        start += BLOCK_C
    if RELU:
        total = tl.maximum(total, 0.0)
    tl.store(grid_ptr + image * n_cells + cell, total, mask=in_cells)


@triton.jit
def class_sums_kernel(
    a_ptr,
    w_ptr,
    grid_ptr,
    n_classes,
    n_channels,
    n_cells,
    a_stride_b,
    a_stride_c,
    a_stride_p,
    RELU: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_of_cells = tl.cdiv(n_cells, BLOCK_P)
    blocks_of_classes = tl.cdiv(n_classes, BLOCK_K)
    block = tl.program_id(0) // blocks_of_cells
    image = (block // blocks_of_classes).to(tl.int64)
    k = ((block % blocks_of_classes) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    in_classes = k < n_classes
    cell = ((tl.program_id(0) % blocks_of_cells) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    in_cells = cell < n_cells
    a_ptr += image * a_stride_b
    w_ptr += image * n_classes * n_channels
    # Added up over the channels behind the loop: in it, every sum across threads would take longer than its terms.
    sums = tl.zeros([BLOCK_P, BLOCK_K, BLOCK_C], tl.float32)
    start = 0
    while start < n_channels:
        channel = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        in_channels = channel < n_channels
        a_offset = cell[:, None] * a_stride_p + channel[None, :] * a_stride_c
        a = tl.load(a_ptr + a_offset, mask=in_cells[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
        w_offset = k[:, None] * n_channels + channel[None, :]
        w = tl.load(w_ptr + w_offset, mask=in_classes[:, None] & in_channels[None, :], other=0.0)
        sums += a[:, None, :] * w[None, :, :]
        start += BLOCK_C
    total = tl.sum(sums, axis=2)
    if RELU:
        total = tl.maximum(total, 0.0)
    offset = (image * n_classes + k[None, :]) * n_cells + cell[:, None]
    tl.store(grid_ptr + offset, total, mask=in_cells[:, None] & in_classes[None, :])


@triton.jit
def grid_extremes(grid_ptr, n_cells, BLOCK: tl.constexpr):
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    start = 0
    while start < n_cells:
        cell = start + tl.arange(0, BLOCK)
        value = tl.load(grid_ptr + cell, mask=cell < n_cells, other=0.0)
        lowest = tl.minimum(lowest, tl.where(cell < n_cells, value, float("inf")))
        highest = tl.maximum(highest, tl.where(cell < n_cells, value, float("-inf")))
        start += BLOCK
    return tl.min(lowest, axis=0), tl.max(highest, axis=0)


@triton.jit
def scaled_below_zero(value, factor, SCALE: tl.constexpr):
    """``value``, times ``factor`` where it is negative if SCALE."""
    if SCALE:
        value = tl.where(value < 0, value * factor, value)
    return value


@triton.jit
def bilinear(
    grid_ptr, pixel, inside, height, width, out_width, scale_y, scale_x, base, factor=1.0, SCALE: tl.constexpr = False
):
    """The bilinear values of grid - base at ``pixel``, half-pixel centres (align_corners=False), as torch has them.

    With SCALE, of a grid whose negative values are multiplied by ``factor``; base is 0 then.
    """
    y = tl.maximum(((pixel // out_width).to(tl.float32) + 0.5) * scale_y - 0.5, 0.0)
    x = tl.maximum(((pixel % out_width).to(tl.float32) + 0.5) * scale_x - 0.5, 0.0)
    top = tl.minimum(y.to(tl.int32), height - 1)
    left = tl.minimum(x.to(tl.int32), width - 1)
    down = tl.minimum(top + 1, height - 1)
    right = tl.minimum(left + 1, width - 1)
    y -= top.to(tl.float32)
    x -= left.to(tl.float32)
    top_left = tl.load(grid_ptr + top * width + left, mask=inside, other=0.0) - base
    top_right = tl.load(grid_ptr + top * width + right, mask=inside, other=0.0) - base
    down_left = tl.load(grid_ptr + down * width + left, mask=inside, other=0.0) - base
    down_right = tl.load(grid_ptr + down * width + right, mask=inside, other=0.0) - base
    upper = scaled_below_zero(top_left, factor, SCALE) * (1 - x) + scaled_below_zero(top_right, factor, SCALE) * x
    lower = scaled_below_zero(down_left, factor, SCALE) * (1 - x) + scaled_below_zero(down_right, factor, SCALE) * x
    return upper * (1 - y) + lower * y


@triton.jit
def first_pixel(cell, scale):
    """The first pixel of an axis that lies at the grid's ``cell`` or behind it; ``scale`` cells a pixel."""
    pixel = tl.maximum(tl.ceil((cell.to(tl.float32) + 0.5) / scale - 0.5).to(tl.int32) - 1, 0)
    # The quotient is rounded, and so is what `bilinear` computes: by the latter, at most two pixels further.
    for _ in tl.static_range(2):
        pixel += ((pixel.to(tl.float32) + 0.5) * scale - 0.5 < cell.to(tl.float32)).to(tl.int32)
    return tl.where(cell > 0, pixel, 0)


@triton.jit
def corner(index, size, out_size, scale):
    """Of an axis, the first pixel between a cell and the next (even ``index``), or the last of these (odd)."""
    cell = index // 2
    behind = tl.where(cell + 1 < size, first_pixel(cell + 1, scale), out_size)
    return tl.where(index % 2 == 0, first_pixel(cell, scale), behind - 1)


@triton.jit
def map_value(
    grid_ptr,
    earlier_ptr,
    pixel,
    inside,
    height,
    width,
    out_width,
    scale_y,
    scale_x,
    base,
    span,
    n_layers,
    SCALE_GRID: tl.constexpr,
    ADD_EARLIER: tl.constexpr,
):
    """The positive part of the bilinear values at ``pixel``: of a grid that is not negative, the values themselves.

    SCALE_GRID: of the grid (x - base) / span; else base is 0. The difference comes before the sums: values that are
    nearly the same would lose their digits in them. ADD_EARLIER: with ``earlier`` added, over ``n_layers``.
    """
    value = tl.maximum(bilinear(grid_ptr, pixel, inside, height, width, out_width, scale_y, scale_x, base), 0.0)
    if SCALE_GRID:
        value /= span
    if ADD_EARLIER:
        value = (tl.load(earlier_ptr + pixel, mask=inside, other=0.0) + value) / n_layers
    return value


@triton.jit
def resize_normalize_kernel(
    grid_ptr,
    earlier_ptr,
    maps_ptr,
    height,
    width,
    out_width,
    n_pixels,
    n_layers,
    scale_y,
    scale_x,
    flat_range,
    epsilon,
    SCALE_GRID: tl.constexpr,
    ADD_EARLIER: tl.constexpr,
    SCALING: tl.constexpr,
    CORNERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    grid_ptr += image * height * width
    earlier_ptr += image * n_pixels
    maps_ptr += image * n_pixels

    grid_base = 0.0
    grid_span = 1.0
    if SCALE_GRID:
        grid_base, grid_high = grid_extremes(grid_ptr, height * width, BLOCK)
        grid_span = epsilon + (grid_high - grid_base)

    if SCALING != "none":
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        highest = tl.zeros([BLOCK], tl.float32)
        n_candidates = n_pixels
        if CORNERS:
            n_candidates = 4 * height * width
        start = 0
        while start < n_candidates:
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < n_candidates
            if CORNERS:
                y = corner(pixel // (2 * width), height, n_pixels // out_width, scale_y)
                x = corner(pixel % (2 * width), width, out_width, scale_x)
                pixel = y * out_width + x
            value = map_value(
                grid_ptr,
                earlier_ptr,
                pixel,
                inside,
                height,
                width,
                out_width,
                scale_y,
                scale_x,
                grid_base,
                grid_span,
                n_layers,
                SCALE_GRID,
                ADD_EARLIER,
            )
            lowest = tl.minimum(lowest, tl.where(inside, value, float("inf")))
            highest = tl.maximum(highest, value)  # a masked lane holds 0
            start += BLOCK
        low = tl.min(lowest, axis=0)
        high = tl.max(highest, axis=0)
        if SCALING == "grad_cam":
            base = low
            span = epsilon + (high - low)
        else:
            flat = high - low <= flat_range * high
            if SCALING == "minmax":
                base = low
                span = high - low
                of_flat = high * 0
            else:
                base = high * 0
                span = high
                of_flat = tl.where(high > 0, 1.0, 0.0)
            span = tl.where(flat, 1.0, span)

    start = part * BLOCK
    while start < n_pixels:
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < n_pixels
        value = map_value(
            grid_ptr,
            earlier_ptr,
            pixel,
            inside,
            height,
            width,
            out_width,
            scale_y,
            scale_x,
            grid_base,
            grid_span,
            n_layers,
            SCALE_GRID,
            ADD_EARLIER,
        )
        if SCALING != "none":
            # Rounded division: the largest value becomes exactly 1. Between equal corners rounding may go beyond them.
            value = tl.minimum(tl.maximum(tl.div_rn(value - base, span), 0.0), 1.0)
        if SCALING == "max" or SCALING == "minmax":
            value = tl.where(flat, of_flat, value)
        tl.store(maps_ptr + pixel, value, mask=inside)
        start += BLOCK * PARTS


def weighted_sum(activations, weights, relu=True, skip_nan=False):
    """The weighted sum over channels, by default its positive part: float32 (B, N).

    Args:
        activations, weights: (B, C, N), float16, bfloat16 or float32, any strides; expand weights (B, C, 1) to
            give every cell of a channel the same.
        skip_nan: leave out the terms that are NaN.
    """
    batch, n_channels, n_cells = activations.shape
    grid = torch.empty(batch, n_cells, dtype=torch.float32, device=activations.device)
    # A tile is long in the direction in which the activations are neighbours in memory.
    if activations.stride(1) == 1:
        block_p, block_c = 4, min(next_power_of_2(n_channels), 512)
    else:
        longest = 16 if skip_nan else 32  # with 32 a version of the compiler spills a register
        block_p, block_c = min(next_power_of_2(n_cells), 64), min(next_power_of_2(n_channels), longest)
    weighted_sum_kernel[(batch * cdiv(n_cells, block_p),)](
        activations,
        weights,
        grid,
        n_channels,
        n_cells,
        *activations.stride(),
        *weights.stride(),
        RELU=relu,
        SKIP_NAN=skip_nan,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return grid


def class_sums(activations, weights, relu=True):
    """K weighted sums over the channels, by default their positive parts: float32 (B, K, N).

    Args:
        activations: (B, C, N), float16, bfloat16 or float32, any strides.
        weights: float32 (B, K, C), contiguous.
    """
    batch, n_channels, n_cells = activations.shape
    n_classes = weights.shape[1]
    grid = torch.empty(batch, n_classes, n_cells, dtype=torch.float32, device=activations.device)
    block_k, block_p, block_c = 16, 1, 256
    class_sums_kernel[(batch * cdiv(n_classes, block_k) * cdiv(n_cells, block_p),)](
        activations,
        weights,
        grid,
        n_classes,
        n_channels,
        n_cells,
        *activations.stride(),
        RELU=relu,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return grid


def resize_normalize(grid, output_size, flat_range, normalize):
    """Maps float32 (B, H, W) in [0, 1]: the positive part of the resized grid float32 (B, h, w), contiguous, scaled.

    Args:
        output_size: (H, W).
        flat_range: a map is flat when max - min <= flat_range * max.
        normalize: "max" divides by the maximum, "minmax" subtracts the minimum first.
    """
    return _launch_resize(grid, output_size, normalize, flat_range=flat_range)


def resize_as_grad_cam(grids, output_size, epsilon, scale_mean=True):
    """The mean of the layers' scaled and resized grids, float32 (B, H, W), by default scaled again; a launch a layer.

    Args:
        grids: list of non-negative float32 (B, h, w), contiguous, a layer each.
        output_size: (H, W).
        epsilon: a map is scaled to (x - min) / (epsilon + max(x - min)).
    """
    maps, last = None, len(grids) - 1
    for layer, grid in enumerate(grids):
        # All but the last launch leave sums behind.
        scaling, n_layers = ("grad_cam" if scale_mean else "none", len(grids)) if layer == last else ("none", 1)
        maps = _launch_resize(grid, output_size, scaling, epsilon=epsilon, earlier=maps, n_layers=n_layers)
    return maps


def _launch_resize(grid, output_size, scaling, flat_range=0.0, epsilon=None, earlier=None, n_layers=1):
    batch, height, width = grid.shape
    out_height, out_width = output_size
    maps = torch.empty(batch, out_height, out_width, dtype=torch.float32, device=grid.device)
    n_pixels = out_height * out_width
    block = min(next_power_of_2(n_pixels), 1024)
    parts = min(max(PARTS, LAUNCH // batch), cdiv(n_pixels, block))
    # Between four cells a bilinear map has its extremes at the corners; where it shrinks the grid, or adds to another
    # layer's map, every pixel is looked at.
    corners = earlier is None and height <= out_height and width <= out_width and 4 * height * width < n_pixels
    resize_normalize_kernel[(batch * parts,)](
        grid,
        grid if earlier is None else earlier,
        maps,
        height,
        width,
        out_width,
        n_pixels,
        n_layers,
        height / out_height,
        width / out_width,
        flat_range,
        0.0 if epsilon is None else epsilon,
        SCALE_GRID=epsilon is not None,
        ADD_EARLIER=earlier is not None,
        SCALING=scaling,
        CORNERS=corners,
        PARTS=parts,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,  # the extremes are values of the map to the last bit
    )
    return maps
