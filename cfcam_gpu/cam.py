"""`CFCAM`: from a model and an input to maps, with pytorch-grad-cam's constructor and call."""

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cfcam_gpu import checks, pipeline, torch_backend
from cfcam_gpu.capture import GuideLayer, HeadCapture
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.targets import Targets

if TYPE_CHECKING:
    from cfcam_gpu.cuda_graph import CapturedCFCAM


class CFCAM:
    """CF-CAM of a model's layers: one forward pass, a backward through the head only, and the pipeline.

    Args:
        model: a ``torch.nn.Module``. It runs in the mode it is in: call ``model.eval()`` first. Nothing about it is
            changed: no hook stays, no ``.grad`` is filled.
        target_layers: list of the model's modules to explain; each gives (B, C, h, w). Of a layer that runs more
            than once in a forward pass, the last run counts.
        reshape_transform: turns a layer's output into (B, C, h, w), for transformers.
        guide_layer: the earlier layer on whose finer grid the map is averaged over alike cells: "auto" (default), the
            last with a map of at least twice the target layer's sides (`cfcam_gpu.guides`), found in the first call;
            a module; or None, the target layer itself. Several target layers: each its own, or a list with one of
            these for each. It runs in the same forward pass, and no gradient is taken of it.
        config, backend, clustering, check_finite: as for `cf_cam`.

    Attributes:
        outputs: the model's raw outputs of the latest call, detached; None before the first.
        classes: the class indices that the latest call explained, int64 (B,) or (B, K) on the outputs' device; None
            before the first call, and where the targets are callables.
        target_names: the target layers' names.
        guide_names: the names of their guides, a target layer's own where it guides itself; None before the first call
            of an object that is to find them.

    The score is the margin of the class over the classes that it is confused with (`CFCAMConfig.margin_temperature`)
    for class indices and for None, on outputs of two classes or more. A callable target is taken as it is, and of a
    model with one output the logit.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a layer is not in the model.

    >>> with CFCAM(model, target_layers=[model.layer4[-1]]) as cam:
    ...     maps = cam.maps(images, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> maps.shape
    torch.Size([2, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
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
        self.outputs: Any = None
        self.classes: torch.Tensor | None = None
        self._capture = HeadCapture(
            model,
            target_layers,
            reshape_transform,
            guide_layer=guide_layer,
            guided=self.config.averages,
            margin_temperature=self.config.margin_temperature,
        )

    @property
    def target_names(self) -> list[str]:
        return self._capture.target_names

    @property
    def guide_names(self) -> list[str] | None:
        return self._capture.guide_names

    def maps(self, input_tensor: torch.Tensor, targets: Targets = None, top: int | None = None) -> torch.Tensor:
        """The maps of a batch, on the model's device, without a host copy.

        Args:
            input_tensor: (B, ..., H, W), floating point.
            targets: None (the top class of each image), a list of class indices, a LongTensor (B,), or one callable
                per image that gets the image's output and returns a scalar. K of them for each image, all explained in
                one pass: a LongTensor (B, K), or a list of B lists of K indices or K callables.
            top: instead of targets, the K classes of highest score of each image, best first; `classes` has them.

        Returns:
            (B, H, W) float32 in [0, 1] (float64 for a float64 model), scaled as ``config.normalize`` says; of K targets
            an image (B, K, H, W). Several layers: the mean of their maps, scaled again.

        Raises:
            ValueError: a wrong number of targets, a class out of range, more classes than there are, a callable among
                several whose score has no gradient, a layer that did not run or has no grid, NaN.
            TypeError: the input or a target is of the wrong kind.

        >>> cam.maps(images, top=5).shape, cam.classes.shape  # images (2, 3, 224, 224)
        (torch.Size([2, 5, 224, 224]), torch.Size([2, 5]))
        """
        size = input_tensor.shape[-2:]
        layers = [
            pipeline.cf_cam(activations, gradients, size, self.config, guide=guide, **self._choices).maps
            for activations, gradients, guide in self._run(input_tensor, targets, top)
        ]
        if len(layers) == 1:
            return layers[0]
        mean = torch.stack(layers).mean(0)
        return torch_backend.normalize(mean.flatten(0, -3), self.config).view_as(mean)

    def __call__(self, input_tensor: torch.Tensor, targets: Targets = None, top: int | None = None) -> np.ndarray:
        """The maps as pytorch-grad-cam returns them: C-contiguous NumPy float32 (B, H, W), or (B, K, H, W).

        Args, Raises: as for `maps`. Each layer's map is scaled to (x - min) / (1e-7 + max) on its grid, resized and
        averaged, and the average scaled again, so that the numbers can be compared with that library's.

        Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM.forward`` and ``scale_cam_image``.
        """
        grids, backend = [], self._choices["backend"]
        for activations, gradients, guide in self._run(input_tensor, targets, top):
            weights = pipeline.channel_weights(activations, gradients, self.config, **self._choices)
            grids.append(pipeline.class_grid(activations, weights, config=self.config, guide=guide, backend=backend))
        maps = pipeline.grad_cam_maps(grids, input_tensor.shape[-2:], backend=backend)
        return maps.float().cpu().numpy()

    def capture(
        self, example_input: torch.Tensor, targets: torch.Tensor | None = None, top: int | None = None
    ) -> "CapturedCFCAM":
        """One CUDA graph of `maps` for a fixed shape, for inference where every launch counts.

        Args:
            example_input: (B, ..., H, W) on a CUDA or ROCm device.
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

    def _run(self, input_tensor, targets, top):
        pool = partial(pipeline.pool_gradients, config=self.config, **self._choices)
        capture = self._capture(input_tensor, targets, several=True, top=top, pool=pool)
        self.outputs, self.classes = capture.outputs, capture.classes
        return list(zip(capture.activations, capture.gradients, capture.guides))

    def release(self) -> None:
        """Let go of the model; a second call does nothing."""
        self._capture.release()

    def __enter__(self) -> "CFCAM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
