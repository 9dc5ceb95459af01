"""What `CFCAM` and the other methods share: the layers, the pass through the model, and what a call hands back."""

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from cfcam_gpu import layers, pipeline, uncompiled
from cfcam_gpu.capture import Capture, HeadCapture
from cfcam_gpu.dry_run import image_size
from cfcam_gpu.inputs import Inputs, ModelInput, check_inputs
from cfcam_gpu.notices import Notices
from cfcam_gpu.outputs import find_logits
from cfcam_gpu.targets import Targets, check_logits

if TYPE_CHECKING:
    from cfcam_gpu.datasets.streaming import StreamedExplanation

Self = TypeVar("Self", bound="Explainer")


@dataclass(frozen=True, eq=False)
class Explanation:
    """All that one call of `explain` found, on the model's device.

    Attributes:
        maps: as `CFCAM.maps` returns them: (B, H, W), or (B, K, H, W) of K targets an image.
        outputs: the model's raw outputs, detached.
        targets: the class indices that are explained, int64 (B,) or (B, K); of callable targets the callables as they
            were given.
        labels: the channels' clusters, int32 (B, C), `DOMINANT` and `NOISE` among them, as `cf_cam` returns them; a
            tuple of one such tensor per target layer where there are several. None of the methods of
            `cfcam_gpu.methods`, which do not cluster.
        weights: the channels' weights, float32 (B, C) or (B, K, C), likewise. None of the methods that have one for
            each cell, or none.
    """

    maps: torch.Tensor
    outputs: Any
    targets: Any
    labels: torch.Tensor | tuple[torch.Tensor, ...] | None
    weights: torch.Tensor | tuple[torch.Tensor, ...] | None


LOG = logging.getLogger("cfcam_gpu")

FINDING = threading.Lock()
"""Of all objects: threads that share one are to find its layer once."""


class _Latest(threading.local):
    """What the latest call of each thread found."""

    outputs: Any = None
    classes: torch.Tensor | None = None

    def __reduce__(self):
        return type(self), ()  # a copy of the object has made no call


