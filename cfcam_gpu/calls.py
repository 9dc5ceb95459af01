"""What belongs to one call: its hooks act in this call alone, and nothing is switched for other threads.

A model may be explained in several threads at once, beside plain inference on it. A hook on a module is seen by all of
them, so each hook asks whose forward pass it is in; and torch's switches are those that are a thread's own. Where torch
has none but the process's, the calls that want it are counted, and it is as before when the last of them ends.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules that without autograd take a fused path, which rounds differently."""


class Call:
    """A context manager: while it is open, this thread's forward passes and backwards belong to the call.

    It may be opened again, for another part of the call, and within another call.
    """

    _outer: "Call | None" = None

    def __enter__(self) -> "Call":
        self._outer, _HERE.call = _HERE.call, self
        return self

    def __exit__(self, *exception: object) -> None:
        _HERE.call, self._outer = self._outer, None

    @contextmanager
    def backward_from(self, root: torch.Tensor) -> Iterator[None]:
        """Makes the backward from ``root`` part of the call also in autograd's own threads, one for each accelerator.

        Checkpointing runs parts of the forward again there.
        """
        tasks: list[int] = []

        def begin(gradient):
            tasks.append(torch._C._current_graph_task_id())
            _BACKWARDS[tasks[-1]] = self

        handle = root.register_hook(begin)
        try:
            yield
        finally:
            handle.remove()
            for task in tasks:
                _BACKWARDS.pop(task, None)

    def only(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook`` as a hook of this call, which does nothing in any other forward pass."""

        def of_call(*args, **kwargs):
            # Nor in code that is being compiled: it would stay there.
            if torch.compiler.is_compiling() or _running() is not self:
                return None
            return hook(*args, **kwargs)

        vars(of_call)["call"] = self
        return of_call


def is_of_call(hook: Callable[..., Any]) -> bool:
    """Whether a hook on a module is of a call of this package, in any thread: made by `Call.only`."""
    return isinstance(getattr(hook, "call", None), Call)


class _Here(threading.local):
    """What is open in this thread."""

    call: Call | None = None


_HERE = _Here()

_BACKWARDS: dict[int, Call] = {}
"""Autograd's number of a backward -> the call that it belongs to, while it runs."""


def _running():
    call = _HERE.call
    return _BACKWARDS.get(torch._C._current_graph_task_id()) if call is None else call


class Counted:
    """A switch of the whole process, on as long as any call wants it; the last call puts back what the first found."""

    def __init__(self, switch: Callable[[], Callable[[], object]]) -> None:
        self._switch, self._lock, self._n_calls = switch, threading.Lock(), 0
        self._put_back: Callable[[], object] = lambda: None

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._lock:
            if not self._n_calls:
                self._put_back = self._switch()
            self._n_calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_calls -= 1
                if not self._n_calls:
                    self._put_back()


def _force_eager():
    stance = torch.compiler.set_stance("force_eager")
    stance.__enter__()
    return lambda: stance.__exit__(None, None, None)


def _unfuse():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


EAGER, UNFUSED = Counted(_force_eager), Counted(_unfuse)
"""Compiled code runs uncompiled; attention takes no fused path. Both are the whole process's."""


class _AsWithFunctions(TorchFunctionMode):
    """Changes nothing, but that it is there: attention takes no fused path for tensors with functions of their own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def is_fused(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules may take a fused path, which `eager_without_grad` is then to prevent."""
    return any(isinstance(module, FUSED) for module in modules)


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules may run compiled code, which passes hooks by."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules)


def eager_without_grad_in(model: nn.Module) -> AbstractContextManager[None]:
    """`eager_without_grad` for one pass of the model, with a look at its modules."""
    modules = list(model.modules())
    return eager_without_grad(fused=is_fused(modules), compiled=is_compiled(modules))


@contextmanager
def eager_without_grad(*, fused: bool = True, compiled: bool = True, nested: bool = True) -> Iterator[None]:
    """Autograd off, and every code path taken as if it were on and uncompiled; all as before afterwards.

    A context manager, for the part of a forward pass that lies before the target layers.

    Args:
        fused: prevent the fused attention, see `is_fused`.
        compiled: prevent compiled code, in every thread meanwhile, see `is_compiled`.
        nested: this ends before whatever context was entered before it does. Where hooks begin and end it that cannot
            be promised; then the attention is switched in every thread meanwhile.
    """
    with ExitStack() as stack:
        # A trunk that runs without autograd would leave weights without a graph in autocast's cache, which all threads
        # share; torch 2.6 would hand them to the caller's next training step.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if fused:
            stack.enter_context(_AsWithFunctions() if nested else UNFUSED.on())
        if compiled and "torch._dynamo" in sys.modules:
            # Code compiled before the hooks came would pass them by; code compiled now would keep them.
            stack.enter_context(EAGER.on())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
