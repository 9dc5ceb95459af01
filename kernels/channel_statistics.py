"""Per channel: the squared norm of the activation and the pooled gradients; and the activations transposed.

    squared_norm_c = sum_p A_cp^2,   plain_c = sum_p G_cp / (h w),   filtered_c = sum_p G_cp s_p

with s the pooling weights of the separable Gaussian (`cfcam_gpu.gaussian.pooling_weights`): the spatial mean of a
filtered grid is one dot product, so that no convolution is needed for the weights. This is the only pass over
A and G as they come, in any strides and dtype; what follows reads the float32 transpose (B, h * w, C), in which
neighbouring channels are neighbours in memory.

Of K classes an image, the pooled gradients are a launch of their own, which reads all of them once.

The products of the guide's cells (see `affinity_sum`) wait for nothing either: where they are wanted, other programs of
the same launch make them.

Floor: 2 * C * h * w reads in the input dtype and C * h * w float32 writes; 5 operations a value. Of K classes an image
(K + 1) * C * h * w reads.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.affinity_sum import product_launch, product_of_cells
from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

VALUES_PER_STEP = 512
"""Of an image's channels and cells, in one step of a program."""


@triton.jit
def load_tile(ptr, channel, y, x, inside, stride_c, stride_y, stride_x):
    """Values of an image at channels and cells, cast before any arithmetic: the interpreter computes wrongly in
    bfloat16."""
    offset = channel.to(tl.int64)[:, None] * stride_c + (y * stride_y + x * stride_x)[None, :]
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def statistics_of_channels(
    program,
    a_ptr,
    g_ptr,
    pooling_ptr,
    transposed_ptr,
    squared_norm_ptr,
    plain_ptr,
    filtered_ptr,
    n_channels,
    width,
    n_cells,
    a_stride_b,
    a_stride_c,
    a_stride_y,
    a_stride_x,
    g_stride_b,
    g_stride_c,
    g_stride_y,
    g_stride_x,
    HAS_GRADIENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The statistics of a block of channels of an image: that of the ``program`` of those that find them."""
    # Images and channel blocks share the x axis: y and z end at 65535.
    blocks_per_image = tl.cdiv(n_channels, BLOCK_C)
    image = (program // blocks_per_image).to(tl.int64)
    channel = (program % blocks_per_image) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < n_channels

    squared_norm = tl.zeros([BLOCK_C], tl.float32)
    plain = tl.zeros([BLOCK_C], tl.float32)
    filtered = tl.zeros([BLOCK_C], tl.float32)
    start = 0
    while start < n_cells:
        cell = start + tl.arange(0, BLOCK_P)
        in_cells = cell < n_cells
        inside = in_channels[:, None] & in_cells[None, :]
        y = cell // width
        x = cell % width
        a = load_tile(a_ptr + image * a_stride_b, channel, y, x, inside, a_stride_c, a_stride_y, a_stride_x)
        squared_norm += tl.sum(a * a, axis=1)
        transposed = (image * n_cells + cell.to(tl.int64))[None, :] * n_channels + channel[:, None]
        tl.store(transposed_ptr + transposed, a, mask=inside)
        if HAS_GRADIENTS:
            g = load_tile(g_ptr + image * g_stride_b, channel, y, x, inside, g_stride_c, g_stride_y, g_stride_x)
            pooling = tl.load(pooling_ptr + cell, mask=in_cells, other=0.0)
            plain += tl.sum(g, axis=1)
            filtered += tl.sum(g * pooling[None, :], axis=1)
        start += BLOCK_P

    out = image * n_channels + channel
    tl.store(squared_norm_ptr + out, squared_norm, mask=in_channels)
    if HAS_GRADIENTS:
        tl.store(plain_ptr + out, plain / n_cells, mask=in_channels)
        tl.store(filtered_ptr + out, filtered, mask=in_channels)


@triton.jit
def channel_statistics_kernel(
    a_ptr,
    g_ptr,
    pooling_ptr,
    transposed_ptr,
    squared_norm_ptr,
    plain_ptr,
    filtered_ptr,
    n_channels,
    width,
    n_cells,
    a_stride_b,
    a_stride_c,
    a_stride_y,
    a_stride_x,
    g_stride_b,
    g_stride_c,
    g_stride_y,
    g_stride_x,
    f_ptr,
    products_ptr,
    n_features,
    f_width,
    n_f_cells,
    f_stride_b,
    f_stride_c,
    f_stride_y,
    f_stride_x,
    n_of_products,
    HAS_GRADIENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SHARES: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    # What takes longer comes first.
    if SHARES > 0:
        if program < n_of_products:
            product_of_cells(
                program,
                f_ptr,
                products_ptr,
                n_features,
                f_width,
                n_f_cells,
                f_stride_b,
                f_stride_c,
                f_stride_y,
                f_stride_x,
                SHARES,
                N_STEPS,
                BLOCK_N,
                BLOCK_F,
            )
    if program >= n_of_products:
        statistics_of_channels(
            program - n_of_products,
            a_ptr,
            g_ptr,
            pooling_ptr,
            transposed_ptr,
            squared_norm_ptr,
            plain_ptr,
            filtered_ptr,
            n_channels,
            width,
            n_cells,
            a_stride_b,
            a_stride_c,
            a_stride_y,
            a_stride_x,
            g_stride_b,
            g_stride_c,
            g_stride_y,
            g_stride_x,
            HAS_GRADIENTS,
            BLOCK_C,
            BLOCK_P,
        )


@triton.jit
def pool_gradients_kernel(
    g_ptr,
    pooling_ptr,
    plain_ptr,
    filtered_ptr,
    n_classes,
    n_channels,
    width,
    n_cells,
    g_stride_b,
    g_stride_k,
    g_stride_c,
    g_stride_y,
    g_stride_x,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks_per_class = tl.cdiv(n_channels, BLOCK_C)
    row = (tl.program_id(0) // blocks_per_class).to(tl.int64)
    channel = (tl.program_id(0) % blocks_per_class) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < n_channels
    g_ptr += (row // n_classes) * g_stride_b + (row % n_classes) * g_stride_k

    plain = tl.zeros([BLOCK_C], tl.float32)
    filtered = tl.zeros([BLOCK_C], tl.float32)
    start = 0
    while start < n_cells:
        cell = start + tl.arange(0, BLOCK_P)
        in_cells = cell < n_cells
        inside = in_channels[:, None] & in_cells[None, :]
        g = load_tile(g_ptr, channel, cell // width, cell % width, inside, g_stride_c, g_stride_y, g_stride_x)
        pooling = tl.load(pooling_ptr + cell, mask=in_cells, other=0.0)
        plain += tl.sum(g, axis=1)
        filtered += tl.sum(g * pooling[None, :], axis=1)
        start += BLOCK_P

    out = row * n_channels + channel
    tl.store(plain_ptr + out, plain / n_cells, mask=in_channels)
    tl.store(filtered_ptr + out, filtered, mask=in_channels)


def pool_gradients(gradients, pooling):
    """The pooled gradients plain and filtered, float32 (B, K, C), of gradients (B, K, C, h, w), any strides.

    Args:
        gradients: float16, bfloat16 or float32.
        pooling: float32 (h * w,), the weights of the filtered mean.
    """
    batch, n_classes, n_channels, height, width = gradients.shape
    plain, filtered = torch.empty(2, batch, n_classes, n_channels, dtype=torch.float32, device=gradients.device)
    block_c, block_p = _blocks(height * width)
    pool_gradients_kernel[(batch * n_classes * cdiv(n_channels, block_c),)](
        gradients,
        pooling,
        plain,
        filtered,
        n_classes,
        n_channels,
        width,
        height * width,
        *gradients.stride(),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return plain, filtered


def _blocks(n_cells):
    """Channels and cells in one step of a program."""
    block_p = min(next_power_of_2(n_cells), 64)
    return max(8, VALUES_PER_STEP // block_p), block_p


def channel_statistics(activations, gradients=None, pooling=None, guide=None, products=None):
    """The statistics of a batch, in one pass; and the products of a guide's cells.

    Args:
        activations, gradients: (B, C, h, w), float16, bfloat16 or float32, any strides; gradients may be None.
        pooling: float32 (h * w,), the weights of the filtered mean; needed with gradients.
        guide: (B, Cg, hg, wg), likewise; needed with products.
        products: float32 (B, n_shares, N, N), N = hg * wg, written as `affinity_sum.cell_products` makes them; None:
            none are.

    Returns:
        transposed float32 (B, h * w, C), squared_norm (B, C), and plain, filtered (B, C) or None.
    """
    batch, n_channels, height, width = activations.shape
    n_cells = height * width
    options = {"dtype": torch.float32, "device": activations.device}
    transposed = torch.empty(batch, n_cells, n_channels, **options)
    squared_norm = torch.empty(batch, n_channels, **options)
    plain = filtered = None
    has_gradients = gradients is not None
    if has_gradients:
        plain, filtered = torch.empty(2, batch, n_channels, **options)
    else:  # pointers that the kernel never follows
        gradients, pooling = activations, squared_norm
    block_c, block_p = _blocks(n_cells)
    if products is None:
        n_of_products, of_products = 0, (activations, squared_norm, 0, 0, 0, 0, 0, 0, 0)
        options = {"SHARES": 0, "N_STEPS": 0, "BLOCK_N": 0, "BLOCK_F": 0, "num_warps": 4}
    else:
        n_of_products, of_products, options = product_launch(guide, products)
    channel_statistics_kernel[(n_of_products + batch * cdiv(n_channels, block_c),)](
        activations,
        gradients,
        pooling,
        transposed,
        squared_norm,
        plain if has_gradients else squared_norm,
        filtered if has_gradients else squared_norm,
        n_channels,
        width,
        n_cells,
        *activations.stride(),
        *gradients.stride(),
        *of_products,
        n_of_products,
        HAS_GRADIENTS=has_gradients,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        enable_fp_fusion=False,
        **options,
    )
    return transposed, squared_norm, plain, filtered
