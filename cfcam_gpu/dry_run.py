"""One forward pass that notes what every layer returned: shapes, whether the image is seen, and where its tokens lie.

The pass is differentiable, so that a layer can be asked afterwards whether the score depends on it, but it keeps hardly
more than a pass without autograd: of the tensors that autograd saves, only the latest (`_Saved`). The way back from the
score to the last layers needs no others.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from cfcam_gpu.calls import Call, eager_without_grad, is_compiled, is_fused
from cfcam_gpu.inputs import Inputs, check_inputs
from cfcam_gpu.outputs import find_logits, map_tensors

KEPT_BYTES = 4 * 2**20
"""Saved tensors that are kept in any case."""

KEPT_OF_MAPS, KEPT_OF_TOKENS = 0.1, 4
"""And beyond, as multiples of the largest input and output that a layer had together. What follows a network's last map
is small. A block of a transformer, which lies between the class token and the last tokens that it attends to, saves
about 17 tokens' widths, and the largest layer of it has 5."""

N_SOURCES = 4
"""The latest maps that tokens may have been made of."""


class LetGo(Exception):
    """The way back needs a tensor that was not kept."""


class Ran(NamedTuple):
    """The last run of a layer."""

    name: str
    module: nn.Module
    order: int
    """In which the layers finished."""
    shape: tuple[int, ...]
    """Of what it returned, or of the first tensor in it."""
    edge: GradientEdge | None
    """Where that is in the graph; None where it is not in it."""
    sees_image: bool


