"""Arrays of other libraries: in and out without a copy, and the same kind comes back."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from problems import activations_like

from cfcam_gpu import CFCAMResult, cf_cam, cluster_channels
from cfcam_gpu.arrays import as_tensor


class Array:
    """A stand-in for CuPy's array on a machine without a GPU: memory, and DLPack to reach it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


Array.__module__ = "standin.core"


@pytest.fixture
def standin(monkeypatch):
    module = ModuleType("standin")
    module.from_dlpack = lambda tensor: Array(torch.from_dlpack(tensor))
    monkeypatch.setitem(sys.modules, "standin", module)
    return module


KINDS = {
    "numpy": (torch.Tensor.numpy, torch.from_numpy),
    "standin": (Array, lambda array: array.tensor),
    "cupy": None,
    "jax": None,
}


@pytest.mark.parametrize("name", KINDS)
def test_round_trip(name, standin, seed):
    if KINDS[name]:
        make, back = KINDS[name]
    else:
        module = pytest.importorskip(name, reason=f"{name} is not installed")
        if name == "cupy" and not module.cuda.is_available():
            pytest.skip("CuPy needs a GPU")
        from_dlpack = module.from_dlpack if name == "cupy" else pytest.importorskip("jax.dlpack").from_dlpack
        device = "cuda" if name == "cupy" else "cpu"
        make, back = (lambda tensor: from_dlpack(tensor.to(device))), torch.from_dlpack
    activations, gradients = activations_like((2, 30, 4, 4)), torch.randn(2, 30, 4, 4)
    arrays = make(activations), make(gradients)
    kind = type(arrays[0])

    tensor, restore = as_tensor("activations", arrays[0])
    assert tensor.data_ptr() == back(arrays[0]).data_ptr(), "no copy on the way in"
    assert back(restore(tensor)).data_ptr() == tensor.data_ptr(), "no copy on the way out"

    result = cf_cam(*arrays, output_size=(8, 8))
    assert isinstance(result, CFCAMResult) and all(type(array) is kind for array in result)
    expected = cf_cam(activations.to(tensor.device), gradients.to(tensor.device), (8, 8))
    for array, wanted in zip(result, expected):
        assert torch.equal(back(array), wanted)
    labels, eps = cluster_channels(arrays[0])
    assert type(labels) is kind and type(eps) is kind


def test_read_only_numpy_is_left_alone(rng):
    activations = rng.random((2, 30, 4, 4), np.float32)
    activations.flags.writeable = False
    before = activations.copy()
    assert isinstance(cf_cam(activations, activations).maps, np.ndarray)
    np.testing.assert_array_equal(activations, before)


def test_an_array_of_no_package(standin):
    del standin.from_dlpack
    with pytest.raises(TypeError, match="activations must be of a package with from_dlpack, got standin.core.Array"):
        as_tensor("activations", Array(torch.rand(3)))
