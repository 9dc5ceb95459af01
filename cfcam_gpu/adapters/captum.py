"""captum's layer attributions: CF-CAM, LayerGradCam without a graph of the trunk, and `captum_heads`.

captum 0.9 differentiates the output down to the layer, no further. What it still pays for is autograd's record of
everything before the layer; here that part runs without autograd, which saves memory more than time. The weighted sum
over the channels is a Triton kernel's where that takes the tensors (a CUDA or ROCm device, half precision or float32).

What a caller can notice: attributions come without a graph (captum's carry that of the layer's activations), and the
model runs in eager code, also where it is compiled; where the kernel sums, half precision is added up in float32 and
rounded once. Faults of captum 0.9.0 that are not copied: it fails under ``torch.inference_mode`` and for models that
were compiled and have run, whose hooks it does not reach; and it leaves ``requires_grad`` set on the caller's input
where that is what the layer gets or returns.
"""

import copy
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from cfcam_gpu import pipeline, torch_backend
from cfcam_gpu.adapters.common import Configured, left_as_it_is, obstacle
from cfcam_gpu.calls import Call, eager_without_grad
from cfcam_gpu.capture import GraphRoot, GuideLayer, make_guides, named_modules
from cfcam_gpu.checks import needs
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.frozen_norms import frozen_norms
from cfcam_gpu.guides import AUTO
from cfcam_gpu.targets import check_logits, margin_cotangent
from cfcam_gpu.weights import weighted

try:
    import captum.attr as original
    from captum._utils.common import _run_forward, _select_targets
    from captum._utils.gradient import compute_layer_gradients_and_eval
    from captum.attr._utils.attribution import Attribution, GradientAttribution, LayerAttribution
    from captum.log import log_usage
except ImportError as error:
    raise ImportError(needs("captum 0.9 or later", "captum")) from error

from cfcam_gpu.adapters import captum_heads

# Private names of captum 0.9 that have no public form: the modules captum._utils.common (_run_forward and
# _select_targets, so that inputs and targets mean what they mean there), captum._utils.gradient, and
# captum.attr._utils.attribution.


class LayerGradCam(original.LayerGradCam):
    """captum's ``LayerGradCam``, with the same arguments and numbers, and no graph of the trunk.

    captum's own code runs, with its results and its errors, where there is nothing to save: DataParallel and
    ``device_ids``, ``grad_kwargs`` with ``create_graph``, layers that do not give floating-point tensors, and outputs
    that need a target and have none. So it does, from a graph of the whole network, for ``attribute_to_layer_input``
    and layers that return what they get: other branches may have taken that before the layer.

    >>> attribution = LayerGradCam(model, model.layer4).attribute(images, target=3)  # images (2, 3, 224, 224)
    >>> attribution.shape
    torch.Size([2, 1, 7, 7])
    """

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs,
        target=None,
        additional_forward_args=None,
        attribute_to_layer_input=False,
        relu_attributions=False,
        attr_dim_summation=True,
        grad_kwargs=None,
    ):
        """(N, 1, h, w), signed, or a tuple of them for a layer with several tensors; arguments as in captum."""
        taken = (inputs, target, additional_forward_args, attribute_to_layer_input)
        try:
            captured = _capture(self, *taken, grad_kwargs)
        except _Around:
            inputs, additional_forward_args = _private((inputs, additional_forward_args))
            taken = (inputs, target, additional_forward_args, attribute_to_layer_input)
            with eager_without_grad():
                return super().attribute(*taken, relu_attributions, attr_dim_summation, grad_kwargs)
        if captured is None:
            return super().attribute(*taken, relu_attributions, attr_dim_summation, grad_kwargs)
        maps = []
        with torch.no_grad():
            for gradients, activations in zip(*captured):
                weights = _pooled(gradients)
                if attr_dim_summation and pipeline.takes_kernels(activations):
                    grid = pipeline.class_grid(activations, weights.flatten(1), relu=False)
                    maps.append(grid[:, None].to(activations.dtype))
                    continue
                # captum's order of operations: a fused sum rounds differently, by up to 3e-6 where terms cancel.
                result = weights * activations
                maps.append(result.sum(1, keepdim=True) if attr_dim_summation else result)
        return _finished(maps, relu_attributions)


