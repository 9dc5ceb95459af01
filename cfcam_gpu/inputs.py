"""What models take: one batch of images, or several inputs, one of which is the batch of images."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from cfcam_gpu.outputs import map_tensors

ModelInput: TypeAlias = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A batch of images; or a tuple of the model's positional arguments, or a dict of its keyword arguments."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of a model's forward, and which of them is the batch of images."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: torch.Tensor

    def first(self) -> "Inputs":
        """Those of the first image alone: of every tensor with a row for each image the first."""
        batch = len(self.images)

        def of_first(tensor):
            return tensor[:1] if tensor.ndim and len(tensor) == batch else tensor

        args, kwargs, images = map_tensors(of_first, (self.args, self.kwargs, self.images))
        return Inputs(args, kwargs, images)

    def of_image(
        self, image: int, images: torch.Tensor, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one of the images, with these in its place, (n, ...): of every other tensor with a row for
        each image its row, n times."""
        batch = len(self.images)

        def of_image(tensor):
            if tensor is self.images:
                return images
            if tensor.ndim and len(tensor) == batch:
                return tensor[image : image + 1].to(device).repeat_interleave(len(images), 0)
            return tensor.to(device, copy=True)

        return map_tensors(of_image, (self.args, self.kwargs))

    def copies(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with private copies of the tensors on this device: a model may change its input in place."""
        return map_tensors(lambda tensor: tensor.to(device, copy=True), (self.args, self.kwargs))


def check_inputs(
    input_tensor: ModelInput | None, keywords: Mapping[str, Any] | None = None, model: nn.Module | None = None
) -> Inputs:
    """The `Inputs` that these arguments are.

    A tensor alone is the batch of images, and beside keywords where it has three dimensions or more. Of several tensors
    it is the first of four dimensions, (B, C, H, W), in the order given and wherever it is nested; without such the
    first of most dimensions, of at least three. Masks of booleans do not count.

    Args:
        input_tensor: `ModelInput`; None where all is in the keywords.
        keywords: further arguments of the model.
        model: whose forward must take the keywords.

    Raises:
        TypeError: they are of another kind, or the model does not take a keyword.
        ValueError: none of them is a batch of images, or it is empty.
    """
    keywords = keywords or {}
    if keywords and model is not None:
        _check_keywords(model, keywords)
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(input_tensor, Mapping):
        named = dict(input_tensor.items())
        for name in named:
            if not isinstance(name, str):
                raise TypeError(
                    f"input_tensor as a dict must have the names of the model's arguments, got {name!r}; for a model"
                    " that takes one dict write (inputs,)"
                )
            if name in keywords:
                raise TypeError(f"input_tensor and the keywords must not name an argument twice, got {name!r}")
    elif isinstance(input_tensor, tuple):
        args = tuple(input_tensor)
    elif isinstance(input_tensor, torch.Tensor):
        args = (input_tensor,)
    elif not (input_tensor is None and keywords):
        hint = "; for a model that takes one list write (inputs,)" if isinstance(input_tensor, list) else ""
        raise TypeError(
            f"input_tensor must be a torch.Tensor, or a tuple or dict of a model's inputs, got {_type(input_tensor)}"
            f"{hint}"
        )
    args, kwargs = map_tensors(_plain, (args, {**named, **keywords}))
    if isinstance(input_tensor, torch.Tensor) and (not keywords or input_tensor.ndim > 2):
        (images,) = args
    else:
        images = _find_images(args, kwargs)
    if images.ndim == 0 or images.shape[0] == 0:
        raise ValueError(f"input_tensor must have shape (B, ...) with B >= 1, got {tuple(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"input_tensor must not be empty, got {tuple(images.shape)}")
    return Inputs(args, kwargs, images)


def _plain(tensor):
    """Without a loader's class, such as MONAI's MetaTensor, which goes over to all that is computed of the tensor, and
    which autograd does not have for its own. One that computes in its own way, such as a DTensor, is as it is."""
    kind = type(tensor)
    computes = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor if kind is torch.Tensor or computes else tensor.as_subclass(torch.Tensor)


def _find_images(args, kwargs):
    tensors: list[torch.Tensor] = []

    def collect(tensor):
        tensors.append(tensor)
        return tensor

    map_tensors(collect, (args, kwargs))
    candidates = [tensor for tensor in tensors if tensor.dtype != torch.bool]
    images = next((tensor for tensor in candidates if tensor.ndim == 4), None)
    if images is None:
        images = max(candidates, key=lambda tensor: tensor.ndim, default=None)
    if images is None or images.ndim < 3:
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors) or "no tensor"
        raise ValueError(f"one of the inputs must be the batch of images, (B, C, H, W), got {shapes}")
    return images


def _check_keywords(model, keywords):
    """A misspelt argument of the call is no argument of the model's."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature takes what it takes
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in keywords:
        if name not in parameters:
            raise TypeError(
                f"keywords must be targets, top, or arguments of {_type(model)}.forward ({', '.join(parameters)}), got"
                f" {name!r}"
            )


def _type(value):
    return type(value).__name__
