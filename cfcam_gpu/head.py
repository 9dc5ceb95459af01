"""The part of a network behind a layer, on its own: outputs for any activations, without the rest of the network.

Methods that change a layer's activations and look what becomes of the outputs (Ablation-CAM, integrated gradients of a
layer) need no more of the network than this. `record_head` runs it twice, with one image more the second time, and
notes the operations behind the layer as torch's dispatcher sees them. What differs between the two runs must be a
multiple of the number of images. The replay with the layer's own activations must give the network's outputs, bit for
bit, or it is not used.
"""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from cfcam_gpu.calls import Call, eager_without_grad_in
from cfcam_gpu.capture import _device
from cfcam_gpu.head_rows import only_needed
from cfcam_gpu.head_steps import Kept, Rows, Size, Slot, Step, needed, slots_of, without_changes, without_constants
from cfcam_gpu.inputs import Inputs, check_inputs
from cfcam_gpu.outputs import all_tensors, first_tensor, map_tensors, with_first
from cfcam_gpu.random_states import random_state, restore_random_state

LOG = logging.getLogger("cfcam_gpu")


ROUNDING = 128
"""Units in the last place of the largest output, by which a replay may differ: with several threads a matrix product is
summed in another order where a tensor lies elsewhere in memory, and one of fewer rows in yet another. Mostly it is
below 10, of outputs that are small sums of large terms up to 60. What computes something else differs by far more."""

REPEATED = "the layer runs more than once in a forward pass"
"""A `Head.reason`."""


