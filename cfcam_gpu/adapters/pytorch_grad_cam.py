"""pytorch-grad-cam's classes on a head-only backward: CF-CAM in its contract, and methods of its own.

The classes here are subclasses of that library's (grad-cam 1.5.7), with its constructors, its call and its numbers, and
can stand wherever its own can: in FinerCAM, RefineCAM, SESS and the metrics. `HeadOnlyCAM` says what is different.
`cfcam_gpu.accelerate` turns an object of the original classes into one of these.
"""

import math
import warnings
from collections.abc import Iterable, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map, tree_map_only

from cfcam_gpu import pipeline, torch_backend, weights
from cfcam_gpu.adapters.common import LOG, Configured, left_as_it_is, obstacle
from cfcam_gpu.capture import GuideLayer, HeadCapture
from cfcam_gpu.checks import needs
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.outputs import find_logits, image_part
from cfcam_gpu.targets import OwnRule, check_logits, check_targets

try:
    import pytorch_grad_cam as original
    from pytorch_grad_cam.activations_and_gradients import ActivationsAndGradients
    from pytorch_grad_cam.base_cam import BaseCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:
    raise ImportError(f"{needs('pytorch-grad-cam', 'grad-cam')} ({error})") from error

from cfcam_gpu.projection import principal_projection

# No private name of pytorch-grad-cam is used, but modules that it does not export: activations_and_gradients, base_cam,
# utils.image and utils.model_targets.


def accelerate(cam):
    """The same CAM, computed from a head-only backward, or from the head alone.

    Args:
        cam: an object of pytorch-grad-cam. Sped up: GradCAM, HiResCAM, GradCAMElementWise, GradCAMPlusPlus, XGradCAM
            and LayerCAM by a head-only backward, and the classes of `cfcam_gpu.adapters.further.METHODS`, also within
            RefineCAM and SESS; where the class is exactly one of these.

    Returns:
        A new object of this package's class of the same name, with the attributes of ``cam``. ``cam`` goes on working
        as before; its hooks are off the model for the length of each call of the new object, so that they cost it
        nothing, and for good when ``cam`` itself is let go of, as in ``cam = accelerate(cam)``. As with ``cam``, which
        called ``model.eval()`` when it was made, the model runs in the mode that it is in.

        Everything else comes back as it was, the same object, with a warning on the logger ``cfcam_gpu`` that names
        the reason: other methods, a subclass or an instance with a method of the user's own, ``detach=False``,
        ``compute_input_gradient=True``, and a model or layer that the head-only capture does not take (scripted).
    """
    from cfcam_gpu.adapters import further  # which imports this module

    if isinstance(cam, (HeadOnlyCAM, *further.METHODS.values())):
        return cam
    if type(cam) in further.WRAPPERS:
        return further.around_accelerated(cam)
    reason = obstacle(cam, {**ACCELERATED, **further.METHODS}, further.REASONS)
    if reason is None:
        try:
            return further.accelerated(cam) if type(cam) in further.METHODS else _accelerated(cam)
        except (TypeError, ValueError) as error:
            reason = str(error)
    return left_as_it_is(cam, reason)


def _check_settings(cam, **own):
    """Raise ValueError for what keeps an object from being sped up; ``own``: what its class sets unlike the others."""
    usual = {"detach": True, "compute_input_gradient": False, "uses_gradients": True, **own}
    for name, value in usual.items():
        if getattr(cam, name) is not value:
            raise ValueError(f"{name} is {getattr(cam, name)!r}, and {value!r} is what is sped up")
    _check_methods(cam)


def _check_methods(cam):
    own = sorted(name for name in vars(cam) if hasattr(type(cam), name))
    if own:
        raise ValueError(f"the instance has its own {', '.join(own)}")


def _accelerated(cam):
    _check_settings(cam)
    return _on_a_head_only_backward(cam, ACCELERATED[type(cam)])


def _on_a_head_only_backward(cam, method):
    hooks = cam.activations_and_grads
    captured = HeadActivationsAndGradients(
        cam.model,
        list(cam.target_layers),
        hooks.reshape_transform,
        hooks.handles,
        evaluated=False,
        **method._capture_options,
    )
    fast = _copy(cam, method, activations_and_grads=captured)
    if hasattr(cam, "outputs"):
        fast.outputs = tree_map_only(torch.Tensor, torch.Tensor.detach, cam.outputs)
    return fast


