"""What is measured: a model with random weights, its target layer, and a batch of noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from cfcam_gpu import layers, models
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.config import CFCAMConfig

MODELS = ("resnet18", "resnet50", "densenet121", "mobilenet_v3_large", "convnext_tiny", "vit_b_16", "swin_t")
"""torchvision's models that the full suite measures; any other name and any spec of `models.load_model` works too."""

TARGET_LAYERS = {
    # densenet's forward() runs an in-place ReLU on the output of "features", the default. pytorch-grad-cam keeps that
    # tensor without a copy, so its maps there are of another tensor than its gradients.
    "densenet121": "features.denseblock4",
}
"""Target layers other than the last one that keeps a map of the image."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in evaluation mode and what to explain with it."""

    name: str
    model: nn.Module
    layer_name: str
    layer: nn.Module
    reshape_transform: Callable | None
    layer_shape: tuple
    """(C, h, w)."""
    images: torch.Tensor
    """(B, 3, H, W) of standard normal noise."""

    @cached_property
    def targets(self):
        """The top class of each image: under random weights, another's map may well be negative everywhere."""
        with torch.no_grad():
            return self.model(self.images).argmax(1).tolist()

    @cached_property
    def top_ten(self):
        """The ten best classes of each image, int64 (B, 10); fewer where the model has fewer."""
        with torch.no_grad():
            outputs = self.model(self.images)
        return outputs.topk(min(10, outputs.shape[1]), dim=1).indices

    @property
    def device(self):
        return self.images.device

    @property
    def output_size(self):
        return tuple(self.images.shape[2:])

    def capture(self):
        """A `HeadCapture` as `CFCAM` has it, for the default configuration."""
        config = CFCAMConfig()
        score = {"margin_temperature": config.margin_temperature, "frozen_norms": config.frozen_norms}
        return HeadCapture(self.model, [self.layer], self.reshape_transform, guide_layer="auto", **score)

    @cached_property
    def captured(self):
        """Activations and gradients (B, C, h, w) of the target layer, contiguous, and its guide's output or None."""
        capture = self.capture()(self.images, self.targets)
        return capture.activations[0].contiguous(), capture.gradients[0].contiguous(), capture.guides[0]

    def first(self, n):
        """The first ``n`` images with what the whole batch's pass gave them: rounding depends on the batch."""
        part = replace(self, images=self.images[:n])
        vars(part).update(
            targets=self.targets[:n], captured=tuple(each if each is None else each[:n] for each in self.captured)
        )
        return part

    def with_targets(self, targets):
        """The same with another class of each image to explain."""
        other = replace(self)
        vars(other).update(targets=targets)
        return other

    def with_batch(self, batch):
        """The same model with another batch size; images come in the same order."""
        return replace(self, images=_noise(batch, self.images.shape[-1], self.device))


def subject(name: str, batch: int = 1, size: int = 224, device: str | torch.device = "cpu") -> Subject:
    """A `Subject`: model ``name`` on ``batch`` noise images of ``size`` x ``size`` pixels; the same on every call.

    Args:
        name: a model of torchvision, which gets random weights, or a spec of `models.load_model`.

    Raises:
        ValueError, TypeError, ImportError, OSError: as `models.load_model` and `layers.inspect_target_layer` do.

    >>> subject("resnet18", batch=2).captured[0].shape
    torch.Size([2, 512, 7, 7])
    """
    spec = name if ":" in name or name == "demo" else f"torchvision:{name}:random"
    torch.manual_seed(0)
    loaded = models.load_model(spec, device)
    if loaded.n_axes != 2:
        raise ValueError(f"model must take images to be measured, {name} takes volumes")
    model = loaded.model
    _fill_zero_heads(model)
    images = _noise(batch, size, device)
    target = layers.inspect_target_layer(model, images[:1], TARGET_LAYERS.get(name))
    return Subject(name, model, target.name, target.module, target.reshape_transform, target.shape, images)


def _noise(batch, size, device):
    # Made on the host: the same images whatever the device.
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def _fill_zero_heads(model):
    """Random weights for linear layers that begin as zeros (torchvision's ViT): they would stop every gradient."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
