"""Tensors that depend on the configuration alone."""

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def constant(function, args, device, dtype):
    """``function(*args)`` as a tensor; cached, because a copy from the host would make the host wait."""
    return torch.tensor(function(*args), dtype=dtype, device=device)
