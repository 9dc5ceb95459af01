"""Of a recorded head, the steps that compute no more than the outputs need.

A vision transformer's classifier reads the class token, of 197. What leads there from the last block can do with that
row: layer norms, products with weights, activations and sums treat every token by itself, and attention needs of its
queries only those rows. Keys and values it needs of all tokens.

`only_needed` walks from the outputs back. What a select or a slice takes of a tensor is a box of it
(`cfcam_gpu.boxes`), and each operator has a rule that says which boxes of its arguments a box of its result takes.
Where it has none, everything is computed. A tensor of which several boxes are wanted is computed in these boxes:
queries, keys and values in one product become three, of one row and of all. The steps are a recording's, of torch's
operators, so this is the same for any model and stays differentiable. That their outputs are the network's own is for
`cfcam_gpu.head` to check.

What there is to gain, in multiply-adds, with d channels and N tokens: a block takes 12 N d^2 + 2 N^2 d. Behind its
first layer norm, for one token, 2 N d^2 for keys and values are left, and 10 d^2 + 2 N d. For ViT-B/16 that is 0.239e9
of 1.454e9, where the network has 17.56e9: a 74th of the network, where the whole block is a 12th.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from cfcam_gpu.boxes import (
    Box,
    Factor,
    NotABox,
    aligned,
    contains,
    is_whole,
    lengths,
    merged,
    moved,
    part,
    reshaped,
    whole,
)
from cfcam_gpu.head_steps import Kept, Rows, Size, Slot, Step, needed, slots_of

aten = torch.ops.aten


class _Want(NamedTuple):
    """In the place of a tensor: a box of it; None for all of one whose size is not known."""

    leaf: Any
    box: Box | None


class _Variant(NamedTuple):
    """An operation that makes boxes of what a step makes: (slot, box) by the tensors that it returns."""

    function: Any
    args: Any  # args, kwargs
    made: list[tuple[int, Box | None]]
    is_smaller: bool = False  # a product or attention, of fewer rows


def only_needed(
    steps: list[Step], result: list[Any], sizes: dict[int, list[Size] | None], weights: set[int]
) -> tuple[list[Step], list[Any], int] | None:
    """Steps for the same results, with products and attention of fewer rows; None where there are none such.

    Args:
        steps: if one of them changes a tensor, None comes back.
        result: slots and constants.
        sizes: by slot, its tensor's shape; None of one that depends on the number of images in another way.
        weights: ids of the model's own tensors, which may change between calls.

    Returns:
        the steps, the results in their slots, and how many slots there are.
    """
    if any(step.function._schema.is_mutable for step in steps):
        return None
    variants = _variants(steps, result, sizes, weights)
    if not any(variant.is_smaller for variant in variants):
        return None
    return _Emitted(variants, sizes).steps_for(result)


def _variants(steps, result, sizes, weights):
    """In their order, what runs instead of the steps."""
    wanted: dict[int, list[Box | None]] = {}
    variants: list[_Variant] = []

    def want(number, box):
        wanted.setdefault(number, []).append(box)

    for number in slots_of(result):
        want(number, _all_of(sizes[number]))
    for step in reversed(steps):
        of_step = _of(step, {number: wanted[number] for number in step.made if number in wanted}, sizes, weights)
        for each in _wants(of_step):
            if type(each.leaf) is Slot:
                want(each.leaf.number, each.box)
        variants += of_step
    return variants[::-1]


def _of(step, wanted, sizes, weights):
    """The variants of a step of whose slots these boxes are wanted."""
    if not wanted:
        return []
    args, kwargs = tree_unflatten(step.leaves, step.spec)
    try:
        found = []
        for number, boxes in wanted.items():
            everything = _all_of(sizes[number])
            if None in (everything, *boxes):
                raise NotABox
            for box in merged(boxes, everything):
                call = _Call(step.function, args, kwargs, step.made.index(number), number, box, sizes, weights)
                if box == everything and call.packet not in PARTS:
                    raise NotABox
                function, new = call.reduced()
                # One of some columns alone, the classifier's for one class, is no less exact left as it is.
                is_smaller = call.packet in PRODUCTS and not is_whole(box[-2])
                found.append(_Variant(function, new, [(number, box)], is_smaller))
        return found
    except NotABox:
        everything = lambda leaf: _Want(leaf, _all_of(sizes[leaf.number])) if type(leaf) is Slot else leaf
        made = [(number, _all_of(sizes[number])) for number in step.made]
        return [_Variant(step.function, tree_map(everything, (args, kwargs)), made)]


def _all_of(sizes):
    return None if sizes is None else whole(sizes)


def _wants(variants):
    for variant in variants:
        yield from (leaf for leaf in _flat(variant.args)[0] if type(leaf) is _Want)


def _flat(args):
    return tree_flatten(args, is_leaf=lambda leaf: type(leaf) is _Want)


class _Emitted:
    """Steps of variants, with what cuts the boxes that they take out of the boxes that there are."""

    def __init__(self, variants, sizes):
        self._steps: list[Step] = []
        self._numbers = count(1)
        self._pieces: dict[Any, dict[Box | None, Any]] = {("slot", 0): {_all_of(sizes[0]): Slot(0)}}
        self._sizes = sizes
        for variant in variants:
            leaves, spec = _flat(variant.args)
            leaves = [self._piece(leaf) if type(leaf) is _Want else leaf for leaf in leaves]
            made = [next(self._numbers) for _ in variant.made]
            self._steps.append(Step(variant.function, leaves, spec, made, []))
            for number, (slot, box) in zip(made, variant.made):
                self._pieces.setdefault(("slot", slot), {})[box] = Slot(number)

    def steps_for(self, result):
        """As `only_needed` returns them."""
        everything = lambda leaf: self._piece(_Want(leaf, _all_of(self._sizes[leaf.number])))
        result = [everything(leaf) if type(leaf) is Slot else leaf for leaf in result]
        return needed(self._steps, slots_of(result), {}), result, next(self._numbers)

    def _piece(self, want):
        """What stands for a box of a tensor."""
        leaf, box = want
        is_slot = type(leaf) is Slot
        pieces = self._pieces.setdefault(("slot", leaf.number) if is_slot else ("tensor", id(leaf)), {})
        if not is_slot:
            pieces.setdefault(whole(_shape(leaf)), leaf)
        if box not in pieces:
            source = next(each for each in pieces if each is not None and contains(each, box))
            pieces[box] = self._cut(pieces[source], source, box)
        return pieces[box]

    def _cut(self, leaf, source, box):
        for axis, pair in enumerate(zip(source, box)):
            if pair[0] == pair[1]:
                continue
            factors = list(zip(*aligned(*pair)))
            shape = lengths((*box[:axis], *source[axis:]))
            within = [large.wanted for large, _ in factors]
            if len(factors) > 1:
                leaf = self._step(aten.reshape.default, leaf, [*shape[:axis], *within, *shape[axis + 1 :]])
            for place, (large, small) in enumerate(factors):
                if small.length != large.length:
                    start = small.start - large.start
                    leaf = self._step(aten.slice.Tensor, leaf, axis + place, start, start + small.length)
            if len(factors) > 1:
                leaf = self._step(aten.reshape.default, leaf, lengths((*box[: axis + 1], *source[axis + 1 :])))
        return leaf

    def _step(self, function, leaf, *args):
        if type(leaf) is Kept and function is aten.slice.Tensor and args[0] > 0:
            return leaf.sliced(*args)
        leaves, spec = tree_flatten(((leaf, *args), {}))
        number = next(self._numbers)
        self._steps.append(Step(function, leaves, spec, [number], []))
        return Slot(number)


def _shape(leaf):
    """Of a tensor from before the layer, or the model's own."""
    return [Rows(1), *leaf.tensor.shape[1:]] if type(leaf) is Kept else list(leaf.shape)


