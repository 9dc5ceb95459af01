"""Arrays of other libraries in and out, through DLPack and without a copy."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

HOMES = {"numpy": "numpy", "cupy": "cupy", "jaxlib": "jax.dlpack", "jax": "jax.dlpack"}
"""Where the ``from_dlpack`` of an array's package is; any other package has its own at the top."""


def as_tensor(name: str, array: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """``array`` as a torch tensor that shares its memory, and the function that takes results back to its kind.

    Args:
        name: what to call the array in an error.
        array: torch.Tensor, or a NumPy, CuPy or JAX array, or any other with ``__dlpack__``. A read-only NumPy array is
            copied: DLPack cannot say that it must not be written.

    Raises:
        TypeError: ``array`` is neither a tensor nor speaks DLPack, or its package has no ``from_dlpack``.
    """
    if isinstance(array, torch.Tensor):
        return array, lambda tensor: tensor
    kind = type(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} must be a torch.Tensor or an array with DLPack, got {kind.__name__}")
    package = kind.__module__.partition(".")[0]
    if package == "numpy":
        return torch.from_numpy(array if array.flags.writeable else array.copy()), torch.Tensor.numpy
    home = importlib.import_module(HOMES.get(package, package))
    if not hasattr(home, "from_dlpack"):
        raise TypeError(f"{name} must be of a package with from_dlpack, got {kind.__module__}.{kind.__name__}")
    return torch.from_dlpack(array), home.from_dlpack
