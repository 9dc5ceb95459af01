"""Other CAM methods, called as `CFCAM` is, without another library.

Each class has the constructor, the call and the promises of `CFCAM`: `maps`, `explain`, ``cam(images)``, ``outputs``,
``classes`` and ``target_names``; the layer found by itself; several targets, layers and inputs; calls in several
threads; and nothing left on the model. What differs:

- The score is the plain one: of a class its logit, not the margin.
- `maps` and the call both give pytorch-grad-cam's numbers: of each layer the positive part, scaled to
  (x - min) / (1e-7 + max), resized bilinearly, averaged over the layers and scaled again.
- `Explanation.labels` is None, since nothing is clustered; ``weights`` is None where a method has a weight for each
  cell, or none.
- The backend "reference" is torch here.

>>> cam = METHODS["layercam"](model)
>>> cam.maps(images, top=3).shape  # images (2, 3, 224, 224)
torch.Size([2, 3, 224, 224])
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cfcam_gpu import pipeline, projection, weights
from cfcam_gpu.calls import eager_without_grad_in
from cfcam_gpu.cam import CFCAM
from cfcam_gpu.checks import check_values
from cfcam_gpu.explainer import Explainer, Seen
from cfcam_gpu.head import REPEATED, record_head
from cfcam_gpu.outputs import find_logits
from cfcam_gpu.perturbed import BLOCK, ablated_values, block_size, scores_masked, scores_without
from cfcam_gpu.targets import check_targets, scores_of_rows

__all__ = [
    "METHODS",
    "AblationCAM",
    "EigenCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "ScoreCAM",
    "XGradCAM",
]


class _OfLayer(NamedTuple):
    """What a method makes of one layer; of K targets an image each has K rows behind B."""

    sums: torch.Tensor
    """(B, h, w), of which the map is the positive part."""
    weights: torch.Tensor | None
    """(B, C)."""
    used: torch.Tensor
    """(B,) bool: the score depends on the layer, as far as is known."""


class _Method(Explainer):
    """What the classes of this module share: the constructor, and the scaling of the grids."""

    _gradients = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        backend: str = "auto",
        check_finite: bool | None = None,
    ) -> None:
        choices = pipeline.check_choices(backend, "auto", check_finite)
        super().__init__(model, target_layers, reshape_transform, choices, gradients=self._gradients)

    def _result(self, seen):
        layers = self._layers(seen)
        grids = [layer.sums.relu() for layer in layers]
        maps = pipeline.grad_cam_maps(grids, seen.size, backend=self._choices["backend"])
        of_channels = tuple(layer.weights for layer in layers)
        if of_channels[0] is None:
            of_channels = None
        elif len(of_channels) == 1:
            (of_channels,) = of_channels
        return maps, None, of_channels, _evidence(seen, layers)

    def _grids(self, seen):
        layers = self._layers(seen)
        return [layer.sums.relu() for layer in layers], _evidence(seen, layers)

    def _layers(self, seen: Seen) -> list[_OfLayer]:
        self._check(activations=seen.capture.activations)
        return [self._of_layer(seen, index) for index in range(len(seen.capture.activations))]

    def _of_layer(self, seen: Seen, index: int) -> _OfLayer:
        raise NotImplementedError

    def _check(self, **named):
        for name, tensors in named.items():
            for tensor in tensors:
                check_values({name: tensor}, self._choices["check_finite"])

    def _summed(self, activations, of_channels):
        """The weighted sums over channels (B, K, h, w), signed, of weights (B, K, C) or (B, K, C, h, w)."""
        backend = self._choices["backend"]
        with pipeline.plain_arithmetic(activations.device):
            if not pipeline.takes_kernels(activations, backend):
                # One after the other, and not as a product of matrices: in the order of pytorch-grad-cam's sums.
                computed = _computed(activations)
                sums = [weights.summed(weights.weighted(computed, each), 1) for each in of_channels.unbind(1)]
                return torch.stack(sums, 1)
            if of_channels.ndim == 3:
                return pipeline.class_grid(activations, of_channels, relu=False, backend=backend)
            grids = (pipeline.class_grid(activations, each, False, backend=backend) for each in of_channels.unbind(1))
            return torch.stack(list(grids), 1)


def _evidence(seen, layers):
    """As `Notices` takes it."""
    return [(of_layer, (layer.used,), None) for of_layer, layer in zip(seen.capture.activations, layers)]


class _OfGradients(_Method):
    """A rule of `cfcam_gpu.weights`, applied to the gradients of one block of targets after the other."""

    _rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    _of_cells = False
    """Whether the rule gives each cell a weight of its own."""

    def _pool(self, gradients, activations):
        """Of gradients (B, k, C, h, w): sums (B, k, h, w), used (B, k), and weights (B, k, C) if they are channels'."""
        self._check(gradients=[gradients])
        with pipeline.plain_arithmetic(activations.device):
            computed, used = _computed(activations), gradients.flatten(2).any(2)
            found = (self._rule(computed, _computed(of_target)) for of_target in gradients.unbind(1))
            if self._of_cells:  # as large as the gradients, so one after the other
                return torch.cat([self._summed(activations, each[:, None]) for each in found], 1), used
            of_channels = torch.stack(list(found), 1)
            return self._summed(activations, of_channels), used, of_channels

    def _of_layer(self, seen, index):
        activations, gradients = seen.capture.activations[index], seen.capture.gradients[index]
        if isinstance(gradients, torch.Tensor):
            found = [each[:, 0] for each in self._pool(gradients[:, None], activations)]
        else:
            found = list(gradients)
        sums, used, *of_channels = found
        return _OfLayer(sums, of_channels[0] if of_channels else None, used)


