"""Which of pytorch-grad-cam's further methods have a faster class, and an object of it from one of the original's."""

import pytorch_grad_cam as original
import torch
from torch.utils._pytree import tree_map_only

from cfcam_gpu.adapters.ablation import AblationCAM
from cfcam_gpu.adapters.eigen import EigenCAM, EigenGradCAM, SegEigenCAM
from cfcam_gpu.adapters.full_grad import FullGrad
from cfcam_gpu.adapters.pytorch_grad_cam import HeadActivationsAndGradients, HeadOnlyCAM
from cfcam_gpu.adapters.score import ScoreCAM

METHODS = {
    getattr(original, fast.__name__): fast
    for fast in (AblationCAM, ScoreCAM, EigenCAM, EigenGradCAM, SegEigenCAM, FullGrad)
}
"""pytorch-grad-cam's class -> ours."""

SETTINGS = {"detach": True, "compute_input_gradient": False, "uses_gradients": True}
"""What the original's constructors set, but for `OWN_SETTINGS`."""

OWN_SETTINGS = {
    original.AblationCAM: {"uses_gradients": False},
    original.ScoreCAM: {"uses_gradients": False},
    original.EigenCAM: {"uses_gradients": False},
    original.FullGrad: {"compute_input_gradient": True},
}


def accelerated(cam):
    """A new object of our class for ``cam``'s, with the attributes of ``cam``, which goes on working as before.

    Args:
        cam: an object of exactly one of the classes in `METHODS`. Its hooks are off the model for the length of each
            call of the new object, which has none there in between.

    Raises:
        ValueError: its class is another, ``detach``, ``compute_input_gradient`` or ``uses_gradients`` are not as its
            constructor sets them, or it has a method of its own.
    """
    method = METHODS.get(type(cam))
    if method is None:
        names = ", ".join(cls.__name__ for cls in METHODS)
        raise ValueError(f"cam must be of one of the classes {names}, no subclasses, got {type(cam).__name__}")
    for name, usual in {**SETTINGS, **OWN_SETTINGS.get(type(cam), {})}.items():
        if getattr(cam, name) is not usual:
            raise ValueError(f"{name} is {getattr(cam, name)!r}, and {usual!r} is what is sped up")
    own = sorted(name for name in vars(cam) if hasattr(type(cam), name))
    if own:
        raise ValueError(f"the instance has its own {', '.join(own)}")
    fast = object.__new__(method)
    vars(fast).update(vars(cam))
    hooks = cam.activations_and_grads
    if issubclass(method, HeadOnlyCAM):
        fast.activations_and_grads = HeadActivationsAndGradients(
            cam.model, list(cam.target_layers), hooks.reshape_transform, hooks.handles
        )
        if hasattr(cam, "outputs"):
            fast.outputs = tree_map_only(torch.Tensor, torch.Tensor.detach, cam.outputs)
    else:
        fast._foreign_hooks = hooks.handles
        fast._hook()
    return fast
