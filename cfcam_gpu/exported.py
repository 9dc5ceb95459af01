"""`load`: the files of `cfcam_gpu.export` in Python, without the model's code."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.explainer import Explanation, _Latest
from cfcam_gpu.exporting import FORMAT, TOP, about_here
from cfcam_gpu.targets import Targets, check_targets, classes_on

if TYPE_CHECKING:
    from cfcam_gpu.models import Preprocess


def load(path: str | os.PathLike) -> "ExportedCFCAM":
    """What `cfcam_gpu.export` wrote, ready to explain. The file holds compiled code: load none that you do not trust.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, or one of another format, version of torch, device or kind of processor.
        TypeError: ``path`` is none.

    >>> cam = cfcam_gpu.load("model.pt2")
    >>> cam.maps(images).shape, cam.class_names[int(cam.classes[0])]  # images (2, 3, 224, 224)
    (torch.Size([2, 224, 224]), 'Egyptian cat')
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's path, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of cfcam_gpu.export, got {str(path)!r}: no such file")
    metadata = read_metadata(path)
    _check_here(path, metadata)
    from torch._inductor import aoti_load_package  # takes a second, and may not be needed

    return ExportedCFCAM(aoti_load_package(str(path)), metadata)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What a file of `cfcam_gpu.export` says of itself; nothing of it is run.

    Raises:
        ValueError: it is no such file.
    """
    from torch._C import _aoti

    reader: Any = _aoti  # its types say less than it has
    try:
        found = reader.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")
    except RuntimeError as error:
        raise ValueError(f"{path}: not a file of cfcam_gpu.export: {str(error).splitlines()[0]}") from error
    if "cfcam_gpu" not in found:
        raise ValueError(f"{path}: an AOTInductor package, but not one of cfcam_gpu.export")
    return found


def _check_here(path, metadata):
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{path}: format {metadata['format']} of cfcam_gpu {metadata['cfcam_gpu']}, this version reads {FORMAT}:"
            " export it again"
        )
    device = torch.device(metadata["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{path}: compiled for device 'cuda', which is not here; export the model on this device")
    for name, here in about_here(device).items():
        if metadata[name] != here:
            what = {"torch": "torch", "machine": "the processor", "capability": "a processor or GPU with"}[name]
            raise ValueError(f"{path}: compiled for {what} {metadata[name]}, here is {here}: export it again here")


class ExportedCFCAM:
    """A loaded file: `maps` and `explain` as `CFCAM` has them, for one class an image.

    Calls in several threads do not disturb each other.

    Attributes:
        outputs: the logits (B, n) of the thread's latest call; None before.
        classes: int64 (B,), the classes that it explained; None before.
        metadata: what the file says of itself, text by names.
        input_size: (C, H, W), the example's.
        sides: the least and the largest of H, and of W, that it takes: the same where the size is fixed.
        n_classes: n.
        device, dtype: of the model and the images.
        target_names, guide_names: of the layers, as of `CFCAM`.
        config: `CFCAMConfig`.
        class_names: list, or dictionary by index, or None.
        preprocess: `cfcam_gpu.models.Preprocess`, or None where none was kept.
    """

    def __init__(self, run: Any, metadata: dict[str, str]) -> None:
        self._run, self.metadata, self._latest = run, metadata, _Latest()
        self.input_size = tuple(map(int, metadata["input"].split()))
        least_and_most = list(map(int, metadata.get("sides", "").split()))
        self.sides = list(zip(least_and_most[::2], least_and_most[1::2])) or [
            (side, side) for side in self.input_size[1:]
        ]
        self.n_classes = int(metadata["classes"])
        self.device, self.dtype = torch.device(metadata["device"]), getattr(torch, metadata["dtype"])
        self.target_names: list[str] = json.loads(metadata["target_layers"])
        self.guide_names: list[str] = json.loads(metadata["guide_layers"])
        self.config = CFCAMConfig(**json.loads(metadata["config"]))
        names = json.loads(metadata["class_names"])
        self.class_names = {int(key): name for key, name in names.items()} if isinstance(names, dict) else names
        self.preprocess: Preprocess | None = _preprocess(metadata)

    @property
    def outputs(self) -> torch.Tensor | None:
        return self._latest.outputs

    @property
    def classes(self) -> torch.Tensor | None:
        return self._latest.classes

    def maps(self, input_tensor: torch.Tensor, targets: Targets = None) -> torch.Tensor:
        """The maps of a batch, (B, H, W) in [0, 1].

        Args:
            input_tensor: (B, C, H, W) of the file's dtype and of a size that it takes (`sides`); moved to its device.
            targets: None for each image's top class; or one class index an image, in a list or an integer tensor (B,).

        Raises:
            TypeError: the images are no tensor, or of another dtype; targets are callables.
            ValueError: a size that it does not take, or no images; a wrong number of targets; a class out of range; on
                a CPU, NaN or infinity.
            RuntimeError: the file's own, as where values overflow within the model.
        """
        return self.explain(input_tensor, targets).maps

    def explain(self, input_tensor: torch.Tensor, targets: Targets = None) -> Explanation:
        """The maps with the logits and the classes, in one object; it has no labels and no weights.

        Args, Raises: as for `maps`.
        """
        images = self._checked(input_tensor)
        chosen = check_targets(targets, len(images))
        if isinstance(chosen, tuple):
            raise TypeError("targets must be None or class indices: a file has no callables")
        if chosen is None:
            chosen = torch.full((len(images),), TOP, device=self.device)
        else:
            chosen = classes_on(self.device, chosen, self.n_classes)
        try:
            with torch.no_grad():
                logits, maps, classes = self._run(images, chosen)
        except RuntimeError as error:  # the file's own says only how many values are
            if not images.isfinite().all():
                raise ValueError("input_tensor must be finite, got NaN or infinite values") from error
            raise
        self._latest.outputs, self._latest.classes = logits, classes
        return Explanation(maps, logits, classes, None, None)

    def _checked(self, images):
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"input_tensor must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype != self.dtype:
            raise TypeError(f"input_tensor must be {self.dtype}, got {images.dtype}")
        channels, of_axes = self.input_size[0], zip(self.sides, images.shape[2:])
        fits = images.ndim == 4 and images.shape[1] == channels and all(low <= n <= high for (low, high), n in of_axes)
        if not fits or not len(images):
            sides = (f"{low}" if low == high else f"{low} to {high}" for low, high in self.sides)
            expected = ", ".join([f"{channels}", *sides])
            raise ValueError(f"input_tensor must be (B, {expected}) with B >= 1, got {tuple(images.shape)}")
        return images.detach().to(self.device).contiguous()  # the compiled code reads what it was compiled for


def _preprocess(metadata):
    from cfcam_gpu.models import Preprocess

    if "mean" not in metadata:
        return None
    numbers: dict[str, Any] = {
        name: tuple(map(kind, metadata[name].split())) or None
        for name, kind in {"size": int, "resize": int, "mean": float, "std": float}.items()
    }
    rest = {"squash": metadata["squash"] == "True", "interpolation": metadata["interpolation"]}
    return Preprocess(**numbers, **rest)
