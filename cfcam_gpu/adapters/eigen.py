"""pytorch-grad-cam's methods by principal component, without the singular vectors that they compute and drop.

The original has LAPACK compute all C right singular vectors of the (cells, C) matrix of a layer, 2048 of 2048 numbers
each for ResNet-50, and uses the first. The thin decomposition has as many as there are cells. The vectors are the same
ones, with the same signs, which are LAPACK's choice and which the maps hang on.
"""

import pytorch_grad_cam as original
import torch

from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.adapters.pytorch_grad_cam import HeadOnlyCAM, _computed
from cfcam_gpu.projection import first_component, principal_projection


class EigenCAM(Hooked, original.EigenCAM):
    """pytorch-grad-cam's EigenCAM with a thin singular value decomposition."""

    def get_cam_image(self, input_tensor, target_layer, target_category, activations, grads, eigen_smooth):
        """The layer's map on its own grid: NumPy (B, h, w) or (B, d, h, w)."""
        return first_component(activations)


class _OfGradients(HeadOnlyCAM):
    def _grid(self, activations, gradients, shape, guide, eigen_smooth):
        terms = self._terms(_computed(activations), _computed(gradients))
        # Contiguous as NumPy's: the order of the sums of the means depends on it.
        return self._signed(principal_projection(terms.contiguous())).relu_().reshape(len(terms), *shape)

    def _signed(self, projections):
        return projections


class EigenGradCAM(_OfGradients, original.EigenGradCAM):
    """pytorch-grad-cam's EigenGradCAM on a head-only backward, with a thin singular value decomposition."""

    def _terms(self, activations, gradients):
        return gradients * activations


class SegEigenCAM(_OfGradients, original.SegEigenCAM):
    """pytorch-grad-cam's SegEigenCAM on a head-only backward, with a thin singular value decomposition."""

    def _terms(self, activations, gradients):
        return gradients.abs() * activations

    def _signed(self, projections):
        low, high = projections.flatten(1).aminmax(dim=1)
        return torch.where((low.abs() > high.abs())[:, None, None], -projections, projections)
