"""Tensors that depend on the configuration alone, and what is known of a tensor while a graph is traced."""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes


@lru_cache(maxsize=64)
def constant(function, args, device, dtype):
    """``function(*args)`` as a tensor; cached, because a copy from the host would make the host wait."""
    with with_values():
        return torch.tensor(function(*args), dtype=dtype, device=device)


def with_values():
    """A context manager: tensors made within have values, also while a graph is traced, and so may be kept."""
    return _disable_current_modes() if is_traced() else nullcontext()


def is_traced():
    """Whether operations go through a mode now, as while a graph is traced."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_symbolic_batch(tensor):
    """Whether a graph for any number of images is being traced: their number is a symbol, over which no loop can go."""
    return isinstance(tensor.shape[0], torch.SymInt)
