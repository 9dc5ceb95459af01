"""Gradients with the statistics of normalisation layers held constant.

A layer normalisation does not see how strong its input is: twice the features, the same output. So the gradient behind
it, times the features that it normalised, is zero in sum, whatever speaks for the class. Where a network normalises its
pooled features (ConvNeXt, Swin), that gradient is blind to the very direction in which the features of the object
point, and the weighted sum of the channels shows the small rest. With the deviation held constant the normalisation is
linear: the products' sum is the score but for biases, and each cell has its share of that.

Source: the LN rule of Ali et al., "XAI for Transformers: Better Explanations through Conservative Propagation", ICML
2022; here hooks on the graph of one backward, nothing of the model's is replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Node = Any
"""torch.autograd.graph.Node, with the attributes of its kind."""

DIVISION, INVERSE, POWER = "DivBackward0", "ReciprocalBackward0", "PowBackward0"

STATISTICS = ("LinalgVectorNormBackward0", "NormBackward1", "SqrtBackward0", "StdBackward0", "StdMeanBackward0")
"""What code of a model's own divides by to normalise. Of ``std_mean`` it is the first of the two."""

SHAPING = (
    *("ExpandBackward0", "ClampBackward0", "ClampBackward1", "ClampMinBackward0", "AddBackward0", "AddBackward1"),
    *("UnsqueezeBackward0", "ViewBackward0", "ReshapeAliasBackward0", "CloneBackward0", "ToCopyBackward0"),
)
"""What may lie between such a statistic and the division."""


@contextmanager
def frozen_norms(roots: Sequence[torch.Tensor]) -> Iterator[None]:
    """Backwards from ``roots`` inside hold the statistics of every normalisation in their graph constant.

    Of ``layer_norm``, ``group_norm``, ``instance_norm``, batch norm that takes the batch's statistics, ``rms_norm``,
    ``normalize`` and ``cosine_similarity``, and of code that divides by a norm, a square root or a standard deviation,
    or multiplies by the inverse. Not of operators that bring a backward of their own.

    Args:
        roots: tensors of any shape, with a graph or without.
    """
    handles = []
    try:
        for node in graph_nodes(roots):
            rule = _rule(node)
            if rule is not None:
                handles.append(node.register_hook(rule))
        yield
    finally:
        for handle in handles:
            handle.remove()


def graph_nodes(roots: Sequence[torch.Tensor]) -> Iterator[Node]:
    """Every node of the graph behind these tensors, each once."""
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _rule(node) -> Callable | None:
    """The hook that makes a node's gradient that of the linear map; None where it is that already."""
    name = node.name()
    if name in RULES:
        return RULES[name](node)
    if name == DIVISION and _is_statistic(*node.next_functions[1]):
        return _only_of_numerator
    if name == INVERSE and _is_statistic(*node.next_functions[0]):
        return _nothing
    return None


def _is_statistic(node, number):
    while node is not None and node.name() in SHAPING:
        node, number = node.next_functions[0]
    if node is None or number:
        return False
    return node.name() in STATISTICS or (node.name() == POWER and node._saved_exponent == 0.5)


def _nothing(*_):
    return (None,)


def _only_of_numerator(inputs, _):
    return None if inputs[0] is None else (inputs[0], None)


def _constant(_):
    return _nothing


def _power(node):
    return _nothing if node._saved_exponent == -0.5 else None


def _layer_norm(node):
    axes = tuple(range(-len(node._saved_normalized_shape), 0))
    return _linear(node._saved_result2, node._saved_weight, lambda gradient: gradient.mean(axes, keepdim=True))


def _group_norm(node):
    n_groups, n_channels = node._saved_group, int(node._saved_C)
    rstd, weight = node._saved_result2, node._saved_weight
    of_channels = rstd.repeat_interleave(n_channels // n_groups, 1)

    def means(gradient):
        of_groups = gradient.reshape(len(rstd), n_groups, -1).mean(2)
        of_channels = of_groups.repeat_interleave(n_channels // n_groups, 1)
        return of_channels.reshape(*of_channels.shape, *[1] * (gradient.ndim - 2))

    return _linear(of_channels, weight, means, channels=True)


def _batch_norm(node):
    if not node._saved_training:
        return None  # running statistics are constants
    return _linear(
        node._saved_result2[None],
        node._saved_weight,
        lambda gradient: gradient.mean((0, *range(2, gradient.ndim)), keepdim=True),
        channels=True,
    )


def _linear(rstd, weight, means, channels=False):
    """The hook for y = (x - mean(x)) * rstd * weight + bias; per channel, axis 1, or per place of the last axes."""

    def hook(inputs, outputs):
        if inputs[0] is None:
            return None
        gradient = outputs[0].to(torch.promote_types(outputs[0].dtype, rstd.dtype))
        over = (lambda each: each.reshape(*each.shape, *[1] * (gradient.ndim - 2))) if channels else (lambda each: each)
        if weight is not None:
            gradient = gradient * (over(weight[None]) if channels else weight)
        return ((gradient - means(gradient)) * over(rstd)).to(inputs[0].dtype), *inputs[1:]

    return hook


RULES: dict[str, Callable[[Node], Callable | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "MiopenBatchNormBackward0": _batch_norm,
    "RsqrtBackward0": _constant,
    POWER: _power,
}
