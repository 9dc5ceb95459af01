"""Activations and gradients of target layers: one forward pass, and a backward through the head only.

A class activation map needs d score / d A for the output A of a target layer, and nothing upstream of it.
So the trunk (everything before the first target layer) runs with autograd off and stores nothing; a forward
hook on the target layer starts the graph at A, and ``torch.autograd.grad`` runs back to A and stops. The
gradients are those of a full backward, bit for bit where the kernels are deterministic, and frozen models and
callers under ``torch.no_grad`` or ``torch.inference_mode`` get them too.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from cfcam_gpu import obstacles, uncompiled
from cfcam_gpu.calls import Call, eager_without_grad, is_compiled, is_fused
from cfcam_gpu.frozen_norms import frozen_norms
from cfcam_gpu.guides import AUTO, Guides
from cfcam_gpu.inputs import Inputs, ModelInput, check_inputs
from cfcam_gpu.outputs import find_logits, map_tensors, with_first
from cfcam_gpu.targets import Targets, check_targets, check_top, chosen_classes, scores

GuideLayer: TypeAlias = nn.Module | str | None | Sequence[nn.Module | str | None]
"""Which earlier layer guides the average: a module, "auto" or None; or one of these per target layer."""


HEAD_BYTES, HEAD_BYTES_ON_CPU = 256 * 2**20, 16 * 2**20
"""Memory that the gradients of several classes may take at once; less on a CPU, where they stay in the cache."""

LOG = logging.getLogger("cfcam_gpu")


@dataclass(frozen=True, eq=False)
class Capture:
    """What one pass gives: the model's outputs, and per target layer its activations and gradients.

    Attributes:
        outputs: what the model returned, in containers of the same types (tuples, dicts, dataclasses and others, see
            `cfcam_gpu.outputs`), every tensor detached.
        activations: one detached (B, C, h, w) tensor per target layer, in the layers' order and dtype; of volumes
            (B, C, d, h, w) and of series (B, C, t).
        gradients: d score / d activations, of the same shapes and dtypes; the score is the sum of the
            images' scores, so image i's gradient is that of its own score where images do not interact.
            May be an expanded view (stride 0), as autograd hands it out. Of K targets an image (B, K, C, h, w), or what
            ``pool`` has made of them. None for each layer where none were asked for.
        classes: the class indices that are explained, int64 (B,) or (B, K); None where the targets are callables.
        guides: per target layer the guide (B, Cg, hg, wg), detached; None where the layer has no other than itself.
        order: the layers' indices in the order in which they ran.
        built: the programs that ran in the network's place (`compiled.Built`); None where the network ran.
    """

    outputs: Any
    activations: tuple[torch.Tensor, ...]
    gradients: tuple[Any, ...]
    guides: tuple[torch.Tensor | None, ...]
    classes: torch.Tensor | None
    order: tuple[int, ...]
    built: Any = None


class HeadCapture:
    """Captures the activations and gradients of ``target_layers`` in one pass through ``model``.

    Nothing stays on the model: hooks live for the length of a call, and grad mode, training flags,
    ``requires_grad`` and every ``.grad`` are as before, also after a call that raised. The model runs in the
    mode it is in (``model.eval()`` is the caller's to call, here as anywhere: in train mode dropout is random and
    batch norm updates its statistics), in plain eager code even where it is compiled, and on its own tensors
    in their own dtype; a caller's autocast applies.

    A layer that runs several times counts with its last call. The number of calls is remembered, so that from the
    second pass on the trunk reaches up to that call; should a pass make fewer calls, it is repeated. A pass is also
    repeated, once in the object's life, when the model itself switches autograd off around a target layer, when a
    target layer hands its input on as it is (``nn.Identity``, a dropout), which the model may have used before, when
    the guide that was found is an output that was let go of (an early layer, rarely), and when the model changes a
    guide's output in place. In the first two cases the trunk is recorded from then on.

    Args:
        model: a ``torch.nn.Module``. Compiled models, DataParallel and DistributedDataParallel are looked through.
        target_layers: list of modules of ``model``, each of which returns a floating-point tensor, or a tuple or
            list that starts with one.
        reshape_transform: callable applied to a layer's activations and gradients alike, which returns them as
            (B, C, h, w); for transformers. Default: none, the layer must return (B, C, h, w).
        guide_layer: the earlier layer whose output is captured beside each target layer's: a module, "auto" (`Guides`
            says which), None, or a list with one of these per target layer. Default: None.
        guided: False checks ``guide_layer`` and captures no guide; or a function of the images that says whether.
        margin_temperature: of the score of class indices and of None; 0 (default) for the logit, above for the margin
            (`margin_cotangent`).
        frozen_norms: take the statistics of normalisation layers as constants in the backward (`frozen_norms`).
            Default: no.
        chosen_side: of a model with a single logit (B, 1), and without targets, explain the side that was chosen: the
            logit where it is 0 or more, minus the logit where it is below. Default: the logit.
        any_rows: take activations with any number of rows, as of a model that runs two views of each image at once.
            Default: one row for each image.
        gradients: False captures activations alone: one forward pass that keeps nothing for a backward, in which
            callable targets are not called.

    Raises:
        TypeError: ``model`` is no ``nn.Module`` or is scripted or traced; ``target_layers`` is no list of modules;
            ``reshape_transform`` is not callable; ``guide_layer`` is of another kind.
        ValueError: ``target_layers`` is empty, a layer is no part of ``model``, or a guide is missing.

    Source: the definition of Grad-CAM's gradients (Selvaraju et al., ICCV 2017, equation 1); constructor as in
    jacobgil/pytorch-grad-cam, which runs the backward through the whole network instead.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> captured = HeadCapture(model, [model[0]])(torch.rand(2, 3, 8, 8), targets=[7, 1])
    >>> captured.outputs.shape, captured.gradients[0].shape
    (torch.Size([2, 8]), torch.Size([2, 8, 6, 6]))
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        guide_layer: GuideLayer = None,
        guided: bool | Callable[[torch.Tensor], bool] = True,
        margin_temperature: float = 0.0,
        frozen_norms: bool = False,
        chosen_side: bool = False,
        any_rows: bool = False,
        gradients: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_type(model)}")
        self.model = _unwrap(model)
        if not isinstance(target_layers, (list, tuple)):
            raise TypeError(
                f"target_layers must be a list of modules, got {_type(target_layers)}; for one layer write [layer]"
            )
        if not target_layers:
            raise ValueError("target_layers must name at least one layer, got an empty list")
        for index, layer in enumerate(target_layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"target_layers[{index}] must be a torch.nn.Module, got {_type(layer)}")
        if not (reshape_transform is None or callable(reshape_transform)):
            raise TypeError(f"reshape_transform must be None or callable, got {_type(reshape_transform)}")
        self.target_layers = tuple(_unwrap(layer) for layer in target_layers)
        if any(isinstance(module, torch.jit.ScriptModule) for module in (self.model, *self.target_layers)):
            raise TypeError(
                "model and target_layers must be eager modules, got scripted or traced, which run no hooks; take the"
                " module that they were made from"
            )
        self.reshape_transform = reshape_transform
        self.margin_temperature = margin_temperature
        self.frozen_norms = frozen_norms
        self.chosen_side = chosen_side
        self.any_rows = any_rows
        self.gradients = gradients
        self._names = {layer: find_module_name(self.model, layer) for layer in self.target_layers}
        guides = make_guides(self.model, guide_layer, len(self.target_layers), reshape_transform)
        self._guides = guides if guided else None
        self._guided, self._has_guides = guided, bool(guided)
        self._last_call: dict[nn.Module, int] = {}  # layer -> number of its calls in the previous pass
        self._grad_from_start = False
        self._batched_backward = True
        self._inference_weights = False
        self._without_values = obstacles.without_values(self.model)
        modules = list(self.model.modules())
        self._fused, self._modules = is_fused(modules), modules
        self._compiled = False

    @property
    def target_names(self) -> list[str]:
        """The target layers' names in the model."""
        return [self._names[layer] for layer in self.target_layers]

    @property
    def guide_names(self) -> list[str] | None:
        """The names of the target layers' guides, a target layer's own where it has no other; None before the first
        pass where they are to be found."""
        return self._guides.names(self.target_names) if self._guides and self._has_guides else self.target_names

    def __call__(
        self,
        input_tensor: ModelInput | Inputs,
        targets: Targets = None,
        *,
        several: bool = False,
        top: int | None = None,
        pool: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
    ) -> Capture:
        """Run the model once and return a :class:`Capture`.

        Args:
            input_tensor: (B, ...) tensor, B >= 1; or a tuple of the model's arguments or a dict of its keyword
                arguments, one of which is the batch of images (`check_inputs` says which). Tensors are moved to the
                model's device, their dtypes are kept.
            targets: None for each image's top class; or one target per image: class indices in [0, n_classes) as a
                list, tuple or array of ints or as an integer tensor (B,) on any device; or callables, each of which
                gets its image's output and returns a one-element tensor (pytorch-grad-cam's target classes work
                as they are). Indices and None need logits (B, n_classes): the output, what it calls logits, or its
                only such tensor. From an output that is not one tensor, image i's is the same structure with every
                tensor of B rows indexed at [i] and all else as it is; but a list of length B holds one element per
                image, as detection models return it. Indices on an accelerator are not range-checked, which would
                make the host wait for the device.
            several: allow K targets an image: an integer tensor or array (B, K), or B lists of K indices or of K
                callables. The backward takes as many of the classes at once as fit into `HEAD_BYTES`, on a CPU
                `HEAD_BYTES_ON_CPU`; through a head that cannot take several, one after the other.
            top: explain this many classes of highest score, (B, top), instead of ``targets``.
            pool: what to keep of the gradients of k of an image's K targets, (B, k, C, h, w): a tensor or a tuple of
                tensors (B, k, ...). It is called for one such part after the other, with the layer's activations
                (B, C, h, w) as second argument, so that the gradients need not all be in memory. Default: the
                gradients themselves.

        Raises:
            TypeError: ``input_tensor`` is of another kind, or integers that the model does not take; ``targets`` are
                not of the kinds above; a layer's output is not of the kinds above; an output whose images cannot be
                told apart.
            ValueError: there is no batch of images, or it is empty; a wrong number of targets; a class index out of
                range; indices or None while the output has no logits, or several tensors that could be them; a
                callable's result without exactly one element; a layer did not run, has activations that are not
                (B, C, h, w), or does not influence the score; a score that no gradient
                flows back from; weights without values, quantised or sharded where that is what failed.
            RuntimeError: from autograd, where the head cannot be differentiated (reentrant checkpointing).
        """
        if torch.compiler.is_compiling():
            return uncompiled.run(self, input_tensor, targets, several=several, top=top, pool=pool)
        inputs = input_tensor if isinstance(input_tensor, Inputs) else check_inputs(input_tensor)
        explain = partial(self._captured, inputs=inputs, targets=targets, several=several, top=top, pool=pool)
        return self._explained(explain, inputs)

    def _explained(self, explain, inputs):
        """What ``explain(begin)`` gives, with the kind of pass that these inputs have."""
        return explain(_Pass)

    def _captured(self, begin, inputs, targets, several, top, pool):
        """The `Capture` of a pass, or of as many as it takes; ``begin`` makes one of this object."""
        batch = inputs.images.shape[0]  # len() would be an int also where the size is a symbol
        with torch.inference_mode(False), torch.no_grad():
            targets, top = check_targets(targets, batch, several), check_top(top, targets)
        while True:
            one_pass = begin(self)
            # Programs have no hooks, which compiled code would pass by; and a look at all modules takes its time.
            compiled = one_pass.built is None and (self._compiled or is_compiled(self._modules))
            weights = _normal_weights() if self._inference_weights else nullcontext()
            try:
                with eager_without_grad(fused=self._fused, compiled=compiled), weights:
                    captured = one_pass.run(inputs, targets, batch, top, pool)
                if captured is not None:
                    return captured
            except _DidNotRun as error:
                if compiled or "torch._dynamo" not in sys.modules:
                    raise ValueError(str(error)) from None
                self._compiled = True  # once more, should it be in a function that is compiled
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if self._inference_weights or not obstacles.has_inference_weights(self.model):
                    cause = obstacles.why_failed(self.model, inputs.images, error)
                    if cause is None:
                        raise
                    raise cause from error
                self._inference_weights = True  # once more, with weights that autograd takes

    def _reshaped(self, gradient):
        return gradient if self.reshape_transform is None else self.reshape_transform(gradient)

    def check_unchanged(self) -> None:
        """Refuses a model whose changes would not be seen: with weights of their own, `CompiledCapture` has such."""

    def release(self) -> None:
        """Nothing: no call leaves anything on the model. For callers of the libraries that do."""

    def repeated_layers(self) -> list[tuple[str, int]]:
        """(name, number of runs) of every target layer that ran more than once in the latest pass."""
        return [(self._names[layer], count) for layer, count in self._last_call.items() if count > 1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()

    def _to_grid(self, layer, activations, inputs):
        """``activations`` as (B, C, h, w), of a volume (B, C, d, h, w), or an error that names the layer."""
        batch, n_axes = inputs.images.shape[0], inputs.images.ndim - 2
        name, hint = f"target layer {self._names[layer]!r}", "; pass a reshape_transform that makes it so"
        if self.reshape_transform is not None:
            activations = self.reshape_transform(activations)
            name, hint = f"reshape_transform of {name}", ""
            if not isinstance(activations, torch.Tensor):
                raise TypeError(f"{name} must return a tensor, got {_type(activations)}")
        shape = tuple(activations.shape)
        axes = {1: "t", 3: "d, h, w"}.get(n_axes, "h, w")
        # A plane also of inputs with further axes, of which the model makes images.
        if len(shape) != 4 and not (n_axes in (1, 3) and len(shape) == 2 + n_axes):
            raise ValueError(f"{name} must return (B, C, {axes}), got {shape}{hint}")
        if shape[0] != batch and not self.any_rows:
            raise ValueError(f"{name} must return one row per image, ({batch}, C, {axes}), got {shape}{hint}")
        if not prod(shape[2:]):
            raise ValueError(f"{name} must return a grid with at least one cell, got {shape}")
        if len(shape) == 3 and self.reshape_transform is None and any(map(_is_of_tokens, layer.modules())):
            raise ValueError(
                f"{name} returns {shape}, of which its kind of layer mostly has the channels last; pass a"
                " reshape_transform that makes (B, C, t) of it"
            )
        return activations

    def _differentiate(self, roots, edges, cotangents=None):
        """The gradients of each target layer; with cotangents (k, *root.shape) of the one root, k of them: (k, ...)."""
        roots = [root for root in roots if root.requires_grad]
        if not roots:
            raise ValueError(
                "the score must be differentiable, got one that no gradient flows back from (argmax, detach, integer"
                " outputs, or torch.no_grad or reentrant checkpointing in the model?)"
                f"{obstacles.why_no_gradient(self.model)}"
            )
        if cotangents is None:
            gradients = torch.autograd.grad(roots, edges, allow_unused=True)
        else:
            gradients = self._backward_of_several(roots[0], edges, cotangents)
        for layer, gradient in zip(self.target_layers, gradients):
            if gradient is None:
                raise ValueError(
                    f"the score does not depend on target layer {self._names[layer]!r}: expected a layer on the way"
                    " to the score, outside what stops gradients (detach, torch.no_grad, reentrant checkpointing)"
                    f"{obstacles.why_no_gradient(self.model)}"
                )
        return gradients

    def _differentiate_several(self, found, edges, activations, pool):
        """Per layer what ``pool`` keeps of the gradients of K scores an image, part after part: (B, K, ...)."""
        limit = HEAD_BYTES_ON_CPU if activations[0].device.type == "cpu" else HEAD_BYTES
        at_once = max(1, limit // sum(each.nbytes for each in activations))
        parts = []
        for start in range(0, found.n_classes, at_once):
            gradients = self._differentiate(found.roots, edges, found.cotangents(slice(start, start + at_once)))
            # A transform is written for one batch of images.
            if self.reshape_transform is not None:
                gradients = [torch.stack([*map(self.reshape_transform, gradient)]) for gradient in gradients]
            parts.append(
                [pool(gradient.transpose(0, 1), of_layer) for gradient, of_layer in zip(gradients, activations)]
            )
        return tuple(tree_map(lambda *of_layer: torch.cat(of_layer, dim=1), *of_layer) for of_layer in zip(*parts))

    def _backward_of_several(self, root, edges, cotangents):
        """Gradients (k, ...) per edge, in one backward, or where an operator of the head refuses that in k of them."""
        options = {"retain_graph": True, "allow_unused": True}
        if self._batched_backward:
            try:
                return torch.autograd.grad(root, edges, cotangents, is_grads_batched=True, **options)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = error
        each = [torch.autograd.grad(root, edges, cotangent, **options) for cotangent in cotangents]
        if self._batched_backward:  # the backward itself is fine, so it was the batch
            self._batched_backward = False
            LOG.warning(
                "the head of %s takes one backward a class, its operators do not take several at once: %s",
                _type(self.model),
                str(reason).splitlines()[0],
            )
        return [None if of_edge[0] is None else torch.stack(of_edge) for of_edge in zip(*each)]


def _is_of_tokens(module):
    return isinstance(module, (nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase, nn.Linear))


class _DidNotRun(ValueError):
    """A target layer did not run, or not where its hook could see it."""


class _Pass:
    """One forward and one backward of a `HeadCapture`: its hooks, and what they keep."""

    built: Any = None

    def __init__(self, capture: HeadCapture) -> None:
        self._of, self._call = capture, Call()
        self._last_call = capture._last_call

    def _begin(self):
        self._calls: Counter[nn.Module] = Counter()
        self._hands_on = False
        self._taps: dict[nn.Module, _Tap] = {}
        guides, guided = self._of._guides, self._of._guided
        if guides is not None and callable(guided) and not guided(self._images):
            guides = None
        self._of._has_guides = guides is not None
        self._guides = guides and guides.begin()

    def run(self, inputs, targets, batch, top, pool):
        """The `Capture`, or None where the pass is to be repeated."""
        with self._opened(inputs):
            captured = self._run(inputs, targets, batch, top, pool)
            return None if self._guides is not None and self._guides.must_repeat() else captured

    @contextmanager
    def _opened(self, inputs):
        self._images = inputs.images
        # The hooks stay for the backward: non-reentrant checkpointing runs parts of the forward again in it.
        self._rooted: list[torch.Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            yield
        finally:
            while self._handles:
                self._handles.pop().remove()
            while self._rooted:
                self._rooted.pop().detach_()  # the model may hold on to its tensor: a buffer, a cached feature map

    def _run(self, inputs, targets, batch, top, pool):
        of = self._of
        with self._call:
            outputs = self._forward(inputs)
        taps = [self._taps[layer] for layer in of.target_layers]
        activations = tuple(of._to_grid(layer, tap.activations, inputs) for layer, tap in zip(of.target_layers, taps))
        guides = (None,) * len(taps)
        if self._guides is not None:
            guides = tuple(map(self._guides.of, range(len(taps)), of.target_names, activations))
            if self._guides.must_repeat():
                return None
        if not of.gradients:
            classes = None
            if not isinstance(targets, tuple):
                classes = chosen_classes(find_logits(outputs, batch).detach(), targets, top)
            outputs = map_tensors(torch.Tensor.detach, outputs)
            return Capture(outputs, activations, (None,) * len(taps), guides, classes, self._order())
        gradients, classes = self._differentiated(outputs, targets, batch, top, pool, activations)
        outputs = map_tensors(torch.Tensor.detach, outputs)
        return Capture(outputs, activations, gradients, guides, classes, self._order(), self.built)

    def _differentiated(self, outputs, targets, batch, top, pool, activations):
        """Per target layer the gradients, or what ``pool`` keeps of them; and the classes that are explained."""
        of = self._of
        with torch.enable_grad():  # a target may run the model: that is no part of the pass
            found = scores(outputs, targets, batch, of.margin_temperature, top, of.chosen_side)
        edges = [self._taps[layer].edge for layer in of.target_layers]
        with self._call, self._backward(found.roots), self._norms(found.roots):
            if found.n_classes is None:
                return tuple(map(of._reshaped, of._differentiate(found.roots, edges))), found.classes
            pool = pool or (lambda gradients, _: gradients)
            return of._differentiate_several(found, edges, activations, pool), found.classes

    def _order(self):
        """The target layers' indices in the order in which they ran."""
        ran, layers = list(self._taps), self._of.target_layers
        return tuple(sorted(range(len(layers)), key=lambda index: ran.index(layers[index])))

    def _backward(self, roots):
        roots = [root for root in roots if root.requires_grad and root.device.type != "cpu"]
        return self._call.backward_from(roots[0]) if roots else nullcontext()

    def _norms(self, roots):
        return frozen_norms(roots) if self._of.frozen_norms else nullcontext()

    def _hook(self, inputs):
        """The hooks of the pass, on the model."""
        of, only = self._of, self._call.only
        tap, refuse = only(self._tap), only(obstacles.refuse_meta)
        for layer in of._names:
            self._handles.append(layer.register_forward_hook(tap))
        if not inputs.images.is_meta:
            self._handles += [layer.register_forward_pre_hook(refuse) for layer in of._without_values]
        if self._guides is not None:
            # Behind the taps, so that a guide which is a target layer too is seen as the model goes on with it.
            self._handles += self._guides.register(named_modules(of.model), only)

    def _forward(self, inputs):
        """The model's raw outputs, from a pass in which every target layer was tapped at its last call."""
        of, device = self._of, _device(self._of.model, inputs.images)
        while True:
            self._begin()
            while self._handles:
                self._handles.pop().remove()
            self._hook(inputs)
            # Private copies: the model may change its input in place, and it may be needed again.
            args, kwargs = inputs.copies(device)
            with torch.set_grad_enabled(of._grad_from_start):
                outputs = of.model(*args, **kwargs)
                # The tap switched autograd on. If it is off again, then a no_grad block of the model's own, or the
                # like, encloses the layer and has just restored what it found; it must find autograd on.
                switched_off = of.gradients and not torch.is_grad_enabled()
            for layer, name in of._names.items():
                if not self._calls[layer]:
                    raise _DidNotRun(
                        f"target layer {name!r} did not run in the forward pass (or ran where no hook sees it: its"
                        f" forward() called directly, or scripted code){obstacles.why_not_run(of.model, name)}"
                    )
            if len(self._taps) < len(of._names):
                self._last_call = {}  # fewer calls than last time: tap every call
            elif (switched_off or self._hands_on) and not of._grad_from_start:
                of._grad_from_start = True
            else:
                of._last_call = self._last_call = dict(self._calls)  # a copy: the backward's recomputation counts on
                return outputs

    def _tap(self, layer, inputs, output):
        """Forward hook: start the graph at the layer's output, unless it is in it, and keep a private copy."""
        self._calls[layer] += 1
        if self._calls[layer] < self._last_call.get(layer, 1):
            return None
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not (isinstance(first, torch.Tensor) and first.is_floating_point()):
            raise TypeError(
                f"target layer {self._of._names[layer]!r} must return a floating-point tensor, or a tuple or list that"
                f" starts with one, got {_describe(output)}{obstacles.why_not_floating(first)}"
            )
        if obstacles.is_sharded(first):
            raise TypeError(
                f"target layer {self._of._names[layer]!r} must return a plain tensor, got a DTensor, which is sharded:"
                " take a layer whose output every rank has whole"
            )
        if not self._of.gradients:
            with torch.inference_mode(False):
                self._taps[layer] = _Tap(first.detach().clone(), None)
            self._at_target(layer)
            return None
        # The very tensor that the layer takes, unchanged: what the model made of it before the layer counts too.
        if any(first is each for each in inputs) and not getattr(layer, "inplace", False):
            self._hands_on = True
        with torch.inference_mode(False), torch.enable_grad():
            # Only a tensor with a history of its own survives later in-place operations as a place in the graph.
            tensor = first.clone() if first._is_view() or first.is_inference() else first
            if not tensor.requires_grad:
                tensor = GraphRoot.apply(torch.zeros((), requires_grad=True), tensor)
                self._rooted.append(tensor)
            self._taps[layer] = _Tap(tensor.detach().clone(), get_gradient_edge(tensor))
        self._at_target(layer)
        torch.set_grad_enabled(True)
        return None if tensor is first else with_first(output, tensor)

    def _at_target(self, layer):
        """What has run until now may guide the layer."""
        if self._guides is not None:
            for index, target in enumerate(self._of.target_layers):
                if target is layer:
                    self._guides.at_target(index)


def find_module_name(model: nn.Module, module: nn.Module, what: str = "target layer") -> str:
    """Qualified name of ``module`` in ``model``, such as "layer4.1.conv2"; the class name for the model itself.

    Args:
        model: ``torch.nn.Module``; compiled models and (Distributed)DataParallel are looked through.
        module: ``torch.nn.Module``, compared by identity.
        what: what to call the module in the error.

    Raises:
        ValueError: ``module`` is no part of ``model``.

    >>> model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    >>> find_module_name(model, model[1][0])
    '1.0'
    """
    model, module = _unwrap(model), _unwrap(module)
    for name, candidate in model.named_modules():
        if candidate is module:
            return _clean(name) or _type(model)
    raise ValueError(f"{what} must be one of the modules of {_type(model)}, got a {_type(module)} that is not")


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model's parts, the model itself left out."""
    return [(_clean(name), module) for name, module in _unwrap(model).named_modules() if name]


def _clean(name):
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def make_guides(
    model: nn.Module,
    guide_layer: GuideLayer,
    n_layers: int,
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    copies: bool = False,
) -> Guides | None:
    """The `Guides` of ``n_layers`` target layers; None when every layer guides itself.

    Args:
        guide_layer: as for `HeadCapture`; reshape_transform, copies: as for `Guides`.

    Raises:
        TypeError: ``guide_layer`` is of another kind.
        ValueError: a module is no part of ``model``, or there is not one guide per target layer.
    """
    guides: list[Any] = list(guide_layer) if isinstance(guide_layer, (list, tuple)) else [guide_layer] * n_layers
    if len(guides) != n_layers:
        raise ValueError(f"guide_layer must hold one guide per target layer: {n_layers}, got {len(guides)}")
    names = {}
    for index, guide in enumerate(guides):
        if isinstance(guide, nn.Module):
            guides[index] = _unwrap(guide)
            names[guides[index]] = find_module_name(model, guide, "guide layer")
        elif not (guide is None or (isinstance(guide, str) and guide == AUTO)):
            got = repr(guide) if isinstance(guide, str) else _type(guide)
            raise TypeError(f'guide_layer must be a module of the model, "{AUTO}" or None, got {got} at [{index}]')
    if all(guide is None for guide in guides):
        return None
    return Guides(guides, names, reshape_transform, copies)


class _Tap(NamedTuple):
    activations: torch.Tensor
    # Not the tensor: a later in-place operation moves the tensor on, the edge stays. None where none are asked for.
    edge: GradientEdge | None


class GraphRoot(torch.autograd.Function):
    """Makes ``tensor`` itself the start of a graph, which then is no leaf and may be changed in place.

    The model goes on with the tensor it made, under every name it has for it: handing it a copy instead would lose
    the gradient through the input of an in-place layer. No backward is needed: the gradient is read at the output; a
    subclass may define one, to say what a caller who wants to go on from here should know.
    """

    @staticmethod
    def forward(ctx, anchor, tensor):
        ctx.mark_dirty(tensor)
        return tensor


class _normal_weights(TorchFunctionMode):
    """Gives every operation normal tensors in the place of inference tensors, with the same memory.

    Weights made under ``torch.inference_mode`` cannot be saved for a backward. The mode is the thread's own, and the
    model is left alone. What asks whether a tensor is one of them gets the truth.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.is_inference:
            args, kwargs = tree_map(_as_normal, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _as_normal(value):
    if not (isinstance(value, torch.Tensor) and value.is_inference()):
        return value
    with torch.inference_mode(False):
        memory = value.untyped_storage(), value.storage_offset(), value.shape, value.stride()
        return torch.empty(0, dtype=value.dtype, device=value.device).set_(*memory)


def _device(model, images):
    """Where the model's first parameter or buffer is; a model without any runs where its input is."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), images.device)


def _unwrap(module):
    """The module that the user wrote, inside torch.compile's and (Distributed)DataParallel's wrappers."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        else:
            return module


def _type(value):
    return type(value).__name__


def _describe(output):
    """Type and content of a layer's output, as far as an error needs it."""
    if isinstance(output, torch.Tensor):
        return f"a tensor of {output.dtype}"
    if isinstance(output, (tuple, list)) and output:
        return f"a {_type(output)} that starts with {_describe(output[0])}"
    return _type(output)
