"""Density clustering of the channels: the table of engines, `ENGINES`.

Every engine gives the same labels. Which of them runs, what ``cfcam doctor`` and ``cfcam bench`` list, and what an
error offers are all read from the table. To add an engine, write a module with the functions that `Engine` names, and
its record here.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from cfcam_gpu.checks import is_installed, needs


def _always() -> None:
    return None


def _cuml_unavailable() -> Exception | None:
    if not is_installed("cuml"):
        return ImportError(needs("cuml", "cuml"))
    if not torch.cuda.is_available():
        return ValueError("no CUDA device is usable here")
    return None


def reference_unavailable() -> ImportError | None:
    """Why SciPy and scikit-learn cannot be used, as an ImportError; None when they can."""
    missing = [name for name in ("scipy", "sklearn") if not is_installed(name)]
    if missing:
        return ImportError(needs(" and ".join(missing), "reference"))
    return None


class Engine(NamedTuple):
    """One way to cluster. Its module, imported when it is first used, has two functions:

    - ``cluster(rows, members, labels, config) -> (labels, eps)``, for the torch backend: descriptors (B, C, D), which
      of them are clustered, bool (B, C), and labels int32 (B, C), in which those of the members are to be replaced;
      eps is (B,);
    - ``label(distances, eps, min_samples) -> labels``, for the Triton backend: one image's distances (R, R) and eps on
      the device, labels int (R,). An engine that the kernels contain (``in_kernels``) needs none.
    """

    name: str
    module: str
    summary: str
    unavailable: Callable[[], Exception | None] = _always
    """Why the engine cannot run in this installation, as an exception; None when it can."""
    devices: tuple[str, ...] | None = None
    """Types of device whose tensors it takes; None: all."""
    in_kernels: bool = False
    """The Triton backend has this engine built in."""
    in_reference: bool = False
    """The reference backend clusters with this engine."""
    distribution: str | None = None
    """The package whose version says which it is."""

    def refusal(self, device: torch.device) -> ValueError | None:
        """Why the engine does not take tensors on this device, as an exception; None when it does."""
        if self.devices is None or device.type in self.devices:
            return None
        expected = " or ".join(kind.upper() for kind in self.devices)
        return ValueError(f'clustering="{self.name}" needs tensors on a {expected} device, got {device}')

    def load(self) -> ModuleType:
        """The engine's module."""
        return importlib.import_module(f"cfcam_gpu.clustering.{self.module}")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "batched",
            "batched",
            "ours, on the tensors' device, all images at once and without a host synchronisation",
            in_kernels=True,
            distribution="triton",
        ),
        Engine("host", "host", "ours, on the host, compiled and image by image: the fastest for tensors on a CPU"),
        Engine(
            "cuml",
            "cuml",
            "RAPIDS cuML's DBSCAN, on the device, one image at a time; makes the host wait",
            unavailable=_cuml_unavailable,
            devices=("cuda",),
            distribution="cuml",
        ),
        Engine(
            "sklearn",
            "scikit",
            "scikit-learn's DBSCAN, on the host",
            unavailable=reference_unavailable,
            in_reference=True,
            distribution="sklearn",
        ),
    )
}
"""By the name that ``clustering=`` takes. "auto" takes "host" for tensors on a CPU and "batched" elsewhere."""


def automatic(backend: str, device: torch.device) -> str:
    """The name of the engine that "auto" takes."""
    return "host" if backend == "torch" and device.type == "cpu" else "batched"
