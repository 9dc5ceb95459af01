"""`HeadCapture` with the network compiled: the same `Capture`, from programs in the place of the network's own code."""

import logging
import threading
import time
import warnings
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from cfcam_gpu import warm_up
from cfcam_gpu.calls import eager_without_grad, is_compiled
from cfcam_gpu.capture import HeadCapture, _device, _Pass, _Tap
from cfcam_gpu.compiled_pipeline import PipelinePrograms
from cfcam_gpu.frozen_norms import graph_nodes
from cfcam_gpu.guides import AUTO, Held
from cfcam_gpu.head import ValuesTaken
from cfcam_gpu.inputs import Inputs
from cfcam_gpu.outputs import all_tensors, find_logits, map_tensors
from cfcam_gpu.programs import NotCompiled, Program, Traced, compare
from cfcam_gpu.targets import chosen_classes
from cfcam_gpu.unchanged import Watch

LOG = logging.getLogger("cfcam_gpu")

MOST_PROGRAMS = 8
"""Kinds of inputs of one object that are compiled; the next are explained eagerly."""

MOST_SEEN = 1000
"""Kinds of inputs that are remembered because they came once."""

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Arguments of the model, beside tensors, that a program has as constants."""


class Choice(NamedTuple):
    """What runs for one kind of inputs, and what its warm-up measured."""

    shape: tuple[int, ...]
    """Of the images."""
    dtype: torch.dtype
    """Of the images, or autocast's."""
    runs: str
    """"compiled", or "eager" for the network itself."""
    reason: str | None
    """Why it is the network itself; None of programs."""
    pass_seconds: dict[str, float]
    """Of a pass, forward and backward, with each of the two, medians; {} where there is no program."""
    warm_up_seconds: float
    """That making, comparing and timing took, the pipeline's program left out."""


class Built(NamedTuple):
    """A program, with what it belongs to."""

    program: Program
    layers: list[nn.Module]  # the target layers in the order in which they ran
    guides: Held | None
    outputs: Any  # the model's, with other tensors
    pipelines: PipelinePrograms  # what makes the maps of such a pass


