"""A network as two compiled programs: from inputs to outputs, activations and guides, and from the outputs' cotangents
to the gradients.

What torch's dispatcher sees of one pass of `HeadCapture`, forward and backward, is noted as one graph. It is cut where
the cotangents come in, and Inductor compiles both halves with the weights frozen: batch norms folded into convolutions,
weights repacked for the machine. The halves meet in an autograd function, so that any score can be differentiated.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten

from cfcam_gpu.head import why_not_replayed
from cfcam_gpu.pipeline import plain_arithmetic
from cfcam_gpu.targets import class_cotangents

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""By dtype, how far a program's results may be from those of the traced pass, as a share of their largest value. Beyond
rounding, even of many layers: a program that computes something else is to be found out."""


class NotCompiled(Exception):
    """Why there is no program: its message says it."""


class Traced(NamedTuple):
    """What a pass gives, detached."""

    outputs: list[torch.Tensor]
    activations: list[torch.Tensor]
    guides: list[torch.Tensor]
    gradients: list[torch.Tensor]
    """Of the activations, for the cotangents."""
    reached: list[tuple[bool, ...]]
    """Of each output, to which of the activations a gradient flows back from it; () of one without a gradient."""


class Program:
    """The compiled forward and backward of one pass, for inputs of one shape.

    Args:
        run: the pass, ``run(tensors, cotangents)``; of the cotangents there is one for each output.
        tensors: the inputs, on the model's device.
        outputs: of a pass with them.
        logits: the index of the output that class indices are meant for; None without one.
        margin_temperature: of the classes' scores, as for `HeadCapture`.

    Attributes:
        constants: the tensors of the model's that it has read.
        logits: as above, but None where no gradient flows back from it to one of the activations;
            `gradients_of_classes` is for programs that have it.
        seconds: that it took to make.

    Raises:
        NotCompiled: the pass is random, depends on values, or changes the model; or the compiler failed, or its
            programs give something else than the pass itself.
    """

    def __init__(
        self,
        run: Callable[[list[torch.Tensor], list[torch.Tensor]], Traced],
        tensors: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        logits: int | None = None,
        margin_temperature: float = 0.0,
    ) -> None:
        start = time.perf_counter()
        # Copies: tensors of torch.inference_mode become normal ones.
        tensors = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self._device = outputs[0].device
        cotangents = [_any_like(each) for each in outputs]
        graph, expected = _traced(run, tensors, cotangents)
        self._counts, self.reached = list(map(len, expected))[:3], expected.reached
        self.constants = [_constant(graph, node) for node in graph.graph.nodes if node.op == "get_attr"]
        forward, backward = _halves(graph, len(tensors), sum(self._counts))
        self._forward = compile_graph(forward, tensors)
        outputs, activations, guides, saved = self.forward(tensors)
        self._backward = compile_graph(backward, [*saved, *cotangents])
        gradients = self.backward(saved, cotangents)
        for name, found, wanted in zip(Traced._fields, (outputs, activations, guides, gradients), expected):
            compare(name, found, wanted)
        self.logits = None if logits is None or not (self.reached[logits] and all(self.reached[logits])) else logits
        if self.logits is not None:
            self._of_classes = self._compiled_of_classes(backward, saved, outputs, margin_temperature)
        self.seconds = time.perf_counter() - start

    def _compiled_of_classes(self, backward, saved, outputs, margin_temperature):
        """The backward from class indices: its cotangents are made in the same program."""
        logits, others = outputs[self.logits], [(each.shape, each.dtype) for each in outputs]

        def run(*given):
            *saved, logits, classes = given
            cotangents = [torch.zeros(shape, dtype=dtype, device=logits.device) for shape, dtype in others]
            cotangents[self.logits] = class_cotangents(logits, classes, margin_temperature)
            return backward(*saved, *cotangents)

        with plain_arithmetic(self._device):
            given = *saved, logits, logits.argmax(1)
            graph, expected = trace(run, given)
            program = compile_graph(graph, given)
            compare("gradients", program(*given), expected)
        return program

    def forward(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Outputs, activations, guides, and what `backward` needs."""
        with plain_arithmetic(self._device):
            found = iter(self._forward(*[tensor.detach().contiguous() for tensor in tensors]))
        outputs, activations, guides = ([next(found) for _ in range(count)] for count in self._counts)
        return outputs, activations, guides, list(found)

    def backward(self, saved: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The gradients of the activations, for a cotangent of each of the outputs."""
        with plain_arithmetic(self._device):
            return tuple(self._backward(*saved, *[each.contiguous() for each in cotangents]))

    def gradients_of_classes(
        self, saved: Sequence[torch.Tensor], logits: torch.Tensor, classes: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of the activations, of the scores of class indices (B,) in their range."""
        with plain_arithmetic(self._device):
            return tuple(self._of_classes(*saved, logits, classes))

    def differentiable(
        self,
        outputs: Sequence[torch.Tensor],
        activations: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of what `forward` gave: outputs with a graph, and the graph's leaves, which stand for the activations."""
        leaves = [each.detach().requires_grad_() for each in activations]
        with torch.enable_grad():
            return list(_Halves.apply(self, saved, outputs, *leaves)), leaves


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, program, saved, outputs, *leaves):
        ctx.program, ctx.saved = program, saved
        ctx.set_materialize_grads(False)
        # Not the tensors themselves: where they are among those that are saved, the graph would hold itself.
        ctx.like = found = tuple(each.detach() for each in outputs)
        ctx.mark_non_differentiable(*[each for each, reached in zip(found, program.reached) if not reached])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        of_leaves = [reached for reached, own in zip(ctx.program.reached, cotangents) if own is not None and reached]
        given = [torch.zeros_like(like) if own is None else own for own, like in zip(cotangents, ctx.like)]
        gradients = ctx.program.backward(ctx.saved, given)
        # None where no gradient flows, as autograd has it.
        return None, None, None, *[each if any(of) else None for each, of in zip(gradients, zip(*of_leaves))]


def _traced(run, tensors, cotangents):
    """The graph of a pass, and what it gave."""
    expected: list[Traced] = []

    def traced(tensors, cotangents):
        found = run([tensor.clone() for tensor in tensors], cotangents)  # the model may change its input
        expected.append(found)
        return tuple(found)[:4]

    graph, _ = trace(traced, (tensors, cotangents))
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            reason = why_not_replayed(node.target, *fx.map_arg((node.args, node.kwargs), _value))
            if reason is not None:
                raise NotCompiled(reason)
    return graph, expected[0]


def trace(run, given):
    """The graph of ``run(*given)``, and what it gave: a tuple of tensors, or of sequences of them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[Any] = []

    def noted(*given):
        found[:] = run(*given)
        return tuple(found)

    try:
        graph = make_fx(noted)(*given)
    except (NotCompiled, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # the pass went well before: it cannot be noted, as where it depends on values
        raise NotCompiled(_first_line(error)) from error
    return graph, found


def _value(node):
    return node.meta.get("val")


def _halves(graph, n_tensors, n_kept):
    """The graph cut in two: what does not depend on the cotangents, with what the other needs of it; and the rest."""
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    results = tree_flatten(nodes[-1].args[0])[0]
    behind = set(inputs[n_tensors:])
    constant: set[fx.Node] = set()
    for node in nodes:
        taken = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and taken and constant.issuperset(taken)):
            constant.add(node)
        elif node.op == "call_function" and not behind.isdisjoint(taken):
            behind.add(node)
        for changed in _changed(node):
            if changed in constant:
                raise NotCompiled(f"{node.target} changes a tensor of the model's")
            if node in behind and changed not in behind:
                raise NotCompiled(f"{node.target} of the backward changes what the forward made")
    inner = [node for node in behind if node.op == "call_function"]
    wanted = dict.fromkeys(taken for node in nodes if node in inner for taken in node.all_input_nodes)
    wanted.update(dict.fromkeys(results[n_kept:]))
    saved = [node for node in wanted if node not in behind and node not in constant]
    first = [node for node in nodes[:-1] if node not in behind]
    last = [node for node in nodes[:-1] if node in constant or node in inner]
    return (
        _part(graph, inputs[:n_tensors], first, [*results[:n_kept], *saved]),
        _part(graph, [*saved, *inputs[n_tensors:]], last, results[n_kept:]),
    )


def _part(graph, inputs, nodes, results):
    part, copies = fx.Graph(), {}
    for index, node in enumerate(inputs):
        copies[node] = part.placeholder(f"input_{index}")
    for node in nodes:
        if node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in results])
    part.eliminate_dead_code()
    return fx.GraphModule(graph, part)


def _changed(node):
    """The nodes whose tensors an operation changes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            found += [each for each in tree_flatten(given)[0] if isinstance(each, fx.Node)]
    return found


def compile_graph(graph, inputs):
    """Inductor's program of a graph, with its constants frozen, for inputs like these."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = {"freezing": True}
    if any(tensor.is_cuda for tensor in inputs):
        options.update(list_mode_options("max-autotune-no-cudagraphs"))
    try:
        with plain_arithmetic(inputs[0].device):  # what autocast does is in the graph
            return compile_fx(graph, list(inputs), config_patches=options)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler has many of its own, and without a C++ compiler it has none
        raise NotCompiled(f"Inductor failed: {_first_line(error)}") from error


def _any_like(tensor):
    """Normal numbers of its shape, dtype and device, the same every time; of a tensor of integers itself."""
    if not tensor.is_floating_point():
        return tensor.contiguous()
    generator = torch.Generator(tensor.device).manual_seed(0)
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)


def compare(name, results, expected):
    """Refuses a program whose results differ from those of the code that it stands for."""
    for one, other in zip(results, expected):
        if other.numel() == 0 or not other.is_floating_point():
            continue
        tolerance, one, other = TOLERANCES[other.dtype], one.double(), other.double()
        scale, error = other.abs().amax(), (one - other).abs().amax()
        if one.shape != other.shape or not error <= tolerance * scale:
            raise NotCompiled(
                f"the program's {name} differ from the network's by {float(error):.2g} of {float(scale):.2g}"
            )


def _constant(graph, node):
    found: Any = graph
    for name in node.target.split("."):
        found = getattr(found, name)
    return found


def _first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
