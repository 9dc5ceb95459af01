"""Where the Triton kernels run: on a GPU where there is one, else in Triton's interpreter on CPU tensors."""

import os

import pytest
import torch

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
DEVICE = "cuda" if GPU else "cpu"
on_gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU: too large or impossible in Triton's interpreter")


def launched(monkeypatch, run=True):
    """The names of the kernels launched from here on, a list that grows; ``run=False`` skips them."""
    from cfcam_gpu.kernels.class_map import weighted_sum_kernel

    kernel_type, names = type(weighted_sum_kernel), []
    original = kernel_type.run

    def count(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs) if run else None

    monkeypatch.setattr(kernel_type, "run", count)
    return names
