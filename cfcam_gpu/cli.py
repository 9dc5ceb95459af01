"""The command ``cfcam``: heat maps of photographs, scans and videos, speed, and what can run here.

Exit status: 0, done; 1, some images could not be explained, the others are done; 2, refused, with the reason in one
line.
"""

import argparse
import glob
import hashlib
import json
import math
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cfcam_gpu import (
    CFCAM,
    CFCAMConfig,
    __version__,
    class_names,
    doctor,
    images,
    layers,
    models,
    pipeline,
    volume_preprocess,
    volumes,
)
from cfcam_gpu import probabilities as prob
from cfcam_gpu.checks import needs
from cfcam_gpu.methods import METHODS
from cfcam_gpu.outputs import find_logits

PANEL_PIXELS = 448
"""Height of the photograph and of each overlay in a picture."""

FAINT_DIFFERENCE = 0.05
"""The colours of --versus reach as far as the largest difference, but at least to this: equal maps would show their
rounding."""

FRAME_PIXELS = 288
"""Height of a frame and of each overlay in an animation."""

MONTAGE_PIXELS = 672
"""Height of the slices together in a picture of a scan."""

N_NOISE = 64
"""Voxels along each axis of the noise that a network of volumes is looked at with, where its size is not known."""

DEFAULT_BATCH = {2: 16, 3: 1}
"""Images, or volumes and videos, per forward pass."""

DEFAULT_TOP = 2
"""Classes that are explained of each image, of a model that has so many."""

GIVE_UP = 3
"""Images that the model fails on, before any has been explained, until it is the model's or the arguments' fault."""

LONGEST_SUFFIX = len("_100000-100000.nii.gz")
"""What may follow an image's name in a file's name."""


class Source(NamedTuple):
    """One image, scan or video to explain."""

    label: str
    load: Callable
    """What a network of ``n_axes`` takes: called with ``n_axes`` and the number of frames, returns a PIL image or a
    `volumes.Volume`."""
    stem: str
    """Name of what is written for it, without the extension."""


class Seen(NamedTuple):
    """A scan or a video, and what the network sees of it, (C, d, h, w)."""

    volume: volumes.Volume
    values: torch.Tensor


class Batch(NamedTuple):
    """Images of one shape: the (B, C, H, W) or (B, C, D, H, W) input, and what the network sees of each: a PIL image,
    or a `Seen`."""

    sources: tuple
    seen: tuple
    inputs: torch.Tensor

    def part(self, images):
        """The images of a slice."""
        return Batch(*(each[images] for each in self))


class _Refused(Exception):
    """The arguments cannot be carried out: exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _Refused(f"{message} (see {self.prog} --help)")


def main(argv=None):
    """Run ``cfcam`` with these arguments (default: the command line's); returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have characters that the terminal lacks
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
        help="write a picture per image, scan or video, with the heat maps of its classes beside it",
        description="Write OUT/NAME.png for every image: the photograph as the network saw it, and beside it the heat "
        "map of each class over it, with the class's name and probability. With a network of volumes: of a scan (.npy, "
        ".tif, .nii, .nii.gz) slices in one picture, and of NIfTI each map as OUT/NAME_CLASS.nii.gz; of a video an "
        "animation, OUT/NAME.webp.",
    )
    add = explain.add_argument
    inputs = "a folder gives what the network takes of its files, not of its subfolders'"
    add("inputs", nargs="+", metavar="IMAGE|FOLDER|GLOB", help=inputs)
    frames = "frames of a video, evenly spread (default: as many as the model says, else 16)"
    add("--frames", type=_positive, metavar="N", help=frames)
    _add_options(explain, out="cfcam-out", versus=False)
    explain.set_defaults(run=lambda args: explain_images(args, lambda n_axes: find_sources(args.inputs, n_axes)))

    demo = commands.add_parser(
        "demo",
        help="explain a photograph of a cat that comes with scikit-image",
        description="Explain scikit-image's photograph of the cat Chelsea: writes OUT/chelsea.png, without a download. "
        "The last panel is that of --versus, where there are two classes to compare.",
    )
    _add_options(demo, out="demo", versus=None)
    demo.set_defaults(run=lambda args: explain_images(args, lambda n_axes: [_chelsea()]), frames=None)

    _add_layers(commands)
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
    which("--top", type=_positive, metavar="N", help="explain the N classes of highest score (default: 2)")
    which("--classes", type=_indices, metavar="I,J,...", help="explain these class indices instead")
    add(
        "--versus",
        action=argparse.BooleanOptionalAction,
        help="add a panel with the first class's map minus the second's, red where the first is hotter and blue where "
        "the second is; its colours reach as far as the largest difference, which the caption gives",
    )
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names: a text file with one on each line, or JSON: a list, a dictionary by index, or a config.json "
        "with id2label (default: the model's own)",
    )
    add(
        "--multilabel",
        action="store_true",
        help="labels that do not exclude each other: probabilities by sigmoid, each label explained by its own logit "
        "(default: where the model says so, by its config or by ending in a sigmoid)",
    )
    parser.set_defaults(versus=versus)  # not above: the help of Python below 3.13 would add "(default: False)"
    add("--layer", metavar="NAME", help="target layer (default: the last one that keeps a map of the image)")
    add("--method", choices=list(METHODS), default="cfcam", help="default: cfcam")
    add(
        "--paper",
        action="store_true",
        help="the published procedure of cfcam: softmax weights, division by the maximum",
    )
    add("--backend", choices=pipeline.BACKENDS, default="auto", help="default: auto")
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--batch-size", type=_positive, metavar="N", help="images per forward pass (default: 16, of volumes 1)")
    add("--colormap", default="inferno", metavar="NAME", help="any of matplotlib's, such as jet (default: inferno)")
    add(
        "--raw",
        action="store_true",
        help="also write OUT/NAME_CLASS.npy: each map as float32 (H, W) in [0, 1], of a scan (D, H, W); and with "
        "--versus OUT/NAME_I-J.npy: the map of class I minus that of class J, in [-1, 1]",
    )


