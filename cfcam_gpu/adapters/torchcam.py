"""torch-cam's life cycle and maps: CF-CAM, and its Grad-CAM family without a graph of the trunk.

torch-cam 0.5 lets the user run the model and differentiates the scores down to the target layers, no further. What
it still pays for is autograd's record of everything before the layer. The extractors here run that part without
autograd: a hook on the model's call switches it off, one on the target layer starts the graph there. The rest is
the library's own code, so the numbers are the same; but the weighted sum over the channels is a Triton kernel's where
that takes the tensors (a CUDA or ROCm device, half precision or float32). The head alone saves memory more than time:
resnet50, batch 8 on a CPU, layer4: 116 MiB beside the model where torch-cam takes 652. `SmoothGradCAMpp` also
runs several noisy copies in a pass; ScoreCAM, SSCAM and ISCAM are in `torchcam_masked`.

What a caller can notice, while the hooks are enabled:

- The scores of a model in eval mode carry the graph of the head alone. A backward from them into the trunk raises a
  RuntimeError. In train mode, or when an input requires gradients, the trunk keeps the graph it has without us.
- Under ``torch.no_grad`` and ``torch.inference_mode`` the scores carry the head's graph too, and maps can be had.
- ``torch.compile(model)``: give the extractor the compiled model, and it runs in eager code, also where it has been
  compiled before (torch-cam then finds no activations). Hooks that are compiled into the model, by ``model.compile()``,
  work as torch-cam's do and save nothing.
- ``cam(..., retain_graph=False)`` frees the head's graph, as in torch-cam.
- Where the kernel sums, half precision is added up and scaled in float32 and rounded once, at the end; torch-cam rounds
  every product. NaN terms (0 / 0 in `XGradCAM`) are left out, as there.
- KeyboardInterrupt in the middle of a forward pass runs no hook: ``remove_hooks()``, the end of the ``with`` block, or
  the next pass puts autograd back.

Faults of torch-cam 0.5.0 that are not copied: frozen models and callers under ``no_grad`` fail; stored activations
share memory with the model's, and gradients are those of the changed tensor, after an in-place operation behind the
layer (`GradCAM` of a convolution before ``ReLU(inplace=True)`` is silently that of the ReLU); `GradCAMpp`, see there.

>>> with GradCAM(model, "layer4") as cam:
...     scores = model(images)  # images (2, 3, 224, 224)
...     maps = cam([285, 282], scores)
>>> maps[0].shape
torch.Size([2, 7, 7])
"""

from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from cfcam_gpu import pipeline
from cfcam_gpu.adapters.common import LOG, Configured, left_as_it_is, obstacle
from cfcam_gpu.calls import eager_without_grad, is_fused
from cfcam_gpu.capture import GraphRoot, GuideLayer, make_guides, named_modules
from cfcam_gpu.checks import needs
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.frozen_norms import frozen_norms
from cfcam_gpu.perturbed import block_size
from cfcam_gpu.random_states import random_state, restore_random_state, same_state
from cfcam_gpu.targets import check_logits, margin_cotangent
from cfcam_gpu.weights import exact_grad_cam_plus_plus

try:
    import torchcam.methods as original
    from torchcam.methods.core import _CAM
    from torchcam.methods.gradient import _CAMWrapper
except ImportError as error:
    raise ImportError(needs("torch-cam 0.5 or later", "torchcam")) from error

from cfcam_gpu.adapters.torchcam_masked import (
    ISCAM,
    SSCAM,
    ScoreCAM,
)

# Private names of torch-cam 0.5 that have no public form: the classes _CAM and _CAMWrapper; of an extractor the methods
# _hook_a, _hook_g, _get_weights, _backprop, _normalize, and the attributes _hook_outputs, _hooks_enabled and _relu; of
# SmoothGradCAMpp _compute_smoothgrad_weights, _store_input, _input and _distrib, and of ScoreCAM what torchcam_masked
# overrides.


class _TrunkEnd(GraphRoot):
    """Where the graph starts; a backward that wants to go on from here must not end in silence."""

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "the layers before the CAM's target layer ran without autograd, so there is no gradient to send them: call"
            " the model with the extractor's hooks disabled (disable_hooks()), in train mode, or with an input that"
            " requires gradients"
        )