class CFCAM(Configured, LayerAttribution, GradientAttribution):
    """CF-CAM as a layer attribution of captum.

    Args:
        forward_func, layer, device_ids: as for captum's ``LayerGradCam``.
        config, backend, clustering, check_finite: as for `cfcam_gpu.cf_cam`.

    Raises:
        TypeError, ValueError: a choice that is unknown or cannot run.

    >>> attribution = CFCAM(model, model.layer4).attribute(images, target=[3, 7])  # images (2, 3, 224, 224)
    >>> attribution.shape
    torch.Size([2, 1, 7, 7])
    """

    def __init__(
        self,
        forward_func,
        layer,
        device_ids=None,
        *,
        guide_layer: GuideLayer = "auto",
        config: CFCAMConfig | None = None,
        backend: str = "auto",
        clustering: str = "auto",
        check_finite: bool | None = None,
    ):
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        GradientAttribution.__init__(self, forward_func)
        self._configure(config, backend, clustering, check_finite)
        self._guides = None
        if isinstance(forward_func, nn.Module):
            self._guides = make_guides(forward_func, guide_layer, n_layers=1, copies=True)
        elif guide_layer not in (None, AUTO):
            raise ValueError(f"guide_layer needs a model, got the function {forward_func!r}")
        if not self.config.averages:
            self._guides = None

    @property
    def guide_names(self):
        """The guide's name, as `cfcam_gpu.CFCAM` has it; None also where the layer guides itself."""
        names = self._guides and self._guides.names([""])
        return names and [name or None for name in names]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs,
        target=None,
        additional_forward_args=None,
        attribute_to_layer_input=False,
        relu_attributions=False,
        attr_dim_summation=True,
        grad_kwargs=None,
    ):
        """CF-CAM's weighted sum over the channels, signed, on the grid of the layer's guide or else its own.

        The score of a class in outputs (N, n), n > 1, is its margin (``config.margin_temperature``). Nothing carries a
        graph, so ``create_graph`` has no effect; DataParallel's module runs on its own device, whatever ``device_ids``.

        Args:
            inputs, target, additional_forward_args, grad_kwargs: as for captum's ``LayerGradCam``.
            attribute_to_layer_input: explain what the layer gets, not what it returns.
            relu_attributions: keep the positive part only, as the published maps do.
            attr_dim_summation: False gives each channel's term, (N, C, h, w).

        Returns:
            (N, 1, h, w), h x w the guide's grid, in the dtype of the layer's activations; a tuple of them where the
            layer has several tensors.

        Raises:
            ValueError: the layer has no (N, C, h, w), or NaN.
            AssertionError, RuntimeError: as captum raises them: targets that do not fit, a layer that did not run.
        """
        taken = (target, additional_forward_args, attribute_to_layer_input)
        guides, score = self._guides, (self.config.margin_temperature, self.config.frozen_norms)
        single = copy.copy(self)
        single.device_ids = None
        if isinstance(self.forward_func, nn.DataParallel):
            single.forward_func = self.forward_func.module
            device = next(self.forward_func.parameters()).device
            inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
        grad_kwargs = {name: value for name, value in (grad_kwargs or {}).items() if name != "create_graph"}
        kept = None if guides is None else guides.begin()
        whole = nullcontext()
        try:
            captured = _capture(single, inputs, *taken, grad_kwargs, kept, *score)
        except _Around:
            captured, whole = None, eager_without_grad()
            inputs, additional_forward_args = _private((inputs, additional_forward_args))
        if captured is None:
            kept = None if guides is None else guides.begin()
            watched = _watched(single.forward_func, kept, Call(), self.layer, attribute_to_layer_input)
            with whole, watched, ExitStack() as norms:
                captured = compute_layer_gradients_and_eval(
                    lambda *args: _score(single.forward_func(*args), target, *score, norms),
                    self.layer,
                    inputs if isinstance(inputs, tuple) else (inputs,),
                    None,
                    additional_forward_args,
                    attribute_to_layer_input=attribute_to_layer_input,
                    grad_kwargs=grad_kwargs,
                )
        maps = []
        for gradients, activations in zip(*captured):
            activations, gradients = activations.detach(), gradients.detach()
            weights = self._weights_of(activations, gradients)
            guide = None if kept is None else kept.of(0, "layer", activations)
            if attr_dim_summation:
                options = {"relu": False, "guide": guide, **self._grid_options}
                result = pipeline.class_grid(activations, weights, **options)[:, None]
            else:
                result = weighted(activations, weights)
                with pipeline.plain_arithmetic(activations.device):
                    features = activations if guide is None else guide
                    config = self.config.of(activations.ndim - 2)
                    if config.averages:
                        # As the sum of the channels is, so that they still add up to it.
                        factors = torch_backend.evidence_factors(result.sum(1), features.shape[2:], config)
                        result = result * factors[:, None]
                        result = torch_backend.average_alike_cells(result, features, config, whole=result.sum(1))
            maps.append(result.to(activations.dtype))
        return _finished(maps, relu_attributions)


