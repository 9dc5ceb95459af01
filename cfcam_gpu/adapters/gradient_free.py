"""Which of pytorch-grad-cam's further methods have a faster class, and an object of it from one of the original's."""

import pytorch_grad_cam as original
import torch
from torch.utils._pytree import tree_map_only

from cfcam_gpu.adapters.ablation import AblationCAM
from cfcam_gpu.adapters.eigen import EigenCAM, EigenGradCAM, SegEigenCAM
from cfcam_gpu.adapters.full_grad import FullGrad
from cfcam_gpu.adapters.head_only import FinerCAM, RandomCAM, ShapleyCAM
from cfcam_gpu.adapters.hooked import CallHooks
from cfcam_gpu.adapters.pytorch_grad_cam import HeadActivationsAndGradients, HeadOnlyCAM, accelerate
from cfcam_gpu.adapters.score import ScoreCAM

METHODS = {
    getattr(original, fast.__name__): fast
    for fast in (
        AblationCAM,
        ScoreCAM,
        EigenCAM,
        EigenGradCAM,
        SegEigenCAM,
        FullGrad,
        FinerCAM,
        ShapleyCAM,
        RandomCAM,
    )
}
"""pytorch-grad-cam's class -> ours."""

SETTINGS = {"detach": True, "compute_input_gradient": False, "uses_gradients": True}
"""What the original's constructors set, but for `OWN_SETTINGS`."""

OWN_SETTINGS = {
    original.AblationCAM: {"uses_gradients": False},
    original.ScoreCAM: {"uses_gradients": False},
    original.EigenCAM: {"uses_gradients": False},
    original.FullGrad: {"compute_input_gradient": True},
    original.ShapleyCAM: {"compute_input_gradient": True, "detach": False},
}


def accelerated(cam):
    """A new object of our class for ``cam``'s, with the attributes of ``cam``, which goes on working as before.

    Args:
        cam: an object of exactly one of the classes in `METHODS`. Its hooks are off the model for the length of each
            call of the new object, which has none there in between.

    Raises:
        ValueError: its class is another, ``detach``, ``compute_input_gradient`` or ``uses_gradients`` are not as its
            constructor sets them, it has a method of its own, or it is a FinerCAM of a method without a head-only
            backward.
    """
    method = METHODS.get(type(cam))
    if method is None:
        names = ", ".join(cls.__name__ for cls in METHODS)
        raise ValueError(f"cam must be of one of the classes {names}, no subclasses, got {type(cam).__name__}")
    own = sorted(name for name in vars(cam) if hasattr(type(cam), name))
    if own:
        raise ValueError(f"the instance has its own {', '.join(own)}")
    if method is FinerCAM:
        base = (accelerated if type(cam.base_cam) in METHODS else accelerate)(cam.base_cam)
        if not isinstance(base, HeadOnlyCAM):
            raise ValueError(f"its base_cam is a {type(base).__name__}, which has no head-only backward")
        return _copy(cam, method, base_cam=base)
    for name, usual in {**SETTINGS, **OWN_SETTINGS.get(type(cam), {})}.items():
        if getattr(cam, name) is not usual:
            raise ValueError(f"{name} is {getattr(cam, name)!r}, and {usual!r} is what is sped up")
    hooks = cam.activations_and_grads
    if issubclass(method, HeadOnlyCAM):
        own_hooks = HeadActivationsAndGradients(
            cam.model, list(cam.target_layers), hooks.reshape_transform, hooks.handles
        )
        fast = _copy(cam, method, activations_and_grads=own_hooks)
        if hasattr(cam, "outputs"):
            fast.outputs = tree_map_only(torch.Tensor, torch.Tensor.detach, cam.outputs)
        return fast
    own_hooks = CallHooks(cam.model, cam.target_layers, hooks.reshape_transform, cam.detach)
    return _copy(cam, method, activations_and_grads=own_hooks, _foreign_hooks=hooks.handles)


def _copy(cam, method, **attributes):
    copy = object.__new__(method)
    # At once: an object that shares the hooks of ``cam`` would take them off the model when it is let go of.
    vars(copy).update({**vars(cam), **attributes})
    return copy
