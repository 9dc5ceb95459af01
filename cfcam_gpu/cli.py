"""The command ``cfcam``: heat maps of photographs, scans and videos, speed, and what can run here.

Exit status: 0, done; 1, some images could not be explained, the others are done; 2, refused, with the reason in one
line.
"""

import argparse
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from cfcam_gpu import (
    __version__,
    datasets,
    doctor,
    exporting,
    host_memory,
    layers,
    models,
    pipeline,
    volume_preprocess,
    web,
)
from cfcam_gpu.checks import needs
from cfcam_gpu.datasets import ray_data, reading, writing
from cfcam_gpu.methods import METHODS
from cfcam_gpu.serving import command as serving_command

N_NOISE = 64
"""Voxels along each axis of the noise that a network of volumes is looked at with, where its size is not known."""


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
        if argv is None and args.run is not run_bench:  # the process is the command's; others are timed as they are
            host_memory.keep()
        return args.run(args)
    except (_Refused, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"cfcam: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cfcam: interrupted", file=sys.stderr)
        return 130


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
    inputs = (
        "a folder gives what the network takes of its files, not of its subfolders'; @FILE is a text file of paths, "
        "and - is standard input; a table (.csv, .parquet) names files in a column, and an archive (.tar) holds images"
    )
    add("inputs", nargs="*", metavar="IMAGE|FOLDER|GLOB", help=inputs)
    frames = "frames of a video, evenly spread (default: as many as the model says, else 16)"
    add("--frames", type=_positive, metavar="N", help=frames)
    _add_options(explain, out="cfcam-out", versus=False)
    _add_dataset_options(explain)
    _add_ray_options(explain)
    explain.set_defaults(run=lambda args: explain_images(args, _inputs(args)))

    demo = commands.add_parser(
        "demo",
        help="explain a photograph of a cat that comes with scikit-image",
        description="Explain scikit-image's photograph of the cat Chelsea: writes OUT/chelsea.png, without a download. "
        "The last panel is that of --versus, where there are two classes to compare.",
    )
    _add_options(demo, out="demo", versus=None)
    demo.set_defaults(
        run=lambda args: web.serve(_options(args), args.port) if args.web else explain_images(args, [_chelsea()])
    )
    _add_web(demo)

    _add_layers(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_serve(commands)

    about = "show which backends, clustering engines and packages can be used here, and why the others cannot"
    doctor_ = commands.add_parser("doctor", help=about, description=about)
    doctor_.set_defaults(run=lambda args: print(doctor.table(doctor.report())) or 0)
    return parser


def _add_options(parser, out, versus):
    add = parser.add_argument
    specs = (
        "demo (EfficientNet-Lite0, the default), torchvision:NAME, timm:NAME (pretrained; NAME:random or NAME:FILE.pth "
        "for other weights), hf:OWNER/NAME or a folder (of transformers), or package.module:callable"
    )
    add("--model", default="demo", metavar="SPEC", help=specs)
    _add_text(parser)
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
    parser.set_defaults(versus=versus)  # not above: the help of Python below 3.13 would add "(default: False)"
    _add_model_options(parser)
    add("--batch-size", type=_positive, metavar="N", help="images per forward pass (default: 16, of volumes 1)")
    add("--colormap", default="inferno", metavar="NAME", help="any of matplotlib's, such as jet (default: inferno)")
    add(
        "--raw",
        action="store_true",
        help="also write OUT/NAME_CLASS.npy: each map as float32 (H, W) in [0, 1], of a scan (D, H, W); and with "
        "--versus OUT/NAME_I-J.npy: the map of class I minus that of class J, in [-1, 1]",
    )


def _add_model_options(parser):
    """What the classes are, and how they are explained."""
    add = parser.add_argument
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
    add("--layer", metavar="NAME", help="target layer (default: the last one that keeps a map of the image)")
    add("--method", choices=list(METHODS), default="cfcam", help="default: cfcam")
    add(
        "--paper",
        action="store_true",
        help="the published procedure of cfcam: softmax weights, division by the maximum",
    )
    add("--backend", choices=pipeline.BACKENDS, default="auto", help="default: auto")
    add(
        "--compile",
        action="store_true",
        help="run the network as a compiled program: the first batch takes up to minutes, the others less than the "
        "network alone; for many pictures, of --method cfcam (docs/speed.md)",
    )
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def _add_text(parser):
    what = "of a model of image and text, such as CLIP: explain the similarity to this text; may be given several times"
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help=what)


