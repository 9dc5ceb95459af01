"""The operations of a recorded head: what they are called with, which are needed, and which compute constants."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

# Dataclasses, not tuples, which torch's pytree would look into.


@dataclass(frozen=True)
class Rows:
    """An integer of the recording that is so many times the number of images."""

    factor: int


@dataclass(frozen=True)
class Slot:
    """A tensor that an earlier operation made."""

    number: int


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor from before the layer, a row for each image."""

    tensor: torch.Tensor
    source: Any = None  # where another forward pass has its like; None if that is not known
    slices: tuple[tuple[int, int, int], ...] = ()  # of it, one after the other: axis, start and end

    def sliced(self, axis: int, start: int, end: int) -> "Kept":
        """A range of an axis."""
        part = self.tensor.narrow(axis, start, end - start).clone()
        return Kept(part, self.source, (*self.slices, (axis, start, end)))

    def of(self, tensor: torch.Tensor) -> "Kept":
        """The same of another pass's tensor."""
        kept = Kept(tensor, self.source)
        for each in self.slices:
            kept = kept.sliced(*each)
        return kept


Size = int | Rows
"""Of an axis."""


class Step(NamedTuple):
    """An operation."""

    function: Any
    leaves: list[Any]  # of (args, kwargs): constants, Rows, Slot, Kept
    spec: Any
    made: list[int]  # the slots of the tensors that it returns
    done: list[int]  # the slots that no later step needs

    @property
    def used(self) -> set[int]:
        """The slots that it takes."""
        return {leaf.number for leaf in self.leaves if type(leaf) is Slot}

    def run(self, value: Callable[[Any], Any]) -> list[torch.Tensor]:
        """The tensors that it returns; ``value`` gives what a leaf stands for."""
        args, kwargs = tree_unflatten([value(leaf) for leaf in self.leaves], self.spec)
        return [each for each in tree_flatten(self.function(*args, **kwargs))[0] if isinstance(each, torch.Tensor)]


def _memory(numbers, memory):
    return {memory[number] for number in numbers if number in memory}


def slots_of(leaves: Iterable[Any]) -> set[int]:
    """The numbers of the slots among the leaves."""
    return {leaf.number for leaf in leaves if type(leaf) is Slot}


def needed(steps: list[Step], wanted: set[int], memory: dict[int, int]) -> list[Step]:
    """The steps that lead to the wanted slots, with what each is the last to need.

    Args:
        memory: by slot, which memory its tensor lies in; of those that no step changes it may be left out.
    """
    wanted, kept = set(wanted), []
    final = set(wanted)
    for step in reversed(steps):
        used = step.used
        changes = step.function._schema.is_mutable
        if not (wanted & set(step.made) or (changes and _memory(used, memory) & _memory(wanted, memory))):
            continue
        done = (used | set(step.made)) - wanted
        kept.append(step._replace(done=sorted(done - final)))
        wanted |= used
    return kept[::-1]


def without_constants(
    steps: list[Step], result: list[Any], weights: set[int], memory: dict[int, int]
) -> tuple[list[Step], list[Any]]:
    """The steps and results with whatever hangs on constants alone computed, once and for all.

    Args:
        weights: ids of the model's own tensors, which may change between calls: what is made of them is no constant.
        memory: by slot, which memory its tensor lies in.
    """
    constant = _constant(steps, weights, memory)
    if not constant:
        return steps, result
    values: dict[int, torch.Tensor] = {}

    def known(leaf):
        return values.get(leaf.number, leaf) if type(leaf) is Slot else leaf

    kept = []
    with torch.no_grad():
        for index, step in enumerate(steps):
            if index in constant:
                values.update(zip(step.made, step.run(known)))
            else:
                kept.append(step._replace(leaves=list(map(known, step.leaves))))
    result = list(map(known, result))
    return needed(kept, slots_of(result), memory), result


def _constant(steps, weights, memory):
    """The indices of the steps that take nothing but constants, and change nothing else, nor too late."""
    variable, before = {memory[0]}, None
    while variable != before:
        before = set(variable)
        read: set[int] = set()  # by steps that run in every call, so far
        found = set()
        for index, step in enumerate(steps):
            used = {memory[each] for each in step.used}
            changed = used if step.function._schema.is_mutable else set()
            if any(_varies(leaf, weights) for leaf in step.leaves) or used & variable or changed & read:
                variable |= changed | {memory[each] for each in step.made}
                read |= used
            else:
                found.add(index)
    return found


def _varies(leaf, weights):
    return type(leaf) in (Rows, Kept) or (isinstance(leaf, torch.Tensor) and id(leaf) in weights)


def without_changes(
    steps: list[Step], result: list[Any], sizes: dict[int, Any], memory: dict[int, int]
) -> tuple[list[Step], list[Any], dict[int, Any]]:
    """The steps, results and sizes with new tensors in the place of some that operations change, where nothing else
    that is read afterwards shares their memory."""
    last = {number: index for index, step in enumerate(steps) for number in step.used}
    last |= dict.fromkeys(slots_of(result), len(steps))
    names: dict[int, int] = {}
    sizes, renamed = dict(sizes), []

    def named(leaf):
        return Slot(names.get(leaf.number, leaf.number)) if type(leaf) is Slot else leaf

    for index, step in enumerate(steps):
        function, changed = _new_instead(step), step.leaves[0]
        leaves = list(map(named, step.leaves))
        if function is not None and type(changed) is Slot and step.made == [changed.number]:
            number = changed.number
            if all(last[each] <= index or each == number or memory[each] != memory[number] for each in last):
                names[number] = len(sizes)
                sizes[len(sizes)] = sizes[number]
                renamed.append(Step(function, leaves, step.spec, [names[number]], []))
                continue
        renamed.append(step._replace(leaves=leaves, made=[names.get(each, each) for each in step.made]))
    return renamed, list(map(named, result)), sizes


def _new_instead(step):
    """Of ``add_`` and the like, ``add``; None where there is none."""
    function, name = step.function, step.function._schema.name
    if not (function._schema.is_mutable and name.startswith("aten::") and name.endswith("_")):
        return None
    if torch.Tag.pointwise not in function.tags:
        return None
    packet = getattr(torch.ops.aten, name[len("aten::") : -1], None)
    return getattr(packet, function._overloadname, None)
