"""What ``torch.compile`` is to leave alone: ``run(function, *arguments)``, in code that is being compiled, ends the
graph there, calls the function as it is, and begins another graph behind it.
"""

import torch

REASON = "a map needs hooks on the model and a backward pass of its own"


def __getattr__(name):
    # Made where it is first needed, by code that is being compiled: what makes it imports the compiler, which takes
    # seconds.
    if name != "run":
        raise AttributeError(name)
    globals()[name] = torch.compiler.disable(_run, reason=REASON)
    return globals()[name]


def _run(function, *args, **kwargs):
    return function(*args, **kwargs)
