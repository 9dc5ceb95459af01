"""`CFCAM`: from a model and an input to maps, with pytorch-grad-cam's constructor and call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from cfcam_gpu import checks, pipeline, torch_backend
from cfcam_gpu.capture import GuideLayer
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.explainer import Explainer

if TYPE_CHECKING:
    from cfcam_gpu.compiled import Choice
    from cfcam_gpu.cuda_graph import CapturedCFCAM


class CFCAM(Explainer):
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
        config, backend, clustering, check_finite: as for `cf_cam`. `maps` are scaled as ``config.normalize`` says.
        compile: True runs the network as compiled programs, with its weights as they are in the first call
            (`cfcam_gpu.compiled`). That call compiles, which takes from seconds to minutes; later ones take less time
            than the network alone. Labels are the same but where a pair of channels is within rounding of eps, maps
            within 1e-4. The model is not touched, and one that has changed since is refused. Default False.

    Attributes:
        outputs: the model's raw outputs of the latest call, detached, in containers of the same types; None before the
            first.
        classes: the class indices that the latest call explained, int64 (B,) or (B, K) on the outputs' device; None
            before the first call, and where the targets are callables. Of a single logit (B, 1) always 0.
        target_names: the target layers' names; None before the first call of an object that is to find its layer.
        guide_names: the names of their guides, a target layer's own where it guides itself; None before the first call
            of an object that is to find them.
        compiled: with ``compile``, a `cfcam_gpu.compiled.Choice` for each kind of inputs that was compiled so far:
            whether its programs run or, being no slower, the network itself, and what the warm-up took and measured.

    Calls in several threads, of one object or of several for one model, do not disturb each other, nor plain inference
    on the model beside them; `explain` hands back all that belongs to a call.

    The score is the margin of the class over the classes that it is confused with (`CFCAMConfig.margin_temperature`)
    for class indices and for None, on outputs of two classes or more. A callable target is taken as it is. The classes
    of a multi-label model do not compete: ``CFCAMConfig(margin_temperature=0)`` explains the plain logit. Of a single
    logit (B, 1), index 0 is the positive class; None explains the side that was chosen, the logit where it is 0 or more
    and minus the logit where it is below, so that the sign of `outputs` says which.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a layer is not in the model. With ``compile``, in a
            call: the model is in training mode, has hooks, or is not as it was when it was compiled.

    Warns:
        UserWarning: once per object, that the model is in training mode, where it has batch norm or dropout; once, that
            a target layer has one cell alone, so that its map is flat; with ``compile`` once for each reason, that the
            network runs uncompiled; and once, that a map is zero everywhere, of which image and why. Of maps on a GPU
            the last is said in a later call, or when `outputs` is read, because the call does not wait for them.

    >>> with CFCAM(model, target_layers=[model.layer4[-1]]) as cam:
    ...     maps = cam.maps(images, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> maps.shape
    torch.Size([2, 224, 224])
    """

    name = "CF-CAM"

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
        compile: bool = False,
    ) -> None:
        self.config = checks.check_config(config)
        choices = pipeline.check_choices(backend, clustering, check_finite)
        super().__init__(
            model,
            target_layers,
            reshape_transform,
            choices,
            compile,
            guide_layer=guide_layer,
            guided=self.config.averages_of,
            margin_temperature=self.config.margin_temperature,
            frozen_norms=self.config.frozen_norms,
        )
        self._pool = partial(pipeline.pool_gradients, config=self.config, **choices)

    @property
    def guide_names(self) -> list[str] | None:
        return None if self._found is None else self._found.guide_names

    @property
    def compiled(self) -> "list[Choice]":
        captures = self._found_at.values() or (self._found,)
        return [choice for capture in captures for choice in getattr(capture, "choices", ())]

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
            pipeline, and returns the maps. The weights are read in place at every replay, but with ``compile`` those
            of the first call; the mode is the capture's.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: it is not on such a device.

        >>> replay = cam.capture(images)
        >>> maps = replay(other_images)
        """
        from cfcam_gpu import cuda_graph

        return cuda_graph.capture(self, example_input, targets, top)

    def check_unchanged(self) -> None:
        """Raises ValueError where, with ``compile``, the model is not as it was when it was compiled."""
        for capture in self._found_at.values() or (self._found,):
            if capture is not None:
                capture.check_unchanged()

    def _result(self, seen):
        captured = _layers(seen.capture)
        built = seen.capture.built
        cf_cam = pipeline.cf_cam if built is None else built.pipelines.cf_cam
        found = [
            cf_cam(activations, gradients, seen.size, self.config, guide=guide, **self._choices)
            for activations, gradients, guide in captured
        ]
        maps, labels, weights = found[0].maps, found[0].labels, found[0].weights
        if len(found) > 1:
            mean = torch.stack([of_layer.maps for of_layer in found]).mean(0)
            maps = torch_backend.normalize(mean.reshape(-1, *seen.size), self.config).view_as(mean)
            labels, weights = (tuple(getattr(each, name) for each in found) for name in ("labels", "weights"))
        return maps, labels, weights, captured

    def _grids(self, seen):
        grids, captured, backend = [], _layers(seen.capture), self._choices["backend"]
        for activations, gradients, guide in captured:
            weights = pipeline.channel_weights(activations, gradients, self.config, **self._choices)
            grids.append(pipeline.class_grid(activations, weights, config=self.config, guide=guide, backend=backend))
        return grids, captured


def _layers(capture):
    return list(zip(capture.activations, capture.gradients, capture.guides))
