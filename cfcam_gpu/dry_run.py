"""One forward pass that notes what every layer returned: shapes, whether the image is seen, and where its tokens lie.

The pass is differentiable, so that a layer can be asked afterwards whether the score depends on it, but it keeps hardly
more than a pass without autograd: of the tensors that autograd saves, only the latest (`_Saved`). The way back from the
score to the last layers needs no others.
"""

import math
import re
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from cfcam_gpu.calls import Call, eager_without_grad_in
from cfcam_gpu.inputs import Inputs, check_inputs
from cfcam_gpu.outputs import find_logits, first_tensor, map_tensors

KEPT_BYTES = 1 * 2**20
"""Saved tensors that are kept in any case."""

KEPT_OF_MAPS, KEPT_OF_TOKENS = 0.1, 3.5
"""And beyond, as a multiple of the largest input and output that a layer had together: what follows a network's last
map is small. Where some tokens are no patches, as a multiple of the largest output: a block of a transformer, which
lies between the class token and the last tokens that it attends to, saves 10 to 13 tokens' widths beside what is for
its weights, and the largest output in it has 4."""

FOR_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that save their input for the gradient of their weights alone."""

MOST_COLOURS = 4
"""Channels that images may have behind their other axes."""

MOST_OF_TOKENS = 48 * 2**20
"""But of tokens no more: those of a video are many in the first stage and few in the last. Of a ViT so large that its
last block needs more, the pass is repeated."""

N_SOURCES = 4
"""The latest maps that tokens may have been made of."""

MOST_NODES = 64
"""Of the graph between tokens and the layers before them, how many are looked at."""

CELL_BY_CELL = "Add Sub Mul Div Neg NativeLayerNorm Gelu Relu Silu Tanh Sigmoid NativeDropout Clone ToCopy".split()
"""Operators that leave every token in its place, by the names of their nodes."""

REORDERING = "Index IndexSelect Gather Take Flip Roll".split()
"""Operators that may put tokens elsewhere."""

VIEWS = "View UnsafeView ReshapeAlias Permute Transpose T Expand Squeeze Unsqueeze Slice Cat Stack Split Unbind".split()
"""Operators that may do so together."""

CHANNELS_FIRST = """Convolution NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeGroupNorm MaxPool2DWithIndices
MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D""".split()
"""Operators on maps (B, C, ...)."""

SAME_LAYOUT = (*CELL_BY_CELL, *"PreluKernel LeakyRelu Elu Hardtanh Hardswish Cat AsStrided CopySlices".split())
"""Operators after which the channels lie where they did; the last two are what a view is that was changed in place."""

HELD_IN_PLACE = "Dropout NativeDropout Expand UnsafeView View ReshapeAlias Clone ToCopy".split()
"""What may lie between a softmax and the product with the values that it weighs."""


class LetGo(Exception):
    """The way back needs a tensor that was not kept."""


class Ran(NamedTuple):
    """The last run of a layer."""

    name: str
    module: nn.Module
    order: int
    """In which the layers finished."""
    began: int
    """How many layers had finished when it began."""
    shape: tuple[int, ...]
    """Of what it returned, or of the first tensor in it."""
    edge: GradientEdge | None
    """Where that is in the graph; None where it is not in it."""
    sees_image: bool
    readings: "dict[tuple[int, bool], TokensToMap | None]"
    """Where its tokens lie, by (number of tokens, sequence first); None where that could not be read."""


class TokensToMap:
    """Reshape transform of a transformer: (B, N, D) tokens -> (B, D, h, w), without those that are no patches; of
    volumes (B, D, d, h, w).

    Args:
        n_prefix: tokens before the patches: class, distillation, register or prompt tokens.
        grid: (h, w) of the patches, row by row, or (d, h, w), slice by slice.
        n_suffix: tokens behind the patches.
        order: the token of every cell, row by row, where they are not in a row of their own; ``n_prefix`` and
            ``n_suffix`` then only say how many others there are.
        sequence_first: the tokens are (N, B, D).

    Raises:
        ValueError: when called with another number of tokens, which another size of the images has.

    >>> TokensToMap(1, (14, 14))(torch.rand(2, 197, 192)).shape
    torch.Size([2, 192, 14, 14])
    """

    def __init__(self, n_prefix, grid, n_suffix=0, order=None, sequence_first=False):
        self.n_prefix, self.grid, self.n_suffix = n_prefix, tuple(grid), n_suffix
        self.order, self.sequence_first = order, sequence_first
        self.n_tokens = n_prefix + math.prod(self.grid) + n_suffix

    def __call__(self, tokens):
        if self.sequence_first:
            tokens = tokens.transpose(0, 1)
        if tokens.ndim != 3 or tokens.shape[1] != self.n_tokens:
            raise ValueError(
                f"{self!r} takes {self.n_tokens} tokens, got {tuple(tokens.shape)}; images of another size have another"
                " grid"
            )
        if self.order is not None:
            patches = tokens[:, torch.tensor(self.order, device=tokens.device)]
        else:
            patches = tokens[:, self.n_prefix : self.n_tokens - self.n_suffix]
        return patches.transpose(1, 2).unflatten(2, self.grid)

    def __repr__(self):
        rest = f", n_suffix={self.n_suffix}" if self.n_suffix else ""
        rest += ", order=..." if self.order is not None else ""
        rest += ", sequence_first=True" if self.sequence_first else ""
        return f"TokensToMap(n_prefix={self.n_prefix}, grid={self.grid}{rest})"


def fits(grid: Sequence[int], image_size: Sequence[int]) -> bool:
    """Whether (h, w) may be a map of an (H, W) image: of its aspect ratio but for rounding, and more than one cell.

    Of a volume (D, H, W), whose frames or slices may be strided otherwise, also (d, h, w).
    """
    if len(grid) > len(image_size):
        return False
    *depth, h, w = grid
    *of_image, height, width = image_size[-len(grid) :]
    if any(cells > size for cells, size in zip((*depth, h, w), (*of_image, height, width))):
        return False
    return math.prod(grid) > 1 and abs(h - w * height / width) <= max(1, height / width)


def image_size(images: torch.Tensor, grids: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """(H, W) of images (B, C, H, W) with maps of these grids, or (D, H, W): their last axes, as many as a grid has.

    Of (B, H, W, C) with at most MOST_COLOURS channels the axes in the middle; but for grids that only the last fit.
    """
    n_axes = len(grids[0])
    last, between = tuple(images.shape[-n_axes:]), tuple(images.shape[1:-1])
    if not may_be_channels_last(images) or n_axes != len(between):
        return last
    first, behind = (all(fits(grid, size) for grid in grids) for size in (last, between))
    return last if first and not behind else between


def may_be_channels_last(images: torch.Tensor) -> bool:
    """Whether the shape looks like (B, H, W, C), or (B, D, H, W, C)."""
    return images.ndim in (4, 5) and 1 <= images.shape[-1] <= MOST_COLOURS < min(images.shape[-3:-1])


def channels_last_to_map(features: torch.Tensor) -> torch.Tensor:
    """Reshape transform of a channels-last layer: (B, h, w, C) -> (B, C, h, w), also of (B, d, h, w, C)."""
    return features.movedim(-1, 1)


class DryRun:
    """The pass, which begins and ends in the constructor; hooks and training flags are as before, also after an error.

    Attributes:
        ran: the layers that ran and returned a floating-point tensor, by name, in the order in which they finished.
        scores: (B, n_classes), with a graph.
        image_size: (H, W), or (D, H, W) of inputs with five axes.
        batch: B.
        widths: of the tokens, (B, N, D), that were seen: {N: {D, ...}}.
        adapters: the modules that wrap a layer and add a low-rank piece to it, each with that layer.

    Args:
        example_input: a tensor with the images, or several inputs of the model, positional ones in a tuple or list,
            named ones in a dictionary, of which the first with four axes has the images.
        linked: False for a model that does not hand on a gradient to its images: integer ones, or detached. Then every
            layer counts as one that sees them.
        keep_from: keep all that is saved once so many layers have finished, and nothing before.

    Raises:
        ValueError: the model returns no scores.
        TypeError: there is no tensor among the inputs.
    """

    def __init__(self, model: nn.Module, example_input: Any, linked: bool = True, keep_from: int | None = None) -> None:
        # Not above: guides, which capture imports, import the layers.
        from cfcam_gpu.capture import GraphRoot, named_modules

        self.ran: dict[str, Ran] = {}
        self._readings: dict[tuple[int, bool], TokensToMap | None] = {}  # the latest
        self._readings_at: dict[tuple[Any, int], dict[tuple[int, bool], TokensToMap | None]] = {}  # by edge
        self.widths: dict[int, set[int]] = {}
        self.adapters: dict[nn.Module, nn.Module] = {}
        self._graph_root = GraphRoot
        self._linked = linked
        self._size_behind: tuple[int, ...] | None = None  # (H, W), of images that look as if they had them last
        self._order = 0
        self._calls: list[_Call] = []  # of the layers that are running
        self._sources: deque[tuple[GradientEdge, Any]] = deque(maxlen=N_SOURCES)
        self._sees: dict[Any, bool] = {}
        self._channels_first: set[Any] = set()
        call = Call()
        self._saved = _Saved(model, keep_from, lambda: self._order, self._is_for_weights)
        with ExitStack() as stack:
            for module in [module for module in model.modules() if module.training]:
                stack.callback(setattr, module, "training", True)
                module.training = False
            stack.enter_context(eager_without_grad_in(model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(self._saved.pack, self._saved.unpack))
            for name, module in named_modules(model):
                stack.callback(module.register_forward_pre_hook(call.only(self._before), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(call.only(self._after(name))).remove)
            arguments, named, image = self._inputs(model, example_input)
            self.image_size, self.batch = tuple(image.shape[2:] if image.ndim == 5 else image.shape[-2:]), len(image)
            if may_be_channels_last(image):
                self._size_behind, self.image_size = self.image_size, tuple(image.shape[1:-1])
            del image
            stack.enter_context(call)
            self.scores = find_logits(model(*arguments, **named), self.batch)

    def is_linked(self) -> bool:
        """Whether the scores are in a graph that begins at the images, as far as that was asked for."""
        return self.scores.requires_grad and (not self._linked or self._sees_image(self.scores.grad_fn))

    def ask(self, ran, question):
        """Per layer what ``question(layer, gradient)`` says of the top scores' gradient where it ran; None without one.

        The score is the sum over the images. Of the gradients only the last layer's is kept, and the others' are handed
        over as the backward passes them.

        Args:
            ran: `Ran` of layers that are in the graph, the earliest last.

        Returns:
            The answers; none to the layers behind the first True, where a tensor on the way to them was not kept.

        Raises:
            LetGo: a tensor on the way was not kept, and no answer before was True.
        """
        answers = {}

        def on_the_way(each, gradients):
            if gradients[each.edge.output_nr] is not None:
                answers[each.name] = question(each, gradients[each.edge.output_nr])

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            score = self.scores.amax(1).sum()
            for each in ran[:-1]:
                stack.callback(each.edge.node.register_prehook(partial(on_the_way, each)).remove)
            try:
                for each in ran[::-1]:  # mostly the first goes through all the others
                    if each.name not in answers:
                        (gradient,) = torch.autograd.grad(score, each.edge, retain_graph=True, allow_unused=True)
                        answers[each.name] = None if gradient is None else question(each, gradient)
            except LetGo:
                known = list(takewhile(lambda each: each.name in answers, ran))
                if True not in (answers[each.name] for each in known):
                    raise
        return [answers.get(each.name) for each in ran]

    def _inputs(self, model, example_input):
        """The positional and the named inputs, private copies on the model's device, and the images among them."""
        from cfcam_gpu.capture import _device

        inputs = example_input
        if not isinstance(inputs, Inputs):
            inputs = check_inputs(tuple(inputs) if isinstance(inputs, list) else inputs)
        image = inputs.images

        def private(tensor):
            is_image = tensor is image
            tensor, device = tensor.detach(), _device(model, tensor)
            if not is_image or not self._linked or not tensor.is_floating_point():
                return tensor.to(device, copy=True)
            # A frozen model still needs a graph, and a leaf could not be changed in place: the product is the copy.
            copy = tensor.to(device, copy=tensor.is_inference()).requires_grad_().mul(1)
            self._image = copy.grad_fn
            self._image_edge = get_gradient_edge(copy)
            return copy

        self._image = self._image_edge = None
        return (*map_tensors(private, (inputs.args, inputs.kwargs)), image)

    def _sees_image(self, node):
        """Whether this node of the graph comes from the images."""
        if not self._linked:
            return node is not None
        if self._image is None or node is None:
            return False
        sees, waiting = self._sees, [node]
        sees[self._image] = True
        while waiting:
            node = waiting[-1]
            if node in sees:
                waiting.pop()
                continue
            behind = [each for each, _ in node.next_functions if each is not None]
            unknown = [each for each in behind if each not in sees]
            if unknown:
                waiting += unknown
            else:
                sees[node] = any(map(sees.__getitem__, behind))
                waiting.pop()
        return sees[node]

    # Hooks

    def _before(self, module, arguments, named):
        tensor = next((each for each in (*arguments, *named.values()) if isinstance(each, torch.Tensor)), None)
        self._calls.append(_Call(module, tensor, self._order))
        if tensor is None:
            return
        if self._size_behind and isinstance(module, nn.modules.conv._ConvNd):
            if tuple(tensor.shape[2:]) == self._size_behind:  # as the first convolution takes them
                self.image_size = self._size_behind
            self._size_behind = None
        self._read(tensor)

    def _after(self, name):
        def hook(module, arguments, output):
            while self._calls and self._calls[-1].module is not module:  # one that raised, and the model went on
                self._calls.pop()
            call = self._calls.pop()
            self._order += 1
            self.ran.pop(name, None)  # the last run of a layer counts, also for the order
            tensor = first_tensor(output)
            if tensor is None:
                return None
            if not (self._linked or tensor.requires_grad or tensor._is_view()) and torch.is_grad_enabled():
                self._graph_root.apply(torch.zeros((), requires_grad=True), tensor)
            self._look_for_an_adapter(call, tensor)
            readings = self._read(tensor)
            edge = get_gradient_edge(tensor) if tensor.requires_grad else None
            sees_image = edge is not None and self._sees_image(edge.node)
            if edge is not None and isinstance(module, nn.modules.instancenorm._InstanceNorm):
                self._channels_first.add(edge.node)  # a view of a batch norm's
            self.ran[name] = Ran(name, module, self._order, call.began, tuple(tensor.shape), edge, sees_image, readings)
            received = call.tensor()
            self._saved.may_keep(KEPT_OF_MAPS * (tensor.nbytes + (0 if received is None else received.nbytes)))
            if any(reading is not None and reading.n_prefix + reading.n_suffix for reading in readings.values()):
                self._saved.may_keep(min(KEPT_OF_TOKENS * tensor.nbytes, MOST_OF_TOKENS))
            if sees_image:
                self._remember(tensor, edge, readings)
            return None

        return hook

    def _is_for_weights(self, tensor):
        """Whether this saved tensor is for the gradient of a layer's weights, which nobody asks for."""
        if not self._calls or type(self._calls[-1].module) not in FOR_WEIGHTS:
            return False
        received = self._calls[-1].tensor()
        return received is not None and received.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def has_channels_first(self, ran):
        """Whether a layer's output has its channels before its grid; False where its operators do not say so."""
        waiting, seen = [ran.edge.node] if ran.edge is not None else [], set()
        while waiting and len(seen) < MOST_NODES:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                if node in self._channels_first or _operator(node) in CHANNELS_FIRST:
                    return True
                if _operator(node) in SAME_LAYOUT:
                    waiting += [each for each, _ in node.next_functions if each is not None]
        return False

    def _look_for_an_adapter(self, call, tensor):
        """A module that adds something of a lower rank to what a layer inside it makes of the module's own input."""
        parent = self._calls[-1] if self._calls else None
        received = call.tensor()
        weight = getattr(call.module, "weight", None)
        if parent is not None and received is not None and isinstance(weight, torch.Tensor) and weight.ndim > 1:
            if parent.base is None and parent.tensor() is received:
                parent.base = call.module, tensor.shape
        if call.base is not None and call.base[1] == tensor.shape:
            module, base = call.module, call.base[0]
            own = {id(parameter) for parameter in base.parameters()}
            rank = min(base.weight.shape[0], base.weight[0].numel())
            others = (each for each in module.parameters() if id(each) not in own and each.ndim > 1 and each.numel())
            if getattr(module, "base_layer", None) is base or any(
                min(each.shape[0], each[0].numel()) < rank for each in others
            ):
                self.adapters[module] = base

    def _is_tokens(self, tensor):
        return tensor.ndim == 3 and self.batch in tensor.shape[:2]

    def _remember(self, tensor, edge, readings):
        """A map, of which tokens may be made."""
        if any(edge == known for known, _ in self._sources):
            return
        if tensor.ndim in (4, 5) and len(tensor) == self.batch:
            if any(fits(grid, self.image_size) for grid in (tensor.shape[2:], tensor.shape[1:-1])):
                self._sources.append((edge, None))
        self._sources.extend((edge, reading) for reading in readings.values() if reading is not None)

    def _counts(self, tensor):
        """(number of tokens, whether they come first) as this tensor may have to be read."""
        first, second = tensor.shape[:2]
        readings = [(second, False)] if first == self.batch else []
        return readings + [(first, True)] if second == self.batch else readings

    # Where tokens lie

    def _read(self, tensor):
        """Where the image's tokens lie in what a layer takes or returns, by (number of tokens, sequence first)."""
        if not (self._is_tokens(tensor) and tensor.is_floating_point() and tensor.requires_grad):
            return {}
        if not self._sees_image(tensor.grad_fn):
            return {}
        edge = get_gradient_edge(tensor)
        place = edge.node, edge.output_nr
        if place not in self._readings_at:
            found = {}
            for key in self._counts(tensor):
                if key[0] > 1:
                    self.widths.setdefault(key[0], set()).add(tensor.shape[2])
                    found[key] = self._readings[key] = self._reading(tensor, place, key)
            self._readings_at[place] = found
        return self._readings_at[place]

    def _reading(self, tensor, place, key):
        """Where tokens lie that a layer takes or returns at this place of the graph; None where it cannot be read."""
        # What is added to known tokens, as in a residual stream, lies where they do.
        waiting, seen, known = [place], set(), []
        while waiting and len(seen) < MOST_NODES:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                if key in self._readings_at.get(at, ()):
                    known.append(self._readings_at[at][key])
                elif _operator(at[0]) in CELL_BY_CELL:
                    waiting += [each for each in at[0].next_functions if each[0] is not None]
        if known:
            return next((reading for reading in known if reading is not None), None)
        operators = self._operators_before(place, key)
        if key not in self._readings or operators <= {*CELL_BY_CELL, *VIEWS, *REORDERING}:
            return self._locate(tensor, *key)
        # Mixed by a layer or an operator, which leaves as many tokens where they are; unless some are picked out.
        return None if operators.intersection(REORDERING) else self._readings[key]

    def _operators_before(self, place, key):
        """The operators between as many known tokens and this place of the graph, on the way of the image."""
        waiting, seen, operators = [place], set(), set()
        while waiting:
            at = waiting.pop()
            if at in seen or key in self._readings_at.get(at, ()) or not self._sees_image(at[0]):
                continue
            if len(seen) == MOST_NODES:
                return operators | {"more"}
            seen.add(at)
            operators.add(_operator(at[0]))
            waiting += [each for each in at[0].next_functions if each[0] is not None]
        return operators

    def _locate(self, tensor, n_tokens, sequence_first):
        """The `TokensToMap`; None where the tokens are no cells of a map, or mixed."""
        sources = list(reversed(self._sources))
        if self._image_edge is not None:
            sources.append((self._image_edge, None))
        for edge, reading in sources:
            if _is_attended(tensor.grad_fn, edge.node):
                continue
            for to_map in [reading] if reading is not None else [None, channels_last_to_map]:
                try:
                    tokens = _tokens_of_cells(tensor, edge, n_tokens, sequence_first, to_map)
                except (LetGo, RuntimeError):  # an operator that cannot be differentiated
                    continue
                tokens = _one_cell_a_token(tokens)
                if tokens is not None:
                    order = tokens.flatten().tolist()
                    n_prefix, n_others = min(order), n_tokens - len(order)
                    if order != list(range(n_prefix, n_prefix + len(order))):
                        n_prefix = min(n_prefix, n_others)
                        return TokensToMap(n_prefix, tokens.shape, n_others - n_prefix, tuple(order), sequence_first)
                    return TokensToMap(n_prefix, tokens.shape, n_others - n_prefix, None, sequence_first)
        return None


