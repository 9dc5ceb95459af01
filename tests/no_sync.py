"""A dispatch mode that refuses whatever makes the host wait for the device; it works on the CPU too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Each of these makes the host wait for the device, or has an output shape that only the device knows.
REFUSED = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


class NoSynchronisation(TorchDispatchMode):
    """Raises a RuntimeError at every operator that would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in REFUSED:
            raise RuntimeError(f"{func} makes the host wait for the device")
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                raise RuntimeError(f"{func} with a mask has a data-dependent shape")
        return func(*args, **(kwargs or {}))