class _Call:
    """An operation, of whose result a box is wanted."""

    def __init__(self, function, args, kwargs, index, number, box, sizes, weights):
        self.function, self.packet = function, function.overloadpacket
        self.index, self.box, self._sizes, self.weights = index, box, sizes, weights
        self.sizes = sizes[number]
        arguments = function._schema.arguments
        self.given = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
        self._n_positional = len(args)

    def reduced(self):
        """The function and the arguments, with `_Want`, that make the box."""
        rule = RULES.get(self.packet)
        if rule is None and torch.Tag.pointwise in self.function.tags:
            rule = _elementwise
        if rule is None:
            raise NotABox
        return rule(self)

    def size(self, leaf):
        """The shape of a tensor among the arguments."""
        sizes = self._sizes[leaf.number] if type(leaf) is Slot else _shape(leaf)
        if sizes is None:
            raise NotABox
        return sizes

    def with_(self, boxes):
        """The same operation, with boxes of some of its tensors; of the others all."""
        given = dict(self.given)
        for name, value in given.items():
            if _is_tensor(value):
                given[name] = _Want(value, boxes[name] if name in boxes else whole(self.size(value)))
        values = list(given.values())
        named = dict(list(given.items())[self._n_positional :])
        return self.function, (tuple(values[: self._n_positional]), named)


def _is_tensor(value):
    return isinstance(value, (torch.Tensor, Slot, Kept))