class GradCAM(_OfGradients):
    """Grad-CAM: a channel's weight is the mean of its gradient. Source: Selvaraju et al., ICCV 2017.

    Args, Attributes, Raises, Warns: as for `CFCAM`, without those of the clustering and the guide.

    One forward pass and a backward through the head, of several targets block by block. In memory besides: the layer's
    activations (B, C, h, w), as much for one target's gradients and products, and a block of gradients of at most 256
    MiB (16 on a CPU).

    >>> cam = GradCAM(model, [model.layer4])
    >>> cam.maps(images, targets=[285, 282]).shape  # images (2, 3, 224, 224)
    torch.Size([2, 224, 224])
    """

    name = "Grad-CAM"
    _rule = staticmethod(weights.grad_cam)


class GradCAMPlusPlus(_OfGradients):
    """Grad-CAM++: positive gradients, weighted by their share. Source: Chattopadhay et al., WACV 2018.

    Args, cost and memory: as for `GradCAM`.
    """

    name = "Grad-CAM++"
    _rule = staticmethod(weights.grad_cam_plus_plus)


class XGradCAM(_OfGradients):
    """XGrad-CAM: the mean gradient, weighted by the activations. Source: Fu et al., BMVC 2020.

    Args, cost and memory: as for `GradCAM`.
    """

    name = "XGrad-CAM"
    _rule = staticmethod(weights.x_grad_cam)


class LayerCAM(_OfGradients):
    """LayerCAM: a weight for each cell, its positive gradient. Source: Jiang et al., IEEE TIP 2021.

    Args, cost and memory: as for `GradCAM`. Finer layers than the last are where it is meant to be used.
    """

    name = "LayerCAM"
    _rule = staticmethod(weights.layer_cam)
    _of_cells = True


class HiResCAM(_OfGradients):
    """HiResCAM: a weight for each cell, its gradient. Source: Draelos and Carin, arXiv 2011.08891.

    Args, cost and memory: as for `GradCAM`.
    """

    name = "HiResCAM"
    _rule = staticmethod(weights.hires_cam)
    _of_cells = True


class GradCAMElementWise(_OfGradients):
    """The positive products of gradient and activation, cell by cell. Source: pytorch-grad-cam 1.5.7.

    Args, cost and memory: as for `GradCAM`.
    """

    name = "GradCAMElementWise"
    _rule = staticmethod(weights.grad_cam_elementwise)
    _of_cells = True


class EigenCAM(_Method):
    """Eigen-CAM: the layer's first principal component. Source: Muhammad and Yeasin, IJCNN 2020.

    Args, Attributes, Warns: as for `GradCAM`. The map does not depend on the target: those of several targets of an
    image are alike, and callables are not called.

    One forward pass, and on the host a singular value decomposition of each image's activations; of an image's
    activations a copy or two is held there.

    >>> EigenCAM(model, [model.layer4]).maps(images).shape  # images (2, 3, 224, 224)
    torch.Size([2, 224, 224])
    """

    name = "Eigen-CAM"
    _gradients = False

    def _of_layer(self, seen, index):
        activations = seen.capture.activations[index]
        with pipeline.plain_arithmetic(activations.device):
            sums = projection.principal_projection(_computed(activations).contiguous())
        chosen = _Chosen(seen)
        return _without_gradients(chosen, sums[:, None].expand(-1, chosen.n_targets, *sums.shape[1:]), None)


