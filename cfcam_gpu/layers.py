"""The layer to explain a model at: found by one pass, or by its name."""

import warnings
from collections.abc import Callable
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import nn

from cfcam_gpu.checks import did_you_mean
from cfcam_gpu.dry_run import DryRun, LetGo, Ran, TokensToMap, channels_last_to_map, fits

__all__ = [
    "MAX_PREFIX_TOKENS",
    "PASSED_OVER",
    "CandidateLayer",
    "TargetLayer",
    "TokensToMap",
    "candidate_layers",
    "channels_last_to_map",
    "find_target_layer",
    "get_layer",
    "inspect_target_layer",
]

MAX_PREFIX_TOKENS = 5
"""Tokens before the patches where that is a guess: none, a class token, a distillation token, or a class token and four
registers."""

HALVED = (2, 4, 8)
"""How many times finer a known grid may be than that of tokens where that is a guess."""

AT_ONCE = (1, 8, 64)
"""Of how many layers, from the last one on, the gradient is asked at once until one is not zero; then of all others."""

PASSED_OVER = (
    # The same tensor as the layer before in evaluation mode
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    # A summary of the map, not a map
    nn.AdaptiveAvgPool1d,  # of tokens
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    # Inside a transformer's block: queries, keys and values, or how they attend, not the token stream
    nn.Linear,
    nn.Softmax,
)
"""Layer types that are never the default target."""


class TargetLayer(NamedTuple):
    """A layer to explain a model at."""

    name: str
    module: nn.Module
    reshape_transform: Callable | None
    """What makes a map (B, C, h, w), or of volumes (B, C, d, h, w), of its output; None where it is one."""
    shape: tuple
    """(C, h, w) of the map, or (C, d, h, w)."""
    n_classes: int
    notice: str | None = None
    """What about the choice is a guess; None where nothing is."""


class CandidateLayer(NamedTuple):
    """A layer that ran, and why it is or is not the default target."""

    name: str
    type: str
    """The name of its class."""
    grid: tuple[int, ...] | None
    """(h, w) of its map, or (d, h, w); None where its output is none."""
    channels: int | None
    """C of its map."""
    chosen: bool
    reason: str


def find_target_layer(
    model: nn.Module, example_input: torch.Tensor
) -> tuple[str, nn.Module, Callable[[torch.Tensor], torch.Tensor] | None]:
    """The default target layer: ``(name, module, reshape_transform)``; see ``inspect_target_layer``.

    >>> name, layer, reshape = find_target_layer(resnet50, torch.rand(1, 3, 224, 224))
    >>> name
    'layer4'
    """
    return inspect_target_layer(model, example_input)[:3]


def inspect_target_layer(model: nn.Module, example_input: Any, name: str | None = None) -> TargetLayer:
    """The last layer that keeps a map of the image, found by one forward pass and the end of a backward.

    A candidate's output, or the first tensor of it, is (B, C, h, w), (B, h, w, C), (B, N, D) or (N, B, D); of a volume
    or video, an input with five axes, (B, C, d, h, w), (B, d, h, w, C) or tokens. It was
    computed from the images: of two towers, the text's is none. Its grid has the image's aspect ratio and more than one
    cell, and the gradient of the top score there is not zero, in more than one channel and outside the tokens that are
    no patches. So a ViT that reads only the class token is explained at its last block's first norm, behind which the
    patch tokens no longer matter. Of several names for one map the outermost is taken; of a layer that runs more than
    once, its last run counts. The layers of PASSED_OVER are not candidates, nor are an adapter such as LoRA around one
    of them and the low-rank pieces of any adapter.

    Where the N tokens lie is read from the pass: by gradients from the tokens, where a layer first takes or returns so
    many of them or may have moved them, to the map or the image that they were made of. So they may lie in any order,
    with class, register, distillation or prompt tokens before and behind them. Where that cannot be read, as many as a
    map has cells and at most MAX_PREFIX_TOKENS before them are taken for its cells; or as many as a map of half the
    sides, a quarter or an eighth has; of a network without any map and square images, a square grid. That is a guess,
    as is a shape that may be read as channels first and last: a warning and ``notice`` say so, and also where later
    layers had to be left out because their tokens are no cells that can be read.

    The pass keeps few tensors (`cfcam_gpu.dry_run`). It is repeated, keeping more, where the last layers' gradients are
    zero and those before them cannot be had without; and for images without a gradient, integer or detached ones.

    Hooks are removed and ``.grad`` and training flags are left as they were, also after an error.

    Args:
        model: module that returns scores (B, n_classes): one tensor, or a dictionary, tuple or list with ``logits`` or
            one (B, n) tensor.
        example_input: (B, 3, H, W) tensor, preferably a real image; B may be 1. Several inputs in a tuple or list, or
            by name in a dictionary; the first with four axes has the images.
        name: look at this layer instead of choosing one.

    Returns:
        TargetLayer.

    Raises:
        ValueError: the model has no candidate, or none of that name, or its output has another shape.
        TypeError: there is no tensor among the inputs.
    """
    target, _ = choose_target_layer(model, example_input, name)
    if target.notice:
        warnings.warn(target.notice, UserWarning, stacklevel=2)
    return target


