"""Whether a model is as it was: its modules, weights, buffers, plain attributes and containers of such, mode and hooks.

A compiled program holds a copy of the weights, so a change of the model would go unseen. `Watch` looks at every call,
without reading a value: at identities, torch's version counters and addresses. A write that torch does not count is not
seen: ``weight.data.mul_(2)``, or one through NumPy.
"""

import copy
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import chain
from operator import attrgetter, eq, is_
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as of_all_modules

from cfcam_gpu.calls import is_of_call

CONSTANT = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, np.generic, torch.dtype, torch.device),
    *(torch.memory_format, FunctionType, BuiltinFunctionType, type),
)

PLAIN = (*CONSTANT, tuple, np.ndarray)
"""Attributes of modules that are constants in a program."""

CONTAINERS = (list, dict, set, tuple, SimpleNamespace, Namespace)
"""And dataclasses: attributes in which constants may change. An adapter's scale lies in a dictionary."""

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module, which are looked at by themselves."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

version, address = attrgetter("_version"), torch.Tensor.data_ptr


def _dict_version():
    """A function of a dictionary that gives another number after each change of it; None without one.

    It is that of torch's compiler, which no interface promises; so whether it counts is looked at.
    """
    probe = nn.Module()
    try:
        count = torch._C._dynamo.guards.dict_version
        counted = [count(vars(probe)), count(probe._forward_hooks)]
        probe.training = False
        probe._forward_hooks[0] = None
        counted += [count(vars(probe)), count(probe._forward_hooks)]
        probe._forward_hooks.clear()
        vars(probe)["training"] = True
        counted += [count(vars(probe)), count(probe._forward_hooks)]
    except Exception:  # not there, of another signature, or of a Python whose dictionaries it does not know
        return None
    return count if len(set(counted)) == len(counted) else None


dict_version = _dict_version()

equal_addresses = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""``equal_addresses(tensors, addresses, indices)`` in one loop of C++, so that the memory's latencies overlap."""


class _Attribute(NamedTuple):
    owner: dict[str, Any]
    name: str
    value: Any
    of: str

    def __str__(self):
        return f"{self.name} of {self.of}"


class _Container(NamedTuple):
    owner: dict[str, Any]
    name: str
    value: Any
    contents: Any
    of: str