class _HeadOnly:
    """Mixin before a gradient extractor of torch-cam: graphs start at the target layers."""

    _fused = True
    _scope = None  # open while the model runs: autograd as the trunk needs it
    _pass_inputs = ()
    _tapped = False
    _grad_from_start = False

    def __init__(self, model, target_layer=None, input_shape=(3, 224, 224), **kwargs):
        super().__init__(model, target_layer, input_shape, **kwargs)
        self._watch_model()

    def _watch_model(self):
        # As torch-cam keeps the modules it found when it was made; looking for them in every pass would cost more.
        self._fused = is_fused(self.submodule_dict.values())
        # The hook that ends the pass comes before those of earlier extractors: scopes close in reverse order.
        self.hook_handles += [
            self.model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            self.model.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True, prepend=True),
        ]

    def _begin_pass(self, model, args, kwargs):
        if not self._hooks_enabled or torch.compiler.is_compiling():
            return
        self._close()
        self._pass_inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tracked = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        tracked = tracked and (model.training or any(tensor.requires_grad for tensor in self._pass_inputs))
        with ExitStack() as scope:
            scope.enter_context(eager_without_grad(fused=self._fused, nested=False))
            scope.enter_context(torch.set_grad_enabled(tracked or self._grad_from_start))
            self._tapped = False
            self._scope = scope.pop_all()

    def _end_pass(self, model, args, kwargs, output):
        if torch.compiler.is_compiling():
            return None
        # Autograd is off again where a no_grad or enable_grad block of the model's own encloses the layer: it has put
        # back what it found, and must find autograd on.
        switched_off = self._scope is not None and self._tapped and not torch.is_grad_enabled()
        try:
            if switched_off and output is not None and not self._grad_from_start and not model.training:
                self._grad_from_start = True
                self._begin_again()
                with torch.enable_grad():
                    return model.forward(*args, **kwargs)
        finally:
            self._close()

    def _begin_again(self):
        """Called before a pass is repeated."""

    def _close(self):
        scope, self._scope, self._pass_inputs = self._scope, None, ()
        if scope is not None:
            scope.close()

    def remove_hooks(self):
        """Take every hook off the model."""
        super().remove_hooks()
        self._close()

    def _hook_a(self, module, inputs, output, idx=0):
        super()._hook_a(module, inputs, output, idx)
        if self._hooks_enabled:
            self.hook_a[idx] = self.hook_a[idx].clone()

    def _hook_g(self, module, inputs, output, idx=0):
        if torch.compiler.is_compiling():
            return super()._hook_g(module, inputs, output, idx)
        in_pass = self._scope is not None
        if not (self._hooks_enabled and isinstance(output, torch.Tensor) and (in_pass or torch.is_grad_enabled())):
            return super()._hook_g(module, inputs, output, idx)
        foreign = self._pass_inputs if in_pass else inputs  # not ours to put into a graph
        with torch.enable_grad():
            # Only a tensor with a history of its own survives later in-place operations as a place in the graph.
            copied = output._is_view() or output.is_inference() or isinstance(output, nn.Parameter)
            copied = copied or any(output is tensor for tensor in foreign)
            tensor = output.clone() if copied else output
            if not tensor.requires_grad:
                tensor = _TrunkEnd.apply(torch.zeros((), requires_grad=True), tensor)
            self._hook_outputs[idx] = get_gradient_edge(tensor)
        self._tapped = True
        if in_pass:
            torch.set_grad_enabled(True)
        return None if tensor is output else tensor

    def _backprop(self, *args, **kwargs):
        with torch.inference_mode(False), torch.enable_grad():
            super()._backprop(*args, **kwargs)

    def compute_cams(self, class_idx=None, scores=None, normalized=True, *, targets=None, **kwargs):
        """The maps without the checks of the arguments, as in torch-cam; the sums by a kernel where it takes them."""
        if targets is not None:
            kwargs["targets"] = targets
        if not all(pipeline.takes_kernels(activations) for activations in self.hook_a):
            return super().compute_cams(class_idx, scores, normalized, **kwargs)
        return self._maps(self._get_weights(class_idx, scores, **kwargs), normalized, skip_nan=True)

    def _maps(self, weights, normalized, guides=None, **options):
        """torch-cam's maps, list of (N, h, w), for weights (N, C) or (N, C, h, w); computed in float32."""
        maps = []
        guides = guides or [None] * len(weights)
        with torch.no_grad():
            for activations, weight, guide in zip(self.hook_a, weights, guides):
                grid = pipeline.class_grid(activations, weight, self._relu, guide=guide, **options)
                maps.append((self._normalize(grid) if normalized else grid).to(activations.dtype))
        return maps