def _add_web(parser):
    add = parser.add_argument_group("in a browser").add_argument
    add("--web", action="store_true", help="instead, a page on this machine that explains the pictures dropped on it")
    add("--port", type=_positive, default=web.PORT, metavar="N", help="of the page (default: %(default)s)")


def _add_dataset_options(parser):
    add = parser.add_argument_group("many pictures (docs/datasets.md)").add_argument
    add("--list", action="append", metavar="FILE", help="a text file with a path on each line; as @FILE")
    add("--path-column", default=reading.PATH_COLUMN, metavar="NAME", help="of tables (default: %(default)s)")
    add(
        "--target-column",
        metavar="NAME",
        help="explain the class whose index is in this column of a table, or in the members of an archive with this "
        "extension, such as cls (default: the best classes)",
    )
    add(
        "--write",
        type=lambda text: [part.strip() for part in text.split(",")],
        default=["overlay"],
        metavar="WHAT,...",
        help=f"one or more of {', '.join(writing.KINDS)} (default: overlay)",
    )
    for kind in writing.KINDS:
        formats = writing.formats_of(kind)
        files = ", ".join(f"{each.name}: {each.files}" for each in formats.values())
        default = next(iter(formats))
        add(f"--{kind}-format", choices=list(formats), default=default, help=f"{files} (default: {default})")
    add(
        "--html",
        action="store_true",
        help="also write OUT/gallery/gallery.html: a page to look through all pictures, to filter and to sort them; it "
        "opens without a server",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start anew where an unfinished run has left its journal (default: go on with it)",
    )
    add(
        "--workers",
        type=_positive,
        metavar="N",
        help="threads that read, and that write (default: one a core, to 8; of volumes 2)",
    )
    add(
        "--json",
        action="store_true",
        help="a line of JSON for every picture as it is done, and one for the run at the end; all else on stderr",
    )


def _add_ray_options(parser):
    add = parser.add_argument_group("on a cluster (docs/scale.md)").add_argument
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: Ray Data, into Parquet files in OUT with the scores and what --write names; a run goes on with what "
        "is there (default: local)",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        help="of a Ray cluster, or auto (default: RAY_ADDRESS, else Ray is started on this machine)",
    )
    add("--actors", type=_positive, metavar="N", help="models at work (default: one a GPU, or by the cores)")
    add("--actor-gpus", type=float, metavar="X", help="GPUs of each, also a fraction (default: 1 where there are any)")


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
    _add_text(parser)
    size = "a picture of N x N pixels, of a network of volumes slices (default: the model's own)"
    add("--size", type=_positive, metavar="N", help=size)
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--json", action="store_true", help="a list of records instead of a table")
    parser.set_defaults(run=list_layers)


def _add_export(commands):
    parser = commands.add_parser(
        "export",
        help="compile a model and its maps into one file, which explains without Python",
        description="Write one compiled file (an AOTInductor package): of images and class indices, -1 for the top "
        "class, it makes logits, maps and classes, in C++ or by cfcam_gpu.load. It runs on this kind of machine. Takes "
        "a minute or two, and a C++ compiler.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a SPEC as explain's --model takes it")
    add("--out", type=Path, default=Path("model.pt2"), metavar="FILE", help="a file *.pt2 (default: %(default)s)")
    add("--layer", metavar="NAME", help="target layer (default: the last one that keeps a map of the image)")
    add("--labels", type=Path, metavar="FILE", help="class names, as for explain (default: the model's own)")
    add("--size", type=_positive, metavar="N", help="images of N x N pixels (default: the model's own)")
    add("--dynamic-size", action="store_true", help="also images of other sizes, each side from half of that to twice")
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.set_defaults(run=export_model)


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


def _add_serve(commands):
    parser = commands.add_parser(
        "serve",
        help="answer pictures that are posted with their classes and heat maps, over HTTP",
        description="POST a picture's file to /explain, and get its classes and the heat map or the overlay, in JSON, "
        "PNG or float16; /classify gives the classes alone. /healthz, /readyz and /metrics tell of the server. SIGTERM "
        "ends it when what has begun is answered.",
    )
    specs = "a SPEC as explain's --model takes it (default: demo)"
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=specs)
    serving_command.add_arguments(parser)
    _add_model_options(parser)
    parser.set_defaults(run=serving_command.run)


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
    return datasets.Source("chelsea", lambda: photograph, "chelsea")


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
    loaded = models.load_model(args.model, _default_device(args), args.text)
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


