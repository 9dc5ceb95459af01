"""Scores of a network without each channel of a layer, and for images masked with each channel: block by block."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from cfcam_gpu.head import Head

LOG = logging.getLogger("cfcam_gpu")

ABLATION_VALUE = 1e7
"""What pytorch-grad-cam takes off the smallest activation where that is not 0."""

BLOCK = 32
"""Channels that pytorch-grad-cam's AblationCAM takes at once; the values that it puts in their places depend on it."""

CACHED_PIXELS = 4 * 224 * 224
"""Of a block of images on a CPU. ResNet-50 takes half as long again in blocks of 32 as in blocks of 4 or 8, because
tensors above 32 MiB come from the system anew for every layer. Blocks under 4 images are rounded differently."""


def ablated_values(activations: torch.Tensor, n: int) -> torch.Tensor:
    """What takes the places of ``n`` channels of a batch, in their order, for an image's activations: (n,).

    0, as in the paper, where the smallest activation is 0. Else pytorch-grad-cam sets one channel of a batch after the
    other, each to `ABLATION_VALUE` below the smallest value that it then finds. float16 has no such values: 0.
    """
    smallest = activations.amin()
    if activations.dtype == torch.float16:
        return smallest.new_zeros(n)
    values = [smallest]
    for _ in range(n):
        values.append(values[-1] - ABLATION_VALUE)
    return torch.stack(values[1:]).where(smallest != 0, torch.zeros_like(smallest))


def scores_without(
    head: Head,
    image: int,
    channels: torch.Tensor,
    values: torch.Tensor,
    score: Callable[[Any, int], torch.Tensor],
    *,
    axis: int = 1,
    size: int = BLOCK,
    done: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """The scores of one image without each of the channels.

    Args:
        head: of the layer; image: which of its images.
        channels: int64 (n,), on the device of the activations.
        values: (n,), what takes the place of each.
        score: called with the outputs of a block and its number of rows; gives (rows, ...).
        axis: of the layer's output (B, ...), where the channels are.
        size: channels of a block, halved where memory runs out.
        done: called after each block.

    Returns:
        (n, ...), the joined results of ``score``.
    """
    activations = head.activations[image]
    whole = activations.movedim(axis - 1, 0)
    batch = activations[None].repeat(min(size, len(channels)), *[1] * activations.ndim)
    of_channels = batch.movedim(axis, 1)

    def run(block):
        without, rows = channels[block], torch.arange(len(channels[block]), device=batch.device)
        of_channels[rows, without] = values[block].reshape(-1, *[1] * (of_channels.ndim - 2))
        try:
            return score(head(batch[: len(rows)], image), len(rows))
        finally:
            of_channels[rows, without] = whole[without]

    return in_blocks("AblationCAM", run, len(channels), size, done)


def scores_masked(
    image: torch.Tensor,
    channels: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    *,
    size: int,
    done: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """The scores of an image masked with each of the channels. Those that are 0 everywhere, which leave nothing of the
    image, are run once.

    Args:
        image: (C, H, W), or with other leading axes.
        channels: (n, h, w), floating point, on its device.
        score: called with masked images (rows, C, H, W); gives (rows, ...).
        size, done: as for `scores_without`.

    Returns:
        (n, ...), the joined results of ``score``.
    """
    run, places = _once(channels)
    channels = channels[run]
    found = in_blocks("ScoreCAM", lambda block: score(masked(image, channels[block])), len(channels), size, done)
    return found[places.to(found.device)]


def n_masks(channels: torch.Tensor) -> int:
    """How many of the channels `scores_masked` runs."""
    return int(_once(channels)[0].sum())


def _once(channels):
    """Which channels are run, bool (n,); and for each its place among them, the blank ones' that of the first."""
    blank = ~channels.flatten(1).any(1)
    run = ~blank | (blank.cumsum(0) == 1)
    places = run.cumsum(0) - 1
    first = (places * (blank & run)).sum()
    return run, torch.where(blank, first, places)


def masked(image: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """The image (..., H, W) times each of the channels (n, h, w), resized and scaled to [0, 1]: (n, ..., H, W)."""
    height, width = image.shape[-2:]
    masks = torch.nn.UpsamplingBilinear2d(size=(height, width))(channels[None])[0]
    low, high = masks.flatten(1).aminmax(dim=1)
    masks = (masks - low[:, None, None]) / (high - low + 1e-8)[:, None, None]
    found = image * masks.view(len(masks), *[1] * (image.ndim - 2), *masks.shape[1:])
    return in_fast_order((found if image.is_floating_point() else found.round()).to(image.dtype))


def in_fast_order(images: torch.Tensor) -> torch.Tensor:
    """The images, on a CPU with their channels last in memory, where convolutions are 1.3 to 1.6 times as fast."""
    on_cpu = images.device.type == "cpu" and images.ndim == 4
    return images.contiguous(memory_format=torch.channels_last) if on_cpu else images


def block_size(images: torch.Tensor, limit: int) -> int:
    """How many images like ``images`` (B, C, ...) go through the network together, at most ``limit``."""
    if images.device.type != "cpu":
        return limit
    return min(limit, max(4, CACHED_PIXELS // max(1, images.shape[2:].numel())))


def in_blocks(
    name: str,
    run: Callable[[slice], torch.Tensor],
    n: int,
    size: int,
    done: Callable[[], object] = lambda: None,
    step: int = 1,
) -> torch.Tensor:
    """The joined results of ``run``, called with slices of n rows, at most ``size`` in each.

    Where a device's memory runs out, they are halved from there on, to multiples of ``step``, and the log says so of
    the method ``name``.
    """
    found: list[torch.Tensor] = []
    start, size = 0, min(size, n)
    while start < n:
        try:
            found.append(run(slice(start, start + size)))
        except torch.OutOfMemoryError:
            if size <= step:
                raise
            size = max(step, size // 2 // step * step)
            LOG.warning("%s: out of memory, goes on with batches of %d", name, size)
        else:
            start += size
            done()
    return found[0] if len(found) == 1 else torch.cat(found)