def _copy(cam, method, **attributes):
    copy = object.__new__(method)
    # At once: an object that shares the hooks of ``cam`` would take them off the model when it is let go of.
    vars(copy).update({**vars(cam), **attributes})
    return copy


class HeadActivationsAndGradients(ActivationsAndGradients):
    """What a CAM of this module has as ``activations_and_grads``: `HeadCapture` instead of hooks that stay.

    Args:
        model, target_layers, reshape_transform: as for `HeadCapture`.
        foreign_hooks: a list of hook handles to take off the model during every pass, read anew each time.
        evaluated: have the model in eval mode during every pass; False for the mode that it is in.
        options: ``guide_layer``, ``guided``, ``margin_temperature``, ``frozen_norms`` and ``any_rows``, as for
            `HeadCapture`.

    Attributes:
        activations, gradients: lists of one tensor per target layer of the latest `capture`, in the order in which the
            layers ran, detached, on the model's device.
    """

    def __init__(self, model, target_layers, reshape_transform=None, foreign_hooks=(), evaluated=True, **options):
        super().__init__(model, [], reshape_transform)
        self._captured = HeadCapture(model, target_layers, reshape_transform, **options)
        self._foreign_hooks, self._evaluated = foreign_hooks, evaluated
        self._told = False

    def __call__(self, x):
        """The model's outputs, detached, as leaves that take a gradient.

        FinerCAM and the like call this, build their targets from the outputs and run a backward, which then has
        nothing to go through and fills no parameter's ``.grad``; the gradients proper come with the targets in
        ``compute_cam_per_layer``, at the price of a second forward.
        """
        with self._undisturbed(), torch.inference_mode(False), torch.no_grad():
            outputs = self.model(x)
        return tree_map_only(torch.Tensor, _as_leaf, outputs)

    def capture(self, input_tensor, targets, **several):
        """The `Capture` of one pass.

        Args:
            several: what `HeadCapture` is called with for several classes of an image.

        Returns:
            outputs; and for each layer, in the order in which they ran, (activations, gradients, shape, guide): both
            (B, C, h, w) and shape (h, w), or for 5-D inputs (B, C, d, h * w) and (d, h, w); the guide
            (B, Cg, hg, wg) or None.
        """
        volumes = []
        captured = self._captured
        if isinstance(input_tensor, torch.Tensor) and input_tensor.dim() == 5:
            options = {name: getattr(captured, name) for name in ("margin_temperature", "frozen_norms", "any_rows")}
            layers, transform = captured.target_layers, self._flattening(volumes)
            captured = HeadCapture(captured.model, layers, transform, **options)
        with self._undisturbed():
            capture = captured(input_tensor, targets, **several)
        self._warn_of_repeated_layers(captured)
        shapes = volumes or [activations.shape[2:] for activations in capture.activations]
        layers = list(zip(capture.activations, capture.gradients, shapes, capture.guides))
        layers = [layers[index] for index in capture.order]
        self.activations, self.gradients = ([layer[part] for layer in layers] for part in (0, 1))
        return capture.outputs, layers

    @property
    def guide_names(self):
        return self._captured.guide_names

    @property
    def is_training(self):
        """Whether an image's outputs may hang on the others in its batch, or on chance."""
        return not self._evaluated and any(module.training for module in self.model.modules())

    def _flattening(self, volumes):
        """A reshape_transform that makes grids of volumes, and notes their shapes: the activations' come first."""

        def transform(output):
            volume = output if self.reshape_transform is None else self.reshape_transform(output)
            volumes.append(volume.shape[2:])
            return volume.flatten(3) if volume.dim() == 5 else volume

        return transform

    def _warn_of_repeated_layers(self, captured):
        repeated = captured.repeated_layers()
        if repeated and not self._told:
            self._told = True
            LOG.warning(
                "target layer %r runs %d times in a forward pass: its last run is explained (pytorch-grad-cam"
                " explains its first)",
                *repeated[0],
            )

    @contextmanager
    def _undisturbed(self):
        with _evaluated(self.model) if self._evaluated else nullcontext(), _off_the_model(self._foreign_hooks):
            yield


