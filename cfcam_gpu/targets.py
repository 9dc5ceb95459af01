"""What is explained: targets as callers give them, and the scores that are differentiated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from cfcam_gpu.outputs import find_logits, image_part

Target: TypeAlias = int | Callable[[Any], torch.Tensor]
"""A class index, or a callable that gets the image's output and returns a scalar."""

Targets: TypeAlias = torch.Tensor | np.ndarray | Sequence[Target] | Sequence[Sequence[Target]] | None
"""What to explain: one target an image, or K an image, either all indices or all callables; None for each image's top
class."""


# Targets as callers give them.


@dataclass(frozen=True)
class OwnRule:
    """In the place of targets, a caller's own rule for what is explained.

    ``scores(outputs)`` gives one-element tensors, of which the sum is differentiated; numbers among them are constants.
    """

    scores: Callable[[Any], Sequence[torch.Tensor | float]]


def check_targets(targets, batch, several=False):
    """``targets`` as None, int64 indices (B,) on whatever device, a tuple of B callables, or the `OwnRule` it is.

    Args:
        targets: as for a call of `HeadCapture`.
        batch: B.
        several: K targets an image may be given: int64 indices (B, K), or a tuple of B tuples of K callables.

    Raises:
        TypeError, ValueError: they are of another kind, or not B, or not the same number for each image.
    """
    if targets is None or isinstance(targets, OwnRule):
        return targets
    expected = f"({batch},) or ({batch}, K)" if several else f"({batch},)"
    if isinstance(targets, np.ndarray) and targets.ndim != 1:
        if targets.dtype.kind not in "iu":
            raise TypeError(f"targets must be an integer array, got {targets.dtype}")
        targets = torch.from_numpy(targets.astype(np.int64))
    if isinstance(targets, torch.Tensor):
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            raise TypeError(f"targets must be an integer tensor, got {targets.dtype}")
        if targets.ndim not in ((1, 2) if several else (1,)) or len(targets) != batch:
            raise ValueError(f"targets must have shape {expected}, got {tuple(targets.shape)}")
        if targets.ndim == 2 and not targets.shape[1]:
            raise ValueError(f"targets must hold at least one target per image, got shape {tuple(targets.shape)}")
        _refuse_flags(targets)
        return targets.to(torch.int64, copy=True)  # a copy: autograd refuses a tensor made in inference mode
    if not isinstance(targets, (list, tuple, np.ndarray)):
        hint = "; for one image write [target]" if isinstance(targets, (Integral, Callable)) else ""
        raise TypeError(
            "targets must be None, a list of class indices or of callables, or an integer tensor, got"
            f" {_type(targets)}{hint}"
        )
    targets = tuple(targets)
    if len(targets) != batch:
        raise ValueError(f"targets must hold one target per image: expected {batch}, got {len(targets)}")
    if several and any(isinstance(of_image, (list, tuple, np.ndarray)) for of_image in targets):
        return _check_several(targets)
    if all(callable(target) for target in targets):
        return targets
    return torch.tensor(_indices(targets, "targets"))


def _refuse_flags(targets):
    """Refuse indices (B, K), K > 2, on the host that are zeros and ones: an image would be explained twice over."""
    if targets.ndim < 2 or targets.device.type != "cpu" or targets.shape[1] < 3:
        return
    if ((targets == 0) | (targets == 1)).all() and (targets == 1).any():
        raise ValueError(
            f"targets must be class indices, got zeros and ones {tuple(targets.shape)}, as of labels that say of each"
            " class whether it is there"
        )


def _check_several(targets):
    """K targets of each of B images, in B lists, as indices (B, K) or a tuple of B tuples of K callables."""
    for image, of_image in enumerate(targets):
        if not isinstance(of_image, (list, tuple, np.ndarray)):
            raise TypeError(f"targets must be all lists or none, got {_type(of_image)} at [{image}]")
        if len(of_image) != len(targets[0]):
            raise ValueError(
                f"targets must hold as many targets for each image: {len(targets[0])} at [0],"
                f" got {len(of_image)} at [{image}]"
            )
    if not len(targets[0]):
        raise ValueError("targets must hold at least one target per image, got empty lists")
    if all(callable(target) for of_image in targets for target in of_image):
        return tuple(map(tuple, targets))
    found = torch.tensor([_indices(of_image, f"targets[{image}]") for image, of_image in enumerate(targets)])
    _refuse_flags(found)
    return found