class Seen(NamedTuple):
    """What there is to make maps of: the inputs, the targets as they were given, and the pass."""

    inputs: Inputs
    targets: Any
    capture: Capture

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W) of the maps: as many of the images' axes as the target layers' grids have."""
        grids = [tuple(activations.shape[2:]) for activations in self.capture.activations]
        n_axes = {len(grid) for grid in grids}
        if len(n_axes) > 1:
            shapes = ", ".join(map(str, grids))
            raise ValueError(f"target_layers must have grids of equally many axes, got {shapes}")
        return image_size(self.inputs.images, grids)


class Explainer:
    """A method that makes maps of a model's layers: the base of `CFCAM` and of the classes of `cfcam_gpu.methods`.

    The attributes, and what is said of threads, are those of `CFCAM`. A subclass defines ``_grids`` and ``_result``.

    Args:
        model, target_layers, reshape_transform: as for `CFCAM`.
        choices: as `pipeline.check_choices` returns them.
        compile: as for `CFCAM`.
        options: of `HeadCapture`.
    """

    name: ClassVar[str]
    """The method's, as its authors write it."""

    of_scores: ClassVar[bool] = False
    """Whether weights come from the values of scores, of changed inputs or activations, rather than from gradients."""

    _pool: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
    """What to keep of the gradients of several targets, as for `HeadCapture`."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None,
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None,
        choices: dict[str, Any],
        compile: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be a bool, got {type(compile).__name__}")
        self._choices = choices
        self._compile = compile
        self._latest = _Latest()
        self._notices = Notices()
        self._options = options
        self._found: HeadCapture | None = None
        self._found_at: dict[tuple[int, ...], HeadCapture] = {}  # where tokens lie depends on the size of the images
        if target_layers is not None:
            self._found = self._capture_of(model, target_layers, reshape_transform)
        elif reshape_transform is not None:
            raise ValueError("reshape_transform is for target_layers that are given: pass those too, or neither")
        # Without the wrappers of torch.compile and DataParallel; and the arguments are checked before the first call.
        self.model = (self._found or self._capture_of(model, [model])).model

    def _capture_of(self, model, target_layers, reshape_transform=None):
        kind = HeadCapture
        if self._compile:
            from cfcam_gpu.compiled import CompiledCapture as kind  # whose imports take time
        return kind(model, target_layers, reshape_transform, chosen_side=True, **self._options)

    def _capture(self, inputs: Inputs) -> HeadCapture:
        """What captures the target layers; they are found for these inputs where they were not given."""
        size = tuple(inputs.images.shape[1:])
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
        """Explain this layer, which was found for images (B, C, H, W) of that size, (C, H, W)."""
        found = self._capture_of(self.model, [target.module], target.reshape_transform)
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

    def maps(
        self, input_tensor: ModelInput | None = None, targets: Targets = None, top: int | None = None, **inputs: Any
    ) -> torch.Tensor:
        """The maps of a batch, on the model's device, without a host copy.

        Args:
            input_tensor: the images (B, ..., H, W), of any dtype that the model takes, or (B, H, W, C) with at most 4
                channels; volumes and videos (B, C, D, H, W), series (B, C, T). Of a model with several inputs a tuple
                of them, a dict by their names, or one of them with the rest as keywords. The images, which give B and
                (H, W), are then this argument where it is a tensor of three dimensions or more, else the first input
                (B, C, H, W); without such the first of most dimensions. For a model that takes one dict write
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
            (B, H, W) float32 in [0, 1] (float64 for a float64 model), of K targets an image (B, K, H, W). Several
            layers: the mean of their maps, scaled again. Of a layer with a grid of three axes (B, D, H, W), of a series
            (B, T), of the input's size.

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

    def stream(
        self, loader: Iterable[Any], top: int | None = None, *, use_targets: bool = True, prefetch: int = 2
    ) -> Iterator["StreamedExplanation"]:
        """`explain` for every batch of a loader; the next ones are loaded and pinned while one is explained.

        Args:
            loader: a ``torch.utils.data.DataLoader`` or any iterable of batches, each of them

                - a tensor of images (B, C, H, W), or a list of images (C, H, W);
                - ``(images, targets)``, or ``(images,)``; what comes after is not used;
                - a dict, such as a batch of rows of Hugging Face's datasets: of the columns those that the model's
                  forward names, or else the one with images, or of several "pixel_values"; and the targets in
                  "labels", "label", "targets" or "target".

                It is iterated in a thread of its own, and its tensors are moved to the model's device.
            top: the K classes of highest score of each image, instead of the batch's targets.
            use_targets: whether the targets in a batch are what is explained; default True. False: the top class.
            prefetch: batches that are loaded ahead; default 2.

        Yields:
            `cfcam_gpu.datasets.streaming.StreamedExplanation`: an `Explanation` whose ``batch`` is what the loader
            gave.

        Raises:
            TypeError: a batch is of another kind.
            As `maps`, and whatever the loader raises.

        >>> for found in cam.stream(DataLoader(photographs, batch_size=16)):
        ...     save(found.batch, found.maps)
        """
        from cfcam_gpu.datasets import streaming

        return streaming.stream(self, loader, top, use_targets, prefetch)

    def _explain(self, input_tensor, targets, top, inputs):
        if torch.compiler.is_compiling():
            return uncompiled.run(self._explain, input_tensor, targets, top, inputs)
        checked = check_inputs(input_tensor, inputs, self.model)
        seen = self._run(checked, targets, top, stacklevel=5)
        maps, labels, weights, captured = self._result(seen)
        self._check_logits(seen)
        if not self._notices.of_one_cell(captured, stacklevel=4):
            self._notices.of_zero_maps(maps, captured, 4, len(seen.size))
        explained = targets if seen.capture.classes is None else seen.capture.classes
        return Explanation(maps, seen.capture.outputs, explained, labels, weights)

    def __call__(
        self, input_tensor: ModelInput | None = None, targets: Targets = None, top: int | None = None, **inputs: Any
    ) -> np.ndarray:
        """The maps as pytorch-grad-cam returns them: C-contiguous NumPy float32 (B, H, W), or (B, K, H, W).

        Args, Raises: as for `maps`. Each layer's map is scaled to (x - min) / (1e-7 + max) on its grid, resized and
        averaged, and the average scaled again, so that the numbers can be compared with that library's.

        Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM.forward`` and ``scale_cam_image``.
        """
        if torch.compiler.is_compiling():
            return uncompiled.run(self, input_tensor, targets, top, **inputs)
        checked = check_inputs(input_tensor, inputs, self.model)
        seen = self._run(checked, targets, top, stacklevel=4)
        grids, captured = self._grids(seen)
        self._check_logits(seen)
        maps = pipeline.grad_cam_maps(grids, seen.size, backend=self._choices["backend"]).float().cpu()
        self._notices.of_zero_maps(maps, captured, 3, len(seen.size))
        return maps.numpy()

    def _result(self, seen: Seen) -> tuple[torch.Tensor, Any, Any, list]:
        """Maps, labels and weights, and per layer what `Notices` takes."""
        raise NotImplementedError

    def _grids(self, seen: Seen) -> tuple[list[torch.Tensor], list]:
        """Each layer's non-negative grids (B, h, w) or (B, K, h, w), and per layer what `Notices` takes."""
        raise NotImplementedError

    def _run(self, inputs: Inputs, targets, top, stacklevel):
        self._notices.poll(stacklevel)
        self._notices.of_training(self.model, stacklevel)
        capture = self._capture(inputs)(inputs, targets, several=True, top=top, pool=self._pool)
        self._latest.outputs, self._latest.classes = capture.outputs, capture.classes
        return Seen(inputs, targets, capture)

    def _check_logits(self, seen):
        """Last: what is wrong with a layer's values says more."""
        if seen.capture.classes is not None:
            logits = find_logits(seen.capture.outputs, seen.inputs.images.shape[0])
            check_logits(logits, self._choices["check_finite"])

    def release(self) -> None:
        """Nothing: no call leaves anything on the model. For callers of the libraries that do."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
