"""What every launcher shares: the limits of the kernels and block sizes.

Kernels that add products up across threads are launched with ``enable_fp_fusion=False``. Every thread ends with the
sum; had each fused the first addition with its own product, which is then not rounded, they would not end with the same
bits, and which of them is stored is not defined.
"""

import torch

MAX_CHANNELS = 4096
"""Largest C: one program holds a value per channel of an image."""

MAX_GRID_CELLS = 256 * 256
"""Largest h * w."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Input dtypes; arithmetic is in float32."""


def next_power_of_2(n):
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a, b):
    """``a / b`` rounded up."""
    return -(-a // b)
