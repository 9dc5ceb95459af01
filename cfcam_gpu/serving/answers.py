"""What clients ask for, and the answers: JSON, a PNG picture, or the map in float16."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from cfcam_gpu import images
from cfcam_gpu.checks import did_you_mean
from cfcam_gpu.datasets import writing
from cfcam_gpu.serving.engine import Engine, Result
from cfcam_gpu.serving.refusals import Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {"json": "application/json", "png": "image/png", "npy": "application/octet-stream"}
"""{format: its media type}."""

MAPS = ("base64", "list", "none")
"""How a map stands in JSON."""

DEFAULT_TOP = 5
"""Classes in an answer, of a network that has so many."""


@dataclass(frozen=True)
class Wanted:
    """What a client asks for, in the query of its request.

    Attributes:
        format: one of `FORMATS`.
        target: the class to explain, by its index; None: the top one.
        top: how many classes are told, the most probable first.
        map: how the map stands in JSON, one of `MAPS`.
        overlay: whether JSON has the overlay too, as a PNG file in base64.
        opacity: of the overlay where the map is hottest, in [0, 1].
        colormap: one of matplotlib's.
    """

    format: str = "json"
    target: int | None = None
    top: int = DEFAULT_TOP
    map: str = "base64"
    overlay: bool = False
    opacity: float = 0.7
    colormap: str = "inferno"

    @property
    def draws(self) -> bool:
        return self.format == "png" or (self.format == "json" and self.overlay)


CLASSIFIED = ("top",)
"""What can be asked for where nothing is explained."""


def wanted(query: Sequence[tuple[str, str]], n_classes: int, maps: bool) -> Wanted:
    """What the parameters of a query say.

    Args:
        query: (name, value), in order.
        n_classes: of the network.
        maps: whether the picture is to be explained, or only classified.

    Raises:
        Refusal: 422; a parameter is unknown, there twice, or has no such value.
    """
    readers = {
        "format": _one_of(FORMATS),
        "class": _whole(0, n_classes - 1),
        "top": _whole(1, n_classes),
        "map": _one_of(MAPS),
        "overlay": lambda text: _one_of(("true", "false"))(text) == "true",
        "opacity": _share,
        "colormap": _colormap,
    }
    readers = {name: read for name, read in readers.items() if maps or name in CLASSIFIED}
    found: dict[str, Any] = {}
    for name, text in query:
        if name not in readers:
            raise Refusal(422, f"no parameter {name!r}; there are {', '.join(readers)}{did_you_mean(name, readers)}")
        field = "target" if name == "class" else name
        if field in found:
            raise Refusal(422, f"{name} is given twice")
        try:
            found[field] = readers[name](text)
        except ValueError as error:
            raise Refusal(422, f"{name} must be {error}, got {text!r}") from error
    return Wanted(**found)


def _one_of(choices):
    def read(text):
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return read


def _whole(least, most):
    def read(text):
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError(f"an integer from {least} to {most}")
        return int(text)

    return read


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return value


def _colormap(text):
    try:
        images.get_colormap(text)
    except ValueError as error:
        raise ValueError("one of matplotlib's colour maps") from error
    return text


def answer(
    wanted: Wanted, engine: Engine, result: Result, seen: "Image | None"
) -> tuple[bytes, str, Mapping[str, str]]:
    """The body of an answer, its media type and further headers.

    Args:
        seen: the region of the photograph that the network sees, where it is drawn.
    """
    if wanted.format == "json":
        said = _in_json(wanted, engine, result, seen)
        return json.dumps(said, ensure_ascii=False).encode(), FORMATS["json"], {}
    content = _overlay(wanted, result, seen) if wanted.format == "png" else _npy(result.map)
    explained = _said(engine, result, result.explained)
    index = explained["index"]
    headers = {
        "x-class-index": "" if index is None else str(index),
        "x-class-name": quote(explained["name"]),
        "x-class-probability": f"{explained['probability']:.6f}",
    }
    return content, FORMATS[wanted.format], headers


def _in_json(wanted, engine, result, seen):
    said = {"classes": _best(engine, result, wanted.top)}
    if result.map is None:
        return said
    said["explained"] = _said(engine, result, result.explained)
    if wanted.map != "none":
        said["map"] = _map_in_json(result.map, wanted.map)
    if wanted.draws:
        said["overlay"] = _base64(_overlay(wanted, result, seen))
    return said


def _said(engine, result, which):
    """A class, or a side of a network with one output, of which the positive one has an index, 0."""
    if engine.n_classes == 1:
        positive = float(result.probabilities[0])
        index, probability = (0, positive) if which else (None, 1 - positive)
    else:
        index, probability = which, float(result.probabilities[which])
    return {"index": index, "name": engine.name_of(which), "probability": round(probability, 6)}


def _best(engine, result, top):
    if engine.n_classes == 1:
        sides = [_said(engine, result, side) for side in (True, False)]
        return sorted(sides, key=lambda side: -side["probability"])
    best = np.argsort(-result.probabilities, kind="stable")[:top]
    return [_said(engine, result, index) for index in best.tolist()]


def _map_in_json(values, how):
    content = values.astype("<f2")
    said = {"shape": list(values.shape), "dtype": "float16"}
    return {**said, "values": content.tolist()} if how == "list" else {**said, "base64": _base64(content.tobytes())}


def _base64(content):
    return base64.b64encode(content).decode()


def _npy(values):
    file = io.BytesIO()
    np.save(file, values.astype("<f2"))
    return file.getvalue()


def _overlay(wanted, result, seen):
    return writing.encoded(images.overlay(seen, result.map, wanted.colormap, wanted.opacity), "png")
