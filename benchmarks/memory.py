"""The memory of a clip's map beside that of the plain forward pass, on torchvision's video networks.

    python benchmarks/memory.py

Each network is measured in a process of its own, whose allocator gives large tensors back to the system at once: the
peak of the resident set above what was resident before the call, after a warm-up on the same clip. One row a network is
appended to results/memory.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import rows
import torch
from torchvision.models import get_model

from cfcam_gpu import CFCAM, layers
from cfcam_gpu.bench import timing

CLIPS = {"r3d_18": (16, 112), "s3d": (16, 224), "swin3d_t": (16, 112), "mvit_v2_s": (16, 224)}
"""{network: (frames, height and width) of a clip}."""


def measured(name):
    """Peaks in MiB of the plain forward, of the map at a known layer, and of finding the layer."""
    torch.manual_seed(0)
    frames, side = CLIPS[name]
    model, clip = get_model(name, weights=None).eval(), torch.rand(1, 3, frames, side, side)

    @torch.no_grad()
    def forward():
        model(clip)

    cam = CFCAM(model)
    calls = {
        "forward": forward,
        "map": lambda: cam.maps(clip),
        "choice": lambda: layers.inspect_target_layer(model, clip),
    }
    for call in calls.values():
        call()
    return {f"{what}_mib": round(timing.peak_mib(call, "cpu"), 1) for what, call in calls.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="*", choices=CLIPS, default=list(CLIPS), help="default: all")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    parser.add_argument("--here", choices=CLIPS, help="measure this one in this process, and print it")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measured(args.here)))
        return 0
    here = rows.about("cfcam_gpu", "torchvision", device="cpu")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in args.network:
        command = [sys.executable, __file__, "--here", name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        frames, side = CLIPS[name]
        point = {"model": name, "clip": [frames, side, side], **json.loads(printed.splitlines()[-1])}
        print(point)
        rows.write("memory", [{**point, **here}], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
