"""The maps under other people's measures: Quantus, and captum's infidelity.

    pip install quantus
    python benchmarks/outsiders.py PHOTOS --limit 50

PHOTOS and the halves are those of faithfulness.py, the network is EfficientNet-Lite0 and the target its top class. The
measures are the libraries' own code, with their defaults but for `MEASURES` and `squares`, which say what is smaller
here so that a CPU can do it. Random numbers are the same for every method. One row a method is appended to
results/outsiders.jsonl, means with 95 % bootstrap intervals over the images; a row that is there is not made again.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import rows
import torch
from faithfulness import BATCH, METHODS, Subject, network, photographs, row_of
from tqdm import tqdm

from cfcam_gpu.layers import find_target_layer

NAMES = ("Grad-CAM", "Grad-CAM++", "LayerCAM", "CF-CAM", "random")
"""Of faithfulness.py's methods; the last shows which measures tell a map from noise."""

MEASURES = {
    "pixel_flipping": ("PixelFlipping", {"features_in_step": 224 * 16}),
    "selectivity": ("Selectivity", {"patch_size": 28}),
    "faithfulness_correlation": ("FaithfulnessCorrelation", {"nr_runs": 50, "return_aggregate": False}),
    "max_sensitivity": ("MaxSensitivity", {"nr_samples": 5}),
    "sparseness": ("Sparseness", {}),
}
"""{measure: Quantus's class, what is not its default}. A feature is one channel of a pixel, of 3 x 224 x 224: 42 steps
and 64 patches an image, each replaced by the image's smallest value."""

SQUARES = 20
"""Squares an image for the infidelity."""


def library():
    try:
        import quantus
    except ImportError as error:
        raise SystemExit("quantus is not installed, and no extra brings it: pip install quantus") from error
    return quantus


def maps_of(subject, method, images, classes):
    """(B, H, W), from one forward pass a batch."""
    (captured,) = subject.captured(method, images, classes[:, None])
    return captured.maps(method, images.shape[2:])


def squares(images):
    """A random square of each image, a quarter of its height wide, becomes the mean colour, which is zero.

    The first of the pair is what captum multiplies the map with. It is 1 in the square, as for attributions that
    contain the input: a class activation map says how much of the score a region holds, not its slope in the pixels.
    """
    n, _, height, width = images.shape
    side = height // 4

    def inside(size):
        start = torch.randint(size - side + 1, (n, 1))
        return (torch.arange(size) >= start) & (torch.arange(size) < start + side)

    removed = (inside(height)[:, None, :, None] & inside(width)[:, None, None, :]).expand_as(images).float()
    return removed, images * (1 - removed)


def measured(subject, method):
    """Per-image values of every measure, {name: (N,)}, and how many maps are zero."""
    from captum.metrics import infidelity

    quantus = library()
    images, classes = subject.images, subject.classes[:, 0]
    maps = maps_of(subject, method, images, classes)

    def explain(model, inputs, targets):
        return maps_of(subject, method, torch.as_tensor(inputs), torch.as_tensor(targets))[:, None].numpy()

    values = {}
    for name, (measure, options) in MEASURES.items():
        if name == "max_sensitivity" and method is METHODS["random"]:
            continue  # noise goes by the place in the batch, and Quantus asks again in other batches
        np.random.seed(0)
        # Copies, because Quantus writes into what it gets.
        arrays = (images.numpy().copy(), classes.numpy(), maps[:, None].numpy().copy())
        score = getattr(quantus, measure)(**options, disable_warnings=True)
        of_images = score(subject.answering, *arrays, explain_func=explain, batch_size=BATCH)
        values[name] = torch.as_tensor(np.array(of_images, dtype=np.float32))
    for curve in ("pixel_flipping", "selectivity"):
        # Quantus's own area calls np.trapz, which NumPy 2.4 has no more. Between 0 and 1, whatever the steps.
        values[curve] = torch.trapezoid(values[curve], dx=1 / (values[curve].shape[1] - 1))
    torch.manual_seed(0)
    values["infidelity"] = torch.cat(
        [
            infidelity(
                subject.answering,
                squares,
                x,
                of_x[:, None].expand_as(x),
                target=targets,
                n_perturb_samples=SQUARES,
                max_examples_per_batch=len(x),
                normalize=True,  # a map in [0, 1] has lost the score's scale
            )
            for x, of_x, targets in zip(images.split(BATCH), maps.split(BATCH), classes.split(BATCH))
        ]
    )
    return values, {"zero_maps": int(maps.flatten(1).any(1).logical_not().sum())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--half", choices=("choose", "confirm"), default="confirm")
    parser.add_argument("--limit", type=int, help="only this many photographs")
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)

    library()
    model, preprocess = network("demo")
    _, images, true_classes = photographs(args.photos, preprocess)
    layer_name, layer, _ = find_target_layer(model, images[:1])
    start = ("choose", "confirm").index(args.half)
    chosen = slice(start, None if args.limit is None else start + 2 * args.limit, 2)
    point = {"network": "demo", "layer": layer_name, "half": args.half}
    here = rows.about("cfcam_gpu", "quantus", "captum")
    of_point = lambda row: tuple(row[field] for field in (*point, "method"))
    done = {of_point(row) for row in rows.read(args.out / "outsiders.jsonl")}
    missing = [name for name in NAMES if args.again or (*point.values(), name) not in done]
    if not missing:
        return 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="quantus")
        subject = Subject(model, images[chosen], true_classes[chosen], layer)
        grad_cam = None
        for name in tqdm(dict.fromkeys(["Grad-CAM", *missing]), desc=f"demo, {layer_name}, {args.half}"):
            values, zero = measured(subject, METHODS[name])
            grad_cam = grad_cam or values
            if name in missing:
                row = {**point, "method": name, **row_of(values, zero, grad_cam), **here}
                rows.write("outsiders", [row], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
