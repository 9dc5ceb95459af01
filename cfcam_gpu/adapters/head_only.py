"""pytorch-grad-cam's FinerCAM, RandomCAM and ShapleyCAM, differentiated down to the target layer and no further."""

import numpy as np
import pytorch_grad_cam as original
import torch
from pytorch_grad_cam.finer_cam import DEFAULT_COMPARISON_CATEGORIES
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget

from cfcam_gpu import weights
from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.adapters.pytorch_grad_cam import HeadOnlyCAM, _computed, _off_the_model
from cfcam_gpu.projection import principal_projection
from cfcam_gpu.targets import OwnRule


class FinerCAM(original.FinerCAM):
    """pytorch-grad-cam's FinerCAM, in one head-only pass where its ``base_cam`` is one of this package's classes."""

    def forward(
        self,
        input_tensor,
        targets=None,
        eigen_smooth=False,
        alpha=1,
        comparison_categories=None,
        target_idx=None,
    ):
        """The maps as NumPy float32; arguments as for the original."""
        if not isinstance(self.base_cam, HeadOnlyCAM):
            return super().forward(input_tensor, targets, eigen_smooth, alpha, comparison_categories, target_idx)
        if targets is None:
            compared = _Compared(alpha, comparison_categories, target_idx)
            targets = OwnRule(lambda outputs: [compared(output) for output in outputs])
        return self.base_cam.forward(input_tensor, targets, eigen_smooth)


class _Compared:
    """FinerCAM's own target: found from an image's output when it is there, so that no pass is needed before."""

    def __init__(self, alpha, categories, target):
        self.alpha, self.categories, self.target = alpha, categories, target

    def __call__(self, output):
        scores = output.detach().float().cpu().numpy()
        reference = scores.max() if self.target is None else scores[self.target]
        nearest = np.argsort(np.abs(scores - reference)).tolist()
        if self.categories is None:
            places = DEFAULT_COMPARISON_CATEGORIES[: max(len(scores) - 1, 0)]
        else:
            places = [place for place in self.categories if place < len(scores)]
        return FinerWeightedTarget(nearest[0], [nearest[place] for place in places], self.alpha)(output)


class RandomCAM(HeadOnlyCAM, original.RandomCAM):
    """pytorch-grad-cam's RandomCAM on a head-only backward: the same numbers from NumPy's global generator."""

    def _grid(self, activations, gradients, shape, guide, eigen_smooth):
        activations = _computed(activations)
        drawn = torch.from_numpy(np.random.uniform(-1, 1, size=activations.shape[:2])).to(activations.device)
        terms = drawn[:, :, None, None] * activations
        grid = principal_projection(terms) if eigen_smooth else weights.summed(terms, 1)
        return grid.relu_().to(activations.dtype).reshape(len(grid), *shape)

    def _smoothed(self, input_tensor, targets, eigen_smooth):
        # View by view, which is the order of the original's draws.
        maps = []
        for transform in self.tta_transforms:
            view = self.maps(transform.augment_image(input_tensor), targets, eigen_smooth=eigen_smooth)
            maps.append(transform.deaugment_mask(view[:, None])[:, 0])
        return torch.stack(maps).mean(0)


class ShapleyCAM(Hooked, original.ShapleyCAM):
    """pytorch-grad-cam's ShapleyCAM, with the backward that is itself differentiated ending at the target layers."""

    def forward(self, input_tensor, targets, eigen_smooth=False):
        """The maps as NumPy float32, without augmentation; as the original."""
        input_tensor = input_tensor.to(self.device).detach().requires_grad_()
        hooks = self.activations_and_grads
        with _off_the_model(self._foreign_hooks):
            self.outputs = outputs = hooks(input_tensor)
        if targets is None:
            targets = [ClassifierOutputTarget(index) for index in outputs.detach().cpu().numpy().argmax(-1)]
        self.model.zero_grad()
        loss = sum(target(output) for target, output in zip(targets, outputs))
        torch.autograd.grad(loss, hooks.edges, retain_graph=True, create_graph=True, allow_unused=True)
        return self.aggregate_multi_layers(self.compute_cam_per_layer(input_tensor, targets, eigen_smooth))
