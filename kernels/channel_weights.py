"""Cluster means of the pooled gradients, and the weights of the channels.

    w_c = plain_c (dominant),   mean of filtered_m over the members m of c's cluster,   0 (noise)

and with "softmax" a softmax over the kept channels. The sums run over a block of channels in a fixed order, so that the
weights are the same in every run. `connected_components` finds them of the labels that it has made; this kernel, one
program an image or a class of an image, those of another engine's labels.

Floor: 3 * C reads and C writes; C operations a cluster.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import DOMINANT, NOISE
from cfcam_gpu.kernels.launch import next_power_of_2


@triton.jit
def weights_of(label, plain_ptr, filtered_ptr, channel, inside, SOFTMAX: tl.constexpr):
    """The weights of an image's channels, of one class; 0 where ``label`` is NOISE."""
    filtered = tl.load(filtered_ptr + channel, mask=inside, other=0.0)
    weights = tl.where(label == DOMINANT, tl.load(plain_ptr + channel, mask=inside, other=0.0), 0.0)
    last = tl.max(label, axis=0)
    cluster = last * 0
    while cluster <= last:
        member = label == cluster
        mean = tl.sum(tl.where(member, filtered, 0.0), axis=0) / tl.sum(member.to(tl.float32), axis=0)
        weights = tl.where(member, mean, weights)
        cluster += 1
    if SOFTMAX:
        kept = label != NOISE
        largest = tl.max(tl.where(kept, weights, -float("inf")), axis=0)
        weights = tl.where(kept, tl.exp(weights - largest), 0.0)
        # Without a kept channel the sum is 0, and 0 / 1 is the right weight.
        total = tl.sum(weights, axis=0)
        weights = weights / tl.where(total > 0, total, 1.0)
    return weights


@triton.jit
def channel_weights_kernel(
    labels_ptr,
    plain_ptr,
    filtered_ptr,
    weights_ptr,
    n_classes,
    n_channels,
    SOFTMAX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_C)
    inside = channel < n_channels
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + (row // n_classes) * n_channels + channel, mask=inside, other=NOISE)
    first = row * n_channels
    weights = weights_of(label, plain_ptr + first, filtered_ptr + first, channel, inside, SOFTMAX)
    tl.store(weights_ptr + first + channel, weights, mask=inside)


def channel_weights(labels, plain, filtered, softmax):
    """Weights float32 (B, C) or (B, K, C) from labels int32 (B, C) and the pooled gradients.

    Args:
        plain, filtered: float32 (B, C) or (B, K, C), contiguous.
    """
    batch, n_channels = labels.shape
    weights = torch.empty_like(plain)
    n_classes = plain.numel() // labels.numel()
    channel_weights_kernel[(batch * n_classes,)](
        labels,
        plain,
        filtered,
        weights,
        n_classes,
        n_channels,
        SOFTMAX=softmax,
        BLOCK_C=next_power_of_2(n_channels),
        num_warps=8,
    )
    return weights