class TokensToMap:
    """Reshape transform of a transformer: (B, N, D) tokens -> (B, D, h, w), without those that are no patches.

    Args:
        n_prefix: tokens before the patches: class, distillation, register or prompt tokens.
        grid: (h, w) of the patches, row by row.
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
        self.n_tokens = n_prefix + self.grid[0] * self.grid[1] + n_suffix

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
    """Whether (h, w) may be a map of an (H, W) image: of its aspect ratio but for rounding, and more than one cell."""
    (h, w), (height, width) = grid, image_size
    return h * w > 1 and h <= height and w <= width and abs(h - w * height / width) <= max(1, height / width)


def channels_last_to_map(features: torch.Tensor) -> torch.Tensor:
    """Reshape transform of a channels-last layer: (B, h, w, C) -> (B, C, h, w)."""
    return features.permute(0, 3, 1, 2)


class DryRun:
    """The pass, which begins and ends in the constructor; hooks and training flags are as before, also after an error.

    Attributes:
        ran: the layers that ran and returned a floating-point tensor, by name, in the order in which they finished.
        scores: (B, n_classes), with a graph.
        image_size: (H, W).
        batch: B.
        readings: `TokensToMap` by (tokens, sequence first), None where the tokens were seen and could not be read.
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
        self.readings: dict[tuple[int, bool], TokensToMap | None] = {}
        self.widths: dict[int, set[int]] = {}
        self.adapters: dict[nn.Module, nn.Module] = {}
        self._graph_root = GraphRoot
        self._linked = linked
        self._order = 0
        self._calls: list[_Call] = []  # of the layers that are running
        self._sources: deque[tuple[GradientEdge, Any]] = deque(maxlen=N_SOURCES)
        self._sees: dict[Any, bool] = {}
        call = Call()
        self._saved = _Saved(model, keep_from, lambda: self._order)
        with ExitStack() as stack:
            for module in [module for module in model.modules() if module.training]:
                stack.callback(setattr, module, "training", True)
                module.training = False
            modules = list(model.modules())
            stack.enter_context(eager_without_grad(fused=is_fused(modules), compiled=is_compiled(modules)))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(self._saved.pack, self._saved.unpack))
            for name, module in named_modules(model):
                stack.callback(module.register_forward_pre_hook(call.only(self._before), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(call.only(self._after(name))).remove)
            arguments, named, image = self._inputs(model, example_input)
            self.image_size, self.batch = tuple(image.shape[-2:]), len(image)
            del image
            stack.enter_context(call)
            self.scores = find_logits(model(*arguments, **named), self.batch)

    def is_linked(self) -> bool:
        """Whether the scores are in a graph that begins at the images, as far as that was asked for."""
        return self.scores.requires_grad and (not self._linked or self._sees_image(self.scores.grad_fn))

    def gradients(self, ran: list[Ran]) -> list[torch.Tensor | None]:
        """The gradients of the sum of the images' top scores where these layers ran, all in the graph; None for none.

        Raises:
            LetGo: a tensor on the way was not kept.
        """
        with torch.inference_mode(False), torch.enable_grad():
            score = self.scores.amax(1).sum()
            edges = [each.edge for each in ran if each.edge is not None]
            return list(torch.autograd.grad(score, edges, retain_graph=True, allow_unused=True))

    def _inputs(self, model, example_input):
        """The positional and the named inputs, private copies on the model's device, and the images among them."""
        from cfcam_gpu.capture import _device

        inputs = example_input
        if not isinstance(inputs, Inputs):
            inputs = check_inputs(tuple(inputs) if isinstance(inputs, list) else inputs)
        image = inputs.images

        def private(tensor):
            copy = tensor.detach().to(_device(model, tensor), copy=True)
            if tensor is not image or not self._linked or not copy.is_floating_point():
                return copy
            # A frozen model still needs a graph, and a leaf could not be changed in place.
            copy = copy.requires_grad_().mul(1)
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
        self._calls.append(_Call(module, tensor))
        if tensor is not None:
            self._read(tensor)

    def _after(self, name):
        def hook(module, arguments, output):
            while self._calls and self._calls[-1].module is not module:  # one that raised, and the model went on
                self._calls.pop()
            call = self._calls.pop()
            self._order += 1
            self.ran.pop(name, None)  # the last run of a layer counts, also for the order
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
                return None
            if not (self._linked or tensor.requires_grad or tensor._is_view()) and torch.is_grad_enabled():
                self._graph_root.apply(torch.zeros((), requires_grad=True), tensor)
            self._look_for_an_adapter(call, tensor)
            self._read(tensor)
            edge = get_gradient_edge(tensor) if tensor.requires_grad else None
            sees_image = edge is not None and self._sees_image(edge.node)
            self.ran[name] = Ran(name, module, self._order, tuple(tensor.shape), edge, sees_image)
            received = call.tensor()
            n_bytes = tensor.nbytes + (received.nbytes if received is not None else 0)
            self._saved.may_keep(n_bytes, self._is_tokens(tensor))
            if sees_image:
                self._remember(tensor, edge)
            return None

        return hook

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

    def _remember(self, tensor, edge):
        """A map, of which tokens may be made."""
        if any(edge == known for known, _ in self._sources):
            return
        if tensor.ndim == 4 and len(tensor) == self.batch:
            if any(fits(grid, self.image_size) for grid in (tensor.shape[2:], tensor.shape[1:3])):
                self._sources.append((edge, None))
        elif self._is_tokens(tensor):
            known = [self.readings.get((n, last)) for n, last in self._counts(tensor)]
            self._sources.extend((edge, reading) for reading in known if reading is not None)

    def _counts(self, tensor):
        """(number of tokens, whether they come first) as this tensor may have to be read."""
        first, second = tensor.shape[:2]
        readings = [(second, False)] if first == self.batch else []
        return readings + [(first, True)] if second == self.batch else readings

    # Where tokens lie

    def _read(self, tensor):
        """Note where the tokens lie that this is the first to hold so many of, if it holds tokens of the image."""
        if not (self._is_tokens(tensor) and tensor.is_floating_point() and tensor.requires_grad):
            return
        if not self._sees_image(tensor.grad_fn):
            return
        for n_tokens, first in self._counts(tensor):
            self.widths.setdefault(n_tokens, set()).add(tensor.shape[2])
            if (n_tokens, first) not in self.readings and n_tokens > 1:
                self.readings[n_tokens, first] = self._locate(tensor, n_tokens, first)

    def _locate(self, tensor, n_tokens, sequence_first):
        """The `TokensToMap`; None where the tokens are no cells of a map, or mixed."""
        sources = list(reversed(self._sources))
        if self._image_edge is not None:
            sources.append((self._image_edge, None))
        for edge, reading in sources:
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

    def __init__(self, module, tensor):
        self.module = module
        self.tensor = (lambda: None) if tensor is None else weakref.ref(tensor)
        self.base = None


class _Saved:
    """The hooks through which autograd saves tensors: the latest are kept, as many as `may_keep` was told.

    A tensor counts once, however often it was saved, and the model's own not at all. None is checked for changes in
    place: only whether a gradient is zero is asked of them.
    """

    def __init__(self, model, keep_from, order):
        self._own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self._keep_from, self._order = keep_from, order
        self._limit, self._bytes = KEPT_BYTES, 0
        self._queue: deque[list] = deque()
        self._holders: dict[int, int] = {}  # of every storage

    def may_keep(self, n_bytes, tokens):
        """A layer has had so many bytes of input and output."""
        self._limit = max(self._limit, (KEPT_OF_TOKENS if tokens else KEPT_OF_MAPS) * n_bytes)

    def pack(self, tensor):
        tensor = tensor.detach()  # autograd's own output would keep its node, and that the tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._own:
            return [tensor]
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


def _tokens_of_cells(tensor, edge, n_tokens, sequence_first, to_map):
    """(h, w) int64: the number of the token that each cell of the map at ``edge`` went into; None if not one token.

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
    if whole is None or whole.ndim != 3 or whole.shape[1] * whole.shape[2] < 2:
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
    """(h, w) with every token once, of a map of which neighbours went into a token together; None if they did not."""
    if tokens is None:
        return None
    (height, width), sides = tokens.shape, []
    for line in (tokens[:, 0], tokens[0]):
        changes = (line != line[0]).nonzero()
        sides.append(int(changes[0]) if len(changes) else len(line))
    if height % sides[0] or width % sides[1]:
        return None
    blocks = tokens.unflatten(1, (-1, sides[1])).unflatten(0, (-1, sides[0]))  # (h, rows, w, columns)
    cells = blocks[:, 0, :, 0]
    is_whole = bool((blocks == cells[:, None, :, None]).all()) and len(cells.unique()) == cells.numel() > 1
    return cells if is_whole else None