def export_model(args):
    """Write the file of a model, and print what is in it; returns 0."""
    device = _default_device(args)
    loaded = models.load_model(args.model, device=device)
    if loaded.n_axes != 2:
        raise _Refused("export takes networks of images")
    image = _noise(args, loaded).to(device)
    size = tuple(image.shape[2:])
    kept = loaded.preprocess if isinstance(loaded.preprocess, models.Preprocess) else None
    if kept is not None and tuple(kept.size) != size:
        kept = replace(kept, size=size, resize=None)
    layer = layers.inspect_target_layer(loaded.model, image, args.layer)
    names = args.labels or loaded.class_names or (models.imagenet_class_names() if layer.n_classes == 1000 else None)
    exporting.export(
        loaded.model,
        image,
        [layer.module],
        args.out,
        reshape_transform=layer.reshape_transform,
        class_names=names,
        preprocess=kept,
        dynamic_size=args.dynamic_size,
    )
    megabytes = args.out.stat().st_size / 1e6
    print(f"{args.out}: {megabytes:.0f} MB, layer {layer.name}, images {size[0]} x {size[1]}, {device}")
    if kept is None:
        print("the preprocessing is the model's own code and not in the file")
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


def _inputs(args):
    lists = args.list or []
    if not args.inputs and not lists:
        raise _Refused("the following arguments are required: IMAGE|FOLDER|GLOB, or --list (see cfcam explain --help)")
    return datasets.Inputs(args.inputs, lists, args.path_column, args.target_column)


def explain_images(args, sources):
    """Write what is asked for of all sources; returns 0, or 1 when some could not be explained, which are listed at the
    end."""
    if getattr(args, "engine", "local") == "ray":
        return _explain_with_ray(args, sources)
    options = _options(args)
    report = _Said(options.out, as_json=getattr(args, "json", False))
    try:
        summary = datasets.explain(options, sources, report)
    finally:
        report.close()
    report.summary(summary)
    return 1 if summary.lost else 0


def _options(args):
    names = [field.name for field in fields(datasets.Options) if hasattr(args, field.name)]
    return datasets.Options(**{name: getattr(args, name) for name in names})


def _explain_with_ray(args, sources):
    """Write Parquet files by Ray Data; returns as `explain_images`."""
    for option, given in (
        ("--json", args.json),
        ("--workers", args.workers),
        ("--html", args.html),
        ("--maps-format", args.maps_format not in ("npy", "parquet")),
    ):
        if given:
            raise _Refused(f"{option} does not go with --engine ray, which writes Parquet by tasks of its own")
    left_out = ("out", "model", "overwrite", "workers", "maps_format", "scores_format")
    names = [field.name for field in fields(datasets.Options) if field.name not in left_out]
    ray_data.show_progress(sys.stderr.isatty())
    how = {name: getattr(args, name) for name in names}
    how.update(address=args.address, actors=args.actors, num_gpus=args.actor_gpus)
    summary = ray_data.write(sources, args.out, args.model, overwrite=args.overwrite, **how)
    for record in summary.lost:
        print(f"cfcam: {record.error}", file=sys.stderr)
    _Said(args.out, as_json=False).summary(summary)
    return 1 if summary.lost else 0


class _Said(datasets.Report):
    """What a run says on the terminal, beside a bar; or lines of JSON."""

    def __init__(self, out, as_json):
        self.out, self.as_json, self.tqdm, self.bar, self.n_lost = out, as_json, _tqdm(), None, 0

    def start(self, n_images, n_done):
        self.bar = self.tqdm(total=n_images, initial=n_done, unit="image", disable=None, file=sys.stderr)

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def note(self, text):
        self.bar.write(text, file=sys.stderr if self.as_json else None)

    def warning(self, text):
        self.bar.write(f"cfcam: warning: {text}", file=sys.stderr)

    def record(self, record, said):
        if self.as_json:
            self.bar.write(json.dumps(record.as_dict()))
        elif record.error is None:
            where = f" -> {self.out / record.files[0]}" if record.files else ""
            self.bar.write(f"{record.path}{where}: {said}")
        if record.error is not None:
            self.n_lost += 1
            self.bar.set_postfix_str(f"{self.n_lost} failed", refresh=False)
        self.bar.update()

    def left_out(self, record):
        self.bar.write(f"cfcam: {record.error}", file=sys.stderr)

    def summary(self, summary):
        n_new = summary.explained - summary.resumed
        if self.as_json:
            values = {**summary._asdict(), "lost": len(summary.lost), "out": str(self.out)}
            print(json.dumps({"summary": values}))
        elif summary.images > 1:
            lost = f", {len(summary.lost)} left out" if summary.lost else ""
            rate = f"{n_new / max(summary.seconds, 1e-9):.3g} a second"
            print(f"{summary.explained} of {summary.images} images explained{lost}: {summary.seconds:.3g} s, {rate}")
