"""What a classifier's outputs are, and the probabilities in them: of classes that compete, or of labels that do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cfcam_gpu.class_names import from_config

SUM_TOLERANCE = 8
"""Probabilities of an image sum to 1 within this many steps of their dtype, or of float32 where that is coarser."""

VIEWS = ("View", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Alias", "Clone", "ToCopy")
"""Beginnings of the names of operations that leave the values as they are."""


class Ending:
    """How a model's outputs end, as its latest pass shows: ``name`` is "softmax", "sigmoid", or None for logits."""

    def __init__(self) -> None:
        self.name: str | None = None

    def look(self, outputs: Any) -> None:
        if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and outputs.is_floating_point():
            self.name = ending_of(outputs) or self.name


def ending_of(outputs: torch.Tensor) -> str | None:
    """Whether outputs (B, n) are probabilities: "softmax", "sigmoid", or None.

    Outputs in [0, 1] that sum to 1 for each image come from a softmax, whatever computed it. Those of a sigmoid cannot
    be told from logits by their values, but by the operation that autograd has recorded, if it has.
    """
    values = outputs.detach().double()
    if not (values.min() >= 0 and values.max() <= 1):
        return None
    tolerance = SUM_TOLERANCE * max(torch.finfo(dtype).eps for dtype in (outputs.dtype, torch.float32))
    if values.shape[1] > 1 and ((values.sum(1) - 1).abs() <= tolerance).all():
        return "softmax"
    step = outputs.grad_fn
    while step is not None and step.name().startswith(VIEWS):
        step = step.next_functions[0][0]
    return "sigmoid" if step is not None and step.name().startswith("SigmoidBackward") else None


@contextmanager
def looking(model: nn.Module) -> Iterator[Ending]:
    """The `Ending` of the outputs that the model gives inside the block, or would without what `give_logits` did."""
    ending, undone = Ending(), _undone(model)
    if undone is not None:
        ending.name = undone.ending
        yield ending
        return
    handle = model.register_forward_hook(lambda _module, _inputs, outputs: ending.look(outputs))
    try:
        yield ending
    finally:
        handle.remove()


class _Undo:
    """A forward hook that makes logits of probabilities."""

    def __init__(self, ending):
        self.ending = ending

    def __call__(self, _module, _inputs, outputs):
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # float16 ends at 6e-8
        limits = torch.finfo(outputs.dtype)
        return outputs.clamp_min(limits.tiny).log() if self.ending == "softmax" else outputs.logit(limits.eps)


def _undone(model):
    """The hook of `give_logits` on a model, or None."""
    return next((hook for hook in model._forward_hooks.values() if isinstance(hook, _Undo)), None)


@contextmanager
def give_logits(model: nn.Module, ending: str) -> Iterator[None]:
    """Make a model that ends in a "softmax" or a "sigmoid" return logits, from now on; if the block raises, not.

    They are those before the softmax but for a constant of each image, which softmax and margin do not see. A model
    that does already is left as it is: who explains it next finds its ending by `looking`.
    """
    if _undone(model) is not None:
        yield
        return
    handle = model.register_forward_hook(_Undo(ending))
    try:
        yield
    except BaseException:
        handle.remove()
        raise


def says_multilabel(model: nn.Module) -> bool:
    """Whether a model's ``config`` says that an image may have several labels, as transformers has it."""
    return from_config(model, "problem_type") == "multi_label_classification"


def probabilities(logits: torch.Tensor, multilabel: bool) -> torch.Tensor:
    """float32 (B, n) of logits (B, n): softmax, or sigmoid for labels that do not compete and for a single output."""
    logits = logits.float()
    return logits.sigmoid() if multilabel or logits.shape[1] == 1 else logits.softmax(1)
