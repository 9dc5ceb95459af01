"""Memory that a process keeps, told by the pages that it asks the system for again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SMALL_PAGES = {"NUMPY_MADVISE_HUGEPAGE": "0"}
"""As torch has them."""

FAULTS = """
import resource
import runpy
import sys
import threading
import numpy as np

keep = runpy.run_path("cfcam_gpu/host_memory.py")["keep"]  # without torch, which takes its time

faults = []

def use():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (1 << 23, 1 << 24, 1 << 25):  # 32 to 128 MB
            np.empty(size, np.float32).fill(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def in_a_thread():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()

kept = keep() if "keep" in sys.argv else None  # before there are threads, as in a server
in_a_thread()
print(kept, min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("own_way", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_is_kept_unless_the_environment_says_how(own_way):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    environment |= {**own_way, **SMALL_PAGES}

    def run(*argv):
        command = [sys.executable, "-c", FAULTS, *argv]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert ran.returncode == 0, ran.stderr
        kept, faults = ran.stdout.split()
        return kept, int(faults)

    (_, before), (kept, after) = run(), run("keep")
    assert before > 1000
    if own_way:
        assert kept == "False" and after > 1000
    else:
        assert kept == "True" and after < 0.05 * before
