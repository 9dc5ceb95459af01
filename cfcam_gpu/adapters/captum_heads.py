"""captum's methods that change a layer's activations, on the part of the network behind it (`cfcam_gpu.head`).

captum runs the whole network for every step and every feature. Its own code runs here too, from the formatting of the
arguments to the sums, with three things in their places: the layer's activations, which the head has; the gradients of
the steps; and the outputs for changed activations. Attributions are so captum's own, but for the rounding of a product
of matrices of other sizes.

captum's code runs unchanged, with its results and errors, where the head cannot be recorded (`Head.reason`), and for
functions that are no modules, DataParallel and ``device_ids``, lists of layers and layers of several tensors.
"""

import copy
import inspect
from types import FunctionType

import captum.attr as original
import torch
from captum._utils.common import (
    _format_additional_forward_args,
    _format_tensor_into_tuples,
    _run_forward,
)
from captum.attr._core.layer.layer_gradient_shap import LayerInputBaselineXGradient
from captum.log import log_usage
from torch import nn

from cfcam_gpu.head import Head, record_head
from cfcam_gpu.inputs import Inputs
from cfcam_gpu.perturbed import in_blocks

# Private names of captum 0.9 that have no public form: of captum._utils.common, which say what inputs and targets mean,
# and LayerInputBaselineXGradient, which LayerGradientShap makes. `_with` looks names up in the modules of its methods.


def _with(method, **names):
    """captum's method, where names of its module mean something else."""
    function = inspect.unwrap(method)
    return FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


class _OnHead:
    """Mixin: the head of an attribution's network, recorded once and renewed for other inputs."""

    _head: Head | None = None  # of one call's copy
    _heads: dict[bool, Head] | None = None
    _refused: set | None = None

    def _head_of(self, inputs, additional_forward_args, to_input):
        """The head behind the layer for these inputs; None where captum's own code must run."""
        model, layer = self.forward_func, self.layer
        if self.device_ids is not None or isinstance(model, nn.DataParallel) or not isinstance(layer, nn.Module):
            return None
        inputs = _format_tensor_into_tuples(inputs)
        further = _format_additional_forward_args(additional_forward_args) or ()
        if not (isinstance(model, nn.Module) and all(isinstance(each, torch.Tensor) and each.ndim for each in inputs)):
            return None
        heads = self._heads = {} if self._heads is None else self._heads
        refused = self._refused = set() if self._refused is None else self._refused
        kind = (to_input, any(module.training for module in model.modules()))
        if kind in refused:
            return None
        arguments = Inputs((*inputs, *further), {}, inputs[0])
        try:
            head = heads.get(to_input)
            head = None if head is None else head.renewed(model, arguments)
            head = record_head(model, layer, arguments, to_input) if head is None else head
        except (TypeError, ValueError):  # of a layer that is not taken here: captum says what there is to say
            head = None
        if head is None or head.reason is not None or head.n_tensors > 1:
            refused.add(kind)
            return None
        heads[to_input] = head
        return head

    def _on(self, head, target=None):
        """A copy of the attribution for one call."""
        call = copy.copy(self)
        call._head, call._target = head, target
        return call


def _of(targets, rows):
    """captum's targets of these rows: one for all, or a list or tensor with one for each."""
    one_for_all = not isinstance(targets, (list, torch.Tensor)) or (
        isinstance(targets, torch.Tensor) and targets.numel() == 1
    )
    return targets if one_for_all else targets[rows]


class _Evaluated:
    """In the place of captum's evaluation of a layer: the head has it for the inputs that it was recorded with."""

    def __init__(self, head, inputs, evaluate):
        self._head, self._inputs, self._evaluate = head, _format_tensor_into_tuples(inputs), evaluate

    def __call__(self, forward_func, inputs, *args, **kwargs):
        if all(one is other for one, other in zip(inputs, self._inputs)):
            return (self._head.activations,)
        return self._evaluate(forward_func, inputs, *args, **kwargs)


