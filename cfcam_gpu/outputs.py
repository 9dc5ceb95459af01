"""What models return: the logits in it, an image's part of it, and a copy with every tensor changed.

Containers are tensors, tuples, named tuples, lists, dictionaries, dataclasses, transformers' outputs, whatever else is
registered with ``torch.utils._pytree``, and objects that hold tensors in their attributes; nested as they like.
"""

import copy
from collections.abc import Callable, Mapping, MutableSequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

NO_CONTAINERS = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, str, bytes)
"""May have tensors in their attributes, but not as a model's outputs."""


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """``value`` with ``function(tensor)`` in the place of every tensor, in containers of the same types.

    What holds a changed tensor is copied, and only that; its class's constructor is not called, except where the class
    is registered with ``torch.utils._pytree``. A tensor that is held under several names is changed once.

    Raises:
        TypeError: an object that holds tensors cannot be copied.

    >>> map_tensors(len, {"logits": torch.rand(2, 5), "stages": [torch.rand(3, 1)], "n": 7})
    {'logits': 2, 'stages': [3], 'n': 7}
    """
    return _mapped(function, value, {})


def all_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, each once, in the order in which `map_tensors` comes to them."""
    found: list[torch.Tensor] = []

    def note(tensor):
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def _mapped(function, value, seen):
    if id(value) not in seen:
        # The value beside its result: an id is taken again once its object is gone.
        seen[id(value)] = value, value  # of an object that leads back to itself
        seen[id(value)] = value, _mapped_anew(function, value, seen)
    return seen[id(value)][1]


def _mapped_anew(function, value, seen):
    if isinstance(value, torch.Tensor):
        return function(value)
    leaves, structure = tree_flatten(value)
    if not (len(leaves) == 1 and leaves[0] is value):
        mapped = [_mapped(function, leaf, seen) for leaf in leaves]
        changed = any(new is not old for new, old in zip(mapped, leaves))
        return tree_unflatten(mapped, structure) if changed else value
    if isinstance(value, NO_CONTAINERS):
        return value
    items, attributes = (
        {key: new for key, old in held.items() if (new := _mapped(function, old, seen)) is not old}
        for held in (_items(value), _attributes(value))
    )
    if not items and not attributes:
        return value
    try:
        if isinstance(value, tuple):  # of a class derived from a named tuple's
            rest = (items.get(index, old) for index, old in enumerate(value))
            return tuple.__new__(type(value), rest)
        copied = copy.copy(value)
        for key, new in items.items():
            copied[key] = new
        for name, new in attributes.items():  # also where the values are held under both, as transformers' are
            object.__setattr__(copied, name, new)  # also of a frozen dataclass
    except Exception as error:
        raise TypeError(
            "what a model takes and returns must be tensors in tuples, lists, dictionaries or dataclasses, got"
            f" {_type(value)}, which cannot be copied: {error}"
        ) from error
    return copied


def _items(value):
    """What ``value`` holds by key or by index, of a class that no tree is known for."""
    if isinstance(value, Mapping):
        return dict(value.items())
    return dict(enumerate(value)) if isinstance(value, (tuple, MutableSequence)) else {}


def _attributes(value):
    """What ``value`` holds by name: its dictionary's and its slots' values."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def _slots(kind):
    names = vars(kind).get("__slots__", ())
    return [name for name in ([names] if isinstance(names, str) else names) if name not in ("__dict__", "__weakref__")]


