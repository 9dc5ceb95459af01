"""The layer to explain a model at: found by one pass, or by its name."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from cfcam_gpu.checks import did_you_mean

MAX_PREFIX_TOKENS = 5
"""Tokens before the patches: none, a class token, a distillation token, or a class token and four registers."""

PASSED_OVER = (
    # The same tensor as the layer before in evaluation mode
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    # A summary of the map, not a map
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    # Inside a transformer's block: queries, keys and values, not the token stream
    nn.Linear,
)
"""Layer types that are never the default target."""


class TokensToMap:
    """Reshape transform of a transformer: (B, N, D) tokens -> (B, D, h, w), the prefix tokens dropped."""

    def __init__(self, n_prefix, grid):
        self.n_prefix, self.grid = n_prefix, grid

    def __call__(self, tokens):
        return tokens[:, self.n_prefix :].transpose(1, 2).unflatten(2, self.grid)

    def __repr__(self):
        return f"TokensToMap(n_prefix={self.n_prefix}, grid={self.grid})"


def channels_last_to_map(features: torch.Tensor) -> torch.Tensor:
    """Reshape transform of a channels-last layer: (B, h, w, C) -> (B, C, h, w)."""
    return features.permute(0, 3, 1, 2)


class TargetLayer(NamedTuple):
    """A layer to explain a model at: its reshape transform, the (C, h, w) of its map and the model's class count."""

    name: str
    module: nn.Module
    reshape_transform: Callable | None
    shape: tuple
    n_classes: int


def find_target_layer(
    model: nn.Module, example_input: torch.Tensor
) -> tuple[str, nn.Module, Callable[[torch.Tensor], torch.Tensor] | None]:
    """The default target layer: ``(name, module, reshape_transform)``; see ``inspect_target_layer``.

    >>> name, layer, reshape = find_target_layer(resnet50, torch.rand(1, 3, 224, 224))
    >>> name
    'layer4'
    """
    return inspect_target_layer(model, example_input)[:3]


def inspect_target_layer(model: nn.Module, example_input: torch.Tensor, name: str | None = None) -> TargetLayer:
    """The last layer that keeps a map of the image, found by one forward pass and one backward.

    A candidate's output is (B, C, h, w), (B, h, w, C) or (B, N, D) with a class token or other prefix before the
    N tokens; its grid has the image's aspect ratio and more than one cell, and the gradient of the top score there
    is not zero, in more than one channel and outside the prefix. So a ViT that reads only the class token is
    explained at its last block's first norm, behind which the patch tokens no longer matter. Of several names for
    one map the outermost is taken; of a layer that runs more than once, its last run counts. The layers of
    PASSED_OVER are not candidates.

    Hooks are removed and ``.grad`` and training flags are left as they were, also after an error.

    Args:
        model: module with one output (B, n_classes).
        example_input: (B, 3, H, W) float tensor on the model's device, preferably a real image; B may be 1.
        name: look at this layer instead of choosing one.

    Returns:
        TargetLayer.

    Raises:
        ValueError: the model has no candidate, or none of that name, or its output has another shape.
    """
    if name is not None:
        get_layer(model, name)
    records, output = _dry_run(model, example_input)
    image_size = tuple(example_input.shape[-2:])
    # In-place operations make another map of the same tensor, with a later version.
    last_run = {(id(tensor), version): order for order, (_, _, tensor, version, _) in enumerate(records)}
    candidates = []
    for order, (layer_name, module, tensor, version, gradient) in enumerate(records):
        if layer_name != name if name is not None else isinstance(module, PASSED_OVER):
            continue
        has_map, reshape = _layout(tuple(tensor.shape), image_size)
        if not has_map:
            if name is not None:
                raise ValueError(
                    f"layer {name} has no map of the image: expected (B, C, h, w), (B, h, w, C) or (B, N, D) "
                    f"with a grid like the image's {image_size}, got {tuple(tensor.shape)}"
                )
            continue
        # Prefer the latest map, then its outermost module, then the last to finish.
        key = (last_run[id(tensor), version], -layer_name.count("."), order)
        candidates.append((key, layer_name, module, reshape, gradient))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    for _, layer_name, module, reshape, gradient in candidates:
        if gradient is not None:
            gradient = reshape(gradient) if reshape else gradient
            if _matters(gradient):
                return TargetLayer(layer_name, module, reshape, tuple(gradient.shape[1:]), output.shape[1])
    if name is not None:
        raise ValueError(
            f"the top score's gradient is zero at layer {name}; choose an earlier one"
            if candidates
            else f"layer {name} did not run, or its output is no tensor with a gradient"
        )
    model_name = type(model).__name__
    if candidates:
        raise ValueError(
            f"the top score's gradient is zero at all {len(candidates)} layers of {model_name} "
            "that keep a map of the image; some models have a last layer of zeros before they are trained"
        )
    raise ValueError(f"no layer of {model_name} keeps a map of the image: expected an output (B, C, h, w) or (B, N, D)")


def _matters(gradient):
    """Whether a (B, C, h, w) gradient is non-zero in more than one channel: one alone is a class score's own map."""
    return int(gradient.ne(0).any(0).flatten(1).any(1).sum()) > 1


def _dry_run(model, example_input):
    """[(name, module, last output, its version, top score's gradient or None)] as the layers finish; the scores."""
    outputs = {}

    def keep(name, module):
        def hook(_module, _inputs, output):
            outputs.pop(name, None)  # the last call of a layer counts, also for the order
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                outputs[name] = (module, output, output._version)

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(keep(name, module)) for name, module in model.named_modules() if name]
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            # A frozen model still needs a graph, and a leaf could not be changed in place.
            output = model(example_input.detach().clone().requires_grad_().mul(1))
            if not isinstance(output, torch.Tensor) or output.ndim != 2:
                shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                raise ValueError(f"the model must return scores (B, n_classes), got {shape}")
            records = [(name, *kept) for name, kept in outputs.items() if kept[1].requires_grad]
            score = output.amax(1).sum()
            tensors = [record[2] for record in records]
            gradients = torch.autograd.grad(score, tensors, allow_unused=True) if records else ()
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    return [(*record, gradient) for record, gradient in zip(records, gradients)], output


def _layout(shape, image_size):
    """(found, reshape transform or None) of a layer's output shape, by the image's aspect ratio."""
    height, width = image_size

    def fits(h, w):
        return h * w > 1 and h <= height and w <= width and abs(h - w * height / width) <= max(1, height / width)

    if len(shape) == 4:
        if fits(*shape[2:]):
            return True, None
        if fits(*shape[1:3]):
            return True, channels_last_to_map
    if len(shape) == 3:
        for n_prefix in range(min(MAX_PREFIX_TOKENS + 1, shape[1])):
            n_patches = shape[1] - n_prefix
            h = round(math.sqrt(n_patches * height / width))
            if h > 1 and n_patches % h == 0 and n_patches // h > 1 and fits(h, n_patches // h):
                return True, TokensToMap(n_prefix, (h, n_patches // h))
    return False, None


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that dotted name, as ``model.named_modules()`` has it; ValueError with close matches otherwise.

    >>> get_layer(resnet50, "layer4.2.conv3")
    Conv2d(512, 2048, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    layers = dict(model.named_modules())
    if not name or name not in layers:
        hint = did_you_mean(name, list(layers)) or f"; it begins with {', '.join(n for n, _ in model.named_children())}"
        raise ValueError(f"{type(model).__name__} has no layer {name!r}{hint}")
    return layers[name]