def candidate_layers(model: nn.Module, example_input: Any, name: str | None = None) -> list[CandidateLayer]:
    """What `inspect_target_layer` had to choose from: the layers that ran, in the order in which they finished.

    Those that returned neither three nor four nor five axes are left out. Args, Raises: as there.

    >>> [layer.name for layer in candidate_layers(resnet50, torch.rand(1, 3, 224, 224)) if layer.chosen]
    ['layer4']
    """
    return choose_target_layer(model, example_input, name)[1]


def choose_target_layer(model, example_input, name=None):
    """(`TargetLayer`, list of `CandidateLayer`); a guess is only said in its notice. Args, Raises: as above."""
    if name is not None:
        get_layer(model, name)
    run, linked = DryRun(model, example_input), True
    if not run.is_linked():
        run, linked = DryRun(model, example_input, linked=False), False
    layouts = {each.name: _layout_in(run, each) for each in run.ran.values()}
    ranked = _ranked(run, layouts, name)
    zero, chosen = [], None

    def matters(ran, gradient):
        reshape = layouts[ran.name].reshape
        return _matters(reshape(gradient) if reshape else gradient)

    for group in _groups(ranked):
        # What a layer returned may be older than its end, where it is the first of several tensors.
        for keep_from in (None, min(each.order for each in group), min(each.began for each in group), 0):
            if keep_from is not None:
                run = DryRun(model, example_input, linked, keep_from)
                group = [run.ran[each.name] for each in group if run.ran[each.name].edge is not None]
            try:
                answers = run.ask(group, matters)
                break
            except LetGo:
                if keep_from == 0:
                    raise
        best = answers.index(True) if True in answers else len(group)
        zero += [each.name for each in group[:best]]
        if best < len(group):
            each, layout = group[best], layouts[group[best].name]
            notice = layout.notice and f"target layer {each.name}: {layout.notice}"
            if name is None and notice is None:
                notice = _left_out(run, layouts, each)
            chosen = TargetLayer(
                each.name, each.module, layout.reshape, tuple(layout.shape), run.scores.shape[1], notice
            )
            break
    if chosen is None:
        raise ValueError(_why_none(model, run, layouts, ranked, name))
    return chosen, _candidates(run, layouts, ranked, zero, chosen.name)


_NO_CELLS = "its tokens are no cells of a map"


class _Layout(NamedTuple):
    """How a layer's output is a map of the image: its shape (C, h, w) and the reshape transform; or why it is none."""

    shape: tuple | None
    reshape: Callable | None = None
    notice: str | None = None
    reason: str = ""