class GradCAM(_HeadOnly, original.GradCAM):
    """torch-cam's ``GradCAM``, with the same arguments, call and numbers, and no graph of the trunk."""


class XGradCAM(_HeadOnly, original.XGradCAM):
    """torch-cam's ``XGradCAM``, with the same arguments, call and numbers, and no graph of the trunk."""


class LayerCAM(_HeadOnly, original.LayerCAM):
    """torch-cam's ``LayerCAM``, with the same arguments, call and numbers, and no graph of the trunk."""


class GradCAMpp(_HeadOnly, original.GradCAMpp):
    """Grad-CAM++ by its definition, in torch-cam's contract; its numbers are not those of torch-cam's ``GradCAMpp``.

    The weight of channel k is sum_ij alpha_ij relu(g_ij) with alpha_ij = g_ij^2 / (2 g_ij^2 + g_ij^3 sum_ab A_ab)
    where g_ij is not 0, else 0. It is computed as 1 / (2 + g_ij sum_ab A_ab), which does not underflow.

    Known faults, not copied (torch-cam 0.5.0, ``GradCAMpp._get_weights``): alpha is divided as
    ``alpha[idx][mask].div_(...)``, which divides the copy that the boolean index makes, so the weights are
    sum_ij g_ij^2 relu(g_ij); and the denominator that is meant sums A_ab g_ab^3, not A_ab g_ij^3.

    Source: Chattopadhay et al., WACV 2018, equation 19.
    """

    def _get_weights(self, class_idx, scores, eps=0.0, **kwargs):
        """Weights (N, C) per layer; ``eps`` is added to the denominator 2 + g sum A."""
        self._backprop(scores, class_idx, **kwargs)
        return [exact_grad_cam_plus_plus(*layer, eps) for layer in zip(self.hook_a, self.hook_g)]