class LayerIntegratedGradients(_OnHead, original.LayerIntegratedGradients):
    """captum's ``LayerIntegratedGradients``, with the same arguments and numbers; the steps run the head alone.

    >>> attribution = LayerIntegratedGradients(model, model.layer4)
    >>> attribution.attribute(images, target=3, n_steps=50).shape  # images (2, 3, 224, 224)
    torch.Size([2, 2048, 7, 7])
    """

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs,
        baselines=None,
        target=None,
        additional_forward_args=None,
        n_steps=50,
        method="gausslegendre",
        internal_batch_size=None,
        return_convergence_delta=False,
        attribute_to_layer_input=False,
        grad_kwargs=None,
    ):
        """As captum's, in its shapes."""
        taken = (inputs, baselines, target, additional_forward_args, n_steps, method, internal_batch_size)
        taken += (return_convergence_delta, attribute_to_layer_input, grad_kwargs)
        head = self._head_of(inputs, additional_forward_args, attribute_to_layer_input)
        whole = inspect.unwrap(original.LayerIntegratedGradients.attribute)
        if head is None:
            return whole(self, *taken)
        call = self._on(head)
        call.ig = copy.copy(self.ig)  # captum sets the gradients' function on it
        evaluated = _Evaluated(head, inputs, whole.__globals__["_forward_layer_eval"])
        return _with(whole, _forward_layer_eval=evaluated)(call, *taken)

    def _make_gradient_func(self, num_outputs_cumsum, attribute_to_layer_input, grad_kwargs):
        if self._head is None:
            return super()._make_gradient_func(num_outputs_cumsum, attribute_to_layer_input, grad_kwargs)

        @torch.enable_grad()
        def of_block(steps, targets):
            output = _run_forward(lambda: self._head(steps, tiled=True), (), targets)
            assert output[0].numel() == 1, (
                "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
            )
            return torch.autograd.grad(torch.unbind(output), steps, **grad_kwargs or {})[0]

        def gradients(forward_fn, inputs, target_ind=None, additional_forward_args=None):
            (steps,) = inputs

            def run(block):
                # Of all steps the very tensor: a slice would keep them alive twice.
                of_all = block == slice(0, len(steps))
                return of_block(steps if of_all else steps[block].detach().requires_grad_(), _of(target_ind, block))

            n, batch = len(steps), len(self._head.activations)
            return (in_blocks(type(self).__name__, run, n, n, step=batch),)

        return gradients


class _Ablated(_OnHead):
    """Mixin: the outputs for changed activations of a layer are the head's."""

    @property
    def attributor(self):
        """captum's class, or what makes one call's object of it."""
        cls = super().attributor
        return cls if self._head is None else lambda forward_func: cls(self._of_changed)

    def _of_changed(self, *args):
        """captum's outputs of a changed layer; the arguments are its tensors, the inputs, and how many tensors."""
        changed, n, batch = args[0], len(args[0]), len(self._head.activations)
        run = lambda block: self._head(changed[block], tiled=True)
        outputs = in_blocks(type(self).__name__, run, n, n, step=batch)
        return _run_forward(lambda: outputs, (), target=self._target)

    def _ablated(self, cls, head, inputs, target, *further):
        whole = inspect.unwrap(cls.attribute)
        evaluated = _Evaluated(head, inputs, whole.__globals__["_forward_layer_eval"])
        return _with(whole, _forward_layer_eval=evaluated)(self._on(head, target), inputs, *further)


class LayerFeatureAblation(_Ablated, original.LayerFeatureAblation):
    """captum's ``LayerFeatureAblation``, with the same arguments and numbers; the head alone runs for each feature.

    >>> attribution = LayerFeatureAblation(model, model.layer4)
    >>> channels = torch.arange(2048).view(1, 2048, 1, 1).expand(1, 2048, 7, 7)
    >>> attribution.attribute(images, target=3, layer_mask=channels).shape  # images (2, 3, 224, 224)
    torch.Size([2, 2048, 7, 7])
    """

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs,
        layer_baselines=None,
        target=None,
        additional_forward_args=None,
        layer_mask=None,
        attribute_to_layer_input=False,
        perturbations_per_eval=1,
    ):
        """As captum's, in its shapes."""
        taken = (layer_baselines, target, additional_forward_args, layer_mask)
        taken += (attribute_to_layer_input, perturbations_per_eval)
        head = self._head_of(inputs, additional_forward_args, attribute_to_layer_input)
        if head is None:
            return inspect.unwrap(original.LayerFeatureAblation.attribute)(self, inputs, *taken)
        return self._ablated(original.LayerFeatureAblation, head, inputs, target, *taken)


