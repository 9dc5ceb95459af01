"""What every launcher shares: the limits of the kernels, when they can run, and block sizes."""

import os

import torch

MAX_CHANNELS = 4096
"""Largest C: one program holds a value per channel of an image."""

MAX_GRID_CELLS = 256 * 256
"""Largest h * w."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Input dtypes; arithmetic is in float32."""


def interpreted():
    """Whether Triton's interpreter is on, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def next_power_of_2(n):
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a, b):
    """``a / b`` rounded up."""
    return -(-a // b)
