"""Where the time of one ``cam.maps`` goes: stages, and the operators that cost most, into benchmarks/profile.md.

    python benchmarks/where_time_goes.py                  # the part of this device, between its markers
    python benchmarks/where_time_goes.py --device cuda

Stages are those of one call after the other; operators are torch.profiler's (on a GPU, its kernels), by the time spent
in them and not in what they call. What was done about the costs stands in profile.md too, written by hand. (The file
is not called profile.py because that would take the place of the standard library's module of that name.)
"""

import argparse
import time
from pathlib import Path

import rows
import tables
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cfcam_gpu import CFCAM, bench, cf_cam, cluster_channels
from cfcam_gpu.bench import timing

PAGE = Path(__file__).parent / "profile.md"

N_OPERATORS = 6

CALLS = 5
"""Calls in a profile."""

WARM_UP = 3
"""Calls that do not count."""


def stages(subject, rounds):
    """{stage: its median milliseconds} of one call, in order; they add up to it. On a GPU each ends with a wait."""
    capture = subject.capture()
    times = {}

    def lap(stage):
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
        now = time.perf_counter()
        times.setdefault(stage, []).append(now - lap.last)
        lap.last = now

    lap.last = time.perf_counter()
    hooks = [
        subject.layer.register_forward_hook(lambda *_: lap("forward up to the target layer")),
        subject.model.register_forward_hook(lambda *_: lap("forward behind it")),
    ]
    try:
        for _ in range(WARM_UP + rounds):
            lap("before")
            captured = capture(subject.images, subject.targets)
            lap("backward through the head, and the capture's own work")
            arguments = captured.activations[0], captured.gradients[0], subject.output_size
            cf_cam(*arguments, guide=captured.guides[0])
            lap("pipeline: clustering to map")
    finally:
        for hook in hooks:
            hook.remove()
    del times["before"]
    return {stage: timing.quantiles_ms(of_stage[WARM_UP:])["median_ms"] for stage, of_stage in times.items()}


def clustering_ms(subject, rounds):
    """Median milliseconds of the clustering alone."""
    activations, *_ = subject.captured
    runs = {"clustering": lambda: cluster_channels(activations)}
    times = timing.interleaved(runs, subject.device, {"clustering": WARM_UP + rounds})["clustering"]
    return timing.quantiles_ms(times[WARM_UP:])["median_ms"]


def operators(subject):
    """[(operator, its own milliseconds in one call, calls)], the most expensive first."""
    cam = CFCAM(subject.model, [subject.layer], subject.reshape_transform)
    on_gpu = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(WARM_UP):
        cam.maps(subject.images, subject.targets)
    with profile(activities=activities) as profiled:
        for _ in range(CALLS):
            cam.maps(subject.images, subject.targets)
        if on_gpu:
            torch.cuda.synchronize(subject.device)
    device_type, own = DeviceType.CPU, "self_cpu_time_total"
    if on_gpu:
        device_type, own = DeviceType.CUDA, "self_device_time_total"
    events = [event for event in profiled.key_averages() if event.device_type == device_type]
    events.sort(key=lambda event: -getattr(event, own))
    return [(event.key[:60], getattr(event, own) / CALLS / 1e3, event.count / CALLS) for event in events]


def section(subject, rounds):
    """The generated part of the page for one batch."""
    parts = stages(subject, rounds)
    total = sum(parts.values())
    found = operators(subject)
    whole = sum(ms for _, ms, _ in found)
    shown = {**parts, "(clustering alone)": clustering_ms(subject, rounds)}
    lines = [[name, tables.number(ms), f"{ms / total:.1%}"] for name, ms in shown.items()]
    costs = [
        [f"`{name}`", tables.number(ms), f"{ms / whole:.1%}", f"{calls:g}"] for name, ms, calls in found[:N_OPERATORS]
    ]
    return "\n\n".join(
        [
            f"{subject.name}, batch {len(subject.images)}, {subject.images.shape[-1]} pixels:",
            tables.markdown(["stage", "ms", "share"], lines),
            tables.markdown(["operator", "own ms", "share", "calls"], costs),
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    subject = bench.subject(args.model, size=args.size, device=args.device)
    here = rows.about("torchvision", device=args.device)
    head = f"{here['device']}, torch {here['torch']}, {here['date']}, commit {here['commit'] or 'unknown'}."
    parts = [section(subject.with_batch(batch), args.rounds) for batch in (1, 8)]
    text = args.page.read_text(encoding="utf-8")
    kind = here["device_type"]
    args.page.write_text(tables.fill(text, kind, "\n\n".join([head, *parts]), args.page.name), encoding="utf-8")


if __name__ == "__main__":
    main()
