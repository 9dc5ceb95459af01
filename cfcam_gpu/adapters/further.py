"""Which of pytorch-grad-cam's further methods have a faster class, and an object of it from one of the original's."""

import pytorch_grad_cam as original

from cfcam_gpu.adapters.ablation import AblationCAM
from cfcam_gpu.adapters.eigen import EigenCAM, EigenGradCAM, SegEigenCAM
from cfcam_gpu.adapters.full_grad import FullGrad
from cfcam_gpu.adapters.head_only import FinerCAM, RandomCAM, ShapleyCAM
from cfcam_gpu.adapters.hooked import CallHooks
from cfcam_gpu.adapters.pytorch_grad_cam import (
    HeadOnlyCAM,
    _check_methods,
    _check_settings,
    _copy,
    _on_a_head_only_backward,
    accelerate,
)
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

OWN_SETTINGS = {
    original.AblationCAM: {"uses_gradients": False},
    original.ScoreCAM: {"uses_gradients": False},
    original.EigenCAM: {"uses_gradients": False},
    original.FullGrad: {"compute_input_gradient": True},
    original.ShapleyCAM: {"compute_input_gradient": True, "detach": False},
}
"""What their constructors set otherwise than those of the other classes."""


REASONS = {
    original.FEM: "its time is that of the model's forward pass",
    original.KPCA_CAM: "its time is that of the model's forward pass",
}
"""pytorch-grad-cam's class -> why it is left alone."""

WRAPPERS = {original.RefineCAM: "base_cam_per_layer", original.SESS: "base_cam"}
"""pytorch-grad-cam's class that computes nothing of its own -> where it has the objects that do."""


def around_accelerated(cam):
    """A copy of a wrapper around the accelerated objects of what it has; the wrapper itself where none is."""
    name = WRAPPERS[type(cam)]
    own = getattr(cam, name)
    bases = own if isinstance(own, list) else [own]
    faster = [accelerate(base) for base in bases]
    if all(one is other for one, other in zip(faster, bases)):
        return cam
    return _copy(cam, type(cam), **{name: faster if isinstance(own, list) else faster[0]})


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
    if method is FinerCAM:
        _check_methods(cam)
        base = (accelerated if type(cam.base_cam) in METHODS else accelerate)(cam.base_cam)
        if not isinstance(base, HeadOnlyCAM):
            raise ValueError(f"its base_cam is a {type(base).__name__}, which has no head-only backward")
        return _copy(cam, method, base_cam=base)
    _check_settings(cam, **OWN_SETTINGS.get(type(cam), {}))
    if issubclass(method, HeadOnlyCAM):
        return _on_a_head_only_backward(cam, method)
    hooks = cam.activations_and_grads
    own_hooks = CallHooks(cam.model, cam.target_layers, hooks.reshape_transform, cam.detach)
    return _copy(cam, method, activations_and_grads=own_hooks, _foreign_hooks=hooks.handles)