class HeadOnlyCAM:
    """What the CAM classes of this module share: the pass, the scaling and the smoothing.

    Subclasses are also subclasses of pytorch-grad-cam's ``BaseCAM`` and define ``channel_weights``. The call is that
    library's: ``cam(input_tensor, targets=None, aug_smooth=False, eigen_smooth=False)`` gives NumPy float32,
    C-contiguous, (B, H, W), in [0, 1): of each layer the positive part, scaled to (x - min) / (1e-7 + max), resized
    bilinearly, averaged over the layers and scaled again. `maps` gives the same on the model's device.

    Args:
        model, target_layers, reshape_transform: as for `HeadCapture`, or ``nn.Sequential`` or ``nn.ModuleList`` for
            the layers in it. A layer that runs several times in a forward pass counts with its last run (the original:
            its first); a log line says so.

    Attributes:
        outputs: the model's outputs of the latest call, detached; of ``aug_smooth``, those of its last view.
        batch_size: the most images of one pass; None, the default, for no limit. ``aug_smooth`` puts all its views
            (six, unless ``tta_transforms`` was set) in one batch, of a model in eval mode.

    Raises:
        TypeError, ValueError: as `HeadCapture`.

    Video and volumes: inputs (B, C, D, H, W) with layers that give (B, C, d, h, w) are supported, with maps
    (B, D, H, W); these are resized on the host, by SciPy's spline, as the original does.

    Targets may be class indices as well as the library's callables, which are paired with what the model returns as
    there: with its rows, or of a tuple or list with its elements; of other containers with each image's part. Not
    copied from pytorch-grad-cam 1.5.7:

    - activations that are no grid, which HiResCAM and others add up over whatever the second axis is: here an error;
    - fewer targets than images, where ``zip`` leaves maps of zeros: here a ValueError;
    - ``model.eval()`` for good: here for the length of a call, and every module's flag is then as before (an object
      from `accelerate` leaves the mode to the caller);
    - ``model.zero_grad()`` and filled ``.grad`` of all parameters: here neither is touched;
    - ``__exit__`` prints an IndexError of the ``with`` block and goes on: here it is raised;
    - on the CPU, activations share memory with the layer's output, so that a later in-place operation (a ReLU, a
      residual sum) changes them: here they are those of the layer;
    - no gradients for frozen models and under ``torch.no_grad``, no NumPy for bfloat16, hooks passed by in a model
      that was compiled and called before: here all of these work, and half precision is computed in float32.

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM`` and ``utils.image.scale_cam_image``.
    """

    outputs = None
    batch_size = None
    # Of the weighted sum and the scaling; `CFCAM` takes them as arguments.
    _grid_options: dict[str, Any] = {"config": None, "backend": "auto"}

    _capture_options: dict[str, Any] = {"any_rows": True}
    _several: dict[str, Any] = {}
    """How the capture takes several classes of an image; empty where it takes one."""

    def __init__(self, model, target_layers, reshape_transform=None):
        if isinstance(target_layers, (torch.nn.Sequential, torch.nn.ModuleList)):
            target_layers = list(target_layers)
        hook_free = HeadActivationsAndGradients(model, target_layers, reshape_transform, **self._capture_options)
        with _evaluated(model):  # the original's constructor calls model.eval()
            super().__init__(model, target_layers, reshape_transform)
        self.activations_and_grads.release()
        self.activations_and_grads = hook_free

    def channel_weights(self, activations, gradients):
        """Weights (B, C), or (B, C, h, w) for a weight of each cell, from activations and gradients (B, C, h, w)."""
        raise NotImplementedError(f"{type(self).__name__} must define channel_weights")

    def __call__(self, input_tensor, targets=None, aug_smooth=False, eigen_smooth=False):
        """The maps as NumPy float32; see `maps`."""
        return _to_numpy(self.maps(input_tensor, targets, aug_smooth, eigen_smooth))

    def forward(self, input_tensor, targets=None, eigen_smooth=False):
        """The maps as NumPy float32, without augmentation."""
        return _to_numpy(self.maps(input_tensor, targets, eigen_smooth=eigen_smooth))

    def forward_augmentation_smoothing(self, input_tensor, targets=None, eigen_smooth=False):
        """The mean of the maps of the views of ``tta_transforms``, as NumPy float32."""
        return _to_numpy(self.maps(input_tensor, targets, True, eigen_smooth))

    def maps(self, input_tensor, targets=None, aug_smooth=False, eigen_smooth=False):
        """The maps on the model's device: (B, H, W) float32 (float64 for a float64 model), or (B, D, H, W).

        Args:
            input_tensor: (B, C, H, W) or (B, C, D, H, W), floating point.
            targets: None for the top class of each image (and of each view), or one class index or callable per
                image; as for `HeadCapture`. More callables than there are outputs are not used.
            aug_smooth: True for the mean over the views of ``tta_transforms``, in one batched pass. As in the original
                nothing else stands for True.
            eigen_smooth: the first principal component of the weighted activations instead of their sum. Its sign is
                that of LAPACK's singular vectors, as in the original, so this part runs on the host.
        """
        if aug_smooth is True:
            return self._smoothed(input_tensor, targets, eigen_smooth)
        return self._resized(self._grids(input_tensor, targets, eigen_smooth), input_tensor)

    def compute_cam_per_layer(self, input_tensor, targets, eigen_smooth=False):
        """List of each layer's scaled maps, NumPy (B, 1, H, W), from a pass of its own."""
        grids = self._grids(input_tensor, targets, eigen_smooth)
        if input_tensor.dim() == 5:
            layers = self._resized_volumes(grids, input_tensor)
        else:
            layers = [self._scaled([grid], input_tensor, scale_mean=False) for grid in grids]
        return [_to_numpy(layer[:, None]) for layer in layers]

    def _grids(self, input_tensor, targets, eigen_smooth, a_row_each=False):
        """Of one pass, each layer's non-negative map on its own grid: list of (B, h, w) or (B, d, h, w).

        Args:
            a_row_each: raise `_NotARowEach` where outputs or activations are not one for each image.
        """
        targets = _listed(targets, len(input_tensor), several=bool(self._several))
        chunks = self._chunks(input_tensor, targets)
        try:
            passes = [self._pass(*chunk, eigen_smooth, a_row_each or len(chunks) > 1) for chunk in chunks]
        except _NotARowEach:
            if a_row_each:
                raise
            passes = [self._pass(input_tensor, targets, eigen_smooth)]
        outputs, grids = zip(*passes)
        self.outputs = outputs[0] if len(outputs) == 1 else _join(outputs)
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*grids)]

    def _pass(self, images, targets, eigen_smooth, a_row_each=False):
        """The outputs of a forward pass, and the layers' grids."""
        rule = _rule(targets, len(images), a_row_each, top=not self._several)
        outputs, layers = self.activations_and_grads.capture(images, rule, **self._several)
        grids = [self._grid(*layer, eigen_smooth) for layer in layers]
        if a_row_each and any(len(grid) != len(images) for grid in grids):
            raise _NotARowEach
        return outputs, grids

    def _resized(self, grids, input_tensor):
        if input_tensor.dim() == 5:
            return self._mean_of_volumes(grids, input_tensor)
        return self._scaled(grids, input_tensor)

    def _scaled(self, grids, input_tensor, scale_mean=True):
        return pipeline.grad_cam_maps(grids, input_tensor.shape[-2:], scale_mean, self._grid_options["backend"])

    def _mean_of_volumes(self, grids, input_tensor):
        mean = torch.stack(self._resized_volumes(grids, input_tensor)).mean(0)
        return torch_backend.scale_as_grad_cam(mean.flatten(2)).view_as(mean)

    def _resized_volumes(self, grids, input_tensor):
        size = self.get_target_width_height(input_tensor)
        scaled = (torch.from_numpy(scale_cam_image(_to_numpy(grid), size)) for grid in grids)
        return [maps.relu_().to(grid.device) for maps, grid in zip(scaled, grids)]  # a spline goes below zero

    def _chunks(self, input_tensor, targets):
        if self.batch_size is None or len(input_tensor) <= self.batch_size or self.activations_and_grads.is_training:
            return [(input_tensor, targets)]
        starts = range(0, len(input_tensor), self.batch_size)
        rows = [slice(start, start + self.batch_size) for start in starts]
        of_part = lambda part: targets if targets is None or isinstance(targets, OwnRule) else targets[part]
        return [(input_tensor[part], of_part(part)) for part in rows]

    def _grid(self, activations, gradients, shape, guide, eigen_smooth):
        """The non-negative map of one layer on its own grid, (B, *shape), or on its guide's."""
        average = self._grid_options["config"]
        average = average and average.of(len(shape))
        if average is not None and len(shape) > 2:  # a volume is given as a grid, on which distances mean nothing
            average = replace(average, affinity_sigma=math.inf)
        # A caller's autocast is for the model; the maps are computed in float32.
        with pipeline.plain_arithmetic(activations.device):
            computed = _computed(activations)
            of_channels = self.channel_weights(computed, _computed(gradients))
            if eigen_smooth or not pipeline.takes_kernels(activations, self._grid_options["backend"]):
                terms = weights.weighted(computed, of_channels)
                grid = principal_projection(terms) if eigen_smooth else weights.summed(terms, 1)
                if average is not None:
                    features = computed if guide is None else guide
                    grid = torch_backend.balance(grid, features.shape[2:], average)
                    grid = torch_backend.average_alike_cells(grid, features, average)
                grid = grid.relu_()
            else:
                options = {**self._grid_options, "config": average, "guide": guide}
                grid = pipeline.class_grid(activations, of_channels, **options)
        return grid if guide is not None else grid.reshape(len(grid), *shape)

    def _smoothed(self, input_tensor, targets, eigen_smooth):
        targets = _listed(targets, len(input_tensor))
        transforms = list(self.tta_transforms)
        views = [transform.augment_image(input_tensor) for transform in transforms]
        maps = self._of_one_batch(views, targets, eigen_smooth)
        if maps is None:
            maps = [self.maps(view, targets, eigen_smooth=eigen_smooth) for view in views]
        back = [transform.deaugment_mask(view[:, None])[:, 0] for transform, view in zip(transforms, maps)]
        return torch.stack(back).mean(0)

    def _of_one_batch(self, views, targets, eigen_smooth):
        """The maps of each of the views, from a batch of all of them; None where they cannot go together."""
        if len({view.shape for view in views}) > 1 or self.activations_and_grads.is_training:
            return None
        batch, images = len(views[0]), torch.cat(views)
        try:
            grids = self._grids(images, _repeat(targets, batch, len(views)), eigen_smooth, a_row_each=True)
        except _NotARowEach:
            return None
        self.outputs = _last_images(self.outputs, batch, len(images))
        return self._resized(grids, images).split(batch)

    def __exit__(self, *exception):
        self.activations_and_grads.release()

    def __del__(self):
        """Nothing to do: no hook stays on the model."""


