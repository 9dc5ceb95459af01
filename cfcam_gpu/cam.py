"""`CFCAM`: from a model and an input to maps, with pytorch-grad-cam's constructor and call."""

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cfcam_gpu import checks, layers, pipeline, torch_backend
from cfcam_gpu.capture import GuideLayer, HeadCapture
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.inputs import Inputs, ModelInput, check_inputs
from cfcam_gpu.notices import Notices
from cfcam_gpu.targets import Targets

if TYPE_CHECKING:
    from cfcam_gpu.cuda_graph import CapturedCFCAM


@dataclass(frozen=True, eq=False)
class Explanation:
    """All that one call of `CFCAM.explain` found, on the model's device.

    Attributes:
        maps: as `CFCAM.maps` returns them: (B, H, W), or (B, K, H, W) of K targets an image.
        outputs: the model's raw outputs, detached.
        targets: the class indices that are explained, int64 (B,) or (B, K); of callable targets the callables as they
            were given.
        labels: the channels' clusters, int32 (B, C), `DOMINANT` and `NOISE` among them, as `cf_cam` returns them; a
            tuple of one such tensor per target layer where there are several.
        weights: the channels' weights, float32 (B, C) or (B, K, C), likewise.
    """

    maps: torch.Tensor
    outputs: Any
    targets: Any
    labels: torch.Tensor | tuple[torch.Tensor, ...]
    weights: torch.Tensor | tuple[torch.Tensor, ...]


LOG = logging.getLogger("cfcam_gpu")

FINDING = threading.Lock()
"""Of all objects: threads that share one are to find its layer once."""


def _output_size(images, captured):
    """The size of the maps: of the images' last axes, as many as the target layers' grids have."""
    n_axes = {activations.ndim - 2 for activations, *_ in captured}
    if len(n_axes) > 1:
        grids = ", ".join(str(tuple(activations.shape[2:])) for activations, *_ in captured)
        raise ValueError(f"target_layers must have grids of equally many axes, got {grids}")
    return tuple(images.shape[-n_axes.pop() :])


class _Latest(threading.local):
    """What the latest call of each thread found."""

    outputs: Any = None
    classes: torch.Tensor | None = None

    def __reduce__(self):
        return type(self), ()  # a copy of the object has made no call


