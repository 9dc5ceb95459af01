"""A model cut in two behind its target layer, so that the first half can be compiled: hooks see nothing in there."""

import signal
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import fx

COMPILE_BUDGET_S = 120
"""Longest time for ``torch.compile`` of a trunk, its first call included."""


class Unavailable(Exception):
    """What is asked for cannot run here; the message says why."""


class Halves(NamedTuple):
    """``crossing, kept = trunk(images)``, and ``head(*crossing)`` is the model's output; ``crossing[0]`` is the target
    layer's output, and ``kept`` that of another layer, or None."""

    trunk: torch.nn.Module
    head: torch.nn.Module


def cut(model, layer_name, kept_name=None):
    """The `Halves` of a model that ``torch.fx`` can trace; ``kept_name`` is that of the layer to keep the output of.

    >>> trunk, head = cut(resnet50, "layer4")
    >>> crossing, _ = trunk(images)  # (2, 3, 224, 224)
    >>> head(*crossing).shape
    torch.Size([2, 1000])
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return name in (layer_name, kept_name) or super().is_leaf_module(module, name)

    nodes = list(Tracer().trace(model).nodes)
    last = max(index for index, node in enumerate(nodes) if (node.op, node.target) == ("call_module", layer_name))
    before, after = nodes[: last + 1], nodes[last + 1 :]
    crossing = [nodes[last]]
    crossing += [node for node in before[:-1] if not node.users.keys().isdisjoint(after)]

    trunk, made = fx.Graph(), {}
    for node in before:
        made[node] = trunk.node_copy(node, made.__getitem__)
    kept = [made[node] for node in before if (node.op, node.target) == ("call_module", kept_name)]
    trunk.output((tuple(made[node] for node in crossing), kept[-1] if kept else None))
    head, made = fx.Graph(), {}
    for node in crossing:
        made[node] = head.placeholder(node.name)
    for node in after:
        made[node] = head.node_copy(node, made.__getitem__)
    return Halves(fx.GraphModule(model, trunk), fx.GraphModule(model, head))


def compiled_halves(model, layer_name, images, kept_name=None, budget_s=COMPILE_BUDGET_S):
    """The `Halves` of a model with the trunk compiled for these images, or an `Unavailable` that says why not."""
    try:
        halves = cut(model, layer_name, kept_name)
        halves = halves._replace(trunk=torch.compile(halves.trunk, dynamic=False))
        with _alarm(budget_s), torch.no_grad():
            halves.trunk(images)
        return halves
    except Exception as error:  # tracing, dynamo, the C++ compiler and Triton raise what they like
        lines = str(error).strip().splitlines() or [""]
        if "_OutOfTime" in f"{type(error).__name__} {error}":
            lines = [f"it took more than {budget_s:g} s"]
        return Unavailable(f"torch.compile of the trunk failed: {lines[0] or type(error).__name__}")


class _OutOfTime(Exception):
    pass


@contextmanager
def _alarm(budget_s):
    """Raises `_OutOfTime` in the block when the time is over; outside the main thread, and on Windows, never."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum, frame):
        raise _OutOfTime("_OutOfTime")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, budget_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