ACCELERATED = {original.LayerGradCam: LayerGradCam, **captum_heads.METHODS}
"""captum's class -> ours."""


def accelerate(attribution):
    """A copy of a captum attribution that is faster: same attributes, arguments and numbers.

    ``LayerGradCam`` gets this module's subclass, and the classes of `captum_heads.METHODS` get theirs. A
    ``NoiseTunnel`` gets the faster copy of its method. Every other attribution is returned as it is, the same object,
    with a warning of the logger "cfcam_gpu" that says why.

    Raises:
        TypeError: ``attribution`` is no attribution of captum.
    """
    if isinstance(attribution, (*ACCELERATED.values(), CFCAM)):
        return attribution
    if not isinstance(attribution, Attribution):
        raise TypeError(f"attribution must be an attribution of captum, got {type(attribution).__name__}")
    if type(attribution) is original.NoiseTunnel:
        method = accelerate(attribution.attribution_method)
        if method is attribution.attribution_method:
            return attribution
        fast = copy.copy(attribution)
        fast.attribution_method = method
        return fast
    reason = obstacle(attribution, ACCELERATED, REASONS)
    if reason is not None:
        return left_as_it_is(attribution, reason)
    fast = copy.copy(attribution)
    fast.__class__ = ACCELERATED[type(attribution)]
    return fast


REASONS = {
    original.LayerActivation: "it is one forward pass already",
    original.LayerGradientXActivation: "it is one forward pass and a backward to the layer already",
    original.LayerConductance: "each of its steps runs the network on another image",
    original.InternalInfluence: "each of its steps runs the network on another image",
    original.LayerDeepLift: "it is one forward pass and a backward to the layer already",
    original.LayerDeepLiftShap: "it is one forward pass and a backward to the layer already",
    original.LayerLRP: "its relevance passes through every layer of the network",
    original.GuidedGradCam: "its guided backward passes through every layer of the network",
}
"""captum's class -> why it is left alone."""


class _NotHere(Exception):
    """The layer's tensors are left to captum."""


class _Around(Exception):
    """The graph must begin before the layer: its tensor may have been used by then, as by a branch around the layer."""


def _capture(
    attribution,
    inputs,
    target,
    additional_forward_args,
    attribute_to_layer_input,
    grad_kwargs,
    kept=None,
    margin_temperature=0.0,
    frozen=False,
):
    """Gradients and activations of the layer, a tuple each, detached; None where captum's own code must run.

    Raises `_Around` where it must run in eager code and without the caller's tensors (`_private`).

    ``kept`` keeps the guide of this one layer. With a temperature, the score of a class is its margin; ``frozen``: the
    gradients are those with `frozen_norms`.
    """
    forward_func, layer, grad_kwargs = attribution.forward_func, attribution.layer, grad_kwargs or {}
    if (
        isinstance(forward_func, nn.DataParallel)
        or attribution.device_ids is not None
        or not isinstance(layer, nn.Module)
        or grad_kwargs.get("create_graph")
    ):
        return None
    if attribute_to_layer_input:
        raise _Around
    starts, rooted, call = [], [], Call()

    def tap(module, layer_inputs, found):
        tensors = found if isinstance(found, (tuple, list)) else (found,)
        if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors):
            raise _NotHere
        if any(tensor is each for tensor in tensors for each in layer_inputs) and not getattr(module, "inplace", False):
            raise _Around
        torch.set_grad_enabled(True)
        each = {id(tensor): _start(tensor, rooted) for tensor in tensors}  # one tensor may be there several times
        starts[:] = [each[id(tensor)] for tensor in tensors]  # of a layer that runs more than once the last run counts
        handed_on = [start.handed_on for start in starts]
        if kept is not None:
            kept.at_target(0)
        if not isinstance(found, (tuple, list)):
            return handed_on[0]
        if hasattr(found, "_fields"):
            return type(found)(*handed_on)
        return handed_on if isinstance(found, list) else tuple(handed_on)

    inputs, additional_forward_args = _private((inputs, additional_forward_args))
    with eager_without_grad():
        if isinstance(target, torch.Tensor) and target.is_inference():
            target = target.clone()  # autograd refuses to keep it for the backward
        handle = layer.register_forward_hook(call.only(tap))
        norms = ExitStack()
        try:
            with _watched(forward_func, kept, call):
                outputs = _run_forward(forward_func, inputs, None, additional_forward_args)
            if not isinstance(outputs, torch.Tensor):
                return None
            output = _score(outputs, target, margin_temperature, frozen, norms)
            # Autograd is off again where a no_grad or enable_grad block of the model's own encloses the layer.
            usable = starts and torch.is_grad_enabled() and isinstance(output, torch.Tensor)
            if not (usable and output.ndim and len(output) and output[0].numel() == 1):
                return None
            materialized = grad_kwargs.get("materialize_grads", False)
            options = {name: value for name, value in grad_kwargs.items() if name != "materialize_grads"}
            with torch.enable_grad():
                edges = [start.edge for start in starts]
                gradients = torch.autograd.grad(torch.unbind(output), edges, **options)
            activations = tuple(start.activations for start in starts)
            if materialized:  # which autograd does not do for edges
                filled = zip(gradients, activations)
                gradients = tuple(torch.zeros_like(like) if each is None else each for each, like in filled)
            return gradients, activations
        except _NotHere:
            return None
        finally:
            handle.remove()
            norms.close()
            while rooted:
                rooted.pop().detach_()  # the model may hold on to its tensor


