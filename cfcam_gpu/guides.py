"""The guide of a target layer: an earlier layer of the same forward pass, whose finer grid the map is averaged on.

Forward hooks keep what the guide returned last before its target layer ran. No copy is made: a tensor that is changed
in place afterwards is told by its version, and then the pass is repeated with copies. Nothing is differentiated.
What has been found out about the model is in `Guides`, for all passes; what a pass keeps is in a `GuidesOfPass`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from cfcam_gpu.layers import PASSED_OVER, channels_last_to_map
from cfcam_gpu.outputs import first_tensor

AUTO = "auto"

FINER = (2, 4)
"""How many times the target's sides a guide's are, at least and at most, where it is chosen. A layer much farther from
the target sees edges and colours rather than things, and its cells are many."""

HELD_BYTES, HELD_OF_LARGEST = 4 * 2**20, 0.75
"""Of the layers of which one may turn out to be the guide, how much a pass holds at once: so much in any case, and as a
multiple of the largest output of a layer. The last two stages before the target layer are within it."""


class _Kept(NamedTuple):
    tensor: torch.Tensor
    version: int | None  # None: a copy, which nobody changes

    def is_changed(self) -> bool:
        return self.version is not None and self.tensor._version != self.version


class Held(NamedTuple):
    """Of each target layer's guide what a pass knows and keeps; None where the layer guides itself."""

    found: list[nn.Module | str | None]
    readings: list[Callable[[torch.Tensor], torch.Tensor] | None]
    tensors: list[torch.Tensor | None]


class _Candidate(NamedTuple):
    depth: int  # of the module's name: 0 for a child of the model
    order: int  # in which the modules finished
    module: nn.Module
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def like(self) -> torch.Tensor:
        """A tensor as this layer returned it, but for the values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class Guides:
    """The guides of a model's target layers.

    Of a layer "auto", the guide is found in the first pass: the last layer whose output is a map with at least twice
    the target's sides (`FINER`). Of the layers with that grid it is the outermost, as for target layers: the end of a
    stage or of a block, and not a layer inside the next one, before that makes the map smaller. Layers that had run
    more than once do not count. Where there is none, the target layer guides itself. A pass that looks for the guide
    holds few of the outputs; where the guide's is not among them, the pass is repeated.

    Args:
        guides: per target layer a module, "auto", or None for the target layer itself.
        names: the names of the modules among them.
        reshape_transform: as for the target layers. Where the guide is found, outputs that it does not make a map of
            count as they are, (B, C, h, w) or (B, h, w, C).
        copies: keep copies from the start, for those who cannot repeat a pass.
    """

    def __init__(
        self,
        guides: Sequence["nn.Module | str | None"],
        names: dict[nn.Module, str],
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None,
        copies: bool = False,
    ) -> None:
        self._asked = tuple(guides)
        self._found = list(guides)
        self._names = dict(names)
        self._reshape = reshape_transform
        self._readings = [reshape_transform] * len(self._asked)
        self._copies = copies
        self._copied: set[nn.Module] = set()
        self._holds_all = copies
        self._undecided: set[int] = set()  # of one cell so far: images of another size may have a guide

    def names(self, target_names: Sequence[str]) -> list[str] | None:
        """Per target layer the guide's name, its own where it guides itself; None before they have been found."""
        if AUTO in self._found:
            return None
        pairs = zip(self._found, target_names)
        return [self._names[found] if isinstance(found, nn.Module) else target for found, target in pairs]

    def begin(self) -> "GuidesOfPass":
        """What keeps the guides of one pass."""
        return GuidesOfPass(self)