class CFCAM:
    """CF-CAM of a model's layers: one forward pass, a backward through the head only, and the pipeline.

    Args:
        model: a ``torch.nn.Module``. It runs in the mode it is in: call ``model.eval()`` first. Nothing about it is
            changed: no hook stays, no ``.grad`` is filled. Its output is logits (B, n_classes), or holds them, see
            ``targets`` of `maps`.
        target_layers: list of the model's modules to explain; each gives (B, C, h, w). Of a layer that runs more
            than once in a forward pass, the last run counts. None (default): the last layer that keeps a map of the
            image, found in the first call with its reshape (`cfcam_gpu.layers.inspect_target_layer`); the logger
            ``cfcam_gpu`` says which, and a warning where that is a guess. Where tokens lie is found again for images of
            another size.
        reshape_transform: turns a layer's output into (B, C, h, w), for transformers.
        guide_layer: the earlier layer on whose finer grid the map is averaged over alike cells: "auto" (default), the
            last with a map of at least twice the target layer's sides (`cfcam_gpu.guides`), found in the first call;
            a module; or None, the target layer itself. Several target layers: each its own, or a list with one of
            these for each. It runs in the same forward pass, and no gradient is taken of it.
        config, backend, clustering, check_finite: as for `cf_cam`.

    Attributes:
        outputs: the model's raw outputs of the latest call, detached, in containers of the same types; None before the
            first.
        classes: the class indices that the latest call explained, int64 (B,) or (B, K) on the outputs' device; None
            before the first call, and where the targets are callables. Of a single logit (B, 1) always 0.
        target_names: the target layers' names; None before the first call of an object that is to find its layer.
        guide_names: the names of their guides, a target layer's own where it guides itself; None before the first call
            of an object that is to find them.

    Calls in several threads, of one object or of several for one model, do not disturb each other, nor plain inference
    on the model beside them; `explain` hands back all that belongs to a call.

    The score is the margin of the class over the classes that it is confused with (`CFCAMConfig.margin_temperature`)
    for class indices and for None, on outputs of two classes or more. A callable target is taken as it is. The classes
    of a multi-label model do not compete: ``CFCAMConfig(margin_temperature=0)`` explains the plain logit. Of a single
    logit (B, 1), index 0 is the positive class; None explains the side that was chosen, the logit where it is 0 or more
    and minus the logit where it is below, so that the sign of `outputs` says which.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a layer is not in the model.

    Warns:
        UserWarning: once per object, that the model is in training mode, where it has batch norm or dropout; once, that
            a target layer has one cell alone, so that its map is flat; and once, that a map is zero everywhere, of
            which image and why. Of maps on a GPU the last is said in a later call, or when `outputs` is read, because
            the call does not wait for them.

    >>> with CFCAM(model, target_layers=[model.layer4[-1]]) as cam:
    ...     maps = cam.maps(images, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> maps.shape
    torch.Size([2, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        guide_layer: GuideLayer = "auto",
        config: CFCAMConfig | None = None,
        backend: str = "auto",
        clustering: str = "auto",
        check_finite: bool | None = None,
    ) -> None:
        self.config = checks.check_config(config)
        self._choices = pipeline.check_choices(backend, clustering, check_finite)
        self._latest = _Latest()
        self._notices = Notices()
        self._capture_of = partial(
            HeadCapture,
            model,
            guide_layer=guide_layer,
            guided=self.config.averages,
            margin_temperature=self.config.margin_temperature,
            chosen_side=True,
        )
        self._found: HeadCapture | None = None
        self._found_at: dict[tuple[int, ...], HeadCapture] = {}  # where tokens lie depends on the size of the images
        if target_layers is not None:
            self._found = self._capture_of(target_layers, reshape_transform)
        elif reshape_transform is not None:
            raise ValueError("reshape_transform is for target_layers that are given: pass those too, or neither")
        # Without the wrappers of torch.compile and DataParallel; and the arguments are checked before the first call.
        self.model = (self._found or self._capture_of([model])).model

    def _capture(self, inputs: Inputs) -> HeadCapture:
        """What captures the target layers; they are found for these inputs where they were not given."""
        size = tuple(inputs.images.shape[-2:])
        found = self._known(size)
        if found is None:
            with FINDING:
                found = self._known(size) or self._find(inputs, size)
        return found

    def _known(self, size):
        return self._found_at.get(size) if self._found_at else self._found

    def _find(self, inputs, size):
        """The layer, or of one that was found for another size of images where its tokens lie in these."""
        name = None if self._found is None else self._found.target_names[0]
        target, _ = layers.choose_target_layer(self.model, inputs.first(), name)
        if name is None:
            LOG.info("target layer of %s: %s", type(self.model).__name__, target.name)
        if target.notice:
            warnings.warn(target.notice, UserWarning, stacklevel=6)
        return self._take(target, size)

    def _take(self, target: layers.TargetLayer, size: tuple[int, ...]) -> HeadCapture:
        """Explain this layer, which was found for images (..., H, W) of that size."""
        found = self._capture_of([target.module], target.reshape_transform)
        if isinstance(target.reshape_transform, layers.TokensToMap):
            self._found_at = {**self._found_at, size: found}
        self._found = self._found or found
        return found

    @property
    def outputs(self) -> Any:
        self._notices.poll(stacklevel=3)
        return self._latest.outputs

    @property
    def classes(self) -> torch.Tensor | None:
        return self._latest.classes

    @property
    def target_names(self) -> list[str] | None:
        return None if self._found is None else self._found.target_names

    @property
    def guide_names(self) -> list[str] | None:
        return None if self._found is None else self._found.guide_names

    def maps(
        self, input_tensor: ModelInput | None = None, targets: Targets = None, top: int | None = None, **inputs: Any
    ) -> torch.Tensor:
        """The maps of a batch, on the model's device, without a host copy.

        Args:
            input_tensor: the images (B, ..., H, W), of any dtype that the model takes; volumes and videos
                (B, C, D, H, W), series (B, C, T). Of a model with several inputs a
                tuple of them, a dict by their names, or one of them with the rest as keywords. The images, which give B
                and (H, W), are then this argument where it is a tensor of three dimensions or more, else the first
                input (B, C, H, W); without such the first of most dimensions. For a model that takes one dict write
                ``(inputs,)``.
            targets: None (the top class of each image), a list of class indices, a LongTensor (B,), or one callable
                per image that gets the image's output and returns a scalar. K of them for each image, all explained in
                one pass: a LongTensor (B, K), or a list of B lists of K indices or K callables. Indices and None need
                logits (B, n_classes): the output itself, what it calls ``logits``, or the only such tensor that it
                holds. A callable gets the output with every tensor of B rows, however it is held, indexed at its image.
            top: instead of targets, the K classes of highest score of each image, best first; `classes` has them.
            inputs: further arguments of the model by their names; what it calls ``targets`` or ``top`` goes into a dict
                as the first argument.

        Returns:
            (B, H, W) float32 in [0, 1] (float64 for a float64 model), scaled as ``config.normalize`` says; of K targets
            an image (B, K, H, W). Several layers: the mean of their maps, scaled again. Of a layer with a grid of three
            axes (B, D, H, W), of a series (B, T), of the input's size.

        Raises:
            ValueError: a wrong number of targets, a class out of range, more classes than there are, an output without
                logits or with several tensors that could be them, a callable among several whose score has no gradient,
                a layer that did not run or has no grid, no batch of images among the inputs, NaN.
            TypeError: the input or a target is of the wrong kind, or the model has no input of that name.

        >>> cam.maps(pixel_values=images, input_ids=texts).shape  # images (2, 3, 224, 224), texts (2, 77)
        torch.Size([2, 224, 224])
        >>> cam.maps(images, top=5).shape, cam.classes.shape  # images (2, 3, 224, 224)
        (torch.Size([2, 5, 224, 224]), torch.Size([2, 5]))
        """
        return self._explain(input_tensor, targets, top, inputs).maps

    def explain(
        self, input_tensor: ModelInput | None = None, targets: Targets = None, top: int | None = None, **inputs: Any
    ) -> Explanation:
        """The maps with all that belongs to them, in one object, of which no other call knows.

        Args, Raises: as for `maps`.

        >>> explained = cam.explain(images, top=5)  # images (2, 3, 224, 224), layer4[-1] of a ResNet-50
        >>> explained.maps.shape, explained.targets.shape, explained.labels.shape, explained.weights.shape
        (torch.Size([2, 5, 224, 224]), torch.Size([2, 5]), torch.Size([2, 2048]), torch.Size([2, 5, 2048]))
        """
        return self._explain(input_tensor, targets, top, inputs)

    def _explain(self, input_tensor, targets, top, inputs):
        checked = check_inputs(input_tensor, inputs, self.model)
        capture, captured = self._run(checked, targets, top, stacklevel=5)
        size = _output_size(checked.images, captured)
        found = [
            pipeline.cf_cam(activations, gradients, size, self.config, guide=guide, **self._choices)
            for activations, gradients, guide in captured
        ]
        maps, labels, weights = found[0].maps, found[0].labels, found[0].weights
        if len(found) > 1:
            mean = torch.stack([of_layer.maps for of_layer in found]).mean(0)
            maps = torch_backend.normalize(mean.reshape(-1, *size), self.config).view_as(mean)
            labels, weights = (tuple(getattr(each, name) for each in found) for name in ("labels", "weights"))
        if not self._notices.of_one_cell(captured, stacklevel=4):
            self._notices.of_zero_maps(maps, captured, 4, len(size))
        explained = targets if capture.classes is None else capture.classes
        return Explanation(maps, capture.outputs, explained, labels, weights)

    def __call__(
        self, input_tensor: ModelInput | None = None, targets: Targets = None, top: int | None = None, **inputs: Any
    ) -> np.ndarray:
        """The maps as pytorch-grad-cam returns them: C-contiguous NumPy float32 (B, H, W), or (B, K, H, W).

        Args, Raises: as for `maps`. Each layer's map is scaled to (x - min) / (1e-7 + max) on its grid, resized and
        averaged, and the average scaled again, so that the numbers can be compared with that library's.

        Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM.forward`` and ``scale_cam_image``.
        """
        checked = check_inputs(input_tensor, inputs, self.model)
        grids, backend = [], self._choices["backend"]
        _, captured = self._run(checked, targets, top, stacklevel=4)
        for activations, gradients, guide in captured:
            weights = pipeline.channel_weights(activations, gradients, self.config, **self._choices)
            grids.append(pipeline.class_grid(activations, weights, config=self.config, guide=guide, backend=backend))
        size = _output_size(checked.images, captured)
        maps = pipeline.grad_cam_maps(grids, size, backend=backend).float().cpu()
        self._notices.of_zero_maps(maps, captured, 3, len(size))
        return maps.numpy()

    def capture(
        self, example_input: torch.Tensor, targets: torch.Tensor | None = None, top: int | None = None
    ) -> "CapturedCFCAM":
        """One CUDA graph of `maps` for a fixed shape, for inference where every launch counts.

        Args:
            example_input: (B, ..., H, W) on a CUDA or ROCm device; one tensor, the model's only input.
            targets: LongTensor (B,) or (B, K) on that device, to give the targets at every replay; or None, for the top
                class.
            top: instead of targets, the number of classes of highest score to explain.

        Returns:
            `CapturedCFCAM`: called with a batch of that shape (and targets) it replays forward, head backward and
            pipeline, and returns the maps. The weights are read in place at every replay; the mode is the capture's.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: it is not on such a device.

        >>> replay = cam.capture(images)
        >>> maps = replay(other_images)
        """
        from cfcam_gpu import cuda_graph

        return cuda_graph.capture(self, example_input, targets, top)

    def _run(self, inputs: Inputs, targets, top, stacklevel):
        self._notices.poll(stacklevel)
        self._notices.of_training(self.model, stacklevel)
        pool = partial(pipeline.pool_gradients, config=self.config, **self._choices)
        capture = self._capture(inputs)(inputs, targets, several=True, top=top, pool=pool)
        self._latest.outputs, self._latest.classes = capture.outputs, capture.classes
        return capture, list(zip(capture.activations, capture.gradients, capture.guides))

    def release(self) -> None:
        """Nothing: no call leaves anything on the model. For callers of the libraries that do."""

    def __enter__(self) -> "CFCAM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
