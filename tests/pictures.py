"""Pictures, and the small network that looks at them, for the tests of what reads files."""

import struct
import zlib

import numpy as np


def network_source(names):
    """The code of a module whose ``build`` makes a network of four classes for pictures of any size."""
    return f"""
import torch
from torch import nn
from cfcam_gpu.models import Preprocess
def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers), Preprocess((64, 64)), {names!r}
"""


def random_photographs(folder, n, rng):
    """The folder, with so many random smooth pictures."""
    from PIL import Image

    folder.mkdir()
    for index in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"p{index:02}.png")
    return folder


def bomb(side, bits=8, colour=0, rows=99):
    """A PNG file of a few bytes that says it is ``side`` pixels wide and high; its ``rows`` are so many zeros."""
    head = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(rows), 9)), (b"IEND", b"")):
        parts += [struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))]
    return b"".join(parts)
