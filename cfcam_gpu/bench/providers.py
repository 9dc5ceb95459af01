"""What is measured on a subject: this package in all its forms, its peers, and the plain forward."""

import copy
import fnmatch
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from cfcam_gpu import CFCAM, accelerate, cf_cam, pipeline
from cfcam_gpu.bench.compiling import Unavailable, compiled, frozen
from cfcam_gpu.checks import needs
from cfcam_gpu.clustering import ENGINES
from cfcam_gpu.layers import get_layer

CF_CAM, CF_CAM_CALL, GRAD_CAM, SCORES = "CF-CAM", "CF-CAM as pytorch-grad-cam scales", "Grad-CAM", "scores"
CF_CAM_OF_TEN, GRAD_CAM_OF_TEN = "CF-CAM, ten classes", "Grad-CAM, ten classes"


class Provider(NamedTuple):
    """Something to measure.

    ``build(subject)`` prepares it outside the clock and returns the function that is timed: without arguments, it
    gives the maps (B, H, W) or (B, K, H, W) at the size of the images, or the model's scores (B, K). It raises
    `Unavailable`, or what the package raises, when it cannot run.
    """

    name: str
    method: str | None
    """Providers of one method must give the same; None: there is nothing to compare."""
    build: Callable
    op: str = "end to end"
    """What the clock contains: "end to end", forward, backward and maps; "pipeline", activations to maps."""


BACKENDS = {
    **{f"{backend}+{engine}": (backend, engine) for backend in ("torch", "triton") for engine in ENGINES},
    "reference": ("reference", "auto"),
}
"""Backend and clustering engine, beside "auto" of both."""


# This package


def _choices(subject, backend, engine):
    """The two as keyword arguments, after a look whether they can run on this device."""
    if backend == "triton" or (engine in ENGINES and ENGINES[engine].devices):
        _need_gpu(subject)  # also where Triton's interpreter is on: its times would mean nothing
    pipeline.choose(backend, engine, torch.empty(1, 1, 1, 1, device=subject.device))
    return {"backend": backend, "clustering": engine}


def _need_gpu(subject):
    if subject.device.type != "cuda":
        raise Unavailable("needs a GPU")


def _cam(subject, **choices):
    return CFCAM(subject.model, [subject.layer], subject.reshape_transform, **choices)


def _forward(subject):
    @torch.no_grad()
    def run():
        return subject.model(subject.images)

    return run


def _maps(backend="auto", engine="auto"):
    def build(subject):
        cam, images, targets = _cam(subject, **_choices(subject, backend, engine)), subject.images, subject.targets
        return lambda: cam.maps(images, targets)

    return build


def _maps_of_ten(subject):
    cam, images = _cam(subject), subject.images
    return lambda: cam.maps(images, subject.top_ten)


def _ten_calls(build):
    """Of a provider that explains one class of each image: one call after the other for each of the ten."""

    def build_all(subject):
        calls = [build(subject.with_targets(of_images)) for of_images in subject.top_ten.T.tolist()]
        return lambda: torch.stack([torch.as_tensor(call()) for call in calls], dim=1)

    return build_all


def _call(backend="auto"):
    def build(subject):
        cam, images, targets = _cam(subject, **_choices(subject, backend, "auto")), subject.images, subject.targets
        return lambda: cam(images, targets)

    return build


def _captured(subject):
    _need_gpu(subject)
    targets = torch.tensor(subject.targets, device=subject.device)
    replay = _cam(subject).capture(subject.images, targets)
    return lambda: replay(subject.images, targets)


def _compiled_forward(subject):
    forward = frozen(copy.deepcopy(subject.model))
    return compiled(lambda: forward(subject.images))


def _compiled_maps(subject):
    model = copy.deepcopy(subject.model)  # some peers' hooks stay on the other, and a model with hooks is refused
    layer = get_layer(model, subject.layer_name)
    cam = CFCAM(model, [layer], subject.reshape_transform, compile=True)
    return compiled(lambda: cam.maps(subject.images, subject.targets))


def _pipeline(backend="auto", engine="auto"):
    def build(subject):
        choices = _choices(subject, backend, engine)
        activations, gradients, guide = subject.captured
        return lambda: cf_cam(activations, gradients, subject.output_size, guide=guide, **choices).maps

    return build


# Peers, imported where they are first needed


# A peer's hooks would cost the others time: they are on the model in the peer's own turn alone.


def _as_it_is(cam):
    return cam


def _grad_cam(subject):
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.activations_and_gradients import ActivationsAndGradients
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise Unavailable(needs("pytorch-grad-cam", "grad-cam")) from error
    cam = GradCAM(subject.model, [subject.layer], subject.reshape_transform)
    return cam, [ClassifierOutputTarget(index) for index in subject.targets], ActivationsAndGradients


def _pytorch_grad_cam(subject):
    cam, targets, hooks = _grad_cam(subject)
    cam.activations_and_grads.release()

    def run():
        cam.activations_and_grads = hooks(subject.model, cam.target_layers, subject.reshape_transform)
        try:
            return cam(subject.images, targets)
        finally:
            cam.activations_and_grads.release()

    return run


