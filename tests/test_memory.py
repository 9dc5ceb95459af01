"""Peak extra memory, measured in a fresh process: bounded per image in flight, whatever the size of the batch."""

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = r"""
import re, sys
import torch
sys.path.insert(0, {root!r})
from cfcam_gpu import cf_cam
# Not ru_maxrss: a child's starts at its parent's peak.
peak_mib = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
activations = torch.rand({batch}, 2048, 7, 7).sub_(0.5).relu_()
gradients = torch.randn({batch}, 2048, 7, 7)
cf_cam(activations[:1, :64], gradients[:1, :64], (8, 8), clustering={engine!r})  # code and thread pools
before = peak_mib()
cf_cam(activations, gradients, (8, 8), clustering={engine!r})
print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("engine, batch, limit_mib", [("auto", 1, 120), ("auto", 24, 120), ("batched", 1, 120)])
def test_peak_extra_memory(engine, batch, limit_mib):
    script = MEASURE.format(root=str(Path(__file__).resolve().parents[1]), batch=batch, engine=engine)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra_mib = float(result.stdout)
    print(f"{engine}, batch {batch}: {extra_mib:.0f} MiB")
    # The distances of 1536 channels alone are 4.5 MiB: less would mean that nothing was measured.
    assert 4 < extra_mib < limit_mib
