"""No host synchronisation from the gradients to the maps: the operators that would force one never run.

The path for accelerators runs here on the CPU under a dispatch mode that refuses them. On a GPU the same holds under
``torch.cuda.set_sync_debug_mode("error")``.
"""

import pytest
import torch
from no_sync import NoSynchronisation
from problems import activations_like

from cfcam_gpu import CFCAMConfig, torch_backend


@pytest.mark.parametrize(
    "config",
    [CFCAMConfig(), CFCAMConfig.stable(), CFCAMConfig.paper(), CFCAMConfig(descriptor="unit")],
)
@pytest.mark.parametrize("guide", [None, (3, 20, 9, 10)])
@pytest.mark.parametrize("classes", [(), (4,)])
def test_device_path_never_waits(config, guide, classes, seed):
    guide = guide and torch.rand(guide)
    activations, gradients = activations_like((3, 60, 5, 5)), torch.randn(3, *classes, 60, 5, 5)
    arguments = (activations, gradients, (32, 32), config)
    torch_backend.cf_cam(*arguments, "batched", guide)  # constants are made once, outside the hot path
    with NoSynchronisation():
        result = torch_backend.cf_cam(*arguments, "batched", guide)
        torch_backend.grad_cam_maps([torch_backend.class_grid(activations, activations)] * 2, (32, 32))
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
