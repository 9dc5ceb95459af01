"""Tensors that depend on the configuration alone, and what is known of a tensor while a graph is traced."""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes


def constant(function, args, device, dtype):
    """``function(*args)`` as a tensor; cached, because a copy from the host would make the host wait.

    Of a function of `gaussian`, sizes among the arguments may be symbols.
    """
    if any(has_symbols(each) for each in args if isinstance(each, (tuple, torch.SymInt))):
        from cfcam_gpu import symbolic

        return getattr(symbolic, function.__name__)(*args).to(device, dtype)
    return _kept(function, args, device, dtype)


@lru_cache(maxsize=64)
def _kept(function, args, device, dtype):
    with with_values():
        return torch.tensor(function(*args), dtype=dtype, device=device)


def with_values():
    """A context manager: tensors made within have values, also while a graph is traced, and so may be kept."""
    return _disable_current_modes() if is_traced() else nullcontext()


def is_traced():
    """Whether operations go through a mode now, as while a graph is traced."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_symbols(sizes):
    """Whether a graph for any size is being traced: one of ``sizes``, or this one, is a symbol."""
    return any(isinstance(size, torch.SymInt) for size in (sizes if isinstance(sizes, tuple) else (sizes,)))


def has_symbolic_batch(tensor):
    """Whether a graph for any number of images is being traced: their number is a symbol, over which no loop can go."""
    return isinstance(tensor.shape[0], torch.SymInt)