class CFCAM(Configured, HeadOnlyCAM, BaseCAM):
    """CF-CAM as a method of pytorch-grad-cam.

    Args:
        model, target_layers, reshape_transform: see `HeadOnlyCAM`.
        guide_layer: as for `cfcam_gpu.CFCAM`; volumes have no guide.
        config, backend, clustering, check_finite: as for `cfcam_gpu.cf_cam`; ``config.normalize`` has no effect,
            because the maps are scaled as that library scales them.

    The score of a class is its margin (``config.margin_temperature``): of an index, of None, and of
    ``ClassifierOutputTarget``, which is this library's way to write an index. Other targets are taken as they are.

    Several targets of each image, a list of lists or a LongTensor (B, K), give (B, K, H, W) in one pass; without
    ``aug_smooth`` and ``eigen_smooth``, and not for volumes.

    >>> cam = CFCAM(model, [model.layer4[-1]])
    >>> cam(images, targets=[ClassifierOutputTarget(285)] * 2, aug_smooth=True).shape  # images (2, 3, 224, 224)
    (2, 224, 224)
    """

    def __init__(
        self,
        model,
        target_layers,
        reshape_transform=None,
        *,
        guide_layer: GuideLayer = "auto",
        config: CFCAMConfig | None = None,
        backend: str = "auto",
        clustering: str = "auto",
        check_finite: bool | None = None,
    ):
        self._configure(config, backend, clustering, check_finite)
        self._capture_options = {
            "guide_layer": guide_layer,
            "guided": self.config.averages_of,
            "margin_temperature": self.config.margin_temperature,
            "frozen_norms": self.config.frozen_norms,
        }
        self._several = {"several": True, "pool": partial(pipeline.pool_gradients, config=self.config, **self._choices)}
        super().__init__(model, target_layers, reshape_transform)

    @property
    def guide_names(self):
        """The names of the target layers' guides, as `cfcam_gpu.CFCAM` has them."""
        return self.activations_and_grads.guide_names

    def _grids(self, input_tensor, targets, *args, **options):
        targets = _indices(_listed(targets, len(input_tensor), several=True), len(input_tensor))
        if isinstance(targets, tuple):
            targets = [_indices(of_image) for of_image in targets]
        grids = super()._grids(input_tensor, targets, *args, **options)
        if not (isinstance(targets, (list, tuple)) and any(map(callable, chain(targets, *_lists(targets))))):
            check_logits(find_logits(self.outputs, len(input_tensor)), self._choices["check_finite"])
        return grids

    def _grid(self, activations, gradients, shape, guide, eigen_smooth):
        if isinstance(gradients, torch.Tensor) and gradients.ndim == 4:
            return super()._grid(activations, gradients, shape, guide, eigen_smooth)
        if eigen_smooth or len(shape) > 2:
            refused = "eigen_smooth takes" if eigen_smooth else "volumes take"
            raise ValueError(f"{refused} one target per image, got several")
        of_channels = self._weights_of(activations, gradients)
        return pipeline.class_grid(activations, of_channels, guide=guide, **self._grid_options)

    def channel_weights(self, activations, gradients):
        """CF-CAM's weights (B, C), 0 for noise. Source: arXiv 2504.00060."""
        return self._weights_of(activations, gradients).to(activations.dtype)

    def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
        """The weights as NumPy (B, C), of NumPy activations and gradients (B, C, h, w)."""
        return _to_numpy(self.channel_weights(torch.as_tensor(activations), torch.as_tensor(grads)))


