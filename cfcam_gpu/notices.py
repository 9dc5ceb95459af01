"""What a user should know though the call went well, as a ``UserWarning``, each kind once per object."""

import warnings
from collections import deque
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MAPS_NAMED = 8
"""Maps that a notice names one by one; of more it says how many."""


LOCK = Lock()
"""Of all objects: two threads of one are not to give a notice twice."""


class Notices:
    """The notices of one object: each kind is given once.

    ``stacklevel`` is as in ``warnings.warn``, called by the method itself.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._changing: list[nn.Module] | None = None
        self._pending: deque[_Pending] = deque()

    def of_training(self, model: nn.Module, stacklevel: int) -> None:
        """That the model is in training mode, where that changes its outputs."""
        if "training" in self._told:
            return
        if self._changing is None:  # kept, because the walk through a model takes longer than the look at its layers
            self._changing = [module for module in model.modules() if _kind(module)]
        active = [_kind(module) for module in self._changing if module.training]
        if not active:
            return
        counts = {kind: active.count(kind) for kind in dict.fromkeys(active)}
        does = " and ".join(DOES[kind].format(count, "s" * (count > 1)) for kind, count in counts.items())
        self._warn("training", f"{_type(model)} is in training mode: {does}; call model.eval()", stacklevel)

    def of_one_cell(self, layers: list[tuple[torch.Tensor, Any, Any]], stacklevel: int) -> bool:
        """That a target layer's grid has one cell; whether that is so. Args: as for `of_zero_maps`."""
        found = any(activations.shape[2:].numel() == 1 for activations, *_ in layers)
        if found and "cell" not in self._told:
            message = "a target layer has no spatial grid, one cell alone: its map is flat; take an earlier layer"
            self._warn("cell", message, stacklevel)
        return found

    def of_zero_maps(
        self, maps: torch.Tensor, layers: list[tuple[torch.Tensor, Any, Any]], stacklevel: int, n_axes: int = 2
    ) -> None:
        """That maps are zero everywhere, of which images, and why.

        On a CPU it is said in the call that made them. Elsewhere the host would have to wait for the device, so their
        largest values are copied while it works, and `poll` says it in a later call.

        Args:
            maps: (B, H, W) or (B, K, H, W), or of other axes, values of at least 0.
            layers: per target layer (activations, gradients, guide), from which the reason is found on a CPU.
            n_axes: of a map.
        """
        if "zero" in self._told or maps.device.type == "meta":
            return
        peaks = maps.flatten(-n_axes).amax(-1)
        if maps.device.type == "cpu":
            zero = peaks <= 0
            if zero.any():
                self._of_zero(zero, layers, stacklevel + 1)
        elif maps.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            host = torch.empty(peaks.shape, dtype=peaks.dtype, pin_memory=True)
            host.copy_(peaks, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(maps.device))
            self._pending.append(_Pending(host, copied))

    def poll(self, stacklevel: int) -> None:
        """Say what has been found by now in the maps of earlier calls on a device; does not wait."""
        if not self._pending or torch.cuda.is_current_stream_capturing():
            return
        while True:
            with LOCK:
                if not (self._pending and self._pending[0].copied.query()):
                    return
                zero = self._pending.popleft().peaks <= 0
            if zero.any():
                self._of_zero(zero, None, stacklevel + 1)

    def _of_zero(self, zero, layers, stacklevel):
        indices = zero.nonzero().tolist()
        reasons: dict[str, list[str]] = {}
        for index in indices[:MAPS_NAMED]:
            place = str(index[0]) if len(index) == 1 else str(tuple(index))
            reasons.setdefault(ANY_REASON if layers is None else _reason(layers, *index), []).append(place)
        said = "; ".join(f"{', '.join(places)}: {reason}" for reason, places in reasons.items())
        more = f"; and {len(indices) - MAPS_NAMED} more" if len(indices) > MAPS_NAMED else ""
        kind = "image" if zero.ndim == 1 else "(image, target)"
        call = "" if layers is not None else "of an earlier call "
        self._warn("zero", f"maps {call}are zero everywhere, of {kind} {said}{more}", stacklevel)

    def _warn(self, kind, message, stacklevel):
        with LOCK:
            if kind in self._told:
                return
            self._told.add(kind)
        warnings.warn(message, UserWarning, stacklevel + 1)


class _Pending(NamedTuple):
    peaks: torch.Tensor
    copied: torch.cuda.Event


# Training mode.

DOES = {
    "norm": "batch norm ({} layer{}) takes this batch's statistics and changes its running ones",
    "dropout": "dropout ({} layer{}) is on, so that every call differs",
}


def _kind(module):
    """What a module does in training mode only: "norm", "dropout", or None."""
    if isinstance(module, _BatchNorm):
        return "norm" if module.track_running_stats else None
    name = type(module).__name__.lower()
    if "drop" in name or name == "stochasticdepth":
        rate = next((getattr(module, each) for each in ("p", "drop_prob", "drop_rate") if hasattr(module, each)), 1)
        return "dropout" if rate else None
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return "dropout" if module.dropout else None
    return None


# Zero maps.

UNUSED = "the score's gradient is zero at the target layer, which this target does not use: take an earlier layer"
SILENT = "the target layer's output is zero"
ALIKE = "all cells of the target layer are alike, so that no place differs from another: take an earlier layer"
AGAINST = "nothing in the target layer speaks for the target: try another target or layer"
ANY_REASON = f"{AGAINST}; or the layer is not used by this target, or its cells are all alike"

ALIKE_CELLS = 1e-6
"""Largest range of a channel over the cells, as a share of the layer's largest value, that is rounding alone."""


def _reason(layers, image, target=None):
    """Why the map of an image, or of its ``target``-th target, is zero; of several layers, what holds for all."""
    found = {_reason_of_layer(activations[image], gradients, image, target) for activations, gradients, _ in layers}
    return found.pop() if len(found) == 1 else AGAINST


def _reason_of_layer(activations, gradients, image, target):
    pooled = isinstance(gradients, tuple)  # of several targets what is kept of the gradients
    parts = [each[image] if target is None else each[image, target] for each in (gradients if pooled else (gradients,))]
    largest = activations.abs().amax()
    if not largest:
        return SILENT
    if not any(part.any() for part in parts):
        return UNUSED
    cells = activations.flatten(1)
    if (cells.amax(1) - cells.amin(1)).amax() <= ALIKE_CELLS * largest:
        return ALIKE
    return AGAINST


def _type(value):
    return type(value).__name__