def _add_layers(commands):
    parser = commands.add_parser(
        "layers",
        help="list a model's layers: their grids and channels, and why each is or is not the default target",
        description="List the layers that run, in their order, with the grid and the channels of their maps and why "
        "each is or is not the default target layer, which has an arrow. One pass on a picture, or a volume, of noise.",
    )
    add = parser.add_argument
    add(
        "model", nargs="?", default="demo", metavar="MODEL", help="a SPEC as explain's --model takes it (default: demo)"
    )
    size = "a picture of N x N pixels, of a network of volumes slices (default: the model's own)"
    add("--size", type=_positive, metavar="N", help=size)
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--json", action="store_true", help="a list of records instead of a table")
    parser.set_defaults(run=list_layers)


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
    usable = _devices()
    if text not in usable:
        raise argparse.ArgumentTypeError(f"expected a device that is here ({', '.join(usable)}), got {text!r}")
    return torch.device(text)


def _devices():
    """The names of the devices that torch can use here."""
    names = ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        names += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    return names


def _chelsea():
    try:
        from skimage.data import chelsea
    except ImportError as error:
        raise ImportError(needs("scikit-image")) from error
    from PIL import Image

    photograph = Image.fromarray(chelsea())
    load = lambda n_axes, n_frames: volumes.check_takes_images("chelsea", photograph, n_axes)
    return Source("chelsea", load, "chelsea")


def find_sources(inputs, n_axes=2):
    """The images that the arguments name, each once, with distinct names for what is written.

    A folder gives its own files with an image's extension, sorted, or for a network of volumes (``n_axes`` of 3) with a
    scan's or a video's; for None with any of these. A pattern gives its matches, sorted; anything else is taken as a
    file and tried. Where two files have the same stem, the later ones are numbered: cat, cat-2.

    Raises:
        ValueError: a folder has no image, or a pattern matches no file.
    """
    extensions = {2: images.EXTENSIONS, 3: volumes.EXTENSIONS, None: (*images.EXTENSIONS, *volumes.EXTENSIONS)}[n_axes]
    paths = {}
    for text in inputs:
        # Of os.path, because Path's methods raise for a name that is too long.
        if os.path.isdir(text):
            found = [file for file in sorted(Path(text).iterdir()) if volumes.extension(file) in extensions]
            found = [file for file in found if os.path.isfile(file)]
            if not found:
                what = "volume or video" if n_axes == 3 else "image"
                raise ValueError(f"no {what} in folder {text} (looked for {' '.join(extensions)})")
        elif glob.has_magic(text) and not os.path.exists(text):
            found = [Path(file) for file in sorted(glob.glob(text, recursive=True)) if os.path.isfile(file)]
            if not found:
                raise ValueError(f"no file matches {text}")
        else:
            found = [Path(text)]
        for file in found:
            paths.setdefault(os.path.realpath(file), file)
    sources, taken = [], set()
    for file in paths.values():
        stem, number = volumes.stem(file), 1
        while _same_name(stem) in taken:
            number += 1
            stem = f"{volumes.stem(file)}-{number}"
        taken.add(_same_name(stem))
        load = lambda n_axes, n_frames, file=file: volumes.load(file, n_axes, n_frames)
        sources.append(Source(str(file), load, stem))
    return sources