class _OfScores(_Method):
    """Weights (B, C) that come from the scores of many forward passes, or passes through the head."""

    of_scores = True
    _gradients = False

    batch_size = BLOCK
    """Images, or changed activations, of one pass; halved where memory runs out."""

    def _of_layer(self, seen, index):
        chosen, of_images = _Chosen(seen), []
        with eager_without_grad_in(self.model):
            for found in self._scores(seen, index, chosen):
                self._check(scores=[found])
                of_images.append(found.T)
        found = self._weights(chosen, torch.stack(of_images))
        return _without_gradients(chosen, self._summed(seen.capture.activations[index], found), found)

    def _scores(self, seen, index, chosen):
        """Of one image after the other the scores (C, K)."""
        raise NotImplementedError

    def _weights(self, chosen, scores):
        """Weights of scores, both (B, K, C)."""
        raise NotImplementedError


class AblationCAM(_OfScores):
    """Ablation-CAM: a channel's weight is the share of the score that is lost without it.

    The channel is set to 0 where the layer's smallest activation is 0, as in the paper. Else it is set far below, as
    pytorch-grad-cam does; in float16, which has no such values, to 0 too. Of a score of 0 the weight is the loss
    itself, where there it would be infinite.

    Args, Attributes, Warns: as for `GradCAM`. A ``reshape_transform`` must leave the channels on an axis of their own.

    Attributes:
        batch_size: 32, the channels that are ablated in one pass; halved where memory runs out, and the log says so.

    Raises:
        TypeError, ValueError: as for `GradCAM`; and of a layer that does not run as often in every forward pass.

    Three to five forward passes of the batch, and C / ``batch_size`` of an image through the part of the network behind
    the layer alone (`cfcam_gpu.head`); where that cannot be recorded, through the whole network, and the log says so.
    The targets of an image share them. In memory: ``batch_size`` copies of an image's activations, with the passes.

    Source: Desai and Ramaswamy, WACV 2020; ``AblationLayer`` of pytorch-grad-cam 1.5.7.

    >>> AblationCAM(model, [model.layer4]).maps(images, top=5).shape  # images (2, 3, 224, 224)
    torch.Size([2, 5, 224, 224])
    """

    name = "Ablation-CAM"

    def _scores(self, seen, index, chosen):
        capture = self._capture(seen.inputs)
        layer = capture.target_layers[index]
        name = capture.target_names[index]
        head = record_head(self.model, layer, seen.inputs, n_runs=dict(capture.repeated_layers()).get(name, 1))
        if head.reason == REPEATED:
            raise ValueError(f"target layer {name!r} must run as often in every forward pass for Ablation-CAM")
        axis = _channel_axis(head.activations, seen.capture.activations[index], capture.reshape_transform)
        channels = torch.arange(head.activations.shape[axis], device=head.activations.device)
        for image, activations in enumerate(head.activations):
            values = ablated_values(activations, BLOCK)[channels % BLOCK]
            score = lambda outputs, n_rows, image=image: chosen.scores(outputs, image, n_rows)
            yield scores_without(head, image, channels, values, score, axis=axis, size=self.batch_size)

    def _weights(self, chosen, scores):
        own = chosen.own_scores()[:, :, None]
        return (own - scores) / torch.where(own != 0, own, 1)