class GradCAM(HeadOnlyCAM, original.GradCAM):
    """pytorch-grad-cam's GradCAM on a head-only backward."""

    channel_weights = staticmethod(weights.grad_cam)


class HiResCAM(HeadOnlyCAM, original.HiResCAM):
    """pytorch-grad-cam's HiResCAM on a head-only backward."""

    channel_weights = staticmethod(weights.hires_cam)

    def maps(self, input_tensor, targets=None, aug_smooth=False, eigen_smooth=False):
        """As `HeadOnlyCAM.maps`; warns, where the original prints, that eigen_smooth voids HiResCAM's guarantee."""
        if eigen_smooth:
            warnings.warn("HiResCAM's faithfulness guarantees do not hold with eigen_smooth", stacklevel=3)
        return super().maps(input_tensor, targets, aug_smooth, eigen_smooth)


class GradCAMElementWise(HeadOnlyCAM, original.GradCAMElementWise):
    """pytorch-grad-cam's GradCAMElementWise on a head-only backward."""

    channel_weights = staticmethod(weights.grad_cam_elementwise)


class GradCAMPlusPlus(HeadOnlyCAM, original.GradCAMPlusPlus):
    """pytorch-grad-cam's GradCAMPlusPlus on a head-only backward."""

    channel_weights = staticmethod(weights.grad_cam_plus_plus)