class Watch:
    """What ``model`` is now; `change` says what has become of it.

    Args:
        model: in the state that is to stay.
        constants: further tensors that are to stay as they are.

    Raises:
        ValueError: a tensor has no version counter, because it was made under ``torch.inference_mode``.
    """

    def __init__(self, model: nn.Module, constants: Iterable[torch.Tensor] = ()) -> None:
        self._modules = {module: repr(name) if name else _type(model) for name, module in model.named_modules()}
        self._owners = owners = [vars(module) for module in self._modules]
        of_module = [(of, vars(module)[name]) for module, of in self._modules.items() for name in HOOKS]
        of_all = [("every module", getattr(of_all_modules, f"_global{name}")) for name in HOOKS]
        self._hooked, self._hooks = zip(*of_module, *of_all)
        # One that is empty now may be filled without a difference to what the model computes.
        kinds = ("_parameters", "_buffers", "_modules")
        self._held = [owner[kind] for owner in owners for kind in kinds if owner[kind]]
        self._dicts = [*self._held, *self._owners]
        self._counted = self._count()
        self._parts = list(_parts(self._held))
        self._ids = list(map(id, self._parts))
        others = {id(tensor): tensor for tensor in constants}
        of_model = {id(part): part for part in self._parts if isinstance(part, torch.Tensor)}
        self._tensors = list({**others, **of_model}.values())
        self._names = {
            id(tensor): repr(name) for name, tensor in chain(model.named_parameters(), model.named_buffers())
        }
        for tensor in self._tensors:
            if tensor.is_inference():
                raise ValueError(f"{self._name(tensor)} is of torch.inference_mode, where changes are not counted")
        self._versions, self._addresses = list(map(version, self._tensors)), list(map(address, self._tensors))
        self._indices = list(range(len(self._tensors)))
        self._attributes = [
            _Attribute(vars(module), name, value, of)
            for module, of in self._modules.items()
            for name, value in vars(module).items()
            if isinstance(value, PLAIN) or id(value) in others
        ]
        containers = [
            _Container(vars(module), name, value, _contents(value, others), of)
            for module, of in self._modules.items()
            for name, value in vars(module).items()
            if name not in OF_TORCH and _is_container(value)
        ]
        self._containers = [each for each in containers if not isinstance(each.value, tuple) or _may_change(each.value)]
        values = {id(each.value): each for each in self._containers}.values()
        # Those of constants alone are compared in C.
        self._flat = [each.value for each in values if _is_flat(each.value)]
        self._flat_before = list(map(copy.copy, self._flat))
        self._nested = [each for each in values if not _is_flat(each.value)]
        self._constants = others
        self._held_before, self._owners_before = list(map(dict, self._held)), list(map(dict, self._owners))
        # One element may be equal, and yet another tensor.
        single = [
            (held, name, value)
            for held in chain(self._held, self._owners)
            for name, value in held.items()
            if isinstance(value, torch.Tensor) and value.numel() < 2
        ]
        self._single = [[each[index] for each in single] for index in range(3)]

    def change(self) -> str | None:
        """What is not as it was, in words; None where all is."""
        if (
            self._are_where_they_were()
            and list(map(version, self._tensors)) == self._versions
            and not any(self._hooks)
            and self._have_their_contents()
            and self._is_equal()
        ):
            return None
        return self._first_change()

    def _are_where_they_were(self):
        if equal_addresses is None:
            return list(map(address, self._tensors)) == self._addresses
        return equal_addresses(self._tensors, self._addresses, self._indices)

    def _have_their_contents(self):
        return all(map(eq, self._flat, self._flat_before)) and all(
            _contents(each.value, self._constants) == each.contents for each in self._nested
        )

    def _is_equal(self):
        """Whether all that the modules hold is what it was, or equal.

        Where dictionaries count their changes, their contents are looked at after one alone: a fraction of the memory
        that is read, which the network has driven out of the caches.
        """
        counted = self._count()  # before the look
        if counted is not None and counted == self._counted:
            return True
        try:
            # A dictionary looks at identities first, in C, so that this takes a fraction of the time of a loop.
            is_equal = (
                all(map(is_, map(dict.get, *self._single[:2]), self._single[2]))
                and self._held == self._held_before
                and self._owners == self._owners_before
            )
        except Exception:  # another tensor, of which the truth of being equal is ambiguous; or whatever __eq__ raises
            return False
        if is_equal and self._is_same():
            self._counted = counted
        return is_equal

    def _is_same(self):
        """Whether dictionaries that are equal hold the very objects. Others may change on their own."""
        before = chain(self._held_before, self._owners_before)
        return all(now[name] is value for now, was in zip(self._dicts, before) for name, value in was.items())

    def _count(self):
        return None if dict_version is None else list(map(dict_version, self._dicts))

    def _first_change(self):
        """The change, looked for one after the other; None where what is new is equal, or hooks of this package."""
        for attribute in self._attributes:
            now = attribute.owner.get(attribute.name)
            if now is not attribute.value and not _equal(now, attribute.value):
                return f"{attribute} is {_shown(now)}, and was {_shown(attribute.value)}"
        for container in self._containers:
            if _contents(container.owner.get(container.name), self._constants) != container.contents:
                return f"{container.name} of {container.of} has other contents"
        parts = set(map(id, _parts(self._held)))
        for part in self._parts:
            if id(part) not in parts:
                return f"{self._name(part)} has been replaced or removed"
        if list(map(id, _parts(self._held))) != self._ids:
            return "weights, buffers or modules have been added"
        for tensor, before, at in zip(self._tensors, self._versions, self._addresses):
            if tensor._version != before:
                return f"{self._name(tensor)} has been changed in place"
            if tensor.data_ptr() != at:
                return f"{self._name(tensor)} is elsewhere: another device, dtype or memory format, or new .data"
        for of, owner, before in zip(self._modules.values(), self._owners, self._owners_before):
            for name, value in list(owner.items()):
                if name not in before and (isinstance(value, PLAIN) or name == "forward"):
                    return f"{of} has a new attribute, {name}"
        return self.hook()

    def hook(self) -> str | None:
        """A hook on the model, or on all modules, that is not of a call of this package; None without one."""
        for of, hooks in zip(self._hooked, self._hooks):
            for hook in list(hooks.values()):
                if not is_of_call(hook):
                    return f"{of} has a hook, {getattr(hook, '__qualname__', _type(hook))}"
        return None

    def _name(self, part):
        if isinstance(part, nn.Module):
            return self._modules.get(part, _type(part))
        return self._names.get(id(part), "a tensor that it uses")


def _is_container(value):
    return isinstance(value, CONTAINERS) or (is_dataclass(value) and not isinstance(value, type))


def _values(container):
    """Of a container what it holds, by their places."""
    if isinstance(container, dict):
        return container
    if isinstance(container, (list, tuple)):
        return dict(enumerate(container))
    if isinstance(container, set):
        return dict.fromkeys(container)
    if is_dataclass(container):
        return {each.name: getattr(container, each.name, None) for each in fields(container)}
    return vars(container)


def _is_flat(container):
    return isinstance(container, (list, dict, set)) and all(
        isinstance(value, CONSTANT) for value in _values(container).values()
    )


def _may_change(value):
    """Whether there is something in the value that may change while it is the same object."""
    if not _is_container(value):
        return False
    return not isinstance(value, tuple) or any(map(_may_change, value))


def _contents(value, constants, within=()):
    """What is compared of a value: its constants, which of a program's tensors it holds, and the types of the rest."""
    if isinstance(value, CONSTANT):
        return value
    if id(value) in constants or isinstance(value, np.ndarray):
        return "the object", id(value)
    if not _is_container(value) or id(value) in within:
        return type(value)
    within = (*within, id(value))
    return type(value), {key: _contents(each, constants, within) for key, each in _values(value).items()}


def _parts(held):
    return chain.from_iterable(map(dict.values, held))


def _equal(now, before):
    if type(now) is not type(before) or isinstance(now, torch.Tensor):
        return False
    try:
        return bool(now == before)
    except Exception:  # tensors in a tuple
        return False


def _shown(value):
    return _type(value) if isinstance(value, torch.Tensor) else repr(value)


def _type(value):
    return type(value).__name__
