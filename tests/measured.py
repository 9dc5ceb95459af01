"""What the tests of the measures have in common: models and maps whose measures are known."""

import torch
from torch import nn

SIZE = 16  # the side of most images; 16 * 16 pixels divide evenly into 4, 8 and 32 steps


def shuffled(maps):
    """The same values elsewhere, each map by itself."""
    flat = maps.flatten(1)
    return torch.stack([row[torch.randperm(row.numel())] for row in flat]).view_as(maps)


def grad_cam(activations, gradients):
    """Grad-CAM on the layer's grid, divided by its maximum."""
    grid = (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    return grid / grid.amax((1, 2), keepdim=True).clamp_min(1e-30)


class Named(nn.Module):
    """Three children with weights, one without, and one that holds a bare parameter."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act, self.scale = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Module()
        self.scale.factor = nn.Parameter(3 + 0.1 * torch.randn(6, 30, 30))
        self.head = nn.Linear(6, 4)
        self.norm.running_mean.normal_()

    def features(self, images):
        return self.act(self.norm(self.stem(images))) * self.scale.factor

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def class_maps(model, images):
    with torch.no_grad():
        grid = torch.einsum("c,bchw->bhw", model.head.weight[1], model.features(images)).abs()  # never all zero
        return grid / grid.amax((1, 2), keepdim=True)