class XGradCAM(HeadOnlyCAM, original.XGradCAM):
    """pytorch-grad-cam's XGradCAM on a head-only backward."""

    channel_weights = staticmethod(weights.x_grad_cam)


class LayerCAM(HeadOnlyCAM, original.LayerCAM):
    """pytorch-grad-cam's LayerCAM on a head-only backward."""

    channel_weights = staticmethod(weights.layer_cam)


ACCELERATED = {
    getattr(original, fast.__name__): fast
    for fast in (GradCAM, HiResCAM, GradCAMElementWise, GradCAMPlusPlus, XGradCAM, LayerCAM)
}
"""pytorch-grad-cam's class -> ours, on a head-only backward."""


class _NotARowEach(Exception):
    """What goes through the model together would not come apart again."""


def _listed(targets, batch, several=False):
    """``targets`` as `check_targets` returns them; of callables also any iterable, and more than there are images."""
    listed = targets
    if isinstance(targets, Iterable) and not isinstance(targets, (torch.Tensor, str)):
        listed = tuple(targets if isinstance(targets, Sized) else islice(targets, batch))
        if len(listed) > batch and all(callable(target) for target in listed):
            return listed
        if isinstance(targets, (list, tuple, np.ndarray)) or not all(callable(target) for target in listed):
            listed = targets
    return check_targets(listed, batch, several)


