"""The guide of a target layer: an earlier layer of the same forward pass, whose finer grid the map is averaged on.

Forward hooks keep what the guide returned last before its target layer ran. No copy is made: a tensor that is changed
in place afterwards is told by its version, and then the pass is repeated with copies. Nothing is differentiated.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from cfcam_gpu.models import PASSED_OVER

AUTO = "auto"

FINER = 2
"""How many times the target's sides a guide's are at least, where it is chosen."""


class _Kept(NamedTuple):
    tensor: torch.Tensor
    version: int | None  # None: a copy, which nobody changes

    def is_changed(self) -> bool:
        return self.version is not None and self.tensor._version != self.version


class _Candidate(NamedTuple):
    name: str
    module: nn.Module
    kept: _Kept


class Guides:
    """The guides of a model's target layers.

    Of a layer "auto", the guide is found in the first pass: the last layer whose output is a map with at least twice
    the target's sides. Of the layers with that grid it is the outermost, as for target layers; so it is the end of a
    stage or of a block, and not the inside of the next one, which the stage that shrinks the map begins with. Layers
    that had run more than once do not count. Where there is none, the target layer guides itself.

    Args:
        guides: per target layer a module, "auto", or None for the target layer itself.
        names: the names of the modules among them.
        reshape_transform: as for the target layers.
    """

    def __init__(
        self,
        guides: Sequence["nn.Module | str | None"],
        names: dict[nn.Module, str],
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._asked = tuple(guides)
        self._found = list(guides)
        self._names = dict(names)
        self._reshape = reshape_transform
        self._copied: set[nn.Module] = set()
        self.begin()

    @property
    def names(self) -> list[str | None] | None:
        """Per target layer the guide's name, None where it is the layer itself; None before they have been found."""
        if AUTO in self._found:
            return None
        return [self._names[found] if isinstance(found, nn.Module) else None for found in self._found]

    def begin(self) -> None:
        """Let go of what the last pass kept."""
        self._runs: Counter[nn.Module] = Counter()
        self._latest: dict[nn.Module, _Kept] = {}
        self._seen: dict[tuple[int, int], dict[int, _Candidate]] = {}  # grid -> depth of the name -> the latest
        self._candidates: dict[int, dict] = {}  # per target layer what had been seen when it ran
        self._guides: dict[int, _Kept | None] = {}  # per target layer what its guide had returned by then
        self._used: list[tuple[nn.Module, _Kept | None]] = []
        self._is_stale = False

    def register(self, named_modules: Iterable[tuple[str, nn.Module]]) -> list:
        """Hooks on the guides, or on all the modules while there is one to be found; their handles."""
        handles = [
            module.register_forward_hook(self._keep)
            for module in dict.fromkeys(self._found)
            if isinstance(module, nn.Module)
        ]
        if AUTO in self._found:
            for name, module in named_modules:
                if not isinstance(module, PASSED_OVER):
                    self._names.setdefault(module, name)
                    handles.append(module.register_forward_hook(self._look))
        return handles

    def _keep(self, module, inputs, output):
        tensor = _first(output)
        if tensor is not None:
            self._latest[module] = self._kept(module, tensor)

    def _kept(self, module, tensor):
        with torch.inference_mode(False):
            if module in self._copied or tensor.is_inference():
                return _Kept(tensor.detach().clone(), None)
            tensor = tensor.detach()
            return _Kept(tensor, tensor._version)

    def _look(self, module, inputs, output):
        self._runs[module] += 1
        tensor = _first(output)
        grid = None if tensor is None else self._map(tensor)
        if grid is not None and grid.ndim == 4 and grid.shape[0] == tensor.shape[0]:
            name = self._names[module]
            candidate = _Candidate(name, module, self._kept(module, tensor))
            self._seen.setdefault(tuple(grid.shape[2:]), {})[name.count(".")] = candidate

    def _map(self, tensor):
        """``tensor`` as (B, C, h, w), or None where the transform does not take it."""
        if self._reshape is None:
            return tensor
        try:
            return self._reshape(tensor)
        except Exception:  # it was written for the target layer's output, and may do anything with another's
            return None

    def at_target(self, index: int) -> None:
        """Called when target layer ``index`` has run: what has run until now may guide it."""
        found = self._found[index]
        if isinstance(found, nn.Module):
            self._guides[index] = self._latest.get(found)
        elif found == AUTO:
            # Now and not later: a shared layer that runs behind the target layer too is still the one it was.
            self._candidates[index] = {
                grid: {depth: each for depth, each in by_depth.items() if self._runs[each.module] == 1}
                for grid, by_depth in self._seen.items()
            }

    def of(self, index: int, target_name: str, activations: torch.Tensor) -> torch.Tensor | None:
        """The guide (B, Cg, hg, wg) of target layer ``index`` in this pass, None where that is the layer itself.

        Raises:
            ValueError: a guide that was asked for did not run before the target layer, or gives no such map.
        """
        found, sides = self._found[index], tuple(activations.shape[2:])
        if found == AUTO:
            candidate = _finest_enough(self._candidates[index], sides)
            self._found[index] = found = candidate and candidate.module
            self._guides[index] = candidate and candidate.kept
        if not isinstance(found, nn.Module):
            return None
        kept, name = self._guides[index], f"guide layer {self._names[found]!r}"
        self._used.append((found, kept))
        problem, guide = None, None
        if kept is None:
            problem = f"{name} must return a floating-point tensor before target layer {target_name!r} runs; it did not"
        else:
            guide = kept.tensor if self._reshape is None else self._reshape(kept.tensor)
            if guide.ndim != 4 or len(guide) != len(activations):
                problem = f"{name} must return ({len(activations)}, C, h, w), a map per image, got {tuple(guide.shape)}"
            elif guide.shape[2] < sides[0] or guide.shape[3] < sides[1]:
                expected = f"of at least target layer {target_name!r}'s size {sides}"
                problem = f"{name} must have a grid {expected}, got {tuple(guide.shape[2:])}"
        if problem and self._asked[index] == AUTO:  # it was right for other inputs
            self._found[index], self._is_stale = AUTO, True
            return None
        if problem:
            raise ValueError(problem)
        return guide

    def must_repeat(self) -> bool:
        """Whether a guide has been changed in place since, or is not the right one for these inputs.

        The next pass works on copies, or finds another.
        """
        changed = [module for module, kept in self._used if kept and kept.is_changed()]
        self._copied.update(changed)
        return bool(changed) or self._is_stale


def _finest_enough(seen, sides):
    """The candidate for a target of these sides: of the smallest grid that is fine enough the outermost, or None."""
    height, width = sides

    def fits(grid):
        # The same shape of the grid, but for rounding: a transform may take another layer's axes for a grid.
        ratio = abs(grid[0] * width - grid[1] * height) <= max(*grid, *sides)
        return grid[0] >= FINER * height and grid[1] >= FINER * width and ratio

    grids = [grid for grid, by_depth in seen.items() if by_depth and fits(grid)]
    if not grids:
        return None
    by_depth = seen[min(grids, key=lambda grid: grid[0] * grid[1])]
    return by_depth[min(by_depth)]


def _first(output):
    """The floating-point tensor that a layer's output is or starts with, or None."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None