class _Call:
    """A run of a layer that has not ended."""

    def __init__(self, module, tensor, began):
        self.module = module
        self.began = began
        self.tensor = (lambda: None) if tensor is None else weakref.ref(tensor)
        self.base = None


class _Saved:
    """The hooks through which autograd saves tensors: the latest are kept, as many as `may_keep` was told.

    A tensor counts once, however often it was saved, and the model's own not at all. Of one that is for the gradient of
    weights only the shape is kept. None is checked for changes in place: only whether a gradient is zero is asked of
    them.
    """

    def __init__(self, model, keep_from, order, is_for_weights):
        self._own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self._keep_from, self._order, self._is_for_weights = keep_from, order, is_for_weights
        self._limit, self._bytes = KEPT_BYTES, 0
        self._queue: deque[list] = deque()
        self._holders: dict[int, int] = {}  # of every storage

    def may_keep(self, n_bytes):
        self._limit = max(self._limit, n_bytes)

    def pack(self, tensor):
        tensor = tensor.detach()  # autograd's own output would keep its node, and that the tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._own:
            return [tensor]
        if self._is_for_weights(tensor):
            return [tensor.new_zeros(()).expand_as(tensor)]
        if self._keep_from is not None:
            return [tensor if self._order() >= self._keep_from else None]
        held = [tensor]
        holders = self._holders.get(storage.data_ptr(), 0)
        self._holders[storage.data_ptr()] = holders + 1
        self._bytes += 0 if holders else storage.nbytes()
        self._queue.append(held)
        while self._bytes > self._limit:
            oldest = self._queue.popleft()
            storage = oldest.pop().untyped_storage()
            oldest.append(None)
            self._holders[storage.data_ptr()] -= 1
            if not self._holders[storage.data_ptr()]:
                del self._holders[storage.data_ptr()]
                self._bytes -= storage.nbytes()
        return held

    def unpack(self, held):
        if held[0] is None:
            raise LetGo
        return held[0]


