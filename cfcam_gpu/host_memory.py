"""The memory of a process that runs a network on a CPU again and again."""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Names of mallopt(3)'s parameters."""

OWN_WAY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Beginnings of the names of variables by which an environment says how memory is managed."""


def keep() -> bool:
    """Have this process keep what memory it frees, and use it again; its resident memory then stays at its peak.

    By default glibc hands large blocks back to the system, which gives them again page by page, each zeroed first. On a
    CPU that is half of the time in which a network of many large activations, as EfficientNet, explains a batch.

    Returns:
        Whether it does: False without glibc, and where the environment has a way of its own.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(OWN_WAY) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena for all threads, because those of their own are of 64 MB at most, and larger blocks again the system's.
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1)])
