"""Where the time of one ``cam.maps`` goes: stages, and the operators that cost most, into benchmarks/profile.md.

    python benchmarks/where_time_goes.py                  # the part of this device, between its markers
    python benchmarks/where_time_goes.py --device cuda

Stages are timed in turns; operators are torch.profiler's, by the time spent in them and not in what they call. What was
done about the costs stands in profile.md too, written by hand. (The file is not called profile.py because that would
take the place of the standard library's module of that name.)
"""

import argparse
from pathlib import Path

import report
import rows
import torch
from torch.profiler import ProfilerActivity, profile

from cfcam_gpu import CFCAM, bench, cf_cam, cluster_channels
from cfcam_gpu.bench import timing
from cfcam_gpu.capture import HeadCapture

PAGE = Path(__file__).parent / "profile.md"

N_OPERATORS = 6

CALLS = 5
"""Calls in a profile."""


def stages(subject, rounds):
    """[(stage, its milliseconds)] of one call; the forward and what each further step adds to it."""
    capture = HeadCapture(subject.model, [subject.layer], subject.reshape_transform)
    activations, gradients = subject.captured

    @torch.no_grad()
    def forward():
        subject.model(subject.images)

    runs = {
        "forward": forward,
        "captured": lambda: capture(subject.images, subject.targets),
        "clustering": lambda: cluster_channels(activations),
        "pipeline": lambda: cf_cam(activations, gradients, subject.output_size),
    }
    for run in runs.values():
        run()
    times = timing.interleaved(runs, subject.device, dict.fromkeys(runs, rounds))
    ms = {name: timing.quantiles_ms(of_run)["median_ms"] for name, of_run in times.items()}
    return [
        ("plain forward", ms["forward"]),
        ("capture: hooks, copies and the head's backward", ms["captured"] - ms["forward"]),
        ("clustering", ms["clustering"]),
        ("filter, weights, map, resize", ms["pipeline"] - ms["clustering"]),
    ]


def operators(subject):
    """[(operator, its own milliseconds in one call, calls)], the most expensive first."""
    cam = CFCAM(subject.model, [subject.layer], subject.reshape_transform)
    on_gpu = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(3):
        cam.maps(subject.images, subject.targets)
    with profile(activities=activities) as profiled:
        for _ in range(CALLS):
            cam.maps(subject.images, subject.targets)
        if on_gpu:
            torch.cuda.synchronize(subject.device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))
    return [(event.key, getattr(event, own) / CALLS / 1e3, event.count / CALLS) for event in events]


def section(subject, rounds):
    """The generated part of the page for one batch."""
    parts = stages(subject, rounds)
    total = sum(ms for _, ms in parts)
    found = operators(subject)
    whole = sum(ms for _, ms, _ in found)
    lines = [[name, report.number(ms), f"{ms / total:.1%}"] for name, ms in parts]
    costs = [
        [f"`{name}`", report.number(ms), f"{ms / whole:.1%}", f"{calls:g}"] for name, ms, calls in found[:N_OPERATORS]
    ]
    return "\n\n".join(
        [
            f"{subject.name}, batch {len(subject.images)}, {subject.images.shape[-1]} pixels:",
            report.markdown(["stage", "ms", "share"], lines),
            report.markdown(["operator", "own ms", "share", "calls"], costs),
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
    args.page.write_text(report.fill(text, kind, "\n\n".join([head, *parts]), args.page.name), encoding="utf-8")


if __name__ == "__main__":
    main()