class CFCAM(Configured, GradCAM):
    """CF-CAM in torch-cam's contract: ``scores = model(images)``, then ``maps = cam(class_idx, scores)``.

    Args:
        model, target_layer, input_shape: as for torch-cam's extractors; of None the layer is found by a pass on zeros.
        guide_layer: as for `cfcam_gpu.CFCAM`.
        config, backend, clustering, check_finite: as for `cfcam_gpu.cf_cam`.
        kwargs: ``enable_hooks`` and ``reshape_transform``, as there.

    The call returns one (N, h, w) per layer, on the grid of the layer's guide (the layer's own where it has none), in
    the layer's dtype, from 0 to 1 as torch-cam scales ((x - min) / (max + 1e-8)) unless ``normalized=False``.
    Of scores (N, n) with n > 1, what is differentiated for ``class_idx`` is the margin (``config.margin_temperature``);
    ``targets`` are taken as they are.

    Raises:
        TypeError, ValueError: as torch-cam and `cfcam_gpu.cf_cam` raise them.

    >>> with CFCAM(model, ["layer3", "layer4"]) as cam:
    ...     scores = model(images)  # images (2, 3, 224, 224)
    ...     fused = cam.fuse_cams(cam(285, scores))
    >>> fused.shape
    torch.Size([2, 28, 28])
    """

    _guides = None
    _kept = None
    _guide_handles = ()

    def __init__(
        self,
        model,
        target_layer=None,
        input_shape=(3, 224, 224),
        *,
        guide_layer: GuideLayer = "auto",
        config: CFCAMConfig | None = None,
        backend: str = "auto",
        clustering: str = "auto",
        check_finite: bool | None = None,
        **kwargs,
    ):
        self._configure(config, backend, clustering, check_finite)
        super().__init__(model, target_layer, input_shape, **kwargs)
        # Copies, because the pass is the caller's and cannot be repeated.
        guides = make_guides(self.model, guide_layer, len(self.target_names), self._reshape_transform, copies=True)
        self._guides = guides if self.config.averages else None

    @property
    def guide_names(self):
        """The names of the target layers' guides, as `cfcam_gpu.CFCAM` has them."""
        return list(self.target_names) if self._guides is None else self._guides.names(self.target_names)

    def _begin_pass(self, model, args, kwargs):
        super()._begin_pass(model, args, kwargs)
        if self._guides is not None and self._scope is not None:
            self._let_go_of_guides()
            self._kept = self._guides.begin()
            self._guide_handles = self._kept.register(named_modules(model))

    def _begin_again(self):
        if self._guides is not None:
            self._let_go_of_guides()
            self._kept = self._guides.begin()
            self._guide_handles = self._kept.register(named_modules(self.model))

    def _end_pass(self, model, args, kwargs, output):
        try:
            return super()._end_pass(model, args, kwargs, output)
        finally:
            self._let_go_of_guides()

    def _let_go_of_guides(self):
        while self._guide_handles:
            self._guide_handles.pop().remove()

    def remove_hooks(self):
        """Take every hook off the model."""
        super().remove_hooks()
        self._let_go_of_guides()

    def _hook_g(self, module, inputs, output, idx=0):
        result = super()._hook_g(module, inputs, output, idx)
        if self._guides is not None and self._scope is not None:
            self._kept.at_target(idx)
        return result

    def _backprop(self, scores, class_idx, *args, targets=None, **kwargs):
        temperature = self.config.margin_temperature
        if targets is None and temperature > 0 and scores.ndim == 2 and scores.shape[1] > 1:
            check_logits(scores.detach())
            classes = torch.as_tensor(class_idx, device=scores.device).expand(len(scores))
            cotangent = margin_cotangent(scores.detach(), classes, temperature)
            with torch.inference_mode(False), torch.enable_grad():
                scores, class_idx = (scores * cotangent).sum(1, keepdim=True), 0
        with frozen_norms([scores]) if self.config.frozen_norms else nullcontext():
            super()._backprop(scores, class_idx, *args, targets=targets, **kwargs)

    def _get_weights(self, class_idx, scores, **kwargs):
        self._backprop(scores, class_idx, **kwargs)
        return [self._weights_of(*layer) for layer in zip(self.hook_a, self.hook_g)]

    def compute_cams(self, class_idx=None, scores=None, normalized=True, *, targets=None, **kwargs):
        """The maps without the checks of the arguments, as in torch-cam."""
        if targets is not None:
            kwargs["targets"] = targets
        weights = self._get_weights(class_idx, scores, **kwargs)
        guides = None
        if self._guides is not None:
            guides = list(map(self._kept.of, range(len(weights)), self.target_names, self.hook_a))
            if self._kept.must_repeat():
                LOG.warning("the guide layer found for other inputs does not fit these; the next pass finds another")
        return self._maps(weights, normalized, guides, **self._grid_options)


class _LibrarysGradCAMpp(_HeadOnly, original.GradCAMpp):
    """torch-cam's ``GradCAMpp`` with the numbers that it has, fault and all, for `accelerate`."""


_LibrarysGradCAMpp.__name__ = "GradCAMpp"  # which is part of an extractor's repr