def _layout_in(run: DryRun, ran: Ran) -> _Layout:
    """The layout of what a layer returned, in view of what else was seen in the pass."""
    shape = ran.shape
    if len(shape) in (4, 5) and shape[0] == run.batch:
        if len(shape) == 4 and _is_of_heads(run, shape) and not run.has_channels_first(ran):
            return _Layout(None, reason="has a row of tokens for every attention head")
        first, last = fits(shape[2:], run.image_size), fits(shape[1:-1], run.image_size)
        notice = None
        if first and last and not run.has_channels_first(ran):
            notice = f"{shape} may be read with its channels first or last; taken as first"
        if first:
            return _Layout(shape[1:], None, notice)
        if last:
            return _Layout((shape[-1], *shape[1:-1]), channels_last_to_map)
    if len(shape) == 3:
        for n_tokens, sequence_first in ((shape[1], False), (shape[0], True)):
            if shape[1 if sequence_first else 0] != run.batch:
                continue
            reading, notice = ran.readings.get((n_tokens, sequence_first)), None
            if reading is None:
                reading = _guess(run, n_tokens, sequence_first)
                notice = f"where its {n_tokens} tokens lie cannot be read from the pass; {reading!r} is a guess"
            if reading is not None:
                return _Layout((shape[2], *reading.grid), reading, notice)
        if run.batch in shape[:2] and max(shape[:2]) > 1:
            return _Layout(None, reason=_NO_CELLS)
    if len(shape) > 2 and run.batch not in shape[: 2 if len(shape) == 3 else 1]:
        return _Layout(None, reason=f"has not a row for each of {run.batch} images")
    return _Layout(None, reason="has no grid like the image's")


def _left_out(run, layouts, chosen):
    """A notice of layers behind the chosen one whose tokens cannot be read; None where there are none."""
    behind = [
        each.name
        for each in run.ran.values()
        if each.order > chosen.order
        and each.sees_image
        and layouts[each.name].reason == _NO_CELLS
        and not isinstance(each.module, PASSED_OVER)
    ]
    if not behind:
        return None
    return (
        f"target layer {chosen.name}: {len(behind)} layers behind it, the last of them {behind[-1]}, return tokens of"
        " the image too, but where these lie cannot be read; of layers so early a map may say little"
    )


def _is_of_heads(run, shape):
    """Whether (B, heads, N, d), (B, N, heads, d) or (B, heads, N, N) of N tokens that were seen."""
    _, a, b, c = shape
    widths = run.widths.get
    return a * c in widths(b, ()) or b * c in widths(a, ()) or (b == c and b in run.widths)


