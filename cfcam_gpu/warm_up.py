"""Which of several ways to the same result is the quickest here: measured, in turns, in a bounded time."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS, LEAST_ROUNDS, SECONDS = 7, 3, 4.0
"""Rounds in which the ways take turns; fewer, but not fewer than the second number, once they have taken that long."""

EAGER, COMPILED = "eager", "compiled"
"""The names of the usual two."""

MARGIN = 0.03
"""By what share of its time the first way must be beaten: less is within what two measurements differ by."""


def quickest(ways: Mapping[str, Callable[[], Any]], device: torch.device) -> tuple[str, dict[str, float]]:
    """The name of the quickest way, and {name: seconds}, medians.

    The first way is the usual one: another has to beat it by `MARGIN`.

    Args:
        ways: {name: function}; each is called once before the clock runs, and then in rounds, every other of which goes
            through them backwards, so that none always runs in another's wake.
        device: that is waited for.
    """
    times = medians(ways, device)
    usual, *others = times
    best = min(others, key=times.__getitem__, default=usual)
    return best if times[best] < (1 - MARGIN) * times[usual] else usual, times


def medians(ways: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """{name: seconds} of `quickest`."""
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    start, names = time.perf_counter(), list(ways)
    for index in range(ROUNDS):
        if index >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name in names[:: -1 if index % 2 else 1]:
            found[name].append(seconds(ways[name], device))
    return {name: statistics.median(of_way) for name, of_way in found.items()}


def seconds(function: Callable[[], Any], device: torch.device | str) -> float:
    """The time of one call, with nothing left to do on the device before and after."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
