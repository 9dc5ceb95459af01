"""What networks take on one core with images that are channels last, beside channels first.

    python benchmarks/memory_formats.py PHOTOS

Two classes of each photograph are explained, with maps that agree in both formats. One thread, as each part of a batch
has in `cfcam explain`; the clock is the processor's, and the formats are run in turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import rows
import torch

from cfcam_gpu import CFCAM, host_memory, images, models

MODELS = ("demo", "torchvision:resnet50:random", "torchvision:convnext_tiny:random")
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
BATCHES = (1, 8)
TOLERANCE = 1e-4


def measured(loaded, pixels, rounds):
    """Milliseconds of the processor an image, of a forward pass and of an explanation, and how far the maps differ."""
    cam, spent = CFCAM(loaded.model), {}
    given = {name: pixels.contiguous(memory_format=each) for name, each in FORMATS.items()}
    maps = [cam.explain(each, top=2).maps for each in given.values()]
    difference = float((maps[0] - maps[1]).abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(f"maps differ by {difference}")
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, each in given.items():
                for what, run in (("forward", loaded.model), ("explain", lambda images: cam.explain(images, top=2))):
                    begun = time.process_time()
                    run(each)
                    spent.setdefault(f"{what}_{name}_ms", []).append(1e3 * (time.process_time() - begun) / len(each))
    return {name: round(statistics.median(each[1:]), 2) for name, each in spent.items()} | {"difference": difference}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photographs")
    parser.add_argument("--models", nargs="*", default=MODELS, metavar="SPEC")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    host_memory.keep()
    about = rows.about("torchvision", device="cpu")
    for spec in args.models:
        torch.manual_seed(0)
        loaded = models.load_model(spec)
        paths = sorted(args.photos.iterdir())[: max(BATCHES)]
        pixels = torch.stack([loaded.preprocess(images.load_image(path)) for path in paths])
        for batch in BATCHES:
            found = measured(loaded, pixels[:batch], args.rounds)
            print(spec, batch, found, flush=True)
            row = {"op": "format", "way": spec, "photos": batch, "rounds": args.rounds}
            rows.write("datasets", [row | found | about], args.out)


if __name__ == "__main__":
    main()