class GuidesOfPass:
    """What one forward pass keeps of its guides; what it finds out goes to the `Guides` that began it."""

    def __init__(self, guides: Guides) -> None:
        self._known = guides
        # As it is known now: another thread's pass may find, or lose, a guide meanwhile.
        self._undecided = frozenset(guides._undecided)
        self._found = [AUTO if index in self._undecided else found for index, found in enumerate(guides._found)]
        self._readings = list(guides._readings)
        self._runs: Counter[nn.Module] = Counter()
        self._latest: dict[nn.Module, _Kept] = {}
        self._seen: dict[tuple, list[_Candidate]] = {}  # the latest two of every size and depth
        self._held: dict[nn.Module, _Kept] = {}  # outputs of some of them
        self._likely: dict[tuple, _Candidate] = {}  # of every size the one that would be chosen
        self._largest = 0
        self._not_held: set[int] = set()
        # Per target layer what had been seen, and was held, when it ran.
        self._candidates: dict[int, tuple[list[_Candidate], dict[nn.Module, _Kept]]] = {}
        self._guides: dict[int, _Kept | None] = {}  # per target layer what its guide had returned by then
        self._used: list[tuple[nn.Module, _Kept | None]] = []
        self._is_stale = False

    def register(self, named_modules: Iterable[tuple[str, nn.Module]], only: Callable = lambda hook: hook) -> list:
        """Hooks on the guides, or on all the modules while there is one to be found; their handles.

        Args:
            only: what makes of a hook one that acts in this pass alone (`cfcam_gpu.calls.Call.only`).
        """
        keep, look = only(self._keep), only(self._look)
        handles = [
            module.register_forward_hook(keep) for module in dict.fromkeys(self._found) if isinstance(module, nn.Module)
        ]
        if AUTO in self._found:
            for name, module in named_modules:
                if not isinstance(module, PASSED_OVER):
                    self._known._names.setdefault(module, name)
                    handles.append(module.register_forward_hook(look))
        return handles

    def held(self) -> "Held":
        """What the guides returned, of a pass in which every target layer has run."""
        kept = [self._guides.get(index) for index in range(len(self._found))]
        found = [None if index in self._undecided else each for index, each in enumerate(self._found)]
        return Held(found, self._readings, [each and each.tensor for each in kept])

    def hold(self, held: "Held") -> None:
        """Instead of hooks: the guides of another pass, with what they returned in this one."""
        self._found, self._readings = list(held.found), list(held.readings)
        for index, tensor in enumerate(held.tensors):
            self._guides[index] = None if tensor is None else _Kept(tensor, None)

    def _keep(self, module, inputs, output):
        tensor = first_tensor(output)
        if tensor is not None:
            self._latest[module] = self._kept(module, tensor)

    def _kept(self, module, tensor):
        with torch.inference_mode(False):
            if self._known._copies or module in self._known._copied or tensor.is_inference():
                return _Kept(tensor.detach().clone(), None)
            tensor = tensor.detach()
            return _Kept(tensor, tensor._version)

    def _look(self, module, inputs, output):
        self._runs[module] += 1
        tensor = first_tensor(output)
        if self._runs[module] > 1 or tensor is None or tensor.ndim < 3 or tensor.layout != torch.strided:
            return
        depth, size = self._known._names[module].count("."), tuple(tensor.shape[2:])
        layout = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
        candidate = _Candidate(depth, self._runs.total(), module, *layout)
        # Two, because the latest may turn out to be a shared layer, which runs again.
        latest = self._seen.setdefault((*size, depth), [])
        for older in latest[:-1]:
            self._held.pop(older.module, None)
        latest[:] = [*latest[-1:], candidate]
        if self._known._holds_all:
            self._held[module] = self._kept(module, tensor)
        else:
            self._hold_if_likely(size, candidate, tensor)

    def _hold_if_likely(self, size, candidate, tensor):
        """Hold the tensor where it would be chosen of those of its size; the largest are let go of first."""
        self._largest = max(self._largest, tensor.nbytes)
        before = self._likely.get(size)
        if before is not None:
            if before.depth < candidate.depth and self._runs[before.module] == 1:
                return
            self._held.pop(before.module, None)
        self._likely[size] = candidate
        if tensor.untyped_storage().nbytes() > (most := max(HELD_BYTES, HELD_OF_LARGEST * self._largest)):
            return
        self._held[candidate.module] = self._kept(candidate.module, tensor)
        sizes = {module: kept.tensor.untyped_storage().nbytes() for module, kept in self._held.items()}
        while sum(sizes.values()) > most:
            largest = max(sizes, key=sizes.__getitem__)
            del sizes[largest], self._held[largest]

    def at_target(self, index: int) -> None:
        """Called when target layer ``index`` has run: what has run until now may guide it."""
        found = self._found[index]
        if isinstance(found, nn.Module):
            self._guides[index] = self._latest.get(found)
        elif found == AUTO:
            # Now and not later: a shared layer that runs behind the target layer too is still the one it was.
            candidates = chain.from_iterable(self._seen.values())
            self._candidates[index] = [each for each in candidates if self._runs[each.module] == 1], dict(self._held)

    def of(self, index: int, target_name: str, activations: torch.Tensor) -> torch.Tensor | None:
        """The guide (B, Cg, hg, wg) of target layer ``index`` in this pass, None where that is the layer itself.

        Raises:
            ValueError: a guide that was asked for did not run before the target layer, or gives no such map.
        """
        found, sides = self._found[index], tuple(activations.shape[2:])
        if prod(sides) == 1 and self._known._asked[index] == AUTO:
            # Whatever else the object has seen: one cell has no finer grid, and says nothing about other images.
            if found == AUTO:
                self._known._found[index] = None
                self._known._undecided.add(index)
            return None
        self._known._undecided.discard(index)
        if found == AUTO:
            found = self._choose(index, len(activations), sides)
            self._found[index], self._known._readings[index] = found, self._readings[index]
            self._known._found[index] = found
        if not isinstance(found, nn.Module) or index in self._not_held:
            return None
        kept, name = self._guides.get(index), f"guide layer {self._known._names[found]!r}"
        self._used.append((found, kept))
        problem, guide = None, None
        if kept is None:
            problem = f"{name} must return a floating-point tensor before target layer {target_name!r} runs; it did not"
        else:
            reading = self._readings[index]
            guide = kept.tensor if reading is None else reading(kept.tensor)
            if guide.ndim != activations.ndim or guide.shape[0] != activations.shape[0]:
                axes = {1: "t", 2: "h, w", 3: "d, h, w"}[len(sides)]
                problem = (
                    f"{name} must return ({len(activations)}, C, {axes}), a map per image, got {tuple(guide.shape)}"
                )
            elif any(cells < side for cells, side in zip(guide.shape[2:], sides)):
                expected = f"the size {sides} of target layer {target_name!r}"
                problem = f"{name} must have a grid of at least {expected}, got {tuple(guide.shape[2:])}"
        if problem and self._known._asked[index] == AUTO:  # it was right for other inputs
            self._known._found[index], self._known._holds_all, self._is_stale = AUTO, True, True
            return None
        if problem:
            raise ValueError(problem)
        return guide

    def _choose(self, index, batch, sides):
        """The guide for a target of these sides, or None: the smallest grid, then the outermost, then the latest."""
        choices = []
        candidates, held = self._candidates.get(index, ((), {}))
        for candidate in candidates:
            if candidate.shape[0] != batch:
                continue
            tensor = held[candidate.module].tensor if candidate.module in held else candidate.like()
            for reading in (self._known._reshape, None, channels_last_to_map):
                grid = _grid(tensor, reading, len(sides))
                if grid is not None and _fits(grid, sides):
                    choices.append((prod(grid), candidate.depth, -candidate.order, candidate, reading))
                    break
        if not choices:
            return None
        *_, candidate, self._readings[index] = min(choices, key=lambda choice: choice[:3])
        self._guides[index] = held.get(candidate.module)
        if candidate.module not in held:
            self._not_held.add(index)
        return candidate.module

    def must_repeat(self) -> bool:
        """Whether a guide has been changed in place since, is not the right one for these inputs, or was not held.

        The next pass works on copies, or finds another.
        """
        changed = [module for module, kept in self._used if kept and kept.is_changed()]
        self._known._copied.update(changed)
        return bool(changed) or bool(self._not_held) or self._is_stale


def _grid(tensor, reading, n_axes):
    """The grid, of ``n_axes``, of a layer's output as this transform reads it; None where it has none then."""
    try:
        found = tensor if reading is None else reading(tensor)
    except Exception:  # a transform was written for the target layer's output, and may do anything with another's
        return None
    is_map = isinstance(found, torch.Tensor) and found.ndim == 2 + n_axes and len(found) == len(tensor)
    return tuple(found.shape[2:]) if is_map else None


def _fits(grid, sides):
    """Whether the grid is fine enough for a target of these sides, and of its shape but for what strides round off.

    Of a volume only the slices' sides: its depth, or a video's frames, may be strided otherwise.
    """
    least, most = FINER
    *depths, rows, columns = zip(grid, sides) if len(sides) > 1 else ((1, 1), (grid[0], sides[0]), (grid[0], sides[0]))
    if any(not side <= cells <= most * side for cells, side in depths):
        return False
    # A side of 2 n - 1 cells too is halved to n.
    is_finer = all(least * (side - 1) < cells <= most * side for cells, side in (rows, columns))
    times = rows[0] / rows[1], columns[0] / columns[1]
    return is_finer and abs(times[0] - times[1]) <= max(times) / min(rows[1], columns[1])
