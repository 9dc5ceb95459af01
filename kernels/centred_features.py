"""The features of a guide less a share of their mean over its cells, before `affinity_sum` compares them.

    f_cp = F_cp - c / N sum_q F_cq

A program owns some channels of an image and reads them twice, the second time from the cache. What is no number counts
as 0 in the mean. With c = 1 what is but rounding is 0: a channel that is the same everywhere sets no cell apart.

Written once instead of subtracted where the products of cells are made: there each value is read by several programs,
and the subtraction was simulated to treble their time.

Floor: one read of the guide and one write in float32, an addition and a subtraction a value.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import AS_THE_MEAN
from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

VALUES_PER_STEP = 2048


@triton.jit
def centred_features_kernel(
    guide_ptr,
    out_ptr,
    n_channels,
    width,
    n_cells,
    centring,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = tl.cdiv(n_channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = ((tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    in_channels = channel < n_channels
    of_channel = guide_ptr + image * stride_b + channel * stride_c
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first = 0
    while first < n_cells:
        cell = first + tl.arange(0, BLOCK_P)
        of_cell = (cell // width).to(tl.int64) * stride_y + (cell % width) * stride_x
        inside = in_channels[:, None] & (cell < n_cells)[None, :]
        value = tl.load(of_channel[:, None] + of_cell[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.where(tl.abs(value) < float("inf"), value, 0.0)
        first += BLOCK_P
    common = (centring * (tl.sum(total, axis=1) / n_cells))[:, None]
    to_channel = out_ptr + (image * n_channels + channel) * n_cells
    first = 0
    while first < n_cells:
        cell = first + tl.arange(0, BLOCK_P)
        of_cell = (cell // width).to(tl.int64) * stride_y + (cell % width) * stride_x
        inside = in_channels[:, None] & (cell < n_cells)[None, :]
        value = tl.load(of_channel[:, None] + of_cell[None, :], mask=inside, other=0.0).to(tl.float32) - common
        if WHOLE:
            value = tl.where(tl.abs(value) <= tl.abs(common) * AS_THE_MEAN, 0.0, value)
        tl.store(to_channel[:, None] + cell[None, :], value, mask=inside)
        first += BLOCK_P


def centred_features(guide, centring):
    """The guide less ``centring`` times its mean over the cells of each channel: float32 (B, C, hg, wg), contiguous.

    Args:
        guide: (B, C, hg, wg) in one of `launch.DTYPES`, any strides.
        centring: in [0, 1].
    """
    batch, n_channels, height, width = guide.shape
    features = torch.empty(guide.shape, dtype=torch.float32, device=guide.device)
    block_p = min(next_power_of_2(height * width), VALUES_PER_STEP // 8)
    block_c = VALUES_PER_STEP // block_p
    centred_features_kernel[(batch * cdiv(n_channels, block_c),)](
        guide,
        features,
        n_channels,
        width,
        height * width,
        float(centring),
        *guide.stride(),
        WHOLE=centring == 1,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return features
