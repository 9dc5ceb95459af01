"""Every kernel compiles for the targets that it is meant for, without a spill, on a machine that has none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = {
    "adjacency_kernel",
    "affinity_sum_kernel",
    "channel_statistics_kernel",
    "channel_weights_kernel",
    "connected_components_kernel",
    "dominant_channels_kernel",
    "gaussian_filter_kernel",
    "order_statistic_kernel",
    "pairwise_distances_kernel",
    "resize_normalize_kernel",
    "weighted_sum_kernel",
}
SHARED_BYTES = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The script's lines for every target, from two processes at once."""
    script, folder = Path(__file__).with_name("ahead_of_time.py"), tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    targets, running = list(SHARED_BYTES), []
    for start in (0, 1):
        with open(folder / f"{start}.out", "w") as out, open(folder / f"{start}.err", "w") as errors:
            command = [sys.executable, script, *targets[start::2]]
            running.append(subprocess.Popen(command, stdout=out, stderr=errors, env=environment))
    lines = []
    for start, process in enumerate(running):
        assert process.wait() == 0, (folder / f"{start}.err").read_text()[-3000:]
        lines += [json.loads(line) for line in (folder / f"{start}.out").read_text().splitlines()]
    return lines


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiles_without_a_spill(target, compiled):
    lines = [line for line in compiled if line["target"] == target]
    assert {line["kernel"] for line in lines} == KERNELS
    for line in lines:
        assert line["spilled"] == 0, line
        assert line["shared"] <= SHARED_BYTES[target], line
        print(line)
