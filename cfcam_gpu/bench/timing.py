"""How times and memory are taken: on the host's clock with the device drained, interleaved; peaks of extra memory."""

import ctypes
import gc
import re
import statistics
from pathlib import Path

import torch

from cfcam_gpu.warm_up import seconds

MIN_ROUNDS = 3
"""Rounds below which no median is reported."""


def interleaved(functions, device, rounds, progress=None):
    """Seconds of every function's calls: {name: [...]}, from rounds in which they take turns.

    Args:
        functions: {name: function}.
        rounds: {name: number of calls}; those of fewer calls are spread evenly over the run.
        progress: called without arguments after every call.

    Every other round goes through the functions backwards, so that none always runs in another's wake.
    """
    times = {name: [] for name in functions}
    most = max(rounds.values())
    for index in range(most):
        for name in list(functions)[:: -1 if index % 2 else 1]:
            if (index + 1) * rounds[name] // most > index * rounds[name] // most:
                times[name].append(seconds(functions[name], device))
                if progress:
                    progress()
    return times


def quantiles_ms(times):
    """Median, 20th and 80th percentile in milliseconds, as a row has them."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": 1e3 * deciles[4], "p20_ms": 1e3 * deciles[1], "p80_ms": 1e3 * deciles[7]}


MEMORY = {
    "cpu": "peak of the resident set (VmHWM) above what was resident before the call",
    "cuda": "peak of torch.cuda.max_memory_allocated above what was allocated before the provider was made",
}
"""What ``peak_mib`` is, by type of device."""


def peak_mib(function, device, before=None):
    """The memory that one call takes at its peak, in MiB (`MEMORY`); None where it cannot be known.

    Args:
        before: bytes allocated on the device before whatever ``function`` holds on to was made. On the CPU, where
            memory comes and goes with everything else in the process, only the call itself counts.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device) if before is None else before
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but is still resident would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _status_mib("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    function()
    return _status_mib("VmHWM") - before


def _status_mib(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
