"""Adapters to other CAM libraries: `accelerate`, and one module per library, imported when it is first needed."""

import importlib
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Peer(NamedTuple):
    """Another CAM library, whose adapter is the module of this package with the library's import name."""

    name: str
    """As it calls itself."""
    module: str
    """As it is imported."""
    distribution: str
    """As it is installed."""
    extra: str
    """The extra of this package that brings it."""


PEERS = {
    peer.module: peer
    for peer in (
        Peer("pytorch-grad-cam", "pytorch_grad_cam", "grad-cam", "grad-cam"),
        Peer("torch-cam", "torchcam", "torchcam", "torchcam"),
        Peer("captum", "captum", "captum", "captum"),
    )
}
"""By import name."""


def accelerate(cam: T) -> T:
    """The same CAM object of pytorch-grad-cam, torch-cam or captum, computed faster.

    Args:
        cam: a CAM object of one of the three libraries, ready to be called.

    Returns:
        An object of the same type (``isinstance(accelerate(cam), type(cam))``) that is called in the same way and
        gives the same numbers, from a backward through the head only. A method that is not sped up, and a class of
        the user's own, come back exactly as they were, and a line on the logger ``cfcam_gpu`` says so. Which methods
        are sped up, and what becomes of ``cam`` itself, is said in the library's adapter module.

    Raises:
        TypeError: ``cam`` is no object of these libraries.

    >>> cam = accelerate(pytorch_grad_cam.GradCAM(model, [model.layer4[-1]]))
    >>> cam(images).shape  # images (2, 3, 224, 224)
    (2, 224, 224)
    """
    for base in type(cam).__mro__:
        peer = PEERS.get(base.__module__.partition(".")[0])
        if peer is not None:
            return importlib.import_module(f"{__name__}.{peer.module}").accelerate(cam)
    *names, last = (peer.name for peer in PEERS.values())
    raise TypeError(f"cam must be an object of {', '.join(names)} or {last}, got {_describe(cam)}")


def _describe(cam):
    if isinstance(cam, type):
        return f"the class {cam.__module__}.{cam.__qualname__}; make an instance first"
    return f"{type(cam).__module__}.{type(cam).__qualname__}"
