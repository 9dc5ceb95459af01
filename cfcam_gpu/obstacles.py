"""What about a model keeps it from being explained as it is, said with the remedy where an error is raised anyway."""

from itertools import chain

import torch
from torch import nn

QUANTISED = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")


def why_not_run(model: nn.Module, name: str) -> str:
    """What to add to "target layer ... did not run": nothing, or that the model is a graph, and a layer that runs."""
    if not isinstance(model, torch.fx.GraphModule):
        return ""
    runs = [node.target for node in model.graph.nodes if node.op == "call_module"]
    inside = [each for each in runs if each.startswith(f"{name}.")]
    remedy = "take the module that it was made from"
    if inside:
        remedy += f", or a layer in it that runs, such as {inside[-1]!r}"
    return f"; {_type(model)} is a GraphModule, of torch.export or torch.fx, in which containers are empty: {remedy}"


def why_no_gradient(model: nn.Module) -> str:
    """What to add to an error about a gradient that is missing: nothing, or that a layer is quantised."""
    name = _quantised_layer(model)
    return "" if name is None else f"; layer {name!r} is quantised and has no gradient: explain the float model"


def why_failed(model: nn.Module, images: torch.Tensor, error: Exception) -> Exception | None:
    """The error to raise in the place of one that a forward or backward raised, where its cause is known."""
    said = (str(error).splitlines() or [""])[0]
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    on_meta = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if on_meta is not None and "meta" in said and not images.is_meta:
        return _without_weights(on_meta)
    sharded = next((name for name, tensor in tensors.items() if is_sharded(tensor)), None)
    if sharded is not None and "DTensor" in said:
        return ValueError(
            f"model must run on plain tensors, got {sharded!r} and perhaps others sharded (DTensor): call it as it is"
            f" trained, the same call on every rank, or gather the weights by full_tensor() ({said})"
        )
    if _quantised_layer(model) is not None and "quantized" in said.lower():
        return ValueError(f"model must be a float model{why_no_gradient(model)} ({said})")
    if not images.is_floating_point() and ("type" in said or "not implemented" in said):
        return TypeError(
            f"input_tensor must be what the model takes, and it failed on {images.dtype}; for a model of floating-point"
            f" images divide by 255 and normalise as it was trained"
        )
    return None


def without_values(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters or buffers of their own on the meta device, but for those that load them to run."""
    return [
        module for module in model.modules() if _own_on_meta(module) is not None and not hasattr(module, "_hf_hook")
    ]


def refuse_meta(module, inputs):
    """Forward pre-hook: some operators take weights on the meta device for memory, and compute with what is there."""
    name = _own_on_meta(module)
    if name is not None:
        raise _without_weights(f"{_type(module)}.{name}")


def _own_on_meta(module):
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return next((name for name, tensor in own if tensor.is_meta), None)


def _without_weights(name):
    return ValueError(
        f"model must have its weights, got {name!r} on the meta device, without values: load them first, as by"
        " model.to_empty(device=...) and load_state_dict(...)"
    )


def why_not_floating(tensor) -> str:
    """What to add to an error about a layer's output that is no floating-point tensor."""
    if isinstance(tensor, torch.Tensor) and str(tensor.dtype).removeprefix("torch.") in QUANTISED:
        return "; the layer is quantised and has no gradient: explain the float model"
    return ""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, which holds a part of the values; by name, as its module is slow to import."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def has_inference_weights(model: nn.Module) -> bool:
    """Whether a parameter or buffer was made under ``torch.inference_mode``: autograd refuses to save it."""
    return any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers()))


def _quantised_layer(model):
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            return name or _type(module)
    return None


def _type(value):
    return type(value).__name__