def _broadcast(box, sizes, of_result):
    """The box of an argument of these sizes that is broadcast to the result's."""
    missing = len(of_result) - len(sizes)
    if missing < 0:
        raise NotABox
    return tuple(axis if size == all_ else () for axis, size, all_ in zip(box[missing:], sizes, of_result[missing:]))


def _elementwise(call):
    tensors = {name: value for name, value in call.given.items() if _is_tensor(value)}
    if any(isinstance(value, list) and any(map(_is_tensor, value)) for value in call.given.values()):
        raise NotABox
    return call.with_({name: _broadcast(call.box, call.size(value), call.sizes) for name, value in tensors.items()})


def _call(function, *args):
    return function, (args, {})


def _reshape(call):
    x = call.given["self"]
    if "dtype" in call.given:  # the same memory read as another type
        raise NotABox
    return _call(aten.reshape.default, _Want(x, reshaped(call.box, call.size(x))), lengths(call.box))


def _expand(call):
    x = call.given["self"]
    return _call(aten.expand.default, _Want(x, _broadcast(call.box, call.size(x), call.sizes)), lengths(call.box))


def _clone(call):
    """Without a copy of what lies in memory as it is to: nothing is changed in place."""
    layout = call.given.get("memory_format")
    x = _Want(call.given["self"], call.box)
    return (
        _call(aten.alias.default, x) if layout is None else (aten.contiguous.default, ((x,), {"memory_format": layout}))
    )


def _permuted(call, order):
    inner: list = [None] * len(order)
    for place, axis in enumerate(order):
        inner[axis] = call.box[place]
    return _call(aten.permute.default, _Want(call.given["self"], tuple(inner)), list(order))


def _permute(call):
    return _permuted(call, [axis % len(call.sizes) for axis in call.given["dims"]])


def _transpose(call):
    order = list(range(len(call.sizes)))
    one, other = call.given.get("dim0", 0), call.given.get("dim1", 1)
    if len(order) > 1:
        order[one], order[other] = order[other], order[one]
    return _permuted(call, order)


def _selected(call, axis, index):
    x = call.given["self"]
    sizes = call.size(x)
    axis %= len(sizes)
    if isinstance(sizes[axis], Rows):
        raise NotABox
    inner = (*call.box[:axis], part(sizes[axis], index % sizes[axis], 1), *call.box[axis:])
    # Not a select, whose backward fills a tensor with zeros.
    return _call(aten.reshape.default, _Want(x, inner), lengths(call.box))


def _select(call):
    return _selected(call, call.given["dim"], call.given["index"])


def _unbind(call):
    return _selected(call, call.given.get("dim", 0), call.index)


def _range(call, axis, start):
    """The result is the range of an axis that begins at ``start``."""
    x = call.given["self"]
    axis %= len(call.sizes)
    size = call.size(x)[axis]
    inner = call.box[axis] if size == call.sizes[axis] else moved(_counted(call, axis), size, start)
    return _call(aten.alias.default, _Want(x, (*call.box[:axis], inner, *call.box[axis + 1 :])))


def _counted(call, axis):
    """Of an axis of the result, what is wanted, with its length also where that is all."""
    found, size = call.box[axis], call.sizes[axis]
    return (Factor(size, 0, size),) if found and is_whole(found) else found


def _slice(call):
    start = call.given.get("start")
    if call.given.get("step", 1) != 1 or isinstance(start, Rows):
        raise NotABox
    axis = call.given.get("dim", 0)
    size = call.size(call.given["self"])[axis]
    start = start or 0
    return _range(call, axis, start if start >= 0 else max(0, start + size))


def _split(call):
    axis, sizes = call.given.get("dim", 0), call.given.get("split_size", call.given.get("split_sizes"))
    if isinstance(sizes, Rows) or (isinstance(sizes, list) and any(isinstance(size, Rows) for size in sizes)):
        raise NotABox
    return _range(call, axis, sizes * call.index if isinstance(sizes, int) else sum(sizes[: call.index]))


def _index(call):
    """A constant list of places of one axis."""
    x, indices = call.given["self"], call.given["indices"]
    places = [axis for axis, index in enumerate(indices) if index is not None]
    if len(places) != 1:
        raise NotABox
    (axis,) = places
    index, sizes = indices[axis], call.size(x)
    if not isinstance(index, torch.Tensor) or id(index) in call.weights or index.dtype != torch.int64:
        raise NotABox
    if index.ndim != 1 or not len(index) or isinstance(sizes[axis], Rows) or not is_whole(call.box[axis]):
        raise NotABox
    index = index % sizes[axis]
    first, last = int(index.min()), int(index.max())
    inner = (*call.box[:axis], part(sizes[axis], first, last - first + 1), *call.box[axis + 1 :])
    return _call(aten.index.Tensor, _Want(x, inner), [*indices[:axis], index - first, *indices[axis + 1 :]])


