"""Adapters to other CAM libraries: `accelerate`, and one module per library, imported when it is first needed."""

import importlib

_ADAPTERS = {
    "pytorch_grad_cam": "pytorch_grad_cam",
    "torchcam": "torchcam",
    "captum": "captum",
}
"""Import name of a library -> name of its adapter in this package."""


def accelerate(cam):
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
        adapter = _ADAPTERS.get(base.__module__.partition(".")[0])
        if adapter is not None:
            return importlib.import_module(f"{__name__}.{adapter}").accelerate(cam)
    raise TypeError(f"cam must be an object of pytorch-grad-cam, torch-cam or captum, got {_describe(cam)}")


def _describe(cam):
    if isinstance(cam, type):
        return f"the class {cam.__module__}.{cam.__qualname__}; make an instance first"
    return f"{type(cam).__module__}.{type(cam).__qualname__}"