class SmoothGradCAMpp(_HeadOnly, original.SmoothGradCAMpp):
    """torch-cam's ``SmoothGradCAMpp``, with the same arguments, call, noise and numbers.

    Several noisy copies go through the network together, up to 32 images (`perturbed.block_size`), and there is
    no graph of the trunk. One by one, by the library's own code, where a copy may depend on those before it: in train
    mode, and where the model draws random numbers; and where a layer's output is not a row, or several, for each image.
    """

    def _compute_smoothgrad_weights(self, class_idx, eps, **kwargs):
        one_by_one = partial(super()._compute_smoothgrad_weights, class_idx, eps, **kwargs)
        if not len(self._input) or any(module.training for module in self.model.modules()):
            return one_by_one()
        device, first = self._input.device, list(self.hook_a)
        before = random_state(device)
        together = max(1, block_size(self._input, 32) // len(self._input))
        try:
            with torch.inference_mode(False):
                weights = self._smoothed(class_idx, eps, together, **kwargs)
        except torch.OutOfMemoryError:
            if together == 1:
                raise
            weights = None
            LOG.warning("SmoothGradCAMpp: out of memory, going on with one noisy copy at a time")
        if weights is None:
            restore_random_state(device, before)
            self.hook_a = first
            return one_by_one()
        return weights

    def _smoothed(self, class_idx, eps, together, *, targets=None, **kwargs):
        """The weights of the layers; None where copies cannot go together."""
        images, first = self._input, list(self.hook_a)
        sums = [[torch.zeros_like(activations) for activations in first] for _ in range(2)]
        for start in range(0, self.num_samples, together):
            copies = min(together, self.num_samples - start)
            noisy = [images + self._distrib.sample(images.size()).to(device=images.device) for _ in range(copies)]
            drawn = random_state(images.device)
            scores = self.model(torch.cat(noisy))
            if not same_state(drawn, random_state(images.device)):
                return None
            of_copies = [each * copies if isinstance(each, list) else each for each in (class_idx, targets)]
            self._backprop(scores, of_copies[0], targets=of_copies[1], **kwargs)
            for index, activations in enumerate(first):
                if self.hook_g[index].shape != (copies * len(activations), *activations.shape[1:]):
                    return None
                for gradients in self.hook_g[index].split(len(activations)):
                    for power, total in zip((2, 3), sums):
                        total[index].add_(gradients.pow(power))
                # As after the last copy alone.
                self.hook_a[index] = self.hook_a[index][-len(activations) :]
                self.hook_g[index] = self.hook_g[index][-len(activations) :]
        weights = []
        for activations, gradients, squares, cubes in zip(first, self.hook_g, *sums):
            squares, cubes = squares.div_(self.num_samples), cubes.div_(self.num_samples)
            scale = (cubes * activations).flatten(2).sum(-1).view(*squares.shape[:2], *[1] * (squares.ndim - 2))
            alpha = squares / (2 * squares + scale + eps)
            weights.append((alpha * gradients.relu()).flatten(2).sum(-1))
        return weights


ACCELERATED = {
    original.GradCAM: GradCAM,
    original.GradCAMpp: _LibrarysGradCAMpp,
    original.SmoothGradCAMpp: SmoothGradCAMpp,
    original.XGradCAM: XGradCAM,
    original.LayerCAM: LayerCAM,
    original.ScoreCAM: ScoreCAM,
    original.SSCAM: SSCAM,
    original.ISCAM: ISCAM,
}
"""torch-cam's class -> ours."""

REASONS = {
    original.CAM: "it costs the forward pass alone",
    original.LeGrad: "it needs the gradients of the attention in every chosen block",
}
"""torch-cam's class -> why it is left alone."""


def accelerate(cam):
    """A torch-cam extractor, made faster in place: the same object with the same hooks, attributes and numbers.

    ``GradCAM``, ``GradCAMpp`` (the library's numbers; those of the definition are `GradCAMpp`'s), ``SmoothGradCAMpp``,
    ``XGradCAM``, ``LayerCAM``, ``ScoreCAM``, ``SSCAM`` and ``ISCAM`` become subclasses of their own, also as the
    ``base_cam`` of the wrappers ``RefineCAM`` and ``FinerCAM``. All other extractors are returned as they are, with a
    warning of the logger "cfcam_gpu" that says why.

    Raises:
        TypeError: ``cam`` is no extractor of torch-cam.
    """
    if type(cam) in ACCELERATED.values() or isinstance(cam, _HeadOnly):
        return cam
    if not isinstance(cam, (_CAM, _CAMWrapper)):
        raise TypeError(f"cam must be an extractor of torch-cam, got {type(cam).__name__}")
    if type(cam) in (original.RefineCAM, original.FinerCAM):
        cam.base_cam = accelerate(cam.base_cam)
        return cam
    reason = obstacle(cam, ACCELERATED, REASONS)
    if reason is not None:
        return left_as_it_is(cam, reason)
    faster = ACCELERATED[type(cam)]
    if not issubclass(faster, _HeadOnly):
        cam.__class__ = faster  # its hooks are the library's
        return cam
    hooked = bool(cam.hook_handles)
    cam.remove_hooks()
    cam.__class__ = faster
    if hooked:
        for hook in (cam._hook_a, cam._hook_g):
            for index, name in enumerate(cam.target_names):
                handle = cam.submodule_dict[name].register_forward_hook(partial(hook, idx=index))
                cam.hook_handles.append(handle)
        if isinstance(cam, SmoothGradCAMpp):
            cam.hook_handles.append(cam.model.register_forward_pre_hook(cam._store_input))
        cam._watch_model()
    return cam
