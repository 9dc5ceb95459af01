"""Every kernel compiles for the targets that it is meant for, without a spill, on a machine that has none of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SOURCES = Path(__file__).resolve().parents[1].joinpath("kernels").glob("*.py")
KERNELS = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
SHARED_BYTES = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


# All kernels for one target of each maker; for the other two of the one, those that may well differ between them.
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiles_without_a_spill(target):
    script = Path(__file__).with_name("ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--demanding"] if target in ("cuda:80", "cuda:100") else []
    command = [sys.executable, script, *options, target]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    compiled = {line["kernel"] for line in lines}
    assert compiled == KERNELS if not options else {"affinity_sum_kernel", "connected_components_kernel"} <= compiled
    for line in lines:
        assert line["target"] == target
        assert line["spilled"] == 0, line
        assert line["shared"] <= SHARED_BYTES[target], line
        # Else threads that hold the same sum may hold different bits of it, and any of them may be stored.
        assert line.get("fused_sums", 0) == 0, line
        print(line)