class Head:
    """What `record_head` returns: called with activations, it gives the model's outputs.

    Attributes:
        activations: the layer's own output for the recorded inputs, detached.
        n_tensors: how many values the layer returns, of which the activations are the first.
        outputs: the model's outputs for them, detached, in the model's own structure.
        reason: why the whole network runs for every call; None where the recorded part does.
    """

    activations: torch.Tensor
    n_tensors: int
    outputs: Any
    reason: str | None = None

    def __call__(self, activations: torch.Tensor, image: int | None = None, tiled: bool = False) -> Any:
        """The model's outputs had the layer returned ``activations``.

        Args:
            activations: (n * B, ...), as the layer returns them for B images but for their number: n of each image
                of the recorded inputs, in the images' order. Gradients flow back to them.
            image: all of the activations, (n, ...), are of this one of the recorded inputs.
            tiled: the activations are n times over those of all images, not n of each.

        Raises:
            ValueError: their shape or number is another, or their dtype or device.
        """
        expected = self.activations
        rows, batch = len(activations), len(expected) if image is None else 1
        if activations.shape[1:] != expected.shape[1:] or rows % batch or not rows:
            shape = ", ".join(["n" if batch == 1 else f"n * {batch}", *map(str, expected.shape[1:])])
            raise ValueError(f"activations must have shape ({shape}), got {tuple(activations.shape)}")
        if (activations.dtype, activations.device) != (expected.dtype, expected.device):
            raise ValueError(
                f"activations must be {expected.dtype} on {expected.device}, got {activations.dtype} on"
                f" {activations.device}"
            )
        return self._run(
            activations, _Copies(rows // batch, slice(None) if image is None else slice(image, image + 1), tiled)
        )

    def renewed(self, model: nn.Module, inputs: Any) -> "Head | None":
        """The same head with other inputs' activations and outputs, from one forward pass; None where it does not hold
        for them: then it is to be recorded anew."""
        return None

    def _run(self, activations, copies):
        raise NotImplementedError


class _Copies(NamedTuple):
    """Which rows of the recorded inputs belong to a call's activations."""

    times: int
    images: slice
    tiled: bool

    def of(self, tensor):
        """Of a tensor with a row for each image, a row for each of the activations."""
        rows = tensor[self.images]
        if self.times == 1:
            return rows
        return torch.cat([rows] * self.times) if self.tiled else rows.repeat_interleave(self.times, 0)


class _Recorded(NamedTuple):
    """What recordings have in common: all operations behind the layer, and what is known of their tensors."""

    steps: list[Step]
    result: list[Any]  # what is returned in the place of each of the outputs' tensors
    sizes: dict[int, list[Size] | None]  # by slot
    memory: dict[int, int]  # by slot, which memory it lies in
    weights: set[int]
    changes_leaf: bool

    def programs(self):
        """What may be run for it, the shortest first."""
        steps, result = without_constants(self.steps, self.result, self.weights, self.memory)
        found = [_Program(steps, result, len(self.sizes))]
        reduced = only_needed(*without_changes(steps, result, self.sizes, self.memory), self.weights)
        return found if reduced is None else [_Program(*reduced), *found]

    def kept(self):
        return [
            leaf
            for leaves in (*(step.leaves for step in self.steps), self.result)
            for leaf in leaves
            if type(leaf) is Kept
        ]


class _Program(NamedTuple):
    steps: list[Step]
    result: list[Any]
    n_slots: int

    def with_kept(self, tensors):
        """The same with other tensors from before the layer, by their sources."""
        renewed = lambda leaves: [leaf.of(tensors[leaf.source]) if type(leaf) is Kept else leaf for leaf in leaves]
        steps = [step._replace(leaves=renewed(step.leaves)) for step in self.steps]
        return self._replace(steps=steps, result=renewed(self.result))


class _Replay(Head):
    def __init__(self, seen, recorded, programs=None):
        self.activations, self.n_tensors, self.outputs = seen.activations, seen.n_tensors, seen.outputs
        self._layer, self._to_input, self._n_runs = seen.layer, seen.to_input, seen.n_runs
        self._recorded, self._programs = recorded, programs or recorded.programs()

    def renewed(self, model, inputs):
        inputs = inputs if isinstance(inputs, Inputs) else check_inputs(inputs)
        kept = self._recorded.kept()
        if any(each.source is None for each in kept):
            return None
        seen = _Observation(self._layer, self._to_input, self._n_runs, {each.source for each in kept})
        with eager_without_grad_in(model):
            seen.run(model, *_with_more(inputs, 0, _device(model, inputs.images)))
        seen.finish(len(inputs.images))
        if seen.reason is not None or len(all_tensors(seen.outputs)) != len(self._recorded.result):
            return None
        if not all(seen.has(each) for each in kept):
            return None
        tensors = {source: tensor.clone() for source, tensor in seen.kept.items()}
        head = _Replay(seen, self._recorded, [program.with_kept(tensors) for program in self._programs])
        return head if head.is_right() else None

    def is_right(self):
        """Whether the replay of the layer's own activations gives the network's outputs, but for `ROUNDING`.

        Of several programs the first with which it does is the one that runs from here on.
        """
        while self._programs:
            try:
                with torch.no_grad():
                    again = self(self.activations)
                if all(map(_alike, all_tensors(again), all_tensors(self.outputs))):
                    return True
            except (RuntimeError, ValueError):  # of another shape than was recorded
                pass
            self._programs = self._programs[1:]
        return False

    def _run(self, activations, copies):
        rows = len(activations)
        steps, result, n_slots = self._programs[0]
        slots: list[Any] = [None] * n_slots
        slots[0] = activations.clone() if self._recorded.changes_leaf else activations

        def value(leaf):
            if type(leaf) is Slot:
                return slots[leaf.number]
            if type(leaf) is Rows:
                return leaf.factor * rows
            return copies.of(leaf.tensor) if type(leaf) is Kept else leaf

        for step in steps:
            for index, tensor in zip(step.made, step.run(value)):
                slots[index] = tensor
            for index in step.done:
                slots[index] = None
        values = map(value, result)
        return map_tensors(lambda _: next(values), self.outputs)


class _WholeForward(Head):
    """The network itself, with the layer's output replaced."""

    def __init__(self, model, inputs, recording, reason):
        self.activations, self.n_tensors = recording.activations, recording.n_tensors
        self.outputs, self.reason = recording.outputs, reason
        self._model, self._inputs, self._recorded = model, inputs, recording

    def _run(self, activations, copies):
        call, runs = Call(), count(1)

        def replace(module, *found):
            is_meant = self._recorded.n_runs in (1, next(runs))  # of one that was to run once, every run
            return with_first(found[-1], activations) if is_meant else None

        args, kwargs = _repeated(self._inputs, copies, self.activations.device)
        handle = _hooked(self._recorded, call.only(replace))
        try:
            with call:
                return self._model(*args, **kwargs)
        finally:
            handle.remove()


def record_head(model: nn.Module, layer: nn.Module, inputs: Any, to_input: bool = False, n_runs: int = 1) -> Head:
    """The part of ``model`` behind ``layer``, for inputs of this kind.

    Where it cannot be recorded, the head that is returned runs the whole network for every call; `Head.reason` says
    why, and so does a line on the logger ``cfcam_gpu``. That is so for control flow that depends on values, random
    operations, batch norm in training, a layer that runs more often than is said, and operations that change tensors
    from before it.

    Args:
        model: runs in the mode it is in; nothing is left on it.
        layer: one of its modules, whose output is a floating-point tensor, or a tuple or list that starts with one.
        inputs: a batch (B, ...), or as for `CFCAM.maps` a tuple or a dict of the model's arguments.
        to_input: the part begins with the layer, whose input takes the place of its output.
        n_runs: how often the layer runs in a forward pass. The part is what is behind its last run.

    Returns:
        `Head`: differentiable, for any number of rows of activations. It reads the weights of the model at every call,
        but what it keeps of the inputs stays: tensors from before the layer that go around it.

    Raises:
        TypeError, ValueError: the inputs are of the wrong kind; the layer did not run, or returns something else.

    >>> head = record_head(model, model.layer4, images)  # images (1, 3, 224, 224)
    >>> head(head.activations.expand(32, -1, -1, -1)).shape
    torch.Size([32, 1000])
    """
    inputs = inputs if isinstance(inputs, Inputs) else check_inputs(inputs)
    batch, device = len(inputs.images), _device(model, inputs.images)

    def run(more):
        recording = _Recording(layer, to_input, n_runs)
        with eager_without_grad_in(model), recording:
            recording.run(model, *_with_more(inputs, more, device))
        recording.finish(batch + more)
        return recording

    untouched = random_state(device)
    own = run(0)
    drawn = random_state(device)
    try:
        if own.reason is not None:
            raise _NotRecorded(own.reason)
        try:
            head = _compared(model, own, run(1), own)
        except _DependsOnRows:
            if batch > 1:
                raise
            # Of one row alone a tensor may be contiguous that otherwise is not, and a copy be saved.
            head = _compared(model, run(1), run(2), own)
        if not head.is_right():
            raise _NotRecorded("its replay does not give the network's own outputs")
        if own.is_random:
            restore_random_state(device, drawn)  # as after one pass, for who draws next
        return head
    except _NotRecorded as error:
        if own.is_random:
            restore_random_state(device, untouched)  # the whole network draws again
        LOG.info("%s behind the layer is not run on its own: %s", type(model).__name__, error)
        return _WholeForward(model, inputs, own, str(error))


class _NotRecorded(Exception):
    """Why the part behind the layer cannot run on its own."""


class _DependsOnRows(_NotRecorded):
    def __init__(self):
        super().__init__("its operations depend on the number of images")


class _Source(NamedTuple):
    """Where a forward pass has a tensor before the layer: what a module returns, or the layer takes, in which run."""

    module: nn.Module
    is_input: bool
    run: int
    place: int


class _Observation:
    """A layer's output, or its input, and the model's output, of one forward pass."""

    def __init__(self, layer, to_input, n_runs, sources=()):
        self.layer, self.to_input, self.n_runs, self._call = layer, to_input, n_runs, Call()
        self.reason: str | None = None
        self.leaf: torch.Tensor | None = None
        self.raw: Any = None
        self.kept: dict[_Source, torch.Tensor] = {}
        self._sources, self._seen_runs = sources, 0
        self._runs: Counter[nn.Module] = Counter()

    def run(self, model, args, kwargs):
        # Before what is replaced is replaced.
        handles = [self.layer.register_forward_pre_hook(self._call.only(self._runs_now))]
        handles.append(_hooked(self, self._call.only(self._begin)))
        handles += [each.register_forward_hook(self._call.only(self._ran)) for each in self._modules(model)]
        try:
            with self._call:
                self.raw = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not self._seen_runs:
            raise ValueError("layer must run in the forward pass of the model, but it did not")
        if self._seen_runs != self.n_runs > 1:
            raise ValueError(f"layer must run {self.n_runs} times in the forward pass (n_runs), got {self._seen_runs}")
        if self._seen_runs > 1 and self.n_runs == 1:
            self.reason = REPEATED

    def finish(self, batch):
        """The activations and outputs, apart from what the model may go on to change."""
        self.batch, self.activations = batch, self._as_it_was
        with torch.no_grad():
            self.outputs = map_tensors(lambda tensor: tensor.detach(), self.raw)
        if self.activations.ndim == 0 or len(self.activations) != batch:
            raise ValueError(f"layer must return a row for each of {batch} images, got {tuple(self.activations.shape)}")

    def has(self, kept):
        """Whether there is a tensor in the place of another pass's, of the same kind."""
        found = self.kept.get(kept.source)
        return found is not None and found.shape[1:] == kept.tensor.shape[1:] and found.dtype == kept.tensor.dtype

    def _modules(self, model):
        """The modules whose outputs are looked at."""
        return {source.module for source in self._sources if not source.is_input}

    def _ran(self, module, args, output):
        if self.leaf is None:
            self._runs[module] += 1
            for place, tensor in enumerate(all_tensors(output)):
                self._name(tensor, _Source(module, False, self._runs[module], place))

    def _runs_now(self, module, args):
        if self.leaf is None:
            for place, tensor in enumerate(all_tensors(args)):
                self._name(tensor, _Source(module, True, self._seen_runs, place))

    def _name(self, tensor, source):
        """Keep a tensor, which is there as it is until the pass ends: no operation of the part may change it."""
        if source in self._sources:
            self.kept[source] = tensor.detach()

    def _begin(self, module, *found):
        self._seen_runs += 1
        if self._seen_runs != self.n_runs:
            return None
        first = first_tensor(found[-1])
        self.n_tensors = len(found[-1]) if isinstance(found[-1], (tuple, list)) else 1
        if first is None:
            raise TypeError(
                f"layer must {'take' if self.to_input else 'return'} a floating-point tensor, or a tuple or list that"
                f" starts with one, got {type(found[-1]).__name__}"
            )
        with _disable_current_modes():
            self._as_it_was = first.detach().clone()
            # What goes around the layer may be the very tensor that it takes, or returns: its input, unchanged.
            taken = all_tensors(found[0])
            if self.to_input or any(_storage(each) == _storage(first) for each in taken):
                self.leaf = first.clone()
                return with_first(found[-1], self.leaf)
        self.leaf = first
        return None


class _Recording(_Observation, TorchDispatchMode):
    """Notes what torch's dispatcher sees of one forward pass from the layer on."""

    def __init__(self, layer, to_input, n_runs):
        _Observation.__init__(self, layer, to_input, n_runs)
        TorchDispatchMode.__init__(self)
        self.steps: list[tuple[Any, list[Any], Any, list[torch.Tensor]]] = []
        self.is_random = False
        self.before = WeakTensorKeyDictionary()  # what was made before the layer, as long as the model holds it

    def run(self, model, args, kwargs):
        map_tensors(self._known, (args, kwargs))
        with ValuesTaken(model, self._are_taken):
            super().run(model, args, kwargs)

    def _are_taken(self, reason):
        if self.leaf is not None and self.reason is None:
            self.reason = reason

    def _modules(self, model):
        return list(model.modules())

    def _name(self, tensor, source):
        self.before[tensor] = source

    def _known(self, tensor):
        self.before[tensor] = None
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "profiler":  # which DataParallel calls, and changes nothing
            return result
        self.is_random = self.is_random or _is_random(function, args, kwargs)
        if self.leaf is None:
            map_tensors(self._known, result)
        elif self.reason is None:
            leaves, spec = tree_flatten((args, kwargs))
            self.reason = why_not_replayed(function, args, kwargs)
            self.steps.append((function, leaves, spec, all_tensors(result)))
        return result


HANDS_OUT = {getattr(torch.Tensor, name): name for name in ("numpy", "tolist", "__array__", "__dlpack__")}


class ValuesTaken(TorchFunctionMode):
    """Calls ``tell`` with the reason where a model's own code takes values out of a tensor.

    What it makes of them torch's dispatcher does not see, so that a replay would have them as constants; which those of
    the model's weights and buffers are.
    """

    def __init__(self, model: nn.Module, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
        self._tell = tell

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HANDS_OUT and id(args[0]) not in self._own:
            self._tell(f"its code takes values out of a tensor, by {HANDS_OUT[function]}")
        return function(*args, **(kwargs or {}))


def why_not_replayed(function: Any, args: Any, kwargs: Any) -> str | None:
    """Why an operation cannot be replayed with these arguments; None where it can."""
    name = str(function)
    if _is_random(function, args, kwargs):
        return f"{name} is random"
    leaves = tree_flatten((args, kwargs))[0]
    indices = [leaf for leaf in leaves[1:] if isinstance(leaf, torch.Tensor)]
    if name.startswith("aten.index.") and not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
        return f"{name} depends on the values"
    if "batch_norm" in name and any(leaf is True for leaf in leaves[5:6]):
        return "batch norm takes the statistics of the batch in training mode"
    return None


def _is_random(function, args, kwargs):
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return False
    given = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
    # Attention's operators are called random for the dropout that they may have.
    return "scaled_dot_product" not in str(function) or given.get("dropout_p", 0.0) != 0.0


def _compared(model, first, second, own):
    """The replay of what two recordings, of n and of n + 1 images, have in common, for those of a third."""
    for recording in (first, second):
        if recording.reason is not None:
            raise _NotRecorded(recording.reason)
    batch = first.batch
    if [function for function, *_ in first.steps] != [function for function, *_ in second.steps]:
        raise _DependsOnRows
    weights = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    sizes, memory = {0: _sizes(first.leaf, second.leaf, batch)}, {0: _storage(first.leaf)}
    slots: tuple[dict[int, int], dict[int, int]] = ({id(first.leaf): 0}, {id(second.leaf): 0})
    storage = _storage(first.leaf)
    made_here = {storage}  # storages that operations of the part may change
    changes_leaf = False
    steps = []

    def merged(one, other):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            index = slots[0].get(id(one))
            if index != slots[1].get(id(other)):
                raise _DependsOnRows
            if index is not None:
                return Slot(index)
            if id(one) in weights or one not in first.before:
                return one  # the model's own, which is read anew in every call, or a constant
            if _storage(one) == storage:
                raise _NotRecorded("what is before the layer shares memory with its output")
            if one.shape == other.shape and torch.equal(one, other):
                return one
            if one.ndim and len(one) == batch and one.shape[1:] == other.shape[1:] and len(other) == batch + 1:
                return Kept(one[: own.batch].detach().clone(), first.before[one])
            raise _NotRecorded("it uses tensors from before the layer that have no row for each image")
        if type(one) is int and type(other) is int and one != other:
            factor = other - one
            if factor * batch != one:
                raise _NotRecorded("a size in it is no multiple of the number of images")
            return Rows(factor)
        if type(one) is not type(other) or not (one is other or one == other):
            raise _NotRecorded("a constant in it depends on the number of images")
        return one

    n_slots = 1
    for (function, leaves, spec, made), (_, others, _, made_other) in zip(first.steps, second.steps):
        if len(leaves) != len(others) or len(made) != len(made_other):
            raise _DependsOnRows
        taken = [merged(one, other) for one, other in zip(leaves, others)]
        for tensor in _changed(function, leaves, spec):
            if _storage(tensor) not in made_here:
                raise _NotRecorded(f"{function} changes a tensor from before the layer, or of the model's own")
            changes_leaf = changes_leaf or _storage(tensor) == storage
        indices = []
        for one, other in zip(made, made_other):
            if id(one) not in slots[0]:
                slots[0][id(one)] = slots[1][id(other)] = n_slots
                sizes[n_slots], memory[n_slots] = _sizes(one, other, batch), _storage(one)
                n_slots += 1
            indices.append(slots[0][id(one)])
            if not any(isinstance(each, torch.Tensor) and _storage(each) == _storage(one) for each in leaves):
                made_here.add(_storage(one))
        steps.append(Step(function, _for_a_backward(function, taken), spec, indices, []))
    raw, other, outputs = all_tensors(first.raw), all_tensors(second.raw), all_tensors(own.outputs)
    if not len(raw) == len(other) == len(outputs):
        raise _DependsOnRows
    result = [merged(*pair) for pair in zip(raw, other)]
    steps = needed(steps, slots_of(result), memory)
    return _Replay(own, _Recorded(steps, result, sizes, memory, weights, changes_leaf))


def _for_a_backward(function, leaves):
    """An accelerator's attention keeps what its backward needs if it is told to, which without autograd it was not."""
    names = [argument.name for argument in function._schema.arguments]
    place = names.index("compute_log_sumexp") if "compute_log_sumexp" in names else None
    return leaves if place is None else [*leaves[:place], True, *leaves[place + 1 :]]


def _sizes(one, other, batch):
    """The shape of a tensor of which two recordings, of n and of n + 1 images, have these; None where it is neither
    constant nor a multiple of the number of images."""
    if one.ndim != other.ndim:
        return None
    sizes: list[Size] = []
    for of_one, of_other in zip(one.shape, other.shape):
        if of_one == of_other:
            sizes.append(of_one)
        elif of_one == (of_other - of_one) * batch:
            sizes.append(Rows(of_other - of_one))
        else:
            return None
    return sizes


def _changed(function, leaves, spec):
    """The tensors among the arguments that an operation changes."""
    if not function._schema.is_mutable:
        return []
    args, kwargs = tree_unflatten(leaves, spec)
    found = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [each for each in tree_flatten(given)[0] if isinstance(each, torch.Tensor)]
    return found


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _alike(one, other):
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other) or not one.is_floating_point():
        return torch.equal(one, other)
    error, largest = (one - other).abs().amax(), other.abs().amax()
    return bool(error <= ROUNDING * torch.finfo(other.dtype).eps * largest)  # NaN and infinity are not


def _with_more(inputs, more, device):
    """The arguments on the device, with so many copies of the first image behind the others."""
    batch = len(inputs.images)

    def extended(tensor):
        tensor = tensor.to(device, copy=True)
        if more and tensor.ndim and len(tensor) == batch:
            return torch.cat([tensor, tensor[:1].expand(more, *tensor.shape[1:])])
        return tensor

    return map_tensors(extended, (inputs.args, inputs.kwargs))


def _hooked(observation, hook):
    """``hook`` on what is replaced: (module, inputs) or (module, inputs, output)."""
    layer = observation.layer
    return layer.register_forward_pre_hook(hook) if observation.to_input else layer.register_forward_hook(hook)


def _repeated(inputs, copies, device):
    """The arguments on the device, as the activations of a call need them."""
    batch = len(inputs.images)

    def repeated(tensor):
        tensor = tensor.to(device, copy=True)
        return copies.of(tensor) if tensor.ndim and len(tensor) == batch else tensor

    return map_tensors(repeated, (inputs.args, inputs.kwargs))