def first_tensor(output: Any) -> torch.Tensor | None:
    """The floating-point tensor that a layer's output is, or that it starts with as a tuple or list; None without."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """A layer's output with this tensor in the place of `first_tensor`."""
    if not isinstance(output, (tuple, list)):
        return tensor
    rest = (tensor, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def find_logits(outputs: Any, batch: int) -> torch.Tensor:
    """The tensor (B, n_classes) that class indices are meant for.

    That is the output itself; or what it calls ``logits``; or the only floating-point (B, n) tensor that it holds, not
    counting those in containers within it.

    Raises:
        ValueError: there is none, or more than one; the message lists what there is.
        TypeError: the output is no container of tensors.
    """
    fields = {} if isinstance(outputs, torch.Tensor) else _fields(outputs)
    logits = outputs if isinstance(outputs, torch.Tensor) else fields.get("logits")
    if logits is None and not isinstance(outputs, torch.Tensor):
        if isinstance(getattr(outputs, "logits", None), torch.Tensor):  # a property
            logits = outputs.logits
        else:
            found = {id(each): each for each in fields.values() if _is_logits(each, batch)}
            logits = next(iter(found.values())) if len(found) == 1 else None
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[0] == batch:
        return logits
    needs = f"class indices and None need ({batch}, n_classes)"
    if isinstance(outputs, torch.Tensor):
        shape = tuple(outputs.shape)
        raise ValueError(f"targets must be one callable per image for a model that returns shape {shape}: {needs}")
    message = f"targets must be one callable per image for a model that returns {_type(outputs)}: {needs}"
    if not fields:
        raise TypeError(message)
    listed = ", ".join(f"{name}: {_describe(each)}" for name, each in fields.items())
    raise ValueError(f"{message}, called logits or the only such tensor, got {listed}")


def _is_logits(value, batch):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 2 and value.shape[0] == batch


def _fields(outputs):
    """{name or [index]: value} of what an output holds at its first level."""
    if isinstance(outputs, NO_CONTAINERS):
        return {}
    names = getattr(outputs, "_fields", None)
    if isinstance(outputs, tuple) and names:
        return dict(zip(names, outputs))
    if isinstance(outputs, Mapping):
        return dict(outputs.items())
    if isinstance(outputs, (tuple, MutableSequence)):
        return {f"[{index}]": each for index, each in enumerate(outputs)}
    return _attributes(outputs)


def image_part(outputs: Any, index: int, batch: int) -> Any:
    """Image ``index``'s part of a model's outputs for ``batch`` images.

    Every tensor of B rows is indexed, however it is held, and all else is as it is: a loss, a mask (H, W) that all
    images share. But of a list of B elements that are no tensors it is one element, as detectors return it, and of a
    list of B tensors too, unless each of them has B rows.

    Raises:
        ValueError: a single tensor has not one row per image, or B tensors in a list have B rows each: then an element
            could be an image's, or one of several outputs.
        TypeError: of another kind of object, in which no tensor is found, the images' parts cannot be told.
    """
    if isinstance(outputs, list) and len(outputs) == batch:
        tensors = all(isinstance(each, torch.Tensor) for each in outputs)
        if batch > 1 and tensors and all(_has_rows(each, batch) for each in outputs):
            raise ValueError(
                f"the model's output must be a tuple or a dict of tensors, or a list with one element per image, got a"
                f" list of {batch} tensors of {batch} rows each, which could be either; explain another number of"
                " images at once, or wrap the model"
            )
        return outputs[index]
    if isinstance(outputs, torch.Tensor) and outputs.ndim and batch > 1 and len(outputs) != batch:
        raise ValueError(
            f"the model's output must have one row per image, ({batch}, ...), got {tuple(outputs.shape)}: callable"
            " targets would get the whole batch; explain one image at a time, or wrap the model"
        )
    seen = []

    def row(tensor):
        seen.append(tensor)
        return tensor[index] if _has_rows(tensor, batch) else tensor

    part = map_tensors(row, outputs)
    if batch > 1 and not seen:
        raise TypeError(
            f"the model's output must hold tensors, so that callable targets get their image's part, got"
            f" {_type(outputs)}, in which none is found; explain one image at a time, or wrap the model"
        )
    return part


def _has_rows(tensor, batch):
    return tensor.ndim > 0 and len(tensor) == batch


def _describe(value):
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return _type(value)


def _type(value):
    return type(value).__name__
