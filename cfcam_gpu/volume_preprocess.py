"""What makes a network's input of a scan or a video, and a map of the scan of the network's map."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cfcam_gpu.class_names import from_config
from cfcam_gpu.volumes import FRAMES


def n_axes_of(model: nn.Module, preprocess: Callable | None = None) -> int:
    """2 for a network of images, 3 for one of volumes and videos: what the preprocess says in ``n_axes``, else whether
    the first convolution is a Conv3d."""
    said = getattr(preprocess, "n_axes", None)
    if said is not None:
        if said not in (2, 3):
            raise ValueError(f"the preprocess's n_axes must be 2 (images) or 3 (volumes and videos), got {said!r}")
        return int(said)
    return 3 if isinstance(_first_convolution(model), nn.Conv3d) else 2


def _first_convolution(model):
    convolutions = (nn.Conv2d, nn.Conv3d)
    return next((module for module in model.modules() if isinstance(module, convolutions)), None)


def n_channels_of(model: nn.Module) -> int | None:
    """Channels of the first convolution; None without one, or where it is lazy."""
    return getattr(_first_convolution(model), "in_channels", None) or None


@dataclass(frozen=True)
class VolumePreprocess:
    """Scale to [0, 1], resize trilinearly: called with (C, D, H, W), returns (channels, *size) as float32.

    Of a scan 0 and 1 are its smallest and its largest voxel, of all channels together; of a video (uint8) 0 and 255.

    Args:
        size: (D, H, W) of the network's input; None, the default, leaves the size as it is.
        channels: 1 takes the mean of a video's colours, 3 repeats the one channel of a scan; default None, as many as
            there are.
        frames: how many of a video; default 16.

    Raises:
        ValueError: called with another number of channels.

    >>> VolumePreprocess((32, 64, 64))(torch.rand(1, 40, 512, 512)).shape
    torch.Size([1, 32, 64, 64])
    """

    size: tuple[int, int, int] | None = None
    channels: int | None = None
    frames: int = FRAMES

    n_axes = 3

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        values = with_channels(values, self.channels)
        low, high = (0, 255) if values.dtype == torch.uint8 else (values.min(), values.max())
        values = (values.float() - low) / max(float(high - low), 1e-30)
        return values if self.size is None else resize(values, self.size)

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        """All of (C, D, H, W)."""
        return values


@dataclass(frozen=True)
class VideoPreprocess:
    """torchvision's preprocessing of a video network: resize, crop at the centre, normalise.

    Called with (C, D, H, W), returns float32 (3, D, h, w). A scan is first scaled to 0 to 255 by its smallest and its
    largest voxel, and its one channel is repeated for the three colours.

    Args:
        recipe: torchvision's VideoClassification, as ``R3D_18_Weights.DEFAULT.transforms()`` returns it.
        frames: how many of a video; default 16.

    Raises:
        ValueError: called with another number of channels than 1 and 3.
    """

    recipe: Any
    frames: int = FRAMES

    n_axes = 3

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        values = with_channels(values, 3)
        if values.dtype != torch.uint8:
            values = VolumePreprocess()(values).mul(255).round().byte()
        return self.recipe(values.transpose(0, 1).contiguous())

    def _box(self, height, width):
        """(top, bottom, left, right) of the crop in the frames' own pixels."""
        resized = self.recipe.resize_size
        if len(resized) == 2:
            to_height, to_width = resized
        elif height <= width:
            to_height, to_width = resized[0], int(resized[0] * width / height)
        else:
            to_height, to_width = int(resized[0] * height / width), resized[0]
        edges = []
        for side, to, crop in zip((height, width), (to_height, to_width), self.recipe.crop_size):
            first = round((to - crop) / 2)
            low = min(max(round(first * side / to), 0), side - 1)
            edges += [low, max(low + 1, min(round((first + crop) * side / to), side))]
        return edges

    def seen(self, values: torch.Tensor) -> torch.Tensor:
        """The region of (C, D, H, W) that the network sees, in its own resolution."""
        top, bottom, left, right = self._box(*values.shape[-2:])
        return values[..., top:bottom, left:right]

    def to_volume(self, heatmap: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """The map (d, h, w) on a scan of that shape (D, H, W), and 0 where the network does not see it."""
        top, bottom, left, right = self._box(*shape[1:])
        placed = heatmap.new_zeros(shape)
        placed[:, top:bottom, left:right] = resize(heatmap[None], (shape[0], bottom - top, right - left))[0]
        return placed


def with_channels(values: torch.Tensor, channels: int | None) -> torch.Tensor:
    """(C, D, H, W) with so many channels: one is repeated, a video's three colours become grey; None: as they are."""
    if channels in (None, len(values)):
        return values
    if len(values) == 1 and channels == 3:
        return values.expand(3, -1, -1, -1)
    if values.dtype == torch.uint8 and channels == 1:
        return values.float().mean(0, keepdim=True).round().byte()
    last = "; its channels must come first" if values.shape[-1] == channels else ""
    expected = "1 channel" if channels == 1 else f"{channels} channels"
    raise ValueError(f"expected {expected}, as the network takes, got {len(values)}: {tuple(values.shape)}{last}")


def resize(values: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """(C, d, h, w) as (C, D, H, W), trilinearly: cells' centres stay where they are in the whole."""
    return F.interpolate(values[None], tuple(size), mode="trilinear", align_corners=False)[0]


def stretched(heatmap: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """The map (d, h, w) over a whole scan of that shape (D, H, W)."""
    return resize(heatmap[None], shape)[0]


def default_volume_preprocess(model: nn.Module) -> VolumePreprocess:
    """The size and the channels that a model's own attributes tell.

    Source: ``img_size``, ``image_size`` or ``spatial_size`` of three integers, ``config.num_frames`` beside
    ``config.image_size``; and the channels of the first convolution.
    """
    size: tuple[int, int, int] | None = None
    for name in ("img_size", "image_size", "spatial_size"):
        for found in (getattr(model, name, None), from_config(model, name)):
            if size is None and isinstance(found, (tuple, list)) and len(found) == 3:
                size = int(found[0]), int(found[1]), int(found[2])
    frames, side = from_config(model, "num_frames"), from_config(model, "image_size")
    if size is None and isinstance(frames, int) and isinstance(side, int):
        size = frames, side, side
    return VolumePreprocess(size, n_channels_of(model), frames=size[0] if size else FRAMES)


class Steps(NamedTuple):
    """How a network of volumes is fed, and what its maps are put on."""

    preprocess: Callable[[torch.Tensor], torch.Tensor]
    seen: Callable[[torch.Tensor], torch.Tensor]
    to_volume: Callable[[torch.Tensor, tuple[int, int, int]], torch.Tensor]
    frames: int


def of_user(preprocess: Callable | None, model: nn.Module) -> Steps:
    """The steps around a network, by the preprocess that came with it.

    Args:
        preprocess: the user's; None for `default_volume_preprocess`, and torchvision's for `VideoPreprocess`. Its
            methods ``seen`` and ``to_volume``, and its ``frames``, are used where it has them.
        model: whose input it makes.
    """
    if preprocess is None:
        preprocess = default_volume_preprocess(model)
    elif type(preprocess).__name__ == "VideoClassification":
        preprocess = VideoPreprocess(preprocess)
    to_volume, frames = getattr(preprocess, "to_volume", stretched), getattr(preprocess, "frames", FRAMES)

    def checked(values):
        made = preprocess(values)
        if not isinstance(made, torch.Tensor) or made.ndim != 4:
            got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise ValueError(f"the preprocess must make a (C, D, H, W) tensor of one, got {got}")
        return made

    seen = getattr(preprocess, "seen", None) or (lambda values: _undone(checked, values))
    return Steps(checked, seen, to_volume, frames)


def _undone(preprocess, values):
    """What an unknown preprocess leaves; of a video as colours, each from its smallest value to its largest."""
    made = preprocess(values).float()
    if values.dtype != torch.uint8:
        return made
    if len(made) not in (1, 3):
        raise ValueError(f"{len(made)} channels are no video: give the preprocess a method seen(frames)")
    low, high = made.amin((1, 2, 3), keepdim=True), made.amax((1, 2, 3), keepdim=True)
    return (255 * (made - low) / (high - low).clamp_min(1e-12)).round().byte().expand(3, -1, -1, -1)
