"""The weights of the CAM methods: what a gradient makes of each channel, or of each of its cells.

Every rule is a function of the activations A and gradients g, both (B, C, h, w) or with any other grid axes, float32 or
float64 and without a graph. It gives weights (B, C), or (B, C, h, w) for a weight of each cell's own; the method's map
is the positive part of sum_c w_c A_c. Names and constants are pytorch-grad-cam's, and so are the numbers.

CF-CAM's own weights are `pipeline.channel_weights`: they need a configuration and a backend.

>>> weights = grad_cam(activations, gradients)  # (2, 512, 7, 7) each
>>> torch_backend.class_grid(activations, weights).shape
torch.Size([2, 7, 7])
"""

import numpy as np
import torch


def grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w[c] = mean of g[c] over the grid. Source: Selvaraju et al., ICCV 2017, equation 1."""
    return _pooled(gradients) / gradients[0, 0].numel()


def grad_cam_plus_plus(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w[c] = sum of max(g, 0) * alpha over the grid, alpha = g^2 / (2 g^2 + sum(A[c]) g^3 + 1e-6), 0 where g = 0.

    The sum of A is over the grid, and 1e-6 is pytorch-grad-cam's: gradients far below 1e-3 vanish in it.

    Source: Chattopadhay et al., arXiv 1710.11063, equation 19.
    """
    square = gradients**2
    alpha = square / (2 * square + per_cell(_pooled(activations), gradients) * (square * gradients) + 1e-6)
    return _pooled(gradients.relu() * torch.where(gradients != 0, alpha, 0))


def exact_grad_cam_plus_plus(activations: torch.Tensor, gradients: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """`grad_cam_plus_plus` without the 1e-6: alpha = 1 / (2 + sum(A[c]) g + eps), which does not underflow.

    Takes half precision too, and is summed in its dtype. Source: Chattopadhay et al., WACV 2018, equation 19.
    """
    total = activations.flatten(2).sum(-1, keepdim=True)
    gradients = gradients.flatten(2)
    return (gradients.relu() / (2 + gradients * total + eps)).nan_to_num(0.0).sum(-1)


def x_grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w[c] = sum of g * A / (sum(A[c]) + 1e-7) over the grid. Source: Fu et al., arXiv 2008.02312, equation 8."""
    return _pooled(gradients * activations / (per_cell(_pooled(activations), gradients) + 1e-7))


def layer_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w[c, i, j] = max(g[c, i, j], 0). Source: Jiang et al., IEEE TIP 2021, equation 5."""
    return gradients.relu()


def hires_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w[c, i, j] = g[c, i, j]. Source: Draelos and Carin, arXiv 2011.08891, equation 4."""
    return gradients


def grad_cam_elementwise(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w = g where g * A > 0, else 0, so that w * A = max(g * A, 0).

    Source: ``grad_cam_elementwise.py`` of pytorch-grad-cam 1.5.7.
    """
    return torch.where(gradients * activations > 0, gradients, 0)


WEIGHTS = {
    "Grad-CAM": grad_cam,
    "Grad-CAM++": grad_cam_plus_plus,
    "XGrad-CAM": x_grad_cam,
    "LayerCAM": layer_cam,
    "HiResCAM": hires_cam,
    "GradCAMElementWise": grad_cam_elementwise,
}
"""By the methods' names."""


def principal_projection(terms: torch.Tensor) -> torch.Tensor:
    """The first principal component of terms (B, C, h, w) over the cells: (B, h, w), NaN taken as 0.

    Of the activations it is Eigen-CAM (Muhammad and Yeasin, IJCNN 2020), which has no weights.

    On the host, with NumPy: the sign of a singular vector is LAPACK's choice, and pytorch-grad-cam's maps hang on it.
    Source: ``utils.svd_on_activations.get_2d_projection`` of pytorch-grad-cam 1.5.7, which computes all C x C right
    singular vectors where one is used.
    """
    projections = []
    for image in torch.where(terms.isnan(), 0, terms).flatten(2).cpu().numpy():
        cells = image.T - image.T.mean(axis=0)
        _, _, components = np.linalg.svd(cells, full_matrices=False)
        projections.append(cells @ components[0])
    return torch.from_numpy(np.stack(projections)).view(len(terms), *terms.shape[2:]).to(terms.device)


def weighted(activations, of_channels):
    """w_c A_c: the activations (B, C, h, w) times weights (B, C), or (B, C, h, w) for a weight of each cell's own."""
    # The weights first, as in pytorch-grad-cam: of two layouts the product takes the first one's.
    return (of_channels if of_channels.ndim == activations.ndim else per_cell(of_channels, activations)) * activations


def summed(values, dims):
    """The sum over ``dims``; on a CPU by NumPy, in its order.

    pytorch-grad-cam's float32 sums over 2048 channels carry rounding errors of up to 1e-5 of the map's maximum
    (GradCAMElementWise on a Swin), five times what its numbers are to be reproduced to, and XGradCAM divides by sums
    that may cancel. The same order of addition gives the same numbers. On a device the order is the kernel's own.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().sum(dims))
    return values.sum(dims)


def _pooled(values):
    """The sum over the grid: (B, C)."""
    return summed(values, tuple(range(2, values.ndim)))


def per_cell(of_channels, grids):
    """(B, C) with an axis of length one for each axis of the grids."""
    return of_channels.view(*of_channels.shape, *[1] * (grids.ndim - 2))
