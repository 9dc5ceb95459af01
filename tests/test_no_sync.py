"""No host synchronisation from the gradients to the maps: the operators that would force one never run.

The path for accelerators runs here on the CPU under a dispatch mode that refuses them. On a GPU the same holds under
``torch.cuda.set_sync_debug_mode("error")``.
"""

import pytest
import torch
from problems import activations_like
from torch.utils._python_dispatch import TorchDispatchMode

from cfcam_gpu import CFCAMConfig, torch_backend

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
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in REFUSED:
            raise RuntimeError(f"{func} makes the host wait for the device")
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                raise RuntimeError(f"{func} with a mask has a data-dependent shape")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [CFCAMConfig(), CFCAMConfig.stable(), CFCAMConfig.paper(), CFCAMConfig(descriptor="unit")],
)
@pytest.mark.parametrize("guide", [None, (3, 20, 9, 10)])
def test_device_path_never_waits(config, guide, seed):
    guide = guide and torch.rand(guide)
    activations, gradients = activations_like((3, 60, 5, 5)), torch.randn(3, 60, 5, 5)
    arguments = (activations, gradients, (32, 32), config)
    torch_backend.cf_cam(*arguments, "batched", guide)  # constants are made once, outside the hot path
    with NoSynchronisation():
        result = torch_backend.cf_cam(*arguments, "batched", guide)
        torch_backend.grad_cam_maps([torch_backend.class_grid(activations, gradients)] * 2, (32, 32))
    for actual, expected in zip(result, torch_backend.cf_cam(*arguments, "host", guide)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
        lambda x: bool(x.any()),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_mode_refuses(operation):
    with pytest.raises(RuntimeError), NoSynchronisation():
        operation(torch.rand(5))