def _guess(run, n_tokens, sequence_first):
    """A grid for tokens that could not be read, or None."""
    maps, tokens = set(), set()
    for each in run.ran.values():
        if len(each.shape) == 2 + len(run.image_size) and each.sees_image and each.shape[0] == run.batch:
            heads = len(each.shape) == 4 and _is_of_heads(run, each.shape)
            grids = [] if heads else [each.shape[2:], each.shape[1:-1]]
            maps.update([grid for grid in grids if fits(grid, run.image_size)][:1])
        tokens.update((reading.grid, reading.order) for reading in each.readings.values() if reading is not None)
    if any(order is not None for _, order in tokens):  # no rows to go by
        return None
    choices = {n_tokens - prod(grid): tuple(grid) for grid in maps}
    if not maps and len(run.image_size) == 2 and run.image_size[0] == run.image_size[1]:
        choices[n_tokens - isqrt(n_tokens) ** 2] = isqrt(n_tokens), isqrt(n_tokens)
    for *depth, h, w in maps | {grid for grid, _ in tokens}:
        for times in HALVED:  # the frames of a video are often not
            half = -(-h // times), -(-w // times)
            for first in dict.fromkeys((tuple(depth), tuple(-(-size // times) for size in depth))):
                if prod((*first, *half)) == n_tokens:
                    choices.setdefault(0, (*first, *half))
    n_prefix = min((each for each in choices if 0 <= each <= MAX_PREFIX_TOKENS), default=None)
    if n_prefix is None or not fits(choices[n_prefix], run.image_size):
        return None
    return TokensToMap(n_prefix, choices[n_prefix], sequence_first=sequence_first)


def _ranked(run, layouts, name):
    """The layers that may be chosen, the best first: the latest map, its outermost module, then the last to finish."""
    last_run = {}
    for each in run.ran.values():
        if each.edge is not None:
            last_run[each.edge.node, each.edge.output_nr] = each.order
    may_be = [
        each
        for each in run.ran.values()
        if each.edge is not None
        and layouts[each.name].shape
        and (each.name == name if name is not None else each.sees_image and not _passed_over(run, each))
    ]
    key = lambda each: (last_run[each.edge.node, each.edge.output_nr], -each.name.count("."), each.order)
    return sorted(may_be, key=key, reverse=True)


def _groups(ranked):
    start = 0
    for count in (*AT_ONCE, len(ranked)):
        if start < len(ranked):
            yield ranked[start : start + count]
        start += count


def _passed_over(run, ran):
    """Why a layer is never the default target; "" for one that may be."""
    module = ran.module
    if isinstance(module, PASSED_OVER):
        return f"layers of type {type(module).__name__} are passed over"
    base = run.adapters.get(module)
    if isinstance(base, PASSED_OVER):
        return f"adapts a {type(base).__name__}, a type that is passed over"
    for adapter in run.adapters:
        if module is not adapter and any(module is part for part in adapter.modules()):
            return "a part of an adapter"
    return ""


def _matters(gradient):
    """Whether a (B, C, h, w) gradient is non-zero in more than one channel: one alone is a class score's own map."""
    return int(gradient.ne(0).any(0).flatten(1).any(1).sum()) > 1


def _candidates(run, layouts, ranked, zero, chosen):
    """A `CandidateLayer` for every layer with three to five axes."""
    edges, found = {}, []
    for each in ranked:
        edges.setdefault((each.edge.node, each.edge.output_nr), each.name)
    for each in run.ran.values():
        layout = layouts[each.name]
        outermost = edges.get((each.edge.node, each.edge.output_nr)) if each.edge is not None else None
        if len(each.shape) not in (3, 4, 5):
            continue
        if each.name == chosen:
            reason = "the last layer that keeps a map of the image"
            reason += f" ({layout.notice})" if layout.notice else ""
        elif each.edge is None:
            reason = "no gradient comes to it"
        elif not each.sees_image:
            reason = "does not see the image"
        elif _passed_over(run, each):
            reason = _passed_over(run, each)
        elif not layout.shape:
            reason = layout.reason
        elif each.name in zero:
            reason = "the top score's gradient is zero there, or has one channel alone"
        elif outermost not in (None, each.name):
            reason = f"the same map as {outermost}"
        else:
            reason = f"earlier than {chosen}"
        grid, channels = (layout.shape[1:], layout.shape[0]) if layout.shape else (None, None)
        found.append(CandidateLayer(each.name, type(each.module).__name__, grid, channels, each.name == chosen, reason))
    return found


def _why_none(model, run, layouts, ranked, name):
    model_name = type(model).__name__
    if name is not None:
        if name in layouts and run.ran[name].edge is not None and not ranked:
            return (
                f"layer {name} has no map of the image: expected (B, C, h, w), (B, h, w, C) or (B, N, D) "
                f"with a grid like the image's {run.image_size}, got {run.ran[name].shape}"
            )
        if ranked:
            return f"the top score's gradient is zero at layer {name}; choose an earlier one"
        return f"layer {name} did not run, or its output is no tensor with a gradient"
    if ranked:
        return (
            f"the top score's gradient is zero at all {len(ranked)} layers of {model_name} "
            "that keep a map of the image; some models have a last layer of zeros before they are trained"
        )
    return f"no layer of {model_name} keeps a map of the image: expected an output (B, C, h, w) or (B, N, D)"


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that dotted name, as ``model.named_modules()`` has it; ValueError with close matches otherwise.

    >>> get_layer(resnet50, "layer4.2.conv3")
    Conv2d(512, 2048, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    from cfcam_gpu.capture import named_modules

    layers = {**dict(model.named_modules()), **dict(named_modules(model))}  # the latter without torch.compile's names
    if not name or name not in layers:
        hint = did_you_mean(name, list(layers)) or f"; it begins with {', '.join(n for n, _ in model.named_children())}"
        raise ValueError(f"{type(model).__name__} has no layer {name!r}{hint}")
    return layers[name]
