"""The clustering engines on the same problems: ours, cuML's and scikit-learn's, C = 512 to 2048 at 7 x 7.

    python benchmarks/engines.py

Every engine that can run here is timed, interleaved, on the host clock with the device drained before and after: all of
stages 1 and 2, from activations on the device to labels on it. Labels are compared first: no agreement, no number. An
engine that cannot run here gets a row that says why, and no time.
"""

import argparse
from pathlib import Path

import growth
import rows
import torch

from cfcam_gpu import cluster_channels
from cfcam_gpu.bench import timing
from cfcam_gpu.clustering import ENGINES

DEFAULTS = ("batched", "host")
"""What "auto" takes, on a device and on a CPU."""


def measure(channels, batch, device, rounds):
    activations, _ = growth.problem((batch, channels, 7, 7), device)
    engines = {"auto": None, **{name: ENGINES[name].unavailable() for name in ENGINES if name not in DEFAULTS}}
    runs = {
        engine: lambda engine=engine: cluster_channels(activations, clustering=engine)[0]
        for engine, reason in engines.items()
        if reason is None
    }
    labels = [run() for run in runs.values()]  # and the warm-up
    assert all(torch.equal(labels[0], other) for other in labels), "the engines disagree"
    times = timing.interleaved(runs, device, dict.fromkeys(runs, rounds))
    for engine, reason in engines.items():
        row = {"op": "cluster_channels", "engine": engine, "shape": [batch, channels, 7, 7], "dtype": "float32"}
        if reason is None:
            row.update(timing.quantiles_ms(times[engine]))
        else:
            row.update(not_measured=str(reason))
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = rows.about("triton", "scikit-learn", "cuml-cu13")
    for channels in (512, 1024, 2048):
        for batch in (1, 8):
            points = ({**row, **here} for row in measure(channels, batch, device, args.rounds))
            for row in rows.write("engines", points, args.out):
                time_ms = f"{row['median_ms']:9.2f} ms" if "median_ms" in row else row["not_measured"]
                print(f"C = {channels:4d}, batch {batch}: {row['engine']:8s} {time_ms}")


if __name__ == "__main__":
    main()