def _score(outputs, target, margin_temperature, frozen, norms):
    """What captum differentiates of the outputs; with a temperature, the margin of a class of (N, n), n > 1.

    ``frozen``: and until ``norms``, an exit stack, closes, by `frozen_norms`.
    """
    if frozen and isinstance(outputs, torch.Tensor):
        norms.enter_context(frozen_norms([outputs]))
    if margin_temperature > 0 and target is not None and outputs.ndim == 2 and outputs.shape[1] > 1:
        check_logits(outputs.detach())
        indices = torch.arange(outputs.shape[1], device=outputs.device).expand_as(outputs)
        cotangent = margin_cotangent(outputs.detach(), _select_targets(indices, target), margin_temperature)
        return (outputs * cotangent).sum(1)
    return _select_targets(outputs, target)


@contextmanager
def _watched(forward_func, kept, call, layer=None, to_input=False):
    """The call, with the hooks of the guide where there is any; with a layer, also the one that tells when it runs."""
    handles = []
    if kept is not None:
        handles = kept.register(named_modules(forward_func), call.only)
    if kept is not None and layer is not None:
        register = layer.register_forward_pre_hook if to_input else layer.register_forward_hook
        handles.append(register(call.only(lambda *_: kept.at_target(0))))
    try:
        with call:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _private(values):
    """The caller's tensors under names of our own, because the layer may get or return them; they stay as they are."""

    def private(tensor):
        if tensor.is_inference():
            return tensor.clone()
        return tensor if tensor.requires_grad else tensor.detach()

    return tree_map_only(torch.Tensor, private, values)


class _Start(NamedTuple):
    """A place to differentiate to. In-place operations behind the layer reach neither the activations nor the edge."""

    activations: torch.Tensor
    edge: GradientEdge
    handed_on: torch.Tensor
    """What the model goes on with."""


def _start(tensor, rooted):
    """The `_Start` of a tensor: itself, under every name that the model has for it, where autograd can have that."""
    if not _is_apart(tensor):
        if not tensor.requires_grad:
            tensor = GraphRoot.apply(torch.zeros((), requires_grad=True), tensor)
            rooted.append(tensor)
        return _Start(tensor.detach().clone(), get_gradient_edge(tensor), tensor)
    if tensor.is_inference():
        tensor = tensor.clone()
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    return _Start(tensor.detach(), get_gradient_edge(tensor), tensor.clone())


def _is_apart(tensor):
    """Whether the model must go on with a copy: autograd takes no in-place operation on these, or loses the place."""
    is_leaf = tensor.is_leaf and tensor.requires_grad
    return tensor._is_view() or tensor.is_inference() or isinstance(tensor, nn.Parameter) or is_leaf


def _pooled(gradients):
    """Grad-CAM's weights: the mean over all but the first two dimensions, of (N, C) the gradients themselves.

    In the gradients' dtype and torch's order, as captum has it: `cfcam_gpu.weights.grad_cam` rounds otherwise.
    """
    return gradients.mean(tuple(range(2, gradients.ndim)), keepdim=True) if gradients.ndim > 2 else gradients


def _finished(maps, relu_attributions):
    """captum's result: one tensor, or a tuple where the layer has several."""
    maps = tuple(result.relu() for result in maps) if relu_attributions else tuple(maps)
    return maps if len(maps) > 1 else maps[0]
