"""Arrays of other libraries in and out, through DLPack and without a copy."""

import sys

import torch


def as_tensor(name, array):
    """``array`` as a torch tensor that shares its memory, and the function that takes results back to its kind.

    Raises:
        TypeError: ``array`` is neither a tensor nor speaks DLPack.
    """
    if isinstance(array, torch.Tensor):
        return array, lambda tensor: tensor
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} must be a torch.Tensor or an array with DLPack, got {type(array).__name__}")
    library = sys.modules[type(array).__module__.partition(".")[0]]
    if library.__name__ == "numpy":
        # A read-only array cannot be exported without a copy.
        return torch.from_numpy(array if array.flags.writeable else array.copy()), torch.Tensor.numpy
    from_dlpack = library.dlpack.from_dlpack if hasattr(library, "dlpack") else library.from_dlpack
    return torch.from_dlpack(array), from_dlpack