class CompiledCapture(HeadCapture):
    """Captures as `HeadCapture` does, its numbers but for rounding, with the network compiled by Inductor.

    The first call compiles for its inputs (shapes, dtypes, autocast, number of threads), which takes from seconds to
    minutes; calls of other threads wait meanwhile. A further kind of inputs is compiled when it comes a second time, so
    that the last, smaller batch of a dataset is not; of `MOST_PROGRAMS` at most. The results are compared with the
    network's own, and the times: where the network itself is quicker, it goes on.

    Args: as for `HeadCapture`.

    Raises, in a call, beside what `HeadCapture` raises:
        ValueError: the model is in training mode, has hooks, or is not as it was when it was compiled.

    Warns:
        UserWarning: once per object and reason, that the network runs uncompiled, and why.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forget()

    def _forget(self):
        self._warming = threading.Lock()
        self._built: dict[Any, Built | None] = {}  # by the kind of inputs; None where they are explained eagerly
        self._seen: set[Any] = set()  # once
        self._watch: Watch | None = None
        self._device: torch.device | None = None  # of a model that is watched and has tensors
        self._told: set[str] = set()
        self.choices: list[Choice] = []

    def __getstate__(self):
        own = ("_warming", "_built", "_seen", "_watch", "_device", "_told", "choices")  # a copy compiles for itself
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state):
        vars(self).update(state)
        self._forget()

    def check_unchanged(self) -> None:
        change = self._watch and self._watch.change()
        if change:
            raise ValueError(
                f"model must be as it was when it was compiled, but {change}; put that back, or make a new object for"
                " the model as it is"
            )

    def _explained(self, explain, inputs):
        self.check_unchanged()
        try:
            kind = self._kind(inputs)
            if kind not in self._built:
                with self._warming, torch.inference_mode(False):
                    self._warm_up(kind, inputs, explain)
        except NotCompiled as error:
            self._tell(str(error))
            return explain(_Pass)
        built = self._built.get(kind)
        return explain(_Pass if built is None else partial(_CompiledPass, built))

    def _tell(self, reason):
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"{type(self.model).__name__} runs uncompiled: {reason}", UserWarning, stacklevel=7)

    def _where(self, images):
        """The model's device; of one without tensors that of the images."""
        return self._device or _device(self.model, images)

    def _kind(self, inputs):
        """What a program is for, beside the model."""
        leaves, structure = tree_flatten((inputs.args, inputs.kwargs))
        of_leaves = []
        for leaf in leaves:
            if type(leaf) is torch.Tensor and leaf.layout == torch.strided and not leaf.is_meta:
                of_leaves.append((leaf.shape, leaf.dtype))
            elif isinstance(leaf, CONSTANTS):
                of_leaves.append((type(leaf), leaf))
            else:
                raise NotCompiled(f"its arguments hold a {type(leaf).__name__}")
        device = self._where(inputs.images).type
        return (
            structure,
            tuple(of_leaves),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.get_num_threads(),  # which the code for a CPU has as a constant
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def _warm_up(self, kind, inputs, explain):
        """Compile for inputs of a kind that was not there before, where it is due."""
        if kind in self._built:
            return  # another thread's
        if len(self._built) >= MOST_PROGRAMS:
            raise NotCompiled(f"it is compiled for {MOST_PROGRAMS} other kinds of inputs already")
        if self._built and kind not in self._seen:
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen.add(kind)
            return
        if any(module.training for module in self._modules):
            raise ValueError("model must be in eval mode to be compiled: call model.eval() first")
        start, times, reason = time.perf_counter(), {}, None
        device = self._where(inputs.images)
        try:
            self._built[kind] = self._quicker(inputs, explain, device, times)
        except NotCompiled as error:
            self._built[kind], reason = None, str(error)
            raise
        finally:
            if kind in self._built:
                autocast = torch.is_autocast_enabled(device.type)
                dtype = torch.get_autocast_dtype(device.type) if autocast else inputs.images.dtype
                runs = warm_up.COMPILED if reason is None else warm_up.EAGER
                seconds = time.perf_counter() - start
                self.choices.append(Choice(tuple(inputs.images.shape), dtype, runs, reason, times, seconds))

    def _quicker(self, inputs, explain, device, times):
        """What is compiled for these inputs; `NotCompiled` where the network itself is quicker. Fills in the times."""
        try:
            watch = Watch(self.model)
        except ValueError as error:
            raise NotCompiled(str(error)) from error
        hook = watch.hook()
        if hook:
            raise ValueError(f"model must have no hooks to be compiled, as none would run, but {hook}")
        outputs = explain(_Pass).outputs  # what it finds out about the model, it has found out then
        built = self._build(inputs, outputs)
        constants = [each.program.constants for each in [built, *self._built.values()] if each is not None]
        later = Watch(self.model, chain.from_iterable(constants))
        for earlier in (watch, self._watch):
            change = earlier and earlier.change()
            if change:
                raise NotCompiled(f"a pass changes the model: {change}")
        ways = {
            warm_up.EAGER: partial(explain, _Pass),
            warm_up.COMPILED: partial(explain, partial(_CompiledPass, built)),
        }
        best, found = warm_up.quickest(ways, device)
        times.update(found)
        size = tuple(inputs.images.shape)
        LOG.info(
            "%s compiled for %s in %.0f s: a pass takes %.1f ms, uncompiled %.1f ms",
            *(type(self.model).__name__, size, built.program.seconds, *(1e3 * times[way] for way in (*ways,)[::-1])),
        )
        if best == warm_up.EAGER:
            raise NotCompiled(f"that is quicker for {size}, or as quick")
        self._watch = later
        has_tensors = next(chain(self.model.parameters(), self.model.buffers()), None) is not None
        self._device = device if has_tensors else None
        return built

    def _build(self, inputs, outputs):
        found: list[tuple] = []
        reasons: list[str] = []
        device = self._where(inputs.images)

        def run(tensors, cotangents):
            compiled = self._compiled or is_compiled(self._modules)
            with eager_without_grad(fused=self._fused, compiled=compiled), ValuesTaken(self.model, reasons.append):
                traced, *rest = _TracedPass(self).traced(_with_tensors(inputs, tensors), cotangents)
            if reasons:
                raise NotCompiled(reasons[0])
            found[:] = rest
            return traced

        logits, tensors = _index_of_logits(outputs, inputs.images.shape[0]), _on(device, inputs)
        program = Program(run, tensors, all_tensors(outputs), logits, self.margin_temperature)
        # Of another pass, which shows chance that torch does not know of.
        compare("outputs", program.forward(tensors)[0], all_tensors(outputs))
        return Built(program, *found, PipelinePrograms())

    def _backward_of_several(self, root, edges, cotangents):
        if not any(isinstance(edge, torch.Tensor) for edge in edges):
            return super()._backward_of_several(root, edges, cotangents)
        options = {"retain_graph": True, "allow_unused": True}
        each = [torch.autograd.grad(root, edges, cotangent, **options) for cotangent in cotangents]
        return [None if of_edge[0] is None else torch.stack(of_edge) for of_edge in zip(*each)]


class _TracedPass(_Pass):
    """One pass, as a program is to repeat it."""

    def traced(self, inputs, cotangents):
        """`Traced`; and of `Built` all but the program."""
        with self._opened(inputs):
            with self._call:
                outputs = self._forward(inputs)
            guides = self._guides and self._guides.held()
            if guides is not None and AUTO in guides.found:
                raise NotCompiled("the guide is not the same in every pass")
            layers, tensors = list(self._taps), all_tensors(outputs)
            pairs = [(tensor, own) for tensor, own in zip(tensors, cotangents) if tensor.requires_grad]
            if not pairs:
                raise NotCompiled("its outputs have no gradient")
            roots, own = zip(*pairs)
            taps = list(self._taps.values())
            edges = [tap.edge for tap in taps]
            reached = [_reached(tensor, edges) for tensor in tensors]
            with self._call, self._backward(roots), self._norms(roots):
                gradients = torch.autograd.grad(roots, edges, own, allow_unused=True)
            if any(gradient is None for gradient in gradients):
                raise NotCompiled("its outputs do not depend on a target layer")
            of_guides = [each for each in guides.tensors if each is not None] if guides else []
            traced = Traced(
                [tensor.detach() for tensor in tensors],
                [tap.activations for tap in taps],
                of_guides,
                list(gradients),
                reached,
            )
            # Of what there was, without the values.
            return traced, layers, *map_tensors(lambda tensor: tensor.detach().new_empty(0), (guides, outputs))


def _reached(tensor, edges):
    """To which of these places in the graph a gradient flows back from the tensor; () where it has none."""
    if not tensor.requires_grad:
        return ()
    nodes = set(graph_nodes([tensor]))
    return tuple(edge.node in nodes for edge in edges)


class _CompiledPass(_Pass):
    """One pass in which a program runs in the network's place."""

    def __init__(self, built, capture):
        super().__init__(capture)
        self.built = built

    def _forward(self, inputs):
        self._begin()
        built = self.built
        tensors = _on(self._of._where(inputs.images), inputs)
        self._found, activations, of_guides, self._saved = built.program.forward(tensors)
        if self._guides is not None and built.guides is not None:
            each = iter(of_guides)
            kept = [None if tensor is None else next(each) for tensor in built.guides.tensors]
            self._guides.hold(built.guides._replace(tensors=kept))
        self._taps = {layer: _Tap(tensor, None) for layer, tensor in zip(built.layers, activations)}
        return self._outputs(self._found)

    def _outputs(self, tensors):
        """The model's, of these tensors."""
        each = iter(tensors)
        return map_tensors(lambda _: next(each), self.built.outputs)

    def _differentiated(self, outputs, targets, batch, top, pool, activations):
        program, of = self.built.program, self._of
        of_image = targets is None or (isinstance(targets, torch.Tensor) and targets.ndim == 1)
        if program.logits is not None and top is None and of_image:
            logits = self._found[program.logits]
            classes = chosen_classes(logits, targets)
            gradients = dict(zip(self._taps, program.gradients_of_classes(self._saved, logits, classes)))
            return tuple(of._reshaped(gradients[layer]) for layer in of.target_layers), classes
        found, leaves = program.differentiable(
            self._found, [tap.activations for tap in self._taps.values()], self._saved
        )
        self._taps = {layer: tap._replace(edge=leaf) for (layer, tap), leaf in zip(self._taps.items(), leaves)}
        return super()._differentiated(self._outputs(found), targets, batch, top, pool, activations)


def _index_of_logits(outputs, batch):
    """Which of the tensors in these outputs holds the logits of several classes; None without one."""
    try:
        logits = find_logits(outputs, batch)
    except (TypeError, ValueError):
        return None
    if logits.shape[1] < 2:  # of one, the side may count that was chosen
        return None
    return next((index for index, each in enumerate(all_tensors(outputs)) if each is logits), None)


def _on(device, inputs):
    return [tensor.to(device) for tensor in all_tensors((inputs.args, inputs.kwargs, inputs.images))]


def _with_tensors(inputs, tensors):
    each = iter(tensors)
    return Inputs(*map_tensors(lambda _: next(each), (inputs.args, inputs.kwargs, inputs.images)))
