"""The whole benchmark suite: every provider on a ResNet-50, its peers on seven models, throughput, and growth.

    python benchmarks/suite.py      # about three quarters of an hour on two cores
    python benchmarks/report.py     # the tables and plots of the pages

Rows are appended to results/bench.jsonl and results/growth.jsonl as they come. A point whose rows are there already,
from this device and commit, is not measured again: an interrupted run goes on where it was. What the clocks contain and
what is compared before, `cfcam_gpu.bench` says.
"""

import argparse
import time
from pathlib import Path

import growth
import rows
import torch
from tqdm import tqdm

from cfcam_gpu import bench

MAIN = ("forward", "cfcam", "pytorch-grad-cam", "pytorch-grad-cam:accelerated", "torch-cam", "captum")
"""The providers of every point; at `FULL` all are measured."""

FULL = {("resnet50", 1), ("resnet50", 8)}

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes, until the time or the memory is over."""


def plan():
    """(model, {batch: names}), the most important first: the ResNet-50, the others' latency, their throughput."""
    others = [model for model in bench.MODELS if model != "resnet50"]
    passes = [("resnet50", BATCHES)]
    passes += [(model, batches) for batches in (BATCHES[:1], BATCHES[1:]) for model in others]
    return [
        (model, {batch: list(bench.PROVIDERS if (model, batch) in FULL else MAIN) for batch in batches})
        for model, batches in passes
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=rows.RESULTS, help="folder of the rows")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--time-limit", type=float, default=6.0, help="seconds for the calls of one provider at one point")
    add("--deadline", type=float, default=float("inf"), help="seconds after which no further point is begun")
    add("--size", type=int, default=224, help="images of so many pixels squared")
    add("--models", nargs="*", default=list(bench.MODELS), help="of the plan's; none: growth alone")
    add("--no-growth", action="store_true")
    add("--again", action="store_true", help="measure points again whose rows are there")
    args = parser.parse_args(argv)

    here = rows.about(*bench.PACKAGES, device=args.device)
    end = time.monotonic() + args.deadline

    def earlier(name):
        here_and_now = [(field, here[field]) for field in ("device", "commit")]
        known = [] if args.again else rows.read(args.out / f"{name}.jsonl")
        return [row for row in known if all(row.get(field) == value for field, value in here_and_now)]

    passes = [(model, batches) for model, batches in plan() if model in args.models]
    growing = [] if args.no_growth else growth.points()
    with tqdm(total=sum(len(batches) for _, batches in passes) + len(growing), unit="point", disable=None) as bar:
        for model, batches in passes:
            known = [row for row in earlier("bench") if (row["model"], row["size"]) == (model, args.size)]
            done = {row["batch"] for row in known}
            bar.update(len(done & batches.keys()))
            todo = {batch: names for batch, names in batches.items() if batch not in done}
            if not todo or time.monotonic() > end:
                continue
            options = {
                "skip": bench.over_limit(known),
                "time_limit_s": args.time_limit,
                "progress": lambda text, model=model: bar.set_postfix_str(f"{model}: {text}", refresh=False),
            }
            try:
                subject = bench.subject(model, size=args.size, device=args.device)
            except (ImportError, OSError, ValueError) as error:
                bar.write(f"{model}: {error}")
                continue
            for point in bench.sweep(subject, todo, **options):
                rows.write("bench", ({**row, **here} for row in point), args.out)
                bar.write(f"{model}, batch {point[0]['batch']}, {here['device']}\n{bench.table(point)}\n")
                bar.update()
                if time.monotonic() > end:
                    break
        known = earlier("growth")
        done = {(row["along"], row["x"]) for row in known}
        slow = {(row["along"], row["provider"]): row.get("not_measured", "") for row in known}
        for along, x in growing:
            if (along, x) in done or time.monotonic() > end:
                bar.update((along, x) in done)
                continue
            bar.set_postfix_str(f"{along} {x}")
            skip = {
                way: reason for (of, way), reason in slow.items() if of == along and reason.startswith("time limit")
            }
            point = growth.measure(along, x, args.device, skip=skip)
            slow.update({(row["along"], row["provider"]): row.get("not_measured", "") for row in point})
            rows.write("growth", ({**row, **here} for row in point), args.out)
            bar.update()


if __name__ == "__main__":
    main()
