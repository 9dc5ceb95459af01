"""`CFCAM(compile=True)`: times against the plain forward, eager and compiled, and against the other libraries.

    python benchmarks/compiled.py                  # a quarter of an hour on two cores, behind the compilation
    python benchmarks/compiled.py resnet50 --warm  # compiles alone, which fills Inductor's cache on the disk
    python benchmarks/compiled.py resnet50 --cache # what the cache saves: two processes, with an empty one before

The models have random weights and get noise, as in suite.py, but for EfficientNet-Lite0, which is pretrained. All ways
of a model and batch take turns. Results are compared before they are timed: compiled maps and labels with the eager
ones, float32, also where the network runs in bfloat16 (autocast). One row a way is appended to results/compiled.jsonl.

"forward:compile" is `torch.compile` with frozen weights, the floor of "cfcam:compile" but for what a map needs beside
the network. Of a ResNet-50 at batch 1 that is: the classifier's weights once more for the backward (8 MB, 0.4 ms at
20 GB/s), the distances of the clustered channels (512 x 511 / 2 pairs of 49 cells, 20 Mflop) and the likeness of the
guide's cells (196 x 196 x 1024, 53 Mflop of which two thirds are made), together below 1 ms on two cores: 1.02.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rows
import torch

from cfcam_gpu import CFCAM, bench, layers
from cfcam_gpu.bench import timing
from cfcam_gpu.bench.compiling import Unavailable, frozen
from cfcam_gpu.bench.providers import PROVIDERS
from cfcam_gpu.bench.run import reason_of

MODELS = {
    "resnet50": "ResNet-50",
    "demo": "EfficientNet-Lite0",
    "convnext_tiny": "ConvNeXt-Tiny",
    "vit_b_16": "ViT-B/16",
}

BATCHES = (1, 8)

PEERS = ("torch-cam", "captum", "pytorch-grad-cam")

ROUNDS, PEERS_ROUNDS = {1: 20, 8: 7}, {1: 6, 8: 3}
"""By batch; of what takes longer fewer."""


def _cam(subject, **options):
    """Of a copy of the model: the other libraries' hooks stay on theirs."""
    model = copy.deepcopy(subject.model)
    return CFCAM(model, [layers.get_layer(model, subject.layer_name)], subject.reshape_transform, **options)


def ways(subject, half):
    """{name: function}, and {name: object} of those that compile; with ``half`` also those with ":bfloat16", which run
    the network under autocast."""
    model, images, targets = subject.model, subject.images, subject.targets
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images_last = images.to(memory_format=torch.channels_last)
    compiled = frozen(copy.deepcopy(model))
    eager_cam, compiled_cam = _cam(subject), _cam(subject, compile=True)
    found = {
        "forward": lambda: model(images),
        "forward:channels_last": lambda: last(images_last),
        "forward:compile": lambda: compiled(images),
        "cfcam": lambda: eager_cam.explain(images, targets),
        "cfcam:compile": lambda: compiled_cam.explain(images, targets),
    }
    cams = {"cfcam:compile": compiled_cam}
    if half:
        found["forward:bfloat16"] = _in_bfloat16(found["forward"])
        found["forward:compile:bfloat16"] = _in_bfloat16(found["forward:compile"])
        # Of its own, whose first call compiles; an object compiles for a further kind of inputs in the second.
        cams["cfcam:compile:bfloat16"] = half_cam = _cam(subject, compile=True)
        found["cfcam:compile:bfloat16"] = _in_bfloat16(lambda: half_cam.explain(images, targets))
    found = {name: torch.no_grad()(way) for name, way in found.items()}
    for name in PEERS:
        try:
            found[name] = PROVIDERS[name].build(subject)
        except (ImportError, Unavailable) as error:
            print(f"{subject.name}, {name}: {reason_of(error)}", file=sys.stderr)
    return found, cams


def _in_bfloat16(way):
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return way()

    return run


def agreement(found, expected):
    """How far maps and labels are from the eager ones."""
    return {
        "max_difference": float((found.maps - expected.maps).abs().max()),
        "labels_differ": int((found.labels != expected.labels).sum()),
    }


def measured(subject, half, here, warm):
    """The rows of a model and batch."""
    (functions, cams), batch = ways(subject, half), len(subject.images)
    agreements = {}
    for name, function in functions.items():
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        if name == "cfcam":
            expected = result
        if name in cams:
            runs = cams[name].compiled[-1].runs
            agreements[name] = {**agreement(result, expected), "first_call_s": seconds, "runs": runs}
            print(subject.name, batch, name, agreements[name], file=sys.stderr)
    if warm:
        return
    counts = {name: (PEERS_ROUNDS if name in PEERS else ROUNDS)[batch] for name in functions}
    times = timing.interleaved(functions, "cpu", counts)
    unit = timing.quantiles_ms(times["forward"])["median_ms"]
    for name in functions:
        quantiles = timing.quantiles_ms(times[name])
        row = {"op": "end to end", "provider": name, "model": subject.name, "layer": subject.layer_name, "batch": batch}
        row |= {**quantiles, "rounds": counts[name], "ratio": quantiles["median_ms"] / unit, **agreements.get(name, {})}
        print(f"{subject.name} {batch} {name:26} {quantiles['median_ms']:8.1f} {row['ratio']:.3f}", file=sys.stderr)
        yield {**row, **here}


def cache(model, here):
    """Rows of the seconds of the first call in two processes, with the cache on the disk empty before the first."""
    script = (
        "import sys, time, compiled\n"
        "subject = compiled.bench.subject(sys.argv[1])\n"
        "cam = compiled._cam(subject, compile=True)\n"
        "start = time.perf_counter()\n"
        "cam.maps(subject.images)\n"
        "print(time.perf_counter() - start)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        for provider in ("empty cache", "second process"):
            command = [sys.executable, "-c", script, model]
            said = subprocess.run(
                command, env=environment, cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True
            )
            row = {"op": "first call", "provider": provider, "model": model, "batch": 1, "seconds": float(said.stdout)}
            print(row, file=sys.stderr)
            yield {**row, **here}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs="*", default=list(MODELS))
    add("--batch", type=int, nargs="*", default=BATCHES, choices=BATCHES)
    add("--bfloat16", action="store_true", help="also under autocast")
    add("--warm", action="store_true", help="compile, and measure nothing")
    add("--cache", action="store_true", help="the first call alone, in two processes")
    add("--threads", type=int, default=2)
    add("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    here = rows.about(*bench.PACKAGES, device="cpu")
    for model in args.models:
        if args.cache:
            rows.write("compiled", cache(model, here), args.out)
            continue
        subject = bench.subject(model)
        for batch in args.batch:
            rows.write("compiled", measured(subject.with_batch(batch), args.bfloat16, here, args.warm), args.out)


if __name__ == "__main__":
    main()