def _is_attended(node, source):
    """Whether attention lies between a node of the graph and another, where it was made of that: all is mixed then.

    To find this out by gradients takes several backward passes through the attention, each as dear as the forward.
    """
    waiting, seen = [node], {source}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if _attends(node) and _comes_from(node, source):
                return True
            waiting += [each for each, _ in node.next_functions if each is not None]
    return False


def _attends(node):
    """Whether a node is attention: one operator for it all, or a product with what a softmax returned."""
    operator = _operator(node)
    if operator.startswith("ScaledDotProduct"):
        return True
    if operator not in ("Bmm", "Baddbmm") or len(node.next_functions) < 2:
        return False
    weights = node.next_functions[-2][0]
    while weights is not None and _operator(weights) in HELD_IN_PLACE:
        weights = weights.next_functions[0][0]
    return weights is not None and _operator(weights) == "Softmax"


def _comes_from(node, source):
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is source:
            return True
        if node not in seen:
            seen.add(node)
            waiting += [each for each, _ in node.next_functions if each is not None]
    return False


def _operator(node):
    return re.sub(r"Backward\d*$", "", node.name())


def _tokens_of_cells(tensor, edge, n_tokens, sequence_first, to_map):
    """(h, w) or (d, h, w) int64: which token each cell of the map at ``edge`` went into; None if not one token.

    A gradient is asked back from the tokens to the map, once for every bit of their numbers: from the tokens with that
    bit set. Where each token is made of cells of its own, with whatever weights, a cell has all of the gradient or
    none.
    """
    width = tensor.shape[2]
    direction = torch.arange(1, width + 1, device=tensor.device).cos().to(tensor.dtype)  # none that a norm removes
    numbers = torch.arange(n_tokens, device=tensor.device)

    def backward(which):
        which = which.to(tensor.dtype)[:, None, None] if sequence_first else which.to(tensor.dtype)[None, :, None]
        cotangent = (which * direction).expand_as(tensor)
        (gradient,) = torch.autograd.grad(tensor, edge, cotangent, retain_graph=True, allow_unused=True)
        if gradient is None:
            return None
        gradient = (gradient if to_map is None else to_map(gradient)).detach()
        return gradient[0].to(torch.promote_types(gradient.dtype, torch.float32))

    whole = backward(torch.ones_like(numbers))
    if whole is None or whole.ndim not in (3, 4) or whole[0].numel() < 2:
        return None
    size, found = whole.abs().sum(0), torch.zeros(whole.shape[1:], dtype=torch.int64, device=tensor.device)
    if not bool((size > 0).all()):
        return None
    for bit in range((n_tokens - 1).bit_length()):
        part = backward((numbers >> bit) & 1)
        all_of_it, none_of_it = ((part - wanted).abs().sum(0) <= 1e-3 * size for wanted in (whole, 0))
        if not bool((all_of_it | none_of_it).all()):
            return None
        found |= all_of_it.long() << bit
    return found


def _one_cell_a_token(tokens):
    """The grid with every token once, of a map of which neighbours went into a token together; None if they did not."""
    if tokens is None:
        return None
    cells = tokens
    for axis, size in enumerate(tokens.shape):
        line = tokens[tuple(slice(None) if each == axis else 0 for each in range(tokens.ndim))]
        changes = (line != line[0]).nonzero()
        side = int(changes[0]) if len(changes) else size
        if size % side:
            return None
        blocks = cells.unflatten(axis, (-1, side))
        cells = blocks.select(axis + 1, 0)
        if not bool((blocks == cells.unsqueeze(axis + 1)).all()):
            return None
    return cells if len(cells.unique()) == cells.numel() > 1 else None
