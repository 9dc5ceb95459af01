"""Compilers in a benchmark: they may fail, and they may take too long."""

import signal
import threading
import warnings
from contextlib import contextmanager

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