def _same_name(stem):
    """Equal for names that a file system may take for one: they differ in case, or in how accents are composed."""
    return unicodedata.normalize("NFC", stem).casefold()


def _shorten(sources, folder):
    """The sources with names that fit in the folder: of one that is too long the beginning and a hash of it all."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        longest = os.pathconf(there, "PC_NAME_MAX") - LONGEST_SUFFIX
    except (AttributeError, OSError, ValueError):  # not on Windows
        longest = 255 - LONGEST_SUFFIX
    return [source._replace(stem=_shortened(source.stem, longest)) for source in sources]


def _shortened(stem, longest):
    name = os.fsencode(stem)
    if len(name) <= longest:
        return stem
    tail = f"-{hashlib.sha256(name).hexdigest()[:12]}"
    return name[: longest - len(tail)].decode("utf-8", "ignore") + tail


def _tqdm():
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(needs("tqdm")) from error
    return tqdm


def _default_device(args):
    return args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def list_layers(args):
    """Print the layers of a model; returns 0."""
    loaded = models.load_model(args.model, device=_default_device(args))
    image = (_noise(args, loaded) if loaded.n_axes == 2 else _noise_of_volume(args, loaded)).to(_default_device(args))
    found = layers.candidate_layers(loaded.model, image)
    if args.json:
        print(json.dumps([layer._asdict() for layer in found], indent=1))
        return 0
    rows = [("", "layer", "type", "grid", "channels", "")]
    for layer in found:
        grid = "x".join(map(str, layer.grid)) if layer.grid else "-"
        rows.append(
            ("->" if layer.chosen else "", layer.name, layer.type, grid, str(layer.channels or "-"), layer.reason)
        )
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    for *cells, reason in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths)), reason]).rstrip())
    return 0


def _noise(args, loaded):
    """What the network takes of a picture of noise."""
    from PIL import Image

    size = args.size or 256
    image = loaded.preprocess(Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)))
    if args.size is None:
        return image[None]
    return torch.nn.functional.interpolate(image[None], (args.size, args.size), mode="bilinear")


def _noise_of_volume(args, loaded):
    """What the network takes of a scan of noise, or of a video where it takes three channels."""
    channels, size = volume_preprocess.n_channels_of(loaded.model) or 1, args.size or N_NOISE
    generator = torch.Generator().manual_seed(0)
    if channels == 3:
        noise = torch.randint(256, (3, loaded.frames, size, size), generator=generator, dtype=torch.uint8)
    else:
        noise = torch.rand(channels, size, size, size, generator=generator)
    volume = loaded.preprocess(noise)[None]
    if args.size is None:
        return volume
    return torch.nn.functional.interpolate(volume, (volume.shape[2], args.size, args.size), mode="trilinear")


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


def explain_images(args, find):
    """Write the pictures of all sources; returns 0, or 1 when some could not be explained, which are listed at the end.

    What fails on the first images, whichever they are, fails because of the model or the arguments, and is raised.

    Args:
        find: gives the sources for a network of ``n_axes``, None while that is not known.
    """
    tqdm = _tqdm()
    find(None)  # what is not there is better known before a model is loaded
    if args.out.exists() and not args.out.is_dir():
        raise _Refused(f"--out must be a folder, got the file {args.out}")
    if args.paper and args.method != "cfcam":
        raise _Refused(f"--paper is a procedure of --method cfcam, got --method {args.method}")
    images.get_colormap(args.colormap)
    _versus(args, args.top or DEFAULT_TOP)
    names = None if args.labels is None else class_names.class_names(args.labels)
    device = _default_device(args)
    pipeline.choose(args.backend, "auto", torch.empty(1, 1, 1, 1, device=device))
    loaded = models.load_model(args.model, device)
    if args.labels is not None:
        loaded = replace(loaded, class_names=names)
    if args.layer is not None:
        layers.get_layer(loaded.model, args.layer)
    sources = find(loaded.n_axes)
    inputs = {os.path.realpath(source.label) for source in sources}
    sources = _shorten(sources, args.out)
    for source in sources:
        picture = args.out / f"{source.stem}.png"
        if os.path.realpath(picture) in inputs:
            raise _Refused(f"--out {args.out} would overwrite the input {picture}")
    args.out.mkdir(parents=True, exist_ok=True)

    with tqdm(total=len(sources), unit="image", disable=None, file=sys.stderr) as bar, warnings.catch_warnings():
        run = _Run(args, loaded, bar, inputs)
        warnings.showwarning = run.warn
        try:
            for batch in _batches(sources, run):
                run.explain(batch._replace(inputs=batch.inputs.to(device)))
            run.check()
        finally:
            run.list_left_out()
    return 1 if run.lost else 0


class _Run:
    """The images of one command, one batch after the other."""

    def __init__(self, args, loaded, bar, inputs):
        self.args, self.loaded, self.bar, self.inputs = args, loaded, bar, inputs
        self.cam = None
        self.explained = 0
        self.lost = []
        """(reason, error) of each image that was left out; the error is None where its file is what is wrong."""

    def warn(self, message, category, filename, lineno, file=None, line=None):
        text = " ".join(str(message).split())
        if not issubclass(category, UserWarning):
            text = f"{filename}:{lineno}: {category.__name__}: {text}"
        self.bar.write(f"cfcam: warning: {text}", file=sys.stderr)

    def left_out(self, reason, error=None):
        self.lost.append((reason, error))
        self.bar.update()

    def failed(self, source, error):
        """The model, or its preprocess, failed on an image."""
        self.left_out(f"{source.label}: {_reason(error)}", error)
        if len([error for _, error in self.lost if error is not None]) >= GIVE_UP:
            self.check()

    def check(self):
        """Raise the first error if the model has explained nothing."""
        errors = [error for _, error in self.lost if error is not None]
        if errors and not self.explained:
            raise _Refused(_reason(errors[0])) from errors[0]

    def list_left_out(self):
        for reason, error in self.lost:
            if error is None or self.explained:
                self.bar.write(f"cfcam: {reason}", file=sys.stderr)

    def explain(self, batch):
        """Write the pictures of a batch; where one image fails, of the others."""
        while self.cam is None:
            if not batch.sources:
                return
            try:
                self.prepare(batch.inputs[:1])
            except _Refused:
                raise
            except Exception as error:  # of the user's network
                self.failed(batch.sources[0], error)
                batch = batch.part(slice(1, None))
        to_find = isinstance(self.cam, CFCAM) and self.cam.guide_names is None
        try:
            classes, scores, maps = _explain_batch(self, batch.inputs)
        except Exception as error:
            if len(batch.sources) == 1:
                return self.failed(batch.sources[0], error)
            for image in range(len(batch.sources)):
                self.explain(batch.part(slice(image, image + 1)))
            return
        if to_find and self.cam.guide_names != self.cam.target_names:
            self.bar.write(f"guide layer: {self.cam.guide_names[0]}")
        for source, seen, *result in zip(batch.sources, batch.seen, classes, scores, maps):
            try:
                picture, said = self.write(source, seen, *result)
            except Exception as error:  # what cannot be written, or the user's own `seen`
                self.failed(source, error)
                continue
            self.explained += 1
            self.bar.write(f"{source.label} -> {picture}: {said}")
            self.bar.update()

    def prepare(self, image):
        """Look at the model with a first image (1, C, H, W): its layer, and what its outputs are."""
        args, model = self.args, self.loaded.model
        with prob.looking(model) as ending:
            try:
                target = layers.inspect_target_layer(model, image, args.layer)
            except ValueError:
                if ending.name is None:
                    raise
        if ending.name is not None:
            # The layer too is chosen by the logits: behind a saturated softmax there is no gradient.
            handle = prob.give_logits(model, ending.name)
            try:
                target = layers.inspect_target_layer(model, image, args.layer)
            except Exception:
                handle.remove()
                raise
            self.bar.write(f"outputs: probabilities, by a {ending.name} of the model's own")
        n_classes = target.n_classes
        _check_classes(args, n_classes)
        self.top = args.top or min(DEFAULT_TOP, n_classes)
        self.versus = n_classes > 1 and _versus(args, self.top)
        if args.versus and n_classes == 1:
            raise _Refused(f"--versus needs two classes or more, {args.model} has one output")
        names = self.loaded.class_names
        if names and not class_names.fit(names, n_classes):
            said = f"{_counted(names)}, {args.model} has {n_classes} classes"
            if args.labels is not None:
                raise _Refused(f"--labels {args.labels} has {said}")
            self.bar.write(f"class names: not used, since there are {said}")
        config = CFCAMConfig.paper() if args.paper else CFCAMConfig()
        self.multilabel = args.multilabel or ending.name == "sigmoid" or prob.says_multilabel(model)
        if self.multilabel and n_classes > 1:
            config = replace(config, margin_temperature=0.0)
            self.bar.write("outputs: several labels an image, each explained by its own logit")
        self.bar.write(f"target layer: {target.name} ({' x '.join(map(str, target.shape))})")
        self.n_classes = n_classes
        if args.method == "cfcam":
            self.cam = CFCAM(model, config=config, backend=args.backend)
        else:
            self.cam = METHODS[args.method](model, backend=args.backend)
            self.bar.write(f"method: {self.cam.name}")
        self.cam._take(target, tuple(image.shape[2:]))

    def write(self, source, seen, classes, scores, maps):
        """Write an image's picture and its maps; returns the picture's path and what it says of its classes."""
        if self.n_classes == 1:
            (positive,), (score,) = classes, scores
            names = [self.loaded.side_name(positive), self.loaded.side_name(not positive)]
            captions, keys = [f"{names[0]} {score:.2f}"], ["positive" if positive else "negative"]
            said = f"{captions[0]} ({names[1]} {1 - score:.2f})"
        else:
            names = [self.loaded.class_name(index, self.n_classes) for index in classes]
            captions, keys = [f"{name} {score:.2f}" for name, score in zip(names, scores)], classes
            said = ", ".join(captions)
        method = "" if self.args.method == "cfcam" else f", {METHODS[self.args.method].name}"
        captions.insert(0, source.stem + method)
        maps = {str(key): heat for key, heat in zip(keys, maps)}
        difference = None
        if self.versus:
            difference = maps[str(keys[0])] - maps[str(keys[1])]
            captions.append(f"{names[0]}, not {names[1]} \u00b1{np.abs(difference).max():.2f}")
        return _write(self, source, seen, captions, maps, difference), said

    def output(self, name):
        """The path of a file to write; ValueError where one of the inputs is."""
        path = self.args.out / name
        if os.path.realpath(path) in self.inputs:
            raise ValueError(f"{path} would overwrite an input: choose another --out")
        return path


def _reason(error):
    text = " ".join(str(error).split())
    if isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _counted(names):
    return f"an index {max(names)}" if isinstance(names, dict) else f"{len(names)} names"


def _check_classes(args, n_classes):
    for index in args.classes or []:
        if index >= n_classes:
            raise _Refused(f"--classes must be in [0, {n_classes}) for {args.model}, got {index}")
    if args.top is not None and args.top > n_classes:
        raise _Refused(f"--top must be at most {n_classes} for {args.model}, got {args.top}")


def _versus(args, top):
    """Whether to compare the first two classes. ``args.versus`` of None: where there are two."""
    n_classes = len(args.classes) if args.classes else top
    if args.versus and n_classes < 2:
        given = f"--classes {args.classes[0]}" if args.classes else f"--top {top}"
        raise _Refused(f"--versus needs two classes or more, got {given}")
    return args.versus is not False and n_classes > 1


def _batches(sources, run):
    """Batches of images that could be read; a new shape begins a new one. Why the others could not goes to
    ``run.left_out``, and to ``run.failed`` where the preprocess is what did not take them."""
    loaded, group = run.loaded, []
    batch_size = run.args.batch_size or DEFAULT_BATCH[loaded.n_axes]
    for source in sources:
        try:
            image = source.load(loaded.n_axes, run.args.frames or loaded.frames)
        except (ImportError, OSError, ValueError, MemoryError) as error:
            run.left_out(_reason(error))
            continue
        try:
            if isinstance(image, volumes.Volume):
                pixels, seen = loaded.preprocess(image.values), Seen(image, loaded.seen(image.values))
            else:
                pixels, seen = loaded.preprocess(image), loaded.seen(image)
        except Exception as error:  # of the user's preprocess
            run.failed(source, error)
            continue
        if group and (len(group) == batch_size or pixels.shape != group[-1][2].shape):
            yield _batch(group)
            group = []
        group.append((source, seen, pixels))
    if group:
        yield _batch(group)


def _batch(group):
    sources, seen, pixels = zip(*group)
    return Batch(sources, seen, torch.stack(pixels))


def _explain_batch(run, inputs):
    """Per image: its classes [K], their scores [K] and their maps (K, H, W), on the host.

    Of a model with one output a class is the side that is explained, True or False, and the score that side's.
    """
    cam, one_output = run.cam, run.n_classes == 1
    targets = run.args.classes and [run.args.classes] * len(inputs)
    maps = cam.maps(inputs, targets, top=None if targets or one_output else run.top)
    logits = find_logits(cam.outputs, len(inputs))
    scores = prob.probabilities(logits, run.multilabel)
    if not one_output:
        return cam.classes.tolist(), scores.gather(1, cam.classes).tolist(), maps.float().cpu().numpy()
    positive = torch.ones_like(logits, dtype=torch.bool) if targets else logits >= 0
    scores = torch.where(positive, scores, 1 - scores)
    maps = maps if targets else maps.unsqueeze(1)
    return positive.tolist(), scores.tolist(), maps.float().cpu().numpy()


def _write(run, source, seen, captions, maps, difference):
    """Write the picture and the maps of an image, a scan or a video; returns the picture's path.

    Args:
        captions: of what was seen, of each class, and of the difference.
        maps: by what they are called in the names of files.
        difference: of the first two, or None.
    """
    if isinstance(seen, Seen):
        # A network that looks at a volume slice by slice may have maps (H, W): they hold for all of them.
        depth = seen.values.shape[1]
        maps = {name: _of_volume(heat, depth) for name, heat in maps.items()}
        difference = None if difference is None else _of_volume(difference, depth)
    # Maps of classes that are confused differ little: as it is, their difference would hardly show.
    shown = None if difference is None else difference / max(np.abs(difference).max(), FAINT_DIFFERENCE)
    draw = _picture if not isinstance(seen, Seen) else _animation if seen.volume.is_video else _slices
    picture = draw(run, source, seen, captions, list(maps.values()), shown)
    if difference is not None:
        maps["-".join(list(maps)[:2])] = difference
    if isinstance(seen, Seen) and not seen.volume.is_video:
        shape, nifti = seen.volume.shape, seen.volume.nifti
        maps = {name: run.loaded.to_volume(torch.from_numpy(heat), shape).numpy() for name, heat in maps.items()}
        for name, heat in maps.items() if nifti is not None else ():
            volumes.save_nifti(heat, nifti, run.output(f"{source.stem}_{name}.nii.gz"))
    if run.args.raw:
        for name, heat in maps.items():
            with images.atomic_write(run.output(f"{source.stem}_{name}.npy")) as file:
                np.save(file, heat)
    return picture


def _of_volume(heat, depth):
    return heat if heat.ndim == 3 else np.repeat(heat[None], depth, 0)


def _picture(run, source, photograph, captions, heats, difference):
    path = run.output(f"{source.stem}.png")
    panels = _panels(photograph, PANEL_PIXELS, heats, difference, run.args.colormap)
    images.save_image(images.side_by_side(panels, captions), path)
    return path


def _slices(run, source, seen, captions, heats, difference):
    path = run.output(f"{source.stem}.png")
    draw = partial(volumes.draw_slices, *seen, height=MONTAGE_PIXELS)
    panels = [draw(heat, colormap=run.args.colormap) for heat in (np.zeros_like(heats[0]), *heats)]
    if difference is not None:
        panels.append(draw(difference, colormap="RdBu_r", difference=True))
    images.save_image(images.side_by_side(panels, captions), path)
    return path


def _animation(run, source, seen, captions, heats, difference):
    path, pictures = run.output(f"{source.stem}.webp"), []
    for index, frame in enumerate(volumes.frames_of(seen.values)):
        # The user's `seen` may show other frames than the network takes.
        index = index * len(heats[0]) // seen.values.shape[1]
        of_frame = None if difference is None else difference[index]
        panels = _panels(frame, FRAME_PIXELS, [heat[index] for heat in heats], of_frame, run.args.colormap)
        pictures.append(images.side_by_side(panels, captions))
    volumes.save_animation(pictures, path, seen.volume.seconds)
    return path


def _panels(photograph, height, heats, difference, colormap):
    """The photograph and the maps over it."""
    from PIL.Image import Resampling

    width = max(1, round(photograph.width * height / photograph.height))
    photograph = photograph.resize((width, height), Resampling.LANCZOS)
    panels = [photograph, *(images.overlay(photograph, heat, colormap) for heat in heats)]
    if difference is not None:
        panels.append(images.overlay_difference(photograph, difference))
    return panels
