"""Scans and videos in a run: what is kept of them until their maps are there, and what is drawn of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from cfcam_gpu import images, volumes

if TYPE_CHECKING:
    from PIL.Image import Image

FRAME_PIXELS = 288
"""Height of a frame and of each overlay in an animation."""

MONTAGE_PIXELS = 672
"""Height of the slices together in a picture of a scan."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A scan or a video, and what the network sees of it.

    Attributes:
        volume: what was read, without its numbers: the shape, the affine, how long it lasts.
        values: (C, d, h, w), what is drawn of it; without numbers too where nothing is drawn.
        depth: slices of the network's input.
        to_volume: as of `models.LoadedModel`.
    """

    volume: volumes.Volume
    values: torch.Tensor
    depth: int
    to_volume: Callable

    @classmethod
    def of(cls, volume: volumes.Volume, values: torch.Tensor | None, depth: int, to_volume: Callable) -> "Seen":
        """With ``values`` of None where nothing is drawn. The volume's numbers, which may be many, are let go of."""
        empty = volume.values.new_empty(1).expand(volume.values.shape)
        return cls(replace(volume, values=empty), empty if values is None else values, depth, to_volume)

    def in_depth(self, maps: np.ndarray) -> np.ndarray:
        """Maps (K, d, h, w) as they are. A network that looks at a volume slice by slice may have maps (K, h, w): they
        hold for all of them."""
        return maps if maps.ndim == 4 else np.repeat(maps[:, None], self.depth, 1)

    def placed(self, heat: np.ndarray) -> np.ndarray:
        """A map (d, h, w) on the scan (D, H, W); of a video the map itself."""
        if self.volume.is_video:
            return heat
        return self.to_volume(torch.from_numpy(heat), self.volume.shape).numpy()

    def slices(
        self, maps: np.ndarray, difference: np.ndarray | None, captions: Sequence[str], colormap: str
    ) -> "Image":
        """A scan's slices beside those with each map (d, h, w) over them, and with the difference of two in [-1, 1]."""
        draw = partial(volumes.draw_slices, self.volume, self.values, height=MONTAGE_PIXELS)
        panels = [draw(heat, colormap=colormap) for heat in (np.zeros_like(maps[0]), *maps)]
        if difference is not None:
            panels.append(draw(difference, colormap="RdBu_r", difference=True))
        return images.side_by_side(panels, captions)

    def animation(
        self, maps: np.ndarray, difference: np.ndarray | None, captions: Sequence[str], colormap: str
    ) -> bytes:
        """The same of every frame of a video, as an animated WebP."""
        pictures = []
        for index, frame in enumerate(volumes.frames_of(self.values)):
            # The user's `seen` may show other frames than the network takes.
            index = index * len(maps[0]) // self.values.shape[1]
            of_frame = None if difference is None else difference[index]
            frame = at_height(frame, FRAME_PIXELS)
            over = panels(frame, maps[:, index], of_frame, colormap)
            pictures.append(images.side_by_side(over, captions))
        return volumes.encoded_animation(pictures, self.volume.seconds or 0.0)


def at_height(photograph: "Image", height: int) -> "Image":
    """The photograph, so many pixels high."""
    from PIL.Image import Resampling

    width = max(1, round(photograph.width * height / photograph.height))
    return photograph.resize((width, height), Resampling.LANCZOS)


def panels(photograph: "Image", maps: np.ndarray, difference: np.ndarray | None, colormap: str) -> list["Image"]:
    """The photograph, each map (h, w) over it, and the difference of two over it."""
    found = [photograph, *(images.overlay(photograph, heat, colormap) for heat in maps)]
    if difference is not None:
        found.append(images.overlay_difference(photograph, difference))
    return found