def _accelerated_grad_cam(subject):
    cam, targets, _ = _grad_cam(subject)
    cam = accelerate(cam)
    return lambda: cam(subject.images, targets)


def _torchcam(finish):
    def build(subject):
        try:
            from torchcam.methods import GradCAM
        except ImportError as error:
            raise Unavailable(needs("torch-cam", "torchcam")) from error
        images, targets = subject.images, subject.targets
        extractor = finish(GradCAM(subject.model, subject.layer, reshape_transform=subject.reshape_transform))
        extractor.disable_hooks()

        def run():
            extractor.enable_hooks()
            try:
                maps = extractor(targets, subject.model(images))[0]
            finally:
                extractor.disable_hooks()
            return F.interpolate(maps[:, None], subject.output_size, mode="bilinear")[:, 0]

        weakref.finalize(run, extractor.remove_hooks)
        return run

    return build


def _captum(finish):
    def build(subject):
        try:
            from captum.attr import LayerAttribution, LayerGradCam
        except ImportError as error:
            raise Unavailable(needs("captum", "captum")) from error
        if subject.reshape_transform is not None:
            raise Unavailable("captum's LayerGradCam takes no reshape_transform")
        attribution = finish(LayerGradCam(subject.model, subject.layer))

        def run():
            maps = attribution.attribute(subject.images, subject.targets, relu_attributions=True)
            return LayerAttribution.interpolate(maps, subject.output_size, "bilinear")[:, 0]

        return run

    return build


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("forward", SCORES, _forward),
        Provider("cfcam", CF_CAM, _maps()),
        Provider("cfcam:numpy", CF_CAM_CALL, _call()),
        Provider("cfcam:numpy:reference", CF_CAM_CALL, _call("reference")),
        *(Provider(f"cfcam:{name}", CF_CAM, _maps(*choice)) for name, choice in BACKENDS.items()),
        Provider("cfcam:capture", CF_CAM, _captured),
        Provider("cfcam:compile", CF_CAM, _compiled_maps),
        Provider("forward:compile", SCORES, _compiled_forward),
        Provider("pytorch-grad-cam", GRAD_CAM, _pytorch_grad_cam),
        Provider("pytorch-grad-cam:accelerated", GRAD_CAM, _accelerated_grad_cam),
        Provider("torch-cam", GRAD_CAM, _torchcam(_as_it_is)),
        Provider("torch-cam:accelerated", GRAD_CAM, _torchcam(accelerate)),
        Provider("captum", GRAD_CAM, _captum(_as_it_is)),
        Provider("captum:accelerated", GRAD_CAM, _captum(accelerate)),
        Provider("cfcam:top10", CF_CAM_OF_TEN, _maps_of_ten),
        *(
            Provider(f"{name}:ten calls", method, _ten_calls(build))
            for name, method, build in (
                ("cfcam", CF_CAM_OF_TEN, _maps()),
                ("pytorch-grad-cam", GRAD_CAM_OF_TEN, _pytorch_grad_cam),
                ("pytorch-grad-cam:accelerated", GRAD_CAM_OF_TEN, _accelerated_grad_cam),
                ("torch-cam", GRAD_CAM_OF_TEN, _torchcam(_as_it_is)),
                ("captum", GRAD_CAM_OF_TEN, _captum(_as_it_is)),
            )
        ),
        Provider("pipeline", CF_CAM, _pipeline(), "pipeline"),
        *(Provider(f"pipeline:{name}", CF_CAM, _pipeline(*choice), "pipeline") for name, choice in BACKENDS.items()),
    )
}
"""By name: "cfcam" is ``CFCAM.maps``, "cfcam:numpy" the call that returns NumPy, "cfcam:capture" a CUDA graph,
":compile" has the network compiled by Inductor with frozen weights, ":accelerated" is the peer's object after
`accelerate`, "cfcam:top10" explains the ten best classes of each image in one pass, ":ten calls" explains one after
the other, and "pipeline" is ``cf_cam`` alone, on the layer's activations and gradients and its guide's output."""

JUDGES = {
    SCORES: ("forward",),
    CF_CAM: ("pipeline:reference", "pipeline:torch+batched"),
    CF_CAM_CALL: ("cfcam:numpy:reference",),
    GRAD_CAM: ("pytorch-grad-cam", "torch-cam", "captum"),
    CF_CAM_OF_TEN: ("cfcam:ten calls",),
    GRAD_CAM_OF_TEN: ("pytorch-grad-cam:ten calls", "torch-cam:ten calls", "captum:ten calls"),
}
"""With whose results the others' of a method are compared: the first of these that can run."""


def select(patterns: Sequence[str]) -> list[str]:
    """The names of the providers that the shell patterns match, in `PROVIDERS`' order; the unit is always there.

    Raises:
        ValueError: a pattern matches none.

    >>> select(["captum*"])
    ['forward', 'captum', 'captum:accelerated']
    """
    for pattern in patterns:
        if not fnmatch.filter(PROVIDERS, pattern):
            raise ValueError(f"providers must be among {', '.join(PROVIDERS)}, or a pattern of them, got {pattern!r}")
    return [name for name in PROVIDERS if name == "forward" or any(fnmatch.fnmatch(name, p) for p in patterns)]
