"""The network behind a server: batches of pictures in, probabilities and maps on the host out."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cfcam_gpu import models
from cfcam_gpu import probabilities as prob
from cfcam_gpu.datasets import running
from cfcam_gpu.outputs import find_logits

PROBE_SIDE = 256
"""Pixels of the picture of noise that the network is looked at with, before its preprocess."""


class Kind(NamedTuple):
    """What pictures of one batch have in common."""

    maps: bool
    """Whether they are explained, or only classified."""
    given: bool
    """Whether their classes are given, not the top ones."""
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Work:
    """A picture that waits for the network.

    Attributes:
        pixels: (C, H, W), as the model's preprocess makes it.
        maps: whether it is to be explained.
        target: the class to explain; None: the top one.
    """

    pixels: torch.Tensor
    maps: bool = True
    target: int | None = None

    @property
    def kind(self) -> Kind:
        return Kind(self.maps, self.target is not None, tuple(self.pixels.shape), self.pixels.dtype)


@dataclass(frozen=True, eq=False)
class Result:
    """What the network says of a picture, on the host.

    Attributes:
        probabilities: float32 (n_classes,).
        explained: the class that the map is of; of a network with one output True for its positive side. None without
            a map.
        map: float32 (H, W) in [0, 1], of the region that the network sees; or None.
    """

    probabilities: np.ndarray
    explained: int | bool | None
    map: np.ndarray | None


class _Explaining(running.Explaining):
    def __init__(self, *args):
        super().__init__(*args)
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Engine:
    """A network, ready to explain: its layer is found, and a first picture of noise has been explained.

    Args:
        model: as for `load_model`; or a module, alone or as (module, preprocess, class_names), of which a copy serves,
            in evaluation mode, on the same device.
        options: those of `datasets.Options` that say how a picture is explained: ``labels``, ``multilabel``, ``layer``,
            ``method``, ``paper``, ``backend``, and of a model by name ``device``.

    Raises:
        ValueError: the options cannot be carried out, or the network takes volumes.
        TypeError: an option is unknown, or the model is of another kind.
        As `load_model`.

    >>> engine = Engine("demo")
    >>> engine.n_classes
    1000
    """

    def __init__(self, model: str | nn.Module | tuple = "demo", **options: Any) -> None:
        load: Callable[[], models.LoadedModel] | None = None
        if not isinstance(model, str):
            given = models.loaded_from(model, "model must be a spec, or")
            # A copy, because the caller's own is to keep its mode, and its outputs where they are probabilities.
            served = replace(given, model=copy.deepcopy(given.model).eval())
            load = lambda: served
            model = type(given.model).__name__
            if "device" in options:
                raise TypeError("device is of a model by name; a module serves where it is")
            options["device"] = next((each.device for each in given.model.parameters()), torch.device("cpu"))
        self.options = running.check(running.Options(Path(), model, top=1, **options))
        self.loaded = running.load(self.options, load)
        if self.loaded.n_axes != 2:
            raise running.Refused(f"pictures are served, {model} takes scans and videos")
        self._explaining = _Explaining(self.options, self.loaded)
        probe = self._probe()
        self._explaining.prepare(probe[None].to(self.options.where))
        self.n_classes: int = self._explaining.n_classes
        for maps in (True, False):  # lazy initialisation, and the compilation of kernels, are not the first client's
            (first,) = self.run([Work(probe, maps)])
            if isinstance(first, Exception):
                raise first

    def _probe(self):
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (PROBE_SIDE, PROBE_SIDE, 3), np.uint8)
        return self.loaded.preprocess(Image.fromarray(noise))

    @property
    def notes(self) -> list[str]:
        """What was found about the network, a line each: its layer, and what its outputs are."""
        return self._explaining.notes

    @property
    def target_names(self) -> list[str]:
        """The layer that is explained."""
        return self._explaining.cam.target_names

    def name_of(self, index: int | bool) -> str:
        """The name of a class, or of a side of a network with one output."""
        if self.n_classes == 1:
            return self.loaded.side_name(bool(index))
        return self.loaded.class_name(index, self.n_classes)

    def run(self, works: list[Work]) -> list[Result | Exception]:
        """The results of pictures of one `Kind`; of those on which the network fails, the error.

        Where a batch fails, each of its pictures is tried on its own.
        """
        try:
            return list(self._run(works))
        except Exception as error:
            if len(works) == 1:
                return [error]
        return [self.run([work])[0] for work in works]

    def _run(self, works):
        explaining, kind = self._explaining, works[0].kind
        inputs = explaining.transfer.to_device(torch.stack([work.pixels for work in works]))
        inputs = explaining.as_taken(inputs)
        maps: Any = [None] * len(works)
        explained = maps
        if kind.maps:
            found = explaining.cam.explain(inputs, [work.target for work in works] if kind.given else None)
            outputs, maps = found.outputs, found.maps.float().cpu().numpy()
        else:
            with torch.inference_mode():
                outputs = self.loaded.model(inputs)
        logits = find_logits(outputs, len(works))
        scores = prob.probabilities(logits, explaining.multilabel).cpu().numpy()
        if kind.maps:
            if self.n_classes == 1:
                explained = [kind.given or side for side in (logits[:, 0] >= 0).tolist()]
            else:
                explained = found.targets.tolist()
        if not np.isfinite(scores).all():
            raise ValueError("the network's outputs are not finite")
        return map(Result, scores, explained, maps)