def _cat(call):
    tensors, axis = call.given["tensors"], call.given.get("dim", 0) % len(call.sizes)
    all_sizes = [call.size(each) for each in tensors]
    if any(len(sizes) != len(call.sizes) for sizes in all_sizes) or len(call.box[axis]) > 1:
        raise NotABox
    if is_whole(call.box[axis]):
        boxes = [(*call.box[:axis], whole(sizes)[axis], *call.box[axis + 1 :]) for sizes in all_sizes]
        return _call(aten.cat.default, [_Want(*pair) for pair in zip(tensors, boxes)], axis)
    start = 0
    (wanted,) = call.box[axis]
    for each, sizes in zip(tensors, all_sizes):
        if start <= wanted.start and wanted.start + wanted.length <= start + sizes[axis]:
            inner = part(sizes[axis], wanted.start - start, wanted.length)
            return _call(aten.alias.default, _Want(each, (*call.box[:axis], inner, *call.box[axis + 1 :])))
        start += sizes[axis]
    raise NotABox


def _product(call):
    """Of matrices, or of batches of them, with or without something added."""
    first, second = ("self", "mat2") if "mat2" in call.given and "mat1" not in call.given else ("mat1", "mat2")
    if "batch1" in call.given:
        first, second = "batch1", "batch2"
    *batch, rows, columns = call.box
    inner = [whole(call.size(call.given[name])) for name in (first, second)]
    boxes = {first: (*batch, rows, inner[0][-1]), second: (*batch, inner[1][-2], columns)}
    if first != "self":
        boxes["self"] = _broadcast(call.box, call.size(call.given["self"]), call.sizes)
    return call.with_(boxes)


def _attention(call):
    *batch, rows, columns = call.box
    if call.index or not is_whole(columns) or (call.given.get("is_causal") and not is_whole(rows)):
        raise NotABox
    query, key, value = (whole(call.size(call.given[name])) for name in ("query", "key", "value"))
    boxes = {"query": (*batch, rows, query[-1]), "key": (*batch, *key[-2:]), "value": (*batch, *value[-2:])}
    for name in ("attn_mask", "attn_bias"):
        mask = call.given.get(name)
        if mask is not None:
            sizes = call.size(mask)
            of_scores = [*call.sizes[:-1], sizes[-1]]
            boxes[name] = _broadcast((*batch, rows, whole(sizes)[-1]), sizes, of_scores)
    return call.with_(boxes)


def _along(name, n_last=False):
    """The rule of an operation that treats everything alike but along some axes, which it needs whole."""

    def rule(call):
        x = next(key for key in ("self", "input") if key in call.given)
        given = call.given[name]
        axes = range(-len(given), 0) if n_last else [given] if isinstance(given, int) else given
        if call.index or not all(is_whole(call.box[axis]) for axis in axes):
            raise NotABox
        return call.with_({x: call.box})

    return rule


def _mean(call):
    """Of some axes, or their sum."""
    x, dims = call.given["self"], call.given.get("dim")
    sizes = call.size(x)
    if not dims:
        raise NotABox
    axes = {axis % len(sizes) for axis in dims}
    left = iter(call.box)
    inner = []
    for axis, all_ in enumerate(whole(sizes)):
        if axis not in axes or call.given.get("keepdim"):
            own = next(left)
        inner.append(all_ if axis in axes else own)
    return call.with_({"self": tuple(inner)})


PARTS = {aten.select, aten.slice, aten.unbind, aten.split, aten.split_with_sizes, aten.index, aten.clone}
"""What has a rule also where all of its result is wanted: most take a part of a tensor."""

ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
}

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, *ATTENTION}

RULES: dict[Any, Callable[[_Call], Any]] = {
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze), _reshape),
    **dict.fromkeys((aten._to_copy, aten.alias, aten.detach, aten.lift_fresh, aten.hardswish), _elementwise),
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _product),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys((aten.mean, aten.sum), _mean),
    **dict.fromkeys((aten.split, aten.split_with_sizes), _split),
    **dict.fromkeys((aten.transpose, aten.t), _transpose),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax), _along("dim")),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _along("normalized_shape", n_last=True)),
    aten.clone: _clone,
    aten.expand: _expand,
    aten.permute: _permute,
    aten.select: _select,
    aten.unbind: _unbind,
    aten.slice: _slice,
    aten.index: _index,
    aten.cat: _cat,
}
"""By operator, which boxes of its arguments it takes."""
