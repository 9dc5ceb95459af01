"""Compilers in a benchmark: they may fail, and they may take too long."""

import signal
import threading
import warnings
from contextlib import contextmanager

import torch

COMPILE_BUDGET_S = 300
"""Longest time of a first call, in which a network is compiled."""


class Unavailable(Exception):
    """What is asked for cannot run here; the message says why."""


def compiled(run, budget_s=COMPILE_BUDGET_S):
    """``run``, after a first call, in which it compiles; `Unavailable` where that fails or it runs uncompiled."""
    try:
        with _alarm(budget_s), warnings.catch_warnings():
            warnings.filterwarnings("error", ".* runs uncompiled: ")
            run()
        return run
    except Exception as error:  # tracing, dynamo, the C++ compiler and Triton raise what they like
        lines = str(error).strip().splitlines() or [""]
        if "_OutOfTime" in f"{type(error).__name__} {error}":
            lines = [f"it took more than {budget_s:g} s"]
        raise Unavailable(f"compilation failed: {lines[0] or type(error).__name__}") from error


def frozen(model):
    """The model's plain forward, compiled by `torch.compile` with the weights frozen: a function of its inputs."""
    from torch._inductor import config

    run = torch.compile(model, dynamic=False)

    def forward(*inputs):
        # Not as an option of torch.compile: dynamo looks at the switch before options act, hands the weights in as
        # inputs then, and nothing is frozen.
        with config.patch(freezing=True), torch.no_grad():
            return run(*inputs)

    return forward


class _OutOfTime(Exception):
    pass


@contextmanager
def _alarm(budget_s):
    """Raises `_OutOfTime` in the block when the time is over; outside the main thread, and on Windows, never."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum, frame):
        raise _OutOfTime("_OutOfTime")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, budget_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
