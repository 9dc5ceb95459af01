"""How the speed gates measure: two threads, variants interleaved in one run, and a ratio that must not be passed.

python -m pytest benchmarks                 # the gates
python -m pytest benchmarks --save-rows     # and a row of each in results/gates.jsonl
"""

import statistics

import pytest
import rows
import torch

from cfcam_gpu.bench import PACKAGES, timing


def pytest_addoption(parser):
    parser.addoption("--save-rows", action="store_true", help="append a row per gate to benchmarks/results/gates.jsonl")


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads for the length of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gate(benchmark, request):
    """``gate(function, baseline, rounds, at_most)``: fails when the medians' ratio is above ``at_most``.

    ``baseline`` runs once before each round of ``function``.
    """

    def run(function, baseline, rounds, at_most):
        baseline_seconds = []
        benchmark.pedantic(
            function,
            setup=lambda: baseline_seconds.append(timing.seconds(baseline, "cpu")),
            rounds=rounds,
            warmup_rounds=WARM_UP,
        )
        row = {
            "op": request.node.name,
            "median_ms": 1e3 * benchmark.stats.stats.median,
            "baseline_median_ms": 1e3 * statistics.median(baseline_seconds[WARM_UP:]),
            "limit": at_most,
            "rounds": rounds,
            "dtype": "float32",
        }
        row["ratio"] = row["median_ms"] / row["baseline_median_ms"]
        benchmark.extra_info.update(row)
        print(f"\n{row['median_ms']:.1f} ms against {row['baseline_median_ms']:.1f} ms: ratio {row['ratio']:.3f}")
        if request.config.getoption("--save-rows"):
            rows.write("gates", [{**row, **rows.about(*PACKAGES, device="cpu")}])
        assert row["ratio"] <= at_most

    return run


WARM_UP = 2
"""Rounds outside the clock."""
