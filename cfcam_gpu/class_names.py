"""Names of classes, however people keep them: a list, a dictionary, or a file of either."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

PLACEHOLDER = re.compile(r"LABEL_\d+")
"""What transformers calls a class that nobody has named."""


def class_names(names: Any) -> list[str] | dict[int, str]:
    """Class names as a list, or as a dictionary by index, which need not name every class.

    Args:
        names: one of

            - a list of names, or another iterable but a string;
            - a dictionary {index: name}, with indices as integers or, as JSON has them, as strings; {name: index}, as
              torchvision's ``class_to_idx``; {index: [..., name]}, as Keras has ImageNet's;
            - the path of a file: JSON with one of these, or with one as its ``id2label``, as the ``config.json`` of
              transformers; else text with a name on each line.

    Raises:
        TypeError: it is none of these.
        ValueError: a dictionary has no indices, or one below 0, or one twice; or the file is no such JSON.
        OSError: the file cannot be read.

    >>> class_names({"0": "cat", "7": "dog"})
    {0: 'cat', 7: 'dog'}
    """
    if isinstance(names, (str, os.PathLike)):
        return _from_file(Path(names))
    if isinstance(names, Mapping):
        return _by_index(names)
    if not isinstance(names, Iterable):
        raise TypeError(f"class names must be a list, a dictionary or a file's path, got {type(names).__name__}")
    return [str(name) for name in names]


def _from_file(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    if path.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        lines = [line.strip() for line in text.rstrip().splitlines()]
        if not lines:
            raise ValueError(f"{path}: expected a class name on each line, got none")
        return lines
    try:
        names = json.loads(text)
        if isinstance(names, dict) and isinstance(names.get("id2label"), dict):
            names = names["id2label"]
        if not isinstance(names, (list, dict)) or not names:
            raise ValueError("a list or a dictionary of class names")
        return class_names(names)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON with class names: {error}") from error


def _by_index(names):
    found = {}
    for key, value in names.items():
        if isinstance(value, int):
            key, value = value, key
        elif isinstance(value, (list, tuple)) and value:
            value = value[-1]
        try:
            index = int(key)
        except (TypeError, ValueError):
            index = -1
        if index < 0 or index in found:
            raise ValueError(f"a dictionary of class names must have one index for each, got {key!r}: {value!r}")
        found[index] = str(value)
    return found


def names_in_config(model: nn.Module) -> dict[int, str] | None:
    """The ``id2label`` of a model's ``config``, as transformers has it; None without, or with placeholders alone."""
    id2label = from_config(model, "id2label")
    if not isinstance(id2label, Mapping) or not id2label:
        return None
    names = _by_index(id2label)
    return None if all(PLACEHOLDER.fullmatch(name) for name in names.values()) else names


def from_config(model: nn.Module, name: str) -> Any:
    """An entry of the ``config`` that a model carries, as an attribute or by key; None without."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def fit(names: list[str] | dict[int, str] | None, n_classes: int) -> bool:
    """Whether the names can be those of so many classes; of one output also two names, those of 0 and of 1."""
    if not names:
        return False
    if isinstance(names, dict):
        return max(names) < max(n_classes, 2)
    return len(names) == n_classes or (n_classes == 1 and len(names) == 2)


def of_class(names: list[str] | dict[int, str], index: int) -> str:
    """The name of a class; "class 7" where a dictionary has none."""
    return names[index] if isinstance(names, list) else names.get(index, f"class {index}")


def of_side(names: list[str] | dict[int, str] | None, positive: bool) -> str:
    """What a single output's side is called: by two names, the second for the positive side, or by its one name."""
    named = dict(enumerate(names)) if isinstance(names, list) else dict(names or {})
    if len(named) == 1 and 0 in named:
        named = {1: named[0]}
    if int(positive) in named:
        return named[int(positive)]
    if named:
        return f"not {named[not positive]}"
    return "positive" if positive else "negative"
