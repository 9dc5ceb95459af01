"""How the speed gates measure: two threads, and the variants interleaved in one run."""

import statistics
import time

import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads for the length of a test; imported by the files whose tests it is for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def interleaved(benchmark, function, baseline, rounds):
    """Median seconds of ``function`` and of ``baseline``, which runs once before each round of it."""
    baseline_seconds = []

    def before_each_round():
        start = time.perf_counter()
        baseline()
        baseline_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(function, setup=before_each_round, rounds=rounds, warmup_rounds=2)
    median, of_baseline = benchmark.stats.stats.median, statistics.median(baseline_seconds[2:])
    benchmark.extra_info.update(baseline_median_ms=1e3 * of_baseline, ratio=median / of_baseline)
    print(f"\n{1e3 * median:.1f} ms against {1e3 * of_baseline:.1f} ms: ratio {median / of_baseline:.3f}")
    return median, of_baseline