class ScoreCAM(_OfScores):
    """Score-CAM: a channel's weight is the score of the image masked with it, in a softmax over the channels.

    Args, Attributes, Raises, Warns: as for `GradCAM`.

    Attributes:
        batch_size: 16, the masked images of one pass, on a CPU fewer where its cache likes that; halved where memory
            runs out, and the log says so.

    One forward pass of the batch, and C / ``batch_size`` of masked images through the whole network for each image of
    it: minutes on a CPU, where the gradients' methods take a second. Channels that are 0 everywhere are run once. The
    targets of an image share the passes. In memory: ``batch_size`` masked images, with the passes.

    Source: Wang et al., CVPR workshops 2020; ``ScoreCAM`` of pytorch-grad-cam 1.5.7.

    >>> ScoreCAM(model, [model.layer4]).maps(images).shape  # images (2, 3, 224, 224)
    torch.Size([2, 224, 224])
    """

    name = "Score-CAM"
    batch_size = 16

    def _scores(self, seen, index, chosen):
        activations = _computed(seen.capture.activations[index])
        pixels = seen.inputs.images
        channels_last = seen.size != pixels.shape[-len(seen.size) :]
        for image, channels in enumerate(activations):

            def score(images, image=image):
                images = images.movedim(1, -1) if channels_last else images
                args, kwargs = seen.inputs.of_image(image, images, images.device)
                return chosen.scores(self.model(*args, **kwargs), image, len(images))

            own = pixels[image].to(channels.device)
            own = own.movedim(-1, 0) if channels_last else own
            yield scores_masked(own, channels, score, size=block_size(own[None], self.batch_size))

    def _weights(self, chosen, scores):
        return scores.softmax(2)


METHODS: dict[str, type[Explainer]] = {
    "cfcam": CFCAM,
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "layercam": LayerCAM,
    "hirescam": HiResCAM,
    "elementwise": GradCAMElementWise,
    "eigencam": EigenCAM,
    "ablation": AblationCAM,
    "score": ScoreCAM,
}
"""By the names that ``cfcam explain --method`` takes."""


class _Chosen:
    """The targets of a call, and their scores without a graph."""

    def __init__(self, seen: Seen) -> None:
        self._outputs, self._batch = seen.capture.outputs, len(seen.inputs.images)
        self._targets: Any = seen.capture.classes
        self._signs: torch.Tensor | None = None
        if self._targets is None:
            self._targets = check_targets(seen.targets, self._batch, several=True)
            self.several = isinstance(self._targets[0], tuple)
        else:
            self.several = self._targets.ndim == 2
            logits = find_logits(self._outputs, self._batch)
            if seen.targets is None and not self.several and logits.shape[1] == 1:
                self._signs = torch.where(logits[:, 0] < 0, -1, 1)  # the side that was chosen, as `HeadCapture`'s
        self.n_targets = len(self._targets[0]) if self.several else 1

    def of_image(self, image):
        """An image's targets: int64 (K,), or K callables."""
        if self.several:
            return self._targets[image]
        return self._targets[image : image + 1]

    def scores(self, outputs, image, n_rows):
        """The scores (n_rows, K) of this image's targets in other outputs."""
        return self._signed(scores_of_rows(outputs, self.of_image(image), n_rows), image)

    def own_scores(self):
        """The scores (B, K) of the images as they are."""
        images = range(self._batch)
        found = [scores_of_rows(self._outputs, self.of_image(each), self._batch, each) for each in images]
        return torch.cat([self._signed(of_image, image) for image, of_image in enumerate(found)])

    def _signed(self, scores, image):
        scores = _computed(scores)
        return scores if self._signs is None else scores * self._signs[image]


def _without_gradients(chosen, sums, of_channels):
    """The `_OfLayer` of sums and weights with an axis of K targets."""
    used = torch.ones(sums.shape[:2], dtype=torch.bool, device=sums.device)
    found = _OfLayer(sums, of_channels, used)
    if chosen.several:
        return found
    return _OfLayer(*(each if each is None else each[:, 0] for each in found))


def _channel_axis(output, grid, reshape_transform):
    """Which axis of a layer's output (B, ...) becomes the channels of the grid (B, C, h, w)."""
    if reshape_transform is None:
        return 1
    n_channels = grid.shape[1]
    expected = torch.arange(n_channels, dtype=torch.float32, device=grid.device).view(-1, 1, 1)
    for axis in reversed(range(1, output.ndim)):
        if output.shape[axis] == n_channels:
            numbers = expected.view(-1, *[1] * (output.ndim - 1 - axis)).expand(output.shape)
            found = reshape_transform(numbers)
            if found.shape == grid.shape and bool((found == expected).all()):
                return axis
    raise ValueError(
        "reshape_transform must leave the channels on an axis of their own for Ablation-CAM, got one of"
        f" {tuple(output.shape)} to {tuple(grid.shape)} that mixes them"
    )


def _computed(tensor):
    """In the dtype of the arithmetic; in its own memory layout, on which the order of NumPy's sums depends."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
