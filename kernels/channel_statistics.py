"""Per channel: the squared norm of the activation and the pooled gradients; and the activations transposed.

    squared_norm_c = sum_p A_cp^2,   plain_c = sum_p G_cp / (h w),   filtered_c = sum_p G_cp s_p

with s the pooling weights of the separable Gaussian (`cfcam_gpu.gaussian.pooling_weights`): the spatial mean of a
filtered grid is one dot product, so that no convolution is needed for the weights. This is the only pass over
A and G as they come, in any strides and dtype; what follows reads the float32 transpose (B, h * w, C), in which
neighbouring channels are neighbours in memory.

Floor: 2 * C * h * w reads in the input dtype and C * h * w float32 writes; 5 operations a value.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

VALUES_PER_STEP = 2048
"""Of an image's channels and cells, in one step of a program."""


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
    HAS_GRADIENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Images and channel blocks share the x axis: y and z end at 65535.
    blocks_per_image = tl.cdiv(n_channels, BLOCK_C)
    image = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    channel = (tl.program_id(0) % blocks_per_image) * BLOCK_C + tl.arange(0, BLOCK_C)
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
        a_offset = channel.to(tl.int64)[:, None] * a_stride_c + (y * a_stride_y + x * a_stride_x)[None, :]
        # Cast before any arithmetic: the interpreter computes wrongly in bfloat16.
        a = tl.load(a_ptr + image * a_stride_b + a_offset, mask=inside, other=0.0).to(tl.float32)
        squared_norm += tl.sum(a * a, axis=1)
        transposed = (image * n_cells + cell.to(tl.int64))[None, :] * n_channels + channel[:, None]
        tl.store(transposed_ptr + transposed, a, mask=inside)
        if HAS_GRADIENTS:
            g_offset = channel.to(tl.int64)[:, None] * g_stride_c + (y * g_stride_y + x * g_stride_x)[None, :]
            g = tl.load(g_ptr + image * g_stride_b + g_offset, mask=inside, other=0.0).to(tl.float32)
            pooling = tl.load(pooling_ptr + cell, mask=in_cells, other=0.0)
            plain += tl.sum(g, axis=1)
            filtered += tl.sum(g * pooling[None, :], axis=1)
        start += BLOCK_P

    out = image * n_channels + channel
    tl.store(squared_norm_ptr + out, squared_norm, mask=in_channels)
    if HAS_GRADIENTS:
        tl.store(plain_ptr + out, plain / n_cells, mask=in_channels)
        tl.store(filtered_ptr + out, filtered, mask=in_channels)


def channel_statistics(activations, gradients=None, pooling=None):
    """The statistics of a batch, in one pass.

    Args:
        activations, gradients: (B, C, h, w), float16, bfloat16 or float32, any strides; gradients may be None.
        pooling: float32 (h * w,), the weights of the filtered mean; needed with gradients.

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
    block_p = min(next_power_of_2(n_cells), 64)
    block_c = max(16, VALUES_PER_STEP // block_p)
    channel_statistics_kernel[(batch * cdiv(n_channels, block_c),)](
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
        HAS_GRADIENTS=has_gradients,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
    )
    return transposed, squared_norm, plain, filtered
