"""pytorch-grad-cam's FullGrad, with one resize for each layer instead of one for each channel."""

import cv2
import numpy as np
import pytorch_grad_cam as original
import torch
from pytorch_grad_cam.utils.image import scale_accross_batch_and_channels

from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.projection import first_component

SMALLEST_MAXIMUM = 1e-7
"""Added to what a channel is divided by, as in the original's ``scale_cam_image``."""


class FullGrad(Hooked, original.FullGrad):
    """pytorch-grad-cam's FullGrad.

    The original resizes every channel of every layer to the image, 26,560 channels in a ResNet-50, and adds them up.
    A resize is linear: here the channels are added on the layer's own grid, and their sum is resized. The sums differ
    in their last bits.

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``FullGrad``.
    """

    def compute_cam_per_layer(self, input_tensor, target_category, eigen_smooth):
        """The sum of the layers' maps, or with ``eigen_smooth`` their first component: NumPy (B, 1, H, W)."""
        size = self.get_target_width_height(input_tensor)
        gradients = self.activations_and_grads.gradients
        if len(self.bias_data) != len(gradients):
            raise AssertionError(f"{len(self.bias_data)} layers have a bias, and {len(gradients)} of them a gradient")
        of_input = np.abs(input_tensor.grad.data.cpu().numpy() * input_tensor.data.cpu().numpy())
        maps = [scale_accross_batch_and_channels(of_input, size)]
        for bias, gradient in zip(self.bias_data, gradients):
            grids = _sum_of_scaled(torch.from_numpy(bias), gradient.cpu().detach())
            maps.append(_resized(grids.numpy(), size)[:, None])
        maps = np.concatenate(maps, axis=1)
        if not eigen_smooth:
            return np.sum(maps, axis=1)[:, None]
        small = scale_accross_batch_and_channels(maps, (size[0] // 8, size[1] // 8))
        return scale_accross_batch_and_channels(first_component(small)[:, None], size)


def _sum_of_scaled(bias, gradient):
    """Sum over the channels of the absolute bias (C,) * gradient (B, C, h, w), each scaled to [0, 1): (B, h, w)."""
    channels = (bias[None, :, None, None] * gradient).abs_()
    channels -= channels.amin((2, 3), keepdim=True)
    channels /= channels.amax((2, 3), keepdim=True) + SMALLEST_MAXIMUM
    return channels.sum(1)


def _resized(grids, size):
    return np.float32([cv2.resize(grid, size) for grid in grids])