class LayerFeaturePermutation(_Ablated, original.LayerFeaturePermutation):
    """captum's ``LayerFeaturePermutation``, with the same arguments, random numbers and results; on the head alone.

    >>> attribution = LayerFeaturePermutation(model, model.layer4)
    >>> channels = torch.arange(2048).view(1, 2048, 1, 1).expand(1, 2048, 7, 7)
    >>> attribution.attribute(images, target=3, layer_mask=channels).shape  # images (2, 3, 224, 224)
    torch.Size([2, 2048, 7, 7])
    """

    @log_usage(part_of_slo=True)
    def attribute(self, inputs, target=None, additional_forward_args=None, layer_mask=None, perturbations_per_eval=1):
        """As captum's, in its shapes."""
        taken = (target, additional_forward_args, layer_mask, perturbations_per_eval)
        head = self._head_of(inputs, additional_forward_args, False)
        if head is None:
            return inspect.unwrap(original.LayerFeaturePermutation.attribute)(self, inputs, *taken)
        return self._ablated(original.LayerFeaturePermutation, head, inputs, target, *taken)


class LayerGradientShap(original.LayerGradientShap):
    """captum's ``LayerGradientShap``, with the same arguments, random numbers and results.

    Without noise all samples of an image are that image, and many of the baselines are the same: each is run through
    the network once.
    """

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs,
        baselines,
        n_samples=5,
        stdevs=0.0,
        target=None,
        additional_forward_args=None,
        return_convergence_delta=False,
        attribute_to_layer_input=False,
    ):
        """As captum's, in its shapes."""
        taken = (inputs, baselines, n_samples, stdevs, target, additional_forward_args)
        whole = _with(original.LayerGradientShap.attribute, LayerInputBaselineXGradient=_InputBaselineXGradient)
        return whole(self, *taken, return_convergence_delta, attribute_to_layer_input)


class _InputBaselineXGradient(LayerInputBaselineXGradient):
    @log_usage(part_of_slo=True)
    def attribute(self, *args, **kwargs):
        """As captum's, with the layer evaluated at different rows only."""
        whole = inspect.unwrap(LayerInputBaselineXGradient.attribute)
        evaluate = whole.__globals__["_forward_layer_eval"]

        def of_different_rows(forward_func, inputs, layer, additional_forward_args=None, **options):
            places = None
            if additional_forward_args is None and isinstance(forward_func, nn.Module):
                if not any(module.training for module in forward_func.modules()):
                    places = _places(inputs)
            if places is None:
                return evaluate(forward_func, inputs, layer, additional_forward_args=additional_forward_args, **options)
            first, place = places
            evaluated = evaluate(forward_func, tuple(each[first] for each in inputs), layer, **options)
            return tuple(each[place] if len(each) == len(first) else each for each in evaluated)

        return _with(whole, _forward_layer_eval=of_different_rows)(self, *args, **kwargs)


def _places(tensors):
    """Of tensors with a row for each image: which rows differ, and for each row the place of its like among them; None
    where all differ."""
    rows = [torch.cat([tensor[row].detach().flatten() for tensor in tensors]) for row in range(len(tensors[0]))]
    first, place, seen = [], [], {}
    for index, row in enumerate(rows):
        alike = seen.setdefault(float(row.double().sum()), [])
        found = next((number for number in alike if torch.equal(rows[first[number]], row)), None)
        if found is None:
            found = len(first)
            first.append(index)
            alike.append(found)
        place.append(found)
    return None if len(first) == len(rows) else (first, place)


METHODS = {
    getattr(original, fast.__name__): fast
    for fast in (LayerIntegratedGradients, LayerFeatureAblation, LayerFeaturePermutation, LayerGradientShap)
}
"""captum's class -> ours."""
