"""The command ``cfcam``: heat maps of photographs, speed, and what can run here.

Exit status: 0, done; 1, some images could not be read, the others are done; 2, refused, with the reason in one line.
"""

import argparse
import glob
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cfcam_gpu import CFCAM, CFCAMConfig, __version__, doctor, images, layers, models, pipeline
from cfcam_gpu.checks import needs

PANEL_PIXELS = 448
"""Height of the photograph and of each overlay in a picture."""

FAINT_DIFFERENCE = 0.05
"""The colours of --versus reach as far as the largest difference, but at least to this: equal maps would show their
rounding."""


class Source(NamedTuple):
    """One image to explain."""

    label: str
    load: Callable
    stem: str
    """Name of what is written for it, without the extension."""


class Batch(NamedTuple):
    """Images of one shape: the (B, 3, H, W) input, and what the network sees of each photograph."""

    sources: list
    seen: list
    inputs: torch.Tensor


class _Refused(Exception):
    """The arguments cannot be carried out: exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _Refused(f"{message} (see {self.prog} --help)")


def main(argv=None):
    """Run ``cfcam`` with these arguments (default: the command line's); returns the exit status."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except (_Refused, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"cfcam: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _parser():
    parser = _Parser(prog="cfcam", description="CF-CAM: where a network looked. Python API: import cfcam_gpu.")
    parser.add_argument("--version", action="version", version=f"cfcam_gpu {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="write a picture per image: the photograph beside the heat maps of its classes",
        description="Write OUT/NAME.png for every image: the photograph as the network saw it, and beside it the heat "
        "map of each class over it, with the class's name and softmax probability.",
    )
    add = explain.add_argument
    add("inputs", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="a folder gives its images, not its subfolders'")
    _add_options(explain, out="cfcam-out", versus=False)
    explain.set_defaults(run=lambda args: explain_images(args, find_sources(args.inputs)))

    demo = commands.add_parser(
        "demo",
        help="explain a photograph of a cat that comes with scikit-image",
        description="Explain scikit-image's photograph of the cat Chelsea: writes OUT/chelsea.png, without a download. "
        "The last panel is that of --versus, where there are two classes to compare.",
    )
    _add_options(demo, out="demo", versus=None)
    demo.set_defaults(run=lambda args: explain_images(args, [Source("chelsea", _chelsea, "chelsea")]))

    _add_bench(commands)

    about = "show which backends, clustering engines and packages can be used here, and why the others cannot"
    doctor_ = commands.add_parser("doctor", help=about, description=about)
    doctor_.set_defaults(run=lambda args: print(doctor.table(doctor.report())) or 0)
    return parser


def _add_options(parser, out, versus):
    add = parser.add_argument
    specs = (
        "demo (EfficientNet-Lite0, the default), torchvision:NAME, timm:NAME (pretrained; NAME:random or NAME:FILE.pth "
        "for other weights) or package.module:callable"
    )
    add("--model", default="demo", metavar="SPEC", help=specs)
    add("--out", default=out, type=Path, metavar="DIR", help="folder for the pictures (default: %(default)s)")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--top", type=_positive, default=2, metavar="N", help="explain the N classes of highest score (default: 2)")
    which("--classes", type=_indices, metavar="I,J,...", help="explain these class indices instead")
    add(
        "--versus",
        action=argparse.BooleanOptionalAction,
        help="add a panel with the first class's map minus the second's, red where the first is hotter and blue where "
        "the second is; its colours reach as far as the largest difference, which the caption gives",
    )
    parser.set_defaults(versus=versus)  # not above: the help of Python below 3.13 would add "(default: False)"
    add("--layer", metavar="NAME", help="target layer (default: the last one that keeps a map of the image)")
    add("--paper", action="store_true", help="the published procedure: softmax weights, division by the maximum")
    add("--backend", choices=pipeline.BACKENDS, default="auto", help="default: auto")
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--batch-size", type=_positive, default=16, metavar="N", help="images per forward pass (default: 16)")
    add("--colormap", default="inferno", metavar="NAME", help="any of matplotlib's, such as jet (default: inferno)")
    add(
        "--raw",
        action="store_true",
        help="also write OUT/NAME_CLASS.npy: each map as float32 (H, W) in [0, 1]; and with --versus OUT/NAME_I-J.npy: "
        "the map of class I minus that of class J, in [-1, 1]",
    )


def _add_bench(commands):
    bench = commands.add_parser(
        "bench",
        help="time this package, its peers and the plain forward side by side",
        description="Time this package in all its forms, pytorch-grad-cam, torch-cam, captum and the plain forward, in "
        "turns, on noise and random weights. Maps of one method are compared first: no agreement, no number.",
    )
    add = bench.add_argument
    add("--model", nargs="+", default=["resnet50"], metavar="NAME", help="torchvision's, or a SPEC as for explain")
    add("--batch", type=_batch_sizes, default=[1, 8], metavar="I,J,...", help="batch sizes (default: 1,8)")
    add("--size", type=_positive, default=224, metavar="N", help="images of N x N pixels (default: 224)")
    add(
        "--providers",
        type=lambda text: [part.strip() for part in text.split(",")],
        metavar="NAME,...",
        help="patterns of the names in the table, such as 'cfcam*,captum' (default: all but those that compile)",
    )
    add(
        "--time-limit",
        type=_seconds,
        default=6.0,
        metavar="S",
        help="seconds for the calls of one provider at one batch; what cannot make three is left out (default: 6)",
    )
    add("--rounds", type=_positive, default=30, metavar="N", help="most calls of a provider at one batch (default: 30)")
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--out", type=Path, metavar="FILE", help="also append the rows to this file, one line of JSON each")
    bench.set_defaults(run=run_bench)


def _positive(text):
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _indices(text):
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected class indices such as 285,282, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def _batch_sizes(text):
    sizes = {_positive(part.strip()) for part in text.split(",")}
    return sorted(sizes)


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def _device(text):
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda:0, got {text!r}") from error
    usable = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise argparse.ArgumentTypeError(f"{text!r} asked for, but {usable} CUDA devices are usable here")
    return device


def _chelsea():
    try:
        from skimage.data import chelsea
    except ImportError as error:
        raise ImportError(needs("scikit-image")) from error
    from PIL import Image

    return Image.fromarray(chelsea())


def find_sources(inputs):
    """The images that the arguments name, each once, with distinct names for what is written.

    A folder gives its own files with an image's extension, sorted; a pattern its matches, sorted; anything else is
    taken as a file and tried. Where two files have the same stem, the later ones are numbered: cat, cat-2.

    Raises:
        ValueError: a folder has no image, or a pattern matches no file.
    """
    paths = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            found = [file for file in files if file.suffix.lower() in images.EXTENSIONS]
            if not found:
                raise ValueError(f"no image in folder {text} (looked for {' '.join(images.EXTENSIONS)})")
        elif glob.has_magic(text) and not path.exists():
            found = sorted(file for file in map(Path, glob.glob(text, recursive=True)) if file.is_file())
            if not found:
                raise ValueError(f"no file matches {text}")
        else:
            found = [path]
        for file in found:
            paths.setdefault(file.resolve(), file)
    sources, taken = [], set()
    for file in paths.values():
        stem, number = file.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{file.stem}-{number}"
        taken.add(stem.casefold())
        sources.append(Source(str(file), lambda file=file: images.load_image(file), stem))
    return sources


def _tqdm():
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(needs("tqdm")) from error
    return tqdm


def _default_device(args):
    return args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_bench(args):
    """Print a table per model and batch; returns 0."""
    from cfcam_gpu import bench
    from cfcam_gpu.bench import rows

    tqdm, device = _tqdm(), _default_device(args)
    names = bench.select(args.providers or ["*"])
    skip = {} if args.providers else {name: "only when asked for" for name in names if name.endswith(":compile")}
    subjects = {name: bench.subject(name, size=args.size, device=device) for name in dict.fromkeys(args.model)}
    if args.out is not None:
        if args.out.is_dir():
            raise _Refused(f"--out must be a file, got the folder {args.out}")
        list(rows.append(args.out, []))  # what cannot be written is better known before the measurement
    here = rows.about(*bench.PACKAGES, device=device)
    with tqdm(total=len(subjects) * len(args.batch), unit="point", disable=None, file=sys.stderr) as bar:
        for name, subject in subjects.items():
            options = {
                "time_limit_s": args.time_limit,
                "rounds": args.rounds,
                "skip": skip,
                "progress": lambda text: bar.set_postfix_str(text, refresh=False),
            }
            for point in bench.sweep(subject, dict.fromkeys(args.batch, names), **options):
                first = point[0]
                if args.out is not None:
                    list(rows.append(args.out, ({**row, **here} for row in point)))
                layer = f"{first['layer']} ({' x '.join(map(str, first['shape'][1:]))})"
                bar.write(f"{name}, {layer}, batch {first['batch']}, {args.size} pixels, {here['device']}")
                bar.write(f"{bench.table(point)}\n")
                bar.update()
    return 0


def explain_images(args, sources):
    """Write the pictures of all sources; returns 0, or 1 when some could not be read."""
    tqdm = _tqdm()
    inputs = {Path(source.label).resolve() for source in sources}
    for source in sources:
        if _picture(args, source).resolve() in inputs:
            raise _Refused(f"--out {args.out} would overwrite the input {_picture(args, source)}")
    if args.out.exists() and not args.out.is_dir():
        raise _Refused(f"--out must be a folder, got the file {args.out}")
    images.get_colormap(args.colormap)
    versus = _versus(args)
    device = _default_device(args)
    pipeline.choose(args.backend, "auto", torch.empty(1, 1, 1, 1, device=device))
    loaded = models.load_model(args.model, device)
    if args.layer is not None:
        layers.get_layer(loaded.model, args.layer)
    args.out.mkdir(parents=True, exist_ok=True)

    failed, cam = [], None
    with tqdm(total=len(sources), unit="image", disable=None, file=sys.stderr) as bar:

        def report(error):
            failed.append(error)
            bar.write(f"cfcam: {' '.join(str(error).split())}", file=sys.stderr)
            bar.update()

        for batch in _batches(sources, loaded, args.batch_size, report):
            inputs = batch.inputs.to(device)
            if cam is None:
                target = layers.inspect_target_layer(loaded.model, inputs[:1], args.layer)
                bar.write(f"target layer: {target.name} ({' x '.join(map(str, target.shape))})")
                _check_classes(args, target.n_classes)
                config = CFCAMConfig.paper() if args.paper else None
                options = {"config": config, "backend": args.backend}
                cam = CFCAM(loaded.model, [target.module], target.reshape_transform, **options)
            announced = cam.guide_names is not None
            classes, scores, maps = _explain_batch(cam, inputs, args)
            if not announced and cam.guide_names != cam.target_names:
                bar.write(f"guide layer: {cam.guide_names[0]}")
            for source, seen, *result in zip(batch.sources, batch.seen, classes, scores, maps):
                names = [loaded.class_name(index, target.n_classes) for index in result[0]]
                captions = [f"{name} {score:.2f}" for name, score in zip(names, result[1])]
                caption = f"{names[0]}, not {names[1]}" if versus else None
                _write(args, source, seen, captions, result[0], result[2], caption)
                bar.write(f"{source.label} -> {_picture(args, source)}: {', '.join(captions)}")
                bar.update()
    return 1 if failed else 0


def _picture(args, source):
    return args.out / f"{source.stem}.png"


def _check_classes(args, n_classes):
    for index in args.classes or []:
        if index >= n_classes:
            raise _Refused(f"--classes must be in [0, {n_classes}) for {args.model}, got {index}")
    if args.classes is None and args.top > n_classes:
        raise _Refused(f"--top must be at most {n_classes} for {args.model}, got {args.top}")


def _versus(args):
    """Whether to compare the first two classes. ``args.versus`` of None: where there are two."""
    n_classes = len(args.classes) if args.classes else args.top
    if args.versus and n_classes < 2:
        given = f"--classes {args.classes[0]}" if args.classes else f"--top {args.top}"
        raise _Refused(f"--versus needs two classes or more, got {given}")
    return args.versus is not False and n_classes > 1


def _batches(sources, loaded, batch_size, report):
    """Batches of images that could be read; the others go to ``report``. A new shape begins a new batch."""
    group = []
    for source in sources:
        try:
            photograph = source.load()
        except (OSError, ValueError) as error:
            report(error)
            continue
        pixels = loaded.preprocess(photograph)
        if group and (len(group) == batch_size or pixels.shape != group[-1][2].shape):
            yield _batch(group)
            group = []
        group.append((source, loaded.seen(photograph), pixels))
    if group:
        yield _batch(group)


def _batch(group):
    sources, seen, pixels = zip(*group)
    return Batch(sources, seen, torch.stack(pixels))


def _explain_batch(cam, inputs, args):
    """Per image: its classes [K], their scores [K] and their maps (K, H, W), on the host."""
    targets = args.classes and [args.classes] * len(inputs)
    maps = cam.maps(inputs, targets, top=None if targets else args.top)
    scores = cam.outputs.float().softmax(1).gather(1, cam.classes)
    return cam.classes.tolist(), scores.tolist(), maps.float().cpu().numpy()


def _write(args, source, seen, captions, classes, maps, versus):
    """``versus`` is the caption of the panel that compares the first two classes; None for no such panel."""
    from PIL.Image import Resampling

    photograph = seen.resize((max(1, round(seen.width * PANEL_PIXELS / seen.height)), PANEL_PIXELS), Resampling.LANCZOS)
    panels = [photograph, *(images.overlay(photograph, heat, args.colormap) for heat in maps)]
    captions = [source.stem, *captions]
    raw = {str(index): heat for index, heat in zip(classes, maps)}
    if versus is not None:
        difference = maps[0] - maps[1]
        largest = np.abs(difference).max()
        # Maps of classes that are confused differ little: as it is, their difference would hardly show.
        panels.append(images.overlay_difference(photograph, difference / max(largest, FAINT_DIFFERENCE)))
        captions.append(f"{versus} \u00b1{largest:.2f}")
        raw[f"{classes[0]}-{classes[1]}"] = difference
    images.save_image(images.side_by_side(panels, captions), _picture(args, source))
    if args.raw:
        for name, values in raw.items():
            with images.atomic_write(args.out / f"{source.stem}_{name}.npy") as file:
                np.save(file, values)
