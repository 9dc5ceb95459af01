"""`CFCAM.stream`: batch after batch of a loader, the next ones loaded while one is explained."""

import inspect
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from cfcam_gpu.datasets.transfer import Transfer
from cfcam_gpu.explainer import Explainer, Explanation
from cfcam_gpu.outputs import map_tensors

Item = TypeVar("Item")

TARGET_NAMES = ("labels", "label", "targets", "target")
"""What the classes are called in batches that are dictionaries."""


@dataclass(frozen=True, eq=False)
class StreamedExplanation(Explanation):
    """An `Explanation` of a batch of a loader.

    Attributes:
        batch: as the loader gave it, on the host.
    """

    batch: Any


def stream(
    cam: Explainer, loader: Iterable[Any], top: int | None, use_targets: bool, prefetch: int
) -> Iterator[StreamedExplanation]:
    """What `Explainer.stream` returns."""
    device = next((each.device for each in (*cam.model.parameters(), *cam.model.buffers())), torch.device("cpu"))
    transfer = Transfer(device)

    def prepared(batch):
        inputs, targets = parts_of(batch, cam.model)
        # In the loader's thread, and of its own memory: a loader may fill the same again for the next batch.
        inputs, targets = map_tensors(own, (inputs, targets))
        return batch, inputs, targets if use_targets and top is None else None

    def own(tensor):
        pinned = device.type == "cuda" and not tensor.is_cuda  # only from there is the copy to the device not awaited
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor) if pinned else tensor.clone()

    for batch, inputs, targets in prefetched(map(prepared, loader), prefetch):
        found = cam.explain(map_tensors(transfer.to_device, inputs), targets, top)
        yield StreamedExplanation(**{each.name: getattr(found, each.name) for each in fields(found)}, batch=batch)


def parts_of(batch: Any, model: nn.Module) -> tuple[Any, Any]:
    """The model's input in a batch of a loader, and its targets or None.

    Raises:
        TypeError: the batch is of another kind.
    """
    targets = None
    if isinstance(batch, Mapping):
        name = next((name for name in TARGET_NAMES if name in batch), None)
        targets = None if name is None else batch[name]
        return _input_in({key: value for key, value in batch.items() if key != name}, model), _targets(targets)
    if isinstance(batch, (tuple, list)) and batch and not _is_images(batch):
        if isinstance(batch[0], Mapping):
            return _input_in(batch[0], model), _targets(batch[1] if len(batch) > 1 else None)
        return _tensor(batch[0]), _targets(batch[1] if len(batch) > 1 else None)
    return _tensor(batch), None


def _is_images(values):
    """Whether it is a list of images (C, H, W) rather than a pair."""
    return all(isinstance(each, torch.Tensor) and each.ndim == 3 for each in values)


def _tensor(value):
    if isinstance(value, (tuple, list)) and value and _is_images(value):
        return torch.stack(tuple(value))
    if isinstance(value, torch.Tensor):
        return value
    raise TypeError(
        "a batch must be a tensor of images, (images, targets), or a dict of the model's inputs, got"
        f" {type(value).__name__}"
    )


def _targets(targets):
    """Targets as `maps` takes them."""
    if isinstance(targets, torch.Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool:
        return targets.long()
    if targets is None or (isinstance(targets, (tuple, list)) and len(targets)):
        return None if targets is None else list(targets)
    got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
    raise TypeError(f"a batch's targets must be class indices or callables, got {got}: take use_targets=False")


def _input_in(columns, model):
    """The model's inputs among the columns of a batch: those that its forward names, or else the images alone."""
    columns = {name: _stacked(value) for name, value in columns.items()}
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    names = {each.name for each in parameters}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    tensors = {name: value for name, value in columns.items() if isinstance(value, torch.Tensor)}
    pictures = {name: value for name, value in tensors.items() if value.ndim >= 3}
    if any(name in names for name in pictures):
        return {name: value for name, value in columns.items() if name in names}
    if takes_all and pictures:
        return tensors
    if len(pictures) > 1:
        pictures = {name: value for name, value in pictures.items() if name == "pixel_values"} or pictures
    if len(pictures) != 1:
        there = ", ".join(columns) or "nothing"
        raise TypeError(f"a batch as a dict must have the model's inputs, or images in one column, got {there}")
    return next(iter(pictures.values()))


def _stacked(value):
    return torch.stack(tuple(value)) if isinstance(value, (tuple, list)) and value and _is_images(value) else value


def prefetched(items: Iterable[Item], n: int) -> Iterator[Item]:
    """The items, at most ``n`` of them fetched ahead in a thread of its own; what it raises is raised here."""
    waiting: queue.Queue = queue.Queue(max(1, n))
    stopped = threading.Event()

    def put(entry):
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def fetch():
        try:
            for item in items:
                put((item, None, False))
                if stopped.is_set():
                    return
            put((None, None, True))
        except BaseException as error:  # whatever the loader raises is the caller's
            put((None, error, True))

    thread = threading.Thread(target=fetch, name="cfcam-load", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