def _rule(targets, batch, a_row_each, top):
    """What the original differentiates, as an `OwnRule`; other targets than its own as they are."""
    if targets is None and top:
        return OwnRule(partial(_top_scores, batch, a_row_each))
    if isinstance(targets, tuple) and all(callable(target) for target in targets):
        return OwnRule(partial(_paired_scores, targets, batch, a_row_each))
    return targets


def _top_scores(batch, a_row_each, outputs):
    logits = outputs
    if isinstance(outputs, torch.Tensor) and outputs.ndim > 1:
        if a_row_each and len(outputs) != batch:
            raise _NotARowEach
        logits = outputs[:, 0] if outputs.ndim == 3 and outputs.shape[1] == 1 else outputs
        batch = len(outputs)
    logits = find_logits(logits, batch)
    return [logits.gather(1, logits.detach().argmax(1, keepdim=True)).sum()]


def _paired_scores(targets, batch, a_row_each, outputs):
    is_sequence = isinstance(outputs, (torch.Tensor, tuple, list))
    if a_row_each and is_sequence and (isinstance(outputs, tuple) or len(outputs) != batch):
        raise _NotARowEach
    parts = outputs if is_sequence else (image_part(outputs, index, batch) for index in range(batch))
    return [target(part) for target, part in zip(targets, parts)]


def _indices(targets, most=None):
    """The classes of targets that all are ``ClassifierOutputTarget``, ``most`` of them; other targets as they are."""
    if isinstance(targets, (list, tuple)) and all(type(target) is ClassifierOutputTarget for target in targets):
        categories = [target.category for target in targets[:most]]
        if all(isinstance(category, Integral) and category >= 0 for category in categories):
            return categories
    return targets


def _lists(targets):
    return [each for each in targets if isinstance(each, (list, tuple))]


def _computed(tensor):
    """In the dtype of the arithmetic; in its own memory layout, on which the order of NumPy's sums depends."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _to_numpy(maps):
    return maps.detach().float().contiguous().cpu().numpy()


def _as_leaf(tensor):
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _repeat(targets, batch, times):
    if targets is None or isinstance(targets, torch.Tensor):
        return targets if targets is None else targets.repeat(times)
    return targets[:batch] * times


def _join(outputs):
    """The outputs of several passes as those of one."""
    if isinstance(outputs[0], list):
        return list(chain.from_iterable(outputs))
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0], *outputs)


def _last_images(outputs, batch, total):
    """The part of the last ``batch`` of ``total`` images."""
    if isinstance(outputs, list) and len(outputs) == total:
        return outputs[-batch:]
    return tree_map_only(torch.Tensor, lambda t: t[-batch:] if t.dim() and len(t) == total else t, outputs)


@contextmanager
def _evaluated(model):
    """The model in eval mode; every module's flag as before afterwards."""
    flags = [(module, module.training) for module in model.modules()] if isinstance(model, torch.nn.Module) else []
    try:
        if any(training for _, training in flags):
            model.eval()
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


@contextmanager
def _off_the_model(handles):
    """The hooks of ``handles`` off their modules, and back in their places afterwards."""
    before = {}
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            before.setdefault(id(hooks), (hooks, dict(hooks)))
            del hooks[handle.id]
    try:
        yield
    finally:
        if handles:  # emptied if their owner was let go of meanwhile
            for hooks, items in before.values():
                hooks.clear()
                hooks.update(items)