def _indices(targets, name):
    for index, target in enumerate(targets):
        if isinstance(target, bool) or not isinstance(target, Integral):
            raise TypeError(f"{name} must be all class indices or all callables, got {_type(target)} at [{index}]")
    return [int(target) for target in targets]


def check_top(top, targets):
    """``top`` as an int of at least 1, or None."""
    if top is None:
        return None
    if isinstance(top, bool) or not isinstance(top, Integral):
        raise TypeError(f"top must be None or a number of classes, got {_type(top)}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if targets is not None:
        raise ValueError("top chooses the classes itself: targets must be None")
    return int(top)


def classes_on(device, classes, n_classes):
    """Class indices, int64 of any shape, on the device; their range is checked where they are on the host."""
    if device.type == "cpu":
        classes = classes.cpu()
    if classes.device.type == "cpu":
        outside = classes[(classes < 0) | (classes >= n_classes)]
        if outside.numel():
            raise ValueError(f"targets must be class indices in [0, {n_classes}), got {outside[0].item()}")
        if device.type == "cuda":
            classes = classes.pin_memory()  # a copy from pageable memory makes the host wait
    return classes.to(device, non_blocking=True)


def check_logits(logits, check_finite=None):
    """Refuse NaN and infinity among logits (B, n); minus infinity is of a class that the model has ruled out.

    Their gradient may be finite all the same, and make a map of a class that means nothing.

    Args:
        check_finite: as for `cf_cam`.
    """
    check = logits.device.type == "cpu" if check_finite is None else check_finite
    if check and not (is_number := logits < torch.inf).all():
        image = (~is_number.all(1)).nonzero()[0].item()
        raise ValueError(f"the model's logits must be finite, got NaN or infinity for image {image}")


def chosen_classes(logits, targets, top=None):
    """The class indices that are explained, int64 (B,) or (B, K) on the device of the logits (B, n), without a graph.

    Args:
        targets: int64 indices, or None; top: as for `scores`.

    Raises:
        ValueError: a class is out of range, or more are asked for than the model has.
    """
    if top is not None:
        if top > logits.shape[1]:
            raise ValueError(f"top must be at most the model's {logits.shape[1]} classes, got {top}")
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
    if targets is None:
        return logits.argmax(dim=1)
    return classes_on(logits.device, targets, n_classes=logits.size(1))


# The scores.


class Scores(NamedTuple):
    """What is differentiated: tensors ``roots``, with cotangents."""

    roots: list[torch.Tensor]
    classes: torch.Tensor | None
    """int64 (B,) or (B, K) on the outputs' device; None where the targets are callables."""
    n_classes: int | None
    """K; None for one score an image, all of which are differentiated at once with cotangents of 1."""
    cotangents: Callable[[slice], torch.Tensor] | None = None
    """Of the one root, for k of the K scores: (k, *root.shape)."""


def scores(outputs, targets, batch, margin_temperature=0.0, top=None, chosen_side=False):
    """The `Scores` of the model's outputs.

    Args:
        targets: as `check_targets` returns them.
        batch: B.
        margin_temperature: of the scores of class indices, as for `HeadCapture`.
        top: the number of classes of highest score to explain, where ``targets`` are None.
        chosen_side: of a single logit and no targets, the side that was chosen, as for `HeadCapture`.
    """
    if isinstance(targets, OwnRule):
        found = [
            _one_score(f"targets[{index}]", score)
            for index, score in enumerate(targets.scores(outputs))
            if isinstance(score, torch.Tensor)
        ]
        return Scores(found, None, None)
    if isinstance(targets, tuple):
        images = (image_part(outputs, i, batch) for i in range(batch))
        if not isinstance(targets[0], tuple):
            found = (
                _one_score(f"targets[{i}]", target(image)) for i, (target, image) in enumerate(zip(targets, images))
            )
            return Scores(list(found), None, None)
        rows = [
            torch.stack([_differentiable(f"targets[{i}][{k}]", target, image) for k, target in enumerate(of_image)])
            for i, (of_image, image) in enumerate(zip(targets, images))
        ]
        total = torch.stack(rows).sum(0)
        each = torch.eye(len(total), dtype=total.dtype, device=total.device)
        return Scores([total], None, len(total), each.__getitem__)
    outputs = find_logits(outputs, batch)
    logits = outputs.detach()
    classes = chosen_classes(logits, targets, top)
    if classes.ndim == 1:
        found = scores_of_classes(outputs, classes, margin_temperature)
        if chosen_side and targets is None and outputs.shape[1] == 1:
            found = torch.where(logits[:, 0] < 0, -found, found)
        return Scores([found.sum()], classes, None)

    def cotangents(chosen):
        chosen = classes[:, chosen].T
        rows = logits.expand(len(chosen), -1, -1).flatten(0, 1)
        found = class_cotangents(rows, chosen.flatten(), margin_temperature)
        return found.view(len(chosen), *logits.shape)

    return Scores([outputs], classes, classes.shape[1], cotangents)


def scores_of_classes(outputs, classes, margin_temperature):
    """The score (B,) of one class (B,) of each row of logits (B, n): its margin, or at 0 or of one class its logit."""
    if margin_temperature > 0 and outputs.shape[1] > 1:
        return (outputs * margin_cotangent(outputs.detach(), classes, margin_temperature)).sum(1)
    return outputs.gather(1, classes[:, None])[:, 0]


def class_cotangents(logits, classes, margin_temperature):
    """The gradient of `scores_of_classes` with respect to the logits, of which it has the shape and dtype."""
    if margin_temperature > 0 and logits.shape[1] > 1:
        return margin_cotangent(logits, classes, margin_temperature)
    return torch.zeros_like(logits).scatter_(1, classes[:, None], 1)


def scores_of_rows(outputs, chosen, n_rows, row=None):
    """Scores (n_rows, K), without a graph, of the rows of a model's outputs; (1, K) of one ``row`` of them.

    ``chosen`` are int64 classes (K,), or K callables.
    """
    rows = range(n_rows) if row is None else range(row, row + 1)
    if isinstance(chosen, torch.Tensor):
        logits = find_logits(outputs, n_rows).detach()
        return logits[rows.start : rows.stop].index_select(1, chosen)
    parts = (image_part(outputs, each, n_rows) for each in rows)
    found = [[_one_score("a target", target(part)).detach() for target in chosen] for part in parts]
    return torch.stack([torch.stack(of_row) for of_row in found])


def margin_cotangent(logits: torch.Tensor, classes: torch.Tensor, temperature: float) -> torch.Tensor:
    """The gradient of the classes' margins with respect to the logits: (B, n), dtype of the logits.

    The margin of class c is z_c - T logsumexp_{k != c}(z_k / T), what speaks for it and not for the classes that it is
    confused with; T is ``temperature`` standard deviations of the other classes' logits and counts as a constant. So
    the gradient is 1 at c and -softmax_{k != c}(z / T) elsewhere: the same when the logits are scaled or shifted, and
    uniform over the other classes where their logits are equal. The class itself has no part in the deviation: of few
    classes, one that stands out would flatten the softmax over the others. Nor have classes of minus infinity, which a
    model has ruled out: it is the margin of the classes that are left.

    Args:
        logits: (B, n), n > 1, floating point.
        classes: int64 (B,).
        temperature: above 0.

    >>> margin_cotangent(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]), 1.5)
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = classes[:, None]
    others = z.scatter(1, chosen, -torch.inf)
    counts = others > -torch.inf
    n_others = counts.sum(1, keepdim=True).clamp_min(1)
    # Counted from the largest of the others: equal logits are exactly 0 then, and the softmax uniform.
    z = torch.where(counts, z - others.amax(1, keepdim=True), 0)
    deviations = torch.where(counts, z - z.sum(1, keepdim=True) / n_others, 0)
    scale = temperature * (deviations.square().sum(1, keepdim=True) / n_others).sqrt()
    z = torch.where(scale > 0, z / torch.where(scale > 0, scale, 1), 0)
    others = torch.where(counts, torch.where(counts, z, -torch.inf).softmax(1), 0)  # of none the softmax is NaN
    return (-others).scatter(1, chosen, 1.0).to(logits.dtype)


def _one_score(name, score):
    if not isinstance(score, torch.Tensor):
        raise TypeError(f"{name} must return a one-element tensor, got {_type(score)}")
    if score.numel() != 1:
        raise ValueError(f"{name} must return a one-element tensor, got shape {tuple(score.shape)}")
    return score.reshape(())


def _differentiable(name, target, output):
    score = _one_score(name, target(output))
    if not score.requires_grad:
        raise ValueError(
            f"{name} must return a score that a gradient flows back from, got one without (detach, argmax?)"
        )
    return score


def _type(value):
    return type(value).__name__
