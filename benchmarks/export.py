"""Exported files: their size, and time to make and to load; their maps against `cam.maps`, and their speed.

    python benchmarks/export.py --build FOLDER      # exports the networks into FOLDER: minutes each
    python benchmarks/export.py --measure FOLDER    # measures what is there, each in a fresh process

The networks have random weights, the images are noise. In one run, in turns: the exported file, `cam.maps`, the same
with the clustering that is in the file, the plain forward, and the plain forward by ``torch.compile``. Differences are
against `cam.maps` with the engine for the CPU, of each map's maximum, for the top class and for the second, as a class
that is given.
One row a network is appended to results/export.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import rows
import torch

from cfcam_gpu import CFCAM, export, load
from cfcam_gpu.bench import subject, timing

NETWORKS = {
    "resnet50": "ResNet-50",
    "demo": "EfficientNet-Lite0",
    "convnext_tiny": "ConvNeXt-Tiny",
    "vit_b_16": "ViT-B/16",
}

PROVIDERS = {
    "file": "the file",
    "maps": "`cam.maps`",
    "batched": '`cam.maps`, `clustering="batched"`',
    "forward": "plain forward",
    "compiled": "forward, `torch.compile`",
}

BATCHES = (1, 3, 8)
"""At which the maps are compared."""

TIMED = (1, 8)
"""At which the time is taken."""

ROUNDS = 7


def build(name, folder):
    """Export one network; returns its size and what it took."""
    one = subject(name)
    before, start = _cpu_s(), time.perf_counter()
    path = export(one.model, one.images, [one.layer], folder / f"{name}.pt2", reshape_transform=one.reshape_transform)
    taken = {"export_cpu_s": round(_cpu_s() - before, 1), "export_wall_s": round(time.perf_counter() - start, 1)}
    return {"size_mb": round(path.stat().st_size / 1e6, 1), **taken}


def _cpu_s():
    """Seconds of all cores in this process and in those that it has waited for, compilers among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(name, folder):
    """Differences and times of one network's file."""
    start = time.perf_counter()
    loaded = load(folder / f"{name}.pt2")
    loaded_s = time.perf_counter() - start
    one = subject(name, batch=max(BATCHES))
    cam = CFCAM(one.model, [one.layer], one.reshape_transform)
    batched = CFCAM(one.model, [one.layer], one.reshape_transform, clustering="batched")
    compiled = torch.compile(one.model, dynamic=True)  # for any batch, as the file
    differences, times = {}, {}
    for batch in BATCHES:
        images = one.images[:batch]
        cam.maps(images, top=2)
        second = cam.classes[:, 1].tolist()
        differences[batch] = max(
            _difference(loaded.maps(images, targets), cam.maps(images, targets)) for targets in (second, None)
        )
        if not torch.equal(loaded.classes, cam.classes):
            raise AssertionError(f"{name}, batch {batch}: other classes")
    for batch in TIMED:
        images = one.images[:batch].contiguous()
        runs = {
            "file": lambda images=images: loaded.maps(images),
            "maps": lambda images=images: cam.maps(images),
            "batched": lambda images=images: batched.maps(images),
            "forward": lambda images=images: _forward(one.model, images),
            "compiled": lambda images=images: _forward(compiled, images),
        }
        for run in runs.values():
            run()
        found = timing.interleaved(runs, "cpu", dict.fromkeys(runs, ROUNDS))
        times[batch] = {provider: timing.quantiles_ms(each) for provider, each in found.items()}
    return {"load_s": round(loaded_s, 3), "differences": differences, "times": times}


@torch.no_grad()
def _forward(model, images):
    model(images)


def _difference(found, expected):
    """Of each expected map's maximum, the largest."""
    differences, largest = (each.abs().flatten(1).amax(1) for each in (found - expected, expected))
    if not largest.all():
        raise AssertionError("a map is zero, and compares nothing")
    return float((differences / largest).max())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--build", type=Path, metavar="FOLDER")
    which.add_argument("--measure", type=Path, metavar="FOLDER")
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    parser.add_argument("--here", action="store_true", help="one network, in this process, and print what was found")
    args = parser.parse_args(argv)
    folder, what = args.build or args.measure, build if args.build else measure
    folder.mkdir(parents=True, exist_ok=True)
    if args.here:
        print(json.dumps(what(args.network[0], folder)))
        return 0
    here = rows.about("cfcam_gpu", "torchvision", device="cpu")
    for name in args.network:
        options = ["--build" if args.build else "--measure", str(folder), "--here", "--network", name]
        printed = subprocess.run(
            [sys.executable, __file__, *options], capture_output=True, text=True, check=True
        ).stdout
        found = json.loads(printed.splitlines()[-1])
        print(name, found, flush=True)
        built = folder / f"{name}.json"  # what building took, until it is measured
        if args.build:
            built.write_text(json.dumps(found))
        else:
            point = {"model": name, "size": 224, **json.loads(built.read_text()), **found}
            rows.write("export", [{**point, **here}], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
